"""The reference engine equals SB3's PPO to the last bit: parameters, optimizer, metrics, and the random numbers drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from tests.helpers import ToyEnv, assert_equal_runs, assert_same_model, train

gym.register_envs(ale_py)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*truncated mini-batch")]

ZOO_CARTPOLE: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 256,
    "n_epochs": 20,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "learning_rate": LinearSchedule(0.001, 0.0, 1.0),
    "clip_range": LinearSchedule(0.2, 0.0, 1.0),
}
SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 3}
VECTOR = spaces.Box(-1.0, 1.0, (3,))


def envs(env_id: str, n_envs: int = 2, **kwargs: Any) -> Callable[[], VecEnv]:
    return lambda: make_vec_env(env_id, n_envs, seed=5, **kwargs)


def toy(observation_space: spaces.Space, action_space: spaces.Space, n_envs: int = 2) -> Callable[[], VecEnv]:
    return lambda: make_vec_env(lambda: ToyEnv(observation_space, action_space), n_envs, seed=5)


def normalized(make_env: Callable[[], VecEnv]) -> Callable[[], VecEnv]:
    return lambda: VecNormalize(make_env(), gamma=0.99)


def image_space(size: int = 36) -> spaces.Box:
    return spaces.Box(0, 255, (size, size, 1), np.uint8)


def test_cartpole_with_the_zoos_hyperparameters() -> None:
    assert_equal_runs("MlpPolicy", envs("CartPole-v1", 8), 1500, iterations=5, **ZOO_CARTPOLE)


@pytest.mark.slow
def test_a_whole_cartpole_run() -> None:
    assert_equal_runs("MlpPolicy", envs("CartPole-v1", 8), 100_000, iterations=390, **ZOO_CARTPOLE)


PENDULUM = {"n_steps": 256, "batch_size": 64, "n_epochs": 3}


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="gaussian"),
        pytest.param({"use_sde": True, "sde_sample_freq": 4}, id="gSDE"),
        pytest.param({"use_sde": True, "policy_kwargs": {"squash_output": True}}, id="squashed gSDE"),
        pytest.param({"use_sde": True, "policy_kwargs": {"use_expln": True, "full_std": False}}, id="gSDE variants"),
    ],
)
def test_pendulum_where_every_episode_is_truncated(kwargs: dict[str, Any]) -> None:
    """Traps 1 and 2: the time limit's bootstrap, one environment at a time."""
    assert_equal_runs("MlpPolicy", envs("Pendulum-v1"), 1600, **PENDULUM, **kwargs)


