"""Bad input gets an error that names the parameter, the value and what is allowed, before anything is trained or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_from_scratch import ScratchPPO
from tests.helpers import ToyEnv

VECTOR = spaces.Box(-1.0, 1.0, (3,))
NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value", "error", "allowed"),
    [
        ("n_steps", 0, ValueError, "at least 1"),
        ("n_steps", 2048.0, TypeError, "integer"),
        ("n_steps", True, TypeError, "integer"),
        ("batch_size", 1, ValueError, "at least 2"),
        ("batch_size", 0, ValueError, "at least 2"),
        ("batch_size", None, TypeError, "integer"),
        ("n_epochs", 0, ValueError, "at least 1"),
        ("gamma", 1.01, ValueError, r"\[0, 1\]"),
        ("gamma", -0.1, ValueError, r"\[0, 1\]"),
        ("gamma", NAN, ValueError, r"\[0, 1\]"),
        ("gae_lambda", 1.5, ValueError, r"\[0, 1\]"),
        ("gae_lambda", "0.9", TypeError, "number"),
        ("clip_range", 0.0, ValueError, "greater than 0"),
        ("clip_range", -0.2, ValueError, "greater than 0"),
        ("clip_range", lambda progress: -progress, ValueError, "at least 0"),
        ("clip_range_vf", -0.2, ValueError, "greater than 0"),
        ("clip_range_vf", 0, ValueError, "greater than 0"),
        ("max_grad_norm", 0.0, ValueError, "greater than 0"),
        ("max_grad_norm", NAN, ValueError, "greater than 0"),
        ("max_grad_norm", None, TypeError, "number"),
        ("target_kl", 0.0, ValueError, "greater than 0"),
        ("target_kl", -0.01, ValueError, "greater than 0"),
        ("vf_coef", -0.5, ValueError, "at least 0"),
        ("ent_coef", NAN, ValueError, "finite"),
        ("learning_rate", -1e-3, ValueError, "at least 0"),
        ("learning_rate", NAN, ValueError, "at least 0"),
        ("learning_rate", float("inf"), ValueError, "finite"),
        ("learning_rate", "3e-4", TypeError, "number or a schedule"),
        ("learning_rate", lambda _: NAN, ValueError, "at least 0"),
        ("normalize_advantage", "yes", TypeError, "True or False"),
        ("stats_window_size", 0, ValueError, "at least 1"),
        ("sde_sample_freq", -2, ValueError, "at least -1"),
        ("seed", -1, ValueError, "at least 0"),
        ("seed", 2**32, ValueError, "at most 4294967295"),
        ("engine", "warp", ValueError, "'auto', .*'torch'"),
        ("precision", "fp8", ValueError, "'fp32', 'bf16'"),
        ("precision", "bf16", ValueError, "NatureCNN"),
        ("device", "abacus", ValueError, "'cpu'"),
        ("rollout_buffer_class", dict, TypeError, "subclass of RolloutBuffer"),
    ],
)
def test_constructor_arguments(name: str, value: Any, error: type[Exception], allowed: str) -> None:
    with pytest.raises(error, match=allowed) as caught:
        ScratchPPO("MlpPolicy", "CartPole-v1", **{name: value})
    message = str(caught.value)
    assert name in message
    assert callable(value) or str(value) in message


def test_a_rollout_of_one_transition_cannot_be_normalized() -> None:
    with pytest.raises(ValueError, match=r"n_steps \* n_envs must be at least 2.*n_steps=1 times n_envs=1"):
        ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=1)
    ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=1, n_epochs=1, normalize_advantage=False).learn(2)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("MlpPolcy", ValueError, "'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy', 'SharedMlpPolicy'.*'MlpPolcy'"),
        ("CnnPolicy", ValueError, "only with images"),
        (th.nn.Linear, TypeError, "policy class"),
        (7, TypeError, "policy class, not 7"),
    ],
)
def test_policies(policy: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ScratchPPO(policy, "CartPole-v1")


@pytest.mark.parametrize("net_arch", [{"pi": [8], "vf": [8]}, [0], [8.0], "64"])
def test_the_shared_trunk_is_one_list_of_sizes(net_arch: Any) -> None:
    with pytest.raises(ValueError, match="net_arch of SharedMlpPolicy must be a list of positive integers"):
        ScratchPPO("SharedMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": net_arch})


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Tuple([VECTOR]), spaces.Discrete(2), "observation space must be Box, Discrete"),
        (spaces.Text(3), spaces.Discrete(2), "observation space must be Box, Discrete"),
        (spaces.Dict(a=spaces.Dict(b=VECTOR)), spaces.Discrete(2), "flat Dict.*under key 'a'"),
        (spaces.Dict(a=VECTOR), spaces.Discrete(2), "MultiInputPolicy"),
        (VECTOR, spaces.Tuple([VECTOR]), "action space must be Box, Discrete"),
        (VECTOR, spaces.Dict(a=VECTOR), "action space must be Box, Discrete"),
        (VECTOR, spaces.Box(-np.inf, np.inf, (2,)), "finite"),
        (VECTOR, spaces.MultiBinary((2, 2)), "Multi-dimensional MultiBinary"),
        (VECTOR, spaces.MultiDiscrete([[2, 3]]), "Multi-dimensional MultiDiscrete"),
    ],
)
@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_unsupported_spaces(policy: str, observation_space: spaces.Space, action_space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchPPO(policy, ToyEnv(observation_space, action_space))


def test_gsde_needs_continuous_actions() -> None:
    with pytest.raises(ValueError, match="gSDE"):
        ScratchPPO("MlpPolicy", "CartPole-v1", use_sde=True)


@pytest.fixture
def model() -> ScratchPPO:
    return ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1)


@pytest.mark.parametrize(
    ("total_timesteps", "error"), [(-1, ValueError), (NAN, ValueError), ("1e5", TypeError), (None, TypeError)]
)
def test_total_timesteps(model: ScratchPPO, total_timesteps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="total_timesteps"):
        model.learn(total_timesteps)


def test_log_interval(model: ScratchPPO) -> None:
    with pytest.raises(ValueError, match="log_interval must be at least 1, not 0"):
        model.learn(32, log_interval=0)


def test_another_environment_must_match(model: ScratchPPO, tmp_path: Path) -> None:
    env = model.env
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"3 != 1"):
        model.set_env(make_vec_env("CartPole-v1", 3))
    assert model.env is env
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="spaces do not match"):
        ScratchPPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))


@pytest.mark.parametrize(("name", "value"), [("gamma", 3.0), ("engine", "warp"), ("batch_size", 1)])
def test_arguments_are_checked_on_load_too(model: ScratchPPO, tmp_path: Path, name: str, value: Any) -> None:
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=name):
        ScratchPPO.load(tmp_path / "model", env=gym.make("CartPole-v1"), **{name: value})


def test_learning_needs_an_environment(model: ScratchPPO, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="env is not set"):
        ScratchPPO.load(tmp_path / "model").learn(10)
    with pytest.raises(ValueError, match="env must be"):
        ScratchPPO("MlpPolicy", None)  # type: ignore[arg-type]  # what the test is about


@pytest.mark.parametrize("name", ["learning_rate", "clip_range", "clip_range_vf", "ent_coef"])
def test_a_schedule_that_goes_wrong_stops_before_the_update(name: str) -> None:
    schedule = lambda progress: 0.1 if progress > 0.6 else NAN  # noqa: E731  # what users write
    model = ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, **{name: schedule})
    with pytest.raises(ValueError, match=rf"{name} must be finite.*nan \(at progress_remaining=0\.33"):
        model.learn(96)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert model._n_updates == 1


class NanEnv(ToyEnv):
    """Observes NaN from its third step on."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return (obs * NAN if self.steps >= 3 else obs), reward, terminated, truncated, info


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.Box(-1.0, 1.0, (2,)), spaces.MultiDiscrete([2, 3])])
def test_nan_observations_are_noticed_when_acting(action_space: spaces.Space) -> None:
    model = ScratchPPO("MlpPolicy", NanEnv(VECTOR, action_space), n_steps=32, batch_size=32)
    with pytest.raises(ValueError, match="probabilities are NaN: check observations"):
        model.learn(64)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


class InfiniteRewardEnv(ToyEnv):
    """Pays infinity once."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, (float("inf") if self.steps == 5 else reward), terminated, truncated, info


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinity minus infinity
def test_infinite_rewards_are_noticed_by_the_update() -> None:
    model = ScratchPPO("MlpPolicy", InfiniteRewardEnv(VECTOR, spaces.Discrete(2), length=1000), n_steps=64, batch_size=64)
    with pytest.raises(ValueError, match=r"not finite.*rewards"):
        model.learn(640)


def test_what_sb3_warns_of_stays_a_warning() -> None:
    with pytest.warns(UserWarning, match="truncated mini-batch of size 14"):
        ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=50, n_epochs=1).learn(64)
    with pytest.warns(UserWarning, match="truncated mini-batch of size 64"):
        ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=100, n_epochs=1).learn(64)


@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_an_mlp_off_the_cpu_is_a_warning(policy: str) -> None:
    with pytest.warns(UserWarning, match="primarily intended to run on the CPU"):
        ScratchPPO(policy, "CartPole-v1", device="meta")