@pytest.mark.parametrize(
    ("make_env", "kwargs"),
    [
        pytest.param(envs("Acrobot-v1", 8), {"ent_coef": 0.01}, id="Acrobot"),
        pytest.param(envs("LunarLander-v3", env_kwargs={"continuous": True}), {}, id="LunarLanderContinuous"),
        pytest.param(envs("MountainCarContinuous-v0", 1), {"use_sde": True}, id="MountainCarContinuous"),
    ],
)
def test_under_vec_normalize(make_env: Callable[[], VecEnv], kwargs: dict[str, Any]) -> None:
    total = 600 * make_env().num_envs  # beyond Acrobot's time limit of 500 steps
    assert_equal_runs("MlpPolicy", normalized(make_env), total, n_steps=200, batch_size=100, n_epochs=3, **kwargs)


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        pytest.param(VECTOR, spaces.Discrete(4), id="box-discrete"),
        pytest.param(spaces.Discrete(5), spaces.Discrete(2), id="discrete-discrete"),
        pytest.param(spaces.MultiDiscrete([3, 4]), spaces.MultiDiscrete([2, 3, 4]), id="multidiscrete"),
        pytest.param(spaces.MultiBinary(6), spaces.MultiBinary(3), id="multibinary"),
        pytest.param(VECTOR, spaces.Box(-2.0, 0.5, (2, 2)), id="box of two dimensions"),
        pytest.param(spaces.Box(-1.0, 1.0, (2, 3), np.float64), spaces.Discrete(3), id="float64 observations"),
        pytest.param(spaces.Box(0, 9, (4,), np.uint16), spaces.Discrete(3), id="uint16 observations"),
    ],
)
def test_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Trap 17 among others: actions of several dimensions and of none."""
    assert_equal_runs("MlpPolicy", toy(observation_space, action_space), 400, ent_coef=0.01, **SMALL)


def test_dict_observations() -> None:
    space = spaces.Dict({"image": image_space(), "vector": VECTOR, "mode": spaces.Discrete(3), "bits": spaces.MultiBinary(2)})
    assert_equal_runs("MultiInputPolicy", toy(space, spaces.Discrete(3)), 200, n_steps=32, batch_size=32, n_epochs=2)


def test_images() -> None:
    assert_equal_runs("CnnPolicy", toy(image_space(), spaces.Discrete(3)), 200, n_steps=32, batch_size=25, n_epochs=2)


def test_breakout() -> None:
    def make_env() -> VecEnv:
        return VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=4, seed=5), n_stack=4)

    schedules = {"learning_rate": LinearSchedule(2.5e-4, 0.0, 1.0), "clip_range": LinearSchedule(0.1, 0.0, 1.0)}
    assert_equal_runs(
        "CnnPolicy", make_env, 256, iterations=2, n_steps=32, batch_size=64, n_epochs=2, ent_coef=0.01, **schedules
    )


class OwnHeads(ActorCriticPolicy):
    """Overrides what SB3's users override."""

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, 2 * values, log_prob

    def evaluate_actions(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return 2 * values, log_prob, entropy


class WithIdleParameter(ActorCriticPolicy):
    """Has a parameter that no loss depends on, as a feature extractor's unused branch would."""

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        self.idle = nn.Parameter(th.ones(3))
        super()._build(lr_schedule)


class OwnBuffer(RolloutBuffer):
    """A user's subclass of SB3's buffer: its ``get`` keeps the last word."""

    def get(self, batch_size: int | None = None) -> Iterator[Any]:
        for batch in super().get(batch_size):
            yield batch._replace(advantages=2 * batch.advantages)


CARTPOLE_VARIANTS: dict[str, dict[str, Any]] = {
    "clip_range_vf": {"clip_range_vf": 0.1},
    "scheduled clip_range_vf": {"clip_range_vf": LinearSchedule(0.5, 0.1, 1.0)},
    "no advantage normalization": {"normalize_advantage": False},
    "entropy bonus": {"ent_coef": 0.03},
    "truncated last minibatch": {"batch_size": 50},
    "a last minibatch of one (trap 7)": {"batch_size": 127},
    "batch larger than the rollout": {"batch_size": 1000},
    "vf_coef 0": {"vf_coef": 0.0},
    "gradients never clipped": {"max_grad_norm": float("inf")},
    "relu": {"policy_kwargs": {"activation_fn": nn.ReLU, "net_arch": {"pi": [33, 17], "vf": [5]}}},
    "linear towers": {"policy_kwargs": {"net_arch": []}},
    "elu": {"policy_kwargs": {"activation_fn": nn.ELU}},
    "two extractors": {"policy_kwargs": {"share_features_extractor": False}},
    "weight decay, amsgrad": {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.01, "amsgrad": True, "eps": 1e-5}}},
    "AdamW": {"policy_kwargs": {"optimizer_class": th.optim.AdamW}},
    "RMSprop": {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}},
    "SGD with momentum": {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}},
    "the user's own buffer": {"rollout_buffer_class": OwnBuffer},
    "learn twice, from 0": {"learns": ({}, {})},
    "learn twice, going on (trap 21)": {"learns": ({}, {"reset_num_timesteps": False})},
}


@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize("kwargs", CARTPOLE_VARIANTS.values(), ids=CARTPOLE_VARIANTS.keys())
def test_variants(kwargs: dict[str, Any], n_envs: int) -> None:
    sizes = {"n_steps": 128 // n_envs, "batch_size": 32, "n_epochs": 3}
    assert_equal_runs("MlpPolicy", envs("CartPole-v1", n_envs), 400, **{**sizes, **kwargs})


@pytest.mark.parametrize("policy", [OwnHeads, WithIdleParameter])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_custom_policies(policy: type[ActorCriticPolicy], env_id: str) -> None:
    assert_equal_runs(policy, envs(env_id), 400, **SMALL)


def test_target_kl_ends_updates_early() -> None:
    """Trap 9: tested before the step, at 1.5 times the target; n_updates counts the epoch it stopped in."""
    kwargs = {"n_steps": 128, "batch_size": 100, "n_epochs": 10, "learning_rate": 3e-3, "target_kl": 0.003}
    ours = assert_equal_runs("MlpPolicy", envs("CartPole-v1", 8), 3000, **kwargs)
    assert 0 < ours.metrics[-1]["train/n_updates"] < 10 * len(ours.metrics)


def test_subprocesses() -> None:
    assert_equal_runs("MlpPolicy", envs("CartPole-v1", 2, vec_env_cls=SubprocVecEnv), 400, **SMALL)


def test_two_threads() -> None:
    th.set_num_threads(2)
    assert_equal_runs("MlpPolicy", envs("CartPole-v1", 8), 2000, n_steps=64, batch_size=512, n_epochs=3)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("saver", [PPO, ScratchPPO])
@pytest.mark.parametrize("loader", [PPO, ScratchPPO])
def test_saved_models_train_on_in_either(saver: type, loader: type, env_id: str, tmp_path: Path) -> None:
    """All four ways from one algorithm's file to the other's training give the bits of SB3 to SB3."""

    def go_on(save_class: type, load_class: type) -> Any:
        name = tmp_path / f"{save_class.__name__}-{load_class.__name__}.zip"
        make_env = envs(env_id)
        reference = {cls: {"engine": "torch"} if cls is ScratchPPO else {} for cls in (save_class, load_class)}
        save_class("MlpPolicy", make_env(), seed=1, device="cpu", **SMALL, **reference[save_class]).learn(300).save(name)
        return load_class.load(name, env=make_env(), device="cpu", **reference[load_class]).learn(300)

    assert_same_model(go_on(saver, loader), go_on(PPO, PPO))


def test_our_files_need_not_this_package(tmp_path: Path) -> None:
    """Plain SB3 opens them: nothing in them is of a class of ours, unless the user asked for one."""
    ScratchPPO("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    assert b"sb3_ppo_from_scratch" not in (tmp_path / "model.zip").read_bytes()
    data = PPO.load(tmp_path / "model.zip").__dict__
    assert not [key for key, value in data.items() if type(value).__module__.startswith("sb3_ppo_from_scratch")]


def test_sb3s_ppo_trains_on_our_buffer() -> None:
    theirs = train(PPO, "MlpPolicy", envs("CartPole-v1", 8), 1600, **SMALL)
    mixed = train(PPO, "MlpPolicy", envs("CartPole-v1", 8), 1600, rollout_buffer_class=ScratchRolloutBuffer, **SMALL)
    assert_same_model(mixed.model, theirs.model)


def test_nothing_of_sb3s_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollout, buffer, GAE and update are this package's own."""
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("SB3's own code was called")

    for owner, name in (
        (PPO, "train"),
        (OnPolicyAlgorithm, "collect_rollouts"),
        (RolloutBuffer, "compute_returns_and_advantage"),
        (RolloutBuffer, "get"),
        (RolloutBuffer, "add"),
    ):
        monkeypatch.setattr(owner, name, fail)
    run = train(ScratchPPO, "MlpPolicy", envs("CartPole-v1"), 256, **SMALL)
    assert len(run.metrics) == 2
