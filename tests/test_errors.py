"""Bad input gets an error that names the parameter, the value and what is allowed, before anything is trained or lost."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_from_scratch import EnvFailedError, NonFiniteError, ScratchPPO
from tests.helpers import ToyEnv, assert_same_model

ROOT = Path(__file__).resolve().parents[1]
VECTOR = spaces.Box(-1.0, 1.0, (3,))
NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value", "error", "allowed"),
    [
        ("nan_observations", "state", TypeError, "a list of keys"),
        ("nan_observations", ["state"], ValueError, "keys"),
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
        ("precision", "fp8", ValueError, "'fp32', 'tf32', 'bf16'"),
        ("precision", "bf16", ValueError, "NatureCNN"),
        ("nan_policy", "ignore", ValueError, "'raise', 'skip'"),
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
        (VECTOR, spaces.Discrete(3, start=1), r"action space must start at 0, not Discrete\(3, start=1\)"),
        (VECTOR, spaces.MultiDiscrete([2, 3], start=[0, 5]), "action space must start at 0"),
        (VECTOR, spaces.Box(0, 20, (2,), np.uint8), "Box action space must be of floats"),
        (VECTOR, spaces.Box(-(2**40), 2**40, (2,), np.int64), "Box action space must be of floats"),
        (spaces.Discrete(5, start=-2), spaces.Discrete(2), "observation space must start at 0"),
        (spaces.MultiDiscrete([2, 3], start=[1, 0]), spaces.Discrete(2), "observation space must start at 0"),
        (spaces.MultiDiscrete([[2, 3]]), spaces.Discrete(2), "MultiDiscrete observation space must have one dimension"),
        (spaces.Dict(a=spaces.Discrete(5, start=2)), spaces.Discrete(2), "must start at 0.*under key 'a'"),
        (spaces.Dict(a=spaces.MultiDiscrete([[2]])), spaces.Discrete(2), "one dimension.*under key 'a'"),
        (spaces.Dict(), spaces.Discrete(2), "empty Dict"),
        (spaces.Box(-1.0, 1.0, ()), spaces.Discrete(2), r"reshape it to \(1,\)"),
    ],
)
@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_unsupported_spaces(policy: str, observation_space: spaces.Space, action_space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchPPO(policy, ToyEnv(observation_space, action_space))


@pytest.mark.parametrize(
    ("policy", "space", "message"),
    [
        ("MultiInputPolicy", VECTOR, "policy must be 'MlpPolicy', 'SharedMlpPolicy' or 'CnnPolicy'"),
        ("MultiInputPolicy", spaces.Dict(a=spaces.Box(-1.0, 1.0, ())), r"of shape \(\)"),
        ("CnnPolicy", spaces.Dict(a=VECTOR), "MultiInputPolicy"),
        ("CnnPolicy", spaces.Box(0, 255, (20, 20, 3), np.uint8), "policy 'CnnPolicy' with the observation space Box.*padded"),
    ],
)
def test_policies_that_do_not_fit_their_observations(policy: str, space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchPPO(policy, ToyEnv(space, spaces.Discrete(2)))


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=1), spaces.Box(0, 20, (2,), np.uint8)])
def test_models_that_cannot_be_trained_may_still_predict(space: spaces.Space, tmp_path: Path) -> None:
    PPO("MlpPolicy", ToyEnv(VECTOR, space), device="cpu").save(tmp_path / "model")
    model = ScratchPPO.load(tmp_path / "model", env=ToyEnv(VECTOR, space))
    model.predict(VECTOR.sample())
    with pytest.raises(ValueError, match="action space must"):
        model.learn(32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", np.int64(3)),
        ("learning_rate", np.float32(1e-3)),
        ("clip_range", np.float32(0.2)),
        ("clip_range_vf", np.float32(0.2)),
        ("ent_coef", np.float32(0.01)),
        ("gamma", np.float32(0.9)),
        ("n_steps", np.int32(32)),
        ("batch_size", np.int64(16)),
        ("target_kl", np.float16(0.5)),
        ("stats_window_size", np.int64(10)),
    ],
)
def test_numpys_numbers_are_pythons(name: str, value: Any, tmp_path: Path) -> None:
    small = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "seed": 3, "device": "cpu"}
    models = [
        ScratchPPO("MlpPolicy", ToyEnv(VECTOR, spaces.Discrete(2)), **{**small, name: number}).learn(32)
        for number in (value, value.item())
    ]
    assert_same_model(*models)
    models[0].save(tmp_path / "model")
    PPO.load(tmp_path / "model")


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("stable_baselines3", "SAC"),
        ("stable_baselines3", "TD3"),
        ("sb3_contrib", "CrossQ"),
        ("sb3_contrib", "TRPO"),
        ("sb3_contrib", "ARS"),
    ],
)
@pytest.mark.filterwarnings("ignore:the file is no model of PPO")  # TRPO's lacks clip_range as well
def test_a_file_of_another_algorithm(package: str, name: str, allow_pickle: bool, tmp_path: Path) -> None:
    algorithm = getattr(pytest.importorskip(package), name)
    algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [4]}, device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match=f"not a model of PPO but of {name}.*: load it with") as caught:
        ScratchPPO.load(tmp_path / "model", allow_pickle=allow_pickle)
    assert "allow_pickle" not in str(caught.value)


def test_a_file_of_a2c_is_a_warning(tmp_path: Path) -> None:
    A2C("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "model")
    with pytest.warns(UserWarning, match="clip_range and what else it lacks"):
        ScratchPPO.load(tmp_path / "model")


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


def test_a_changed_n_steps_counts_from_the_next_learn(model: ScratchPPO) -> None:
    for n_steps in (32, 48, 16):
        model.n_steps = n_steps
        model.learn(n_steps)
        assert (model.num_timesteps, model.rollout_buffer.rewards.shape) == (n_steps, (n_steps, 1))
    model.n_steps = 0
    with pytest.raises(ValueError, match="n_steps must be at least 1"):
        model.learn(32)


OPTIMIZED = """
import gymnasium as gym, numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from sb3_ppo_from_scratch import ScratchPPO
from tests.helpers import ToyEnv

vector, two = spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(2)
cases = {
    "another number": lambda: ScratchPPO("MlpPolicy", "CartPole-v1").set_env(make_vec_env("CartPole-v1", 3)),
    "an infinite Box": lambda: ScratchPPO("MlpPolicy", ToyEnv(vector, spaces.Box(-np.inf, np.inf, (2,)))),
    "no image": lambda: ScratchPPO("CnnPolicy", "CartPole-v1"),
    "squashing": lambda: ScratchPPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"squash_output": True}),
    "nested": lambda: ScratchPPO("MultiInputPolicy", ToyEnv(spaces.Dict(a=spaces.Dict(b=vector)), two)),
    "a Tuple": lambda: ScratchPPO("MlpPolicy", ToyEnv(vector, spaces.Tuple([vector]))),
    "gSDE": lambda: ScratchPPO("MlpPolicy", "CartPole-v1", use_sde=True),
}
for name, case in cases.items():
    try:
        case()
    except ValueError:
        continue
    print(name, "was accepted")
"""


@pytest.mark.slow  # Python compiles everything anew
def test_what_sb3_asserts_is_checked_without_assertions_too() -> None:
    done = subprocess.run([sys.executable, "-O", "-c", OPTIMIZED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


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
    with pytest.raises(ValueError, match="observation is not finite"):
        model.learn(64)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


class FaultyEnv(ToyEnv):
    """Observes, receives or ends with something that is not finite, once, in the middle of its second episode."""

    def __init__(self, fault: str = "", value: float = NAN, space: spaces.Space = VECTOR):
        super().__init__(space, spaces.Discrete(2), length=4)
        self.fault = fault
        self.value = value
        self.total = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, _, truncated, info = super().step(action)
        self.total += 1
        if self.total == 6 and self.fault == "observation":
            obs[1] = self.value
        if self.total == 6 and self.fault == "reward":
            reward = self.value
        if self.total == 8 and self.fault == "final observation":
            obs[1] = self.value
        return obs, reward, False, truncated, info


SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 1, "device": "cpu"}


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("fault", ["observation", "reward", "final observation"])
def test_the_faulty_environment_is_named_and_spoils_no_statistics(
    fault: str, value: float, normalized: bool, engine: str
) -> None:
    env = DummyVecEnv([FaultyEnv, FaultyEnv, partial(FaultyEnv, fault, value), FaultyEnv])
    env = VecNormalize(env) if normalized else env
    model = ScratchPPO("MlpPolicy", env, engine=engine, **SMALL)
    step = 7 if fault == "final observation" else 5
    if step == 7 and normalized and value == float("inf"):
        model.learn(64)  # it is clipped, and no statistics are taken of it
        return
    with pytest.raises(NonFiniteError, match=f"^{fault} is not finite .* in environment 2 at step {step} of the rollout"):
        model.learn(64)
    env.unwrapped.envs[2].unwrapped.fault = ""
    if normalized:
        assert np.isfinite(env.obs_rms.mean).all()
        assert np.isfinite(env.ret_rms.var).all()
    model.learn(64)


def test_nan_in_a_reset_is_named_and_spoils_no_statistics() -> None:
    class FaultyReset(ToyEnv):
        faulty = True

        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            return obs * (NAN if self.faulty else 1), info

    env = VecNormalize(DummyVecEnv([partial(kind, VECTOR, spaces.Discrete(2)) for kind in (ToyEnv, FaultyReset, ToyEnv)]))
    model = ScratchPPO("MlpPolicy", env, **SMALL)
    with pytest.raises(NonFiniteError, match=r"observation is not finite .* in environment 1"):
        model.learn(48)
    FaultyReset.faulty = False
    model.learn(48, reset_num_timesteps=False)


class Filling(BaseFeaturesExtractor):
    """Knows what to do about NaN."""

    def __init__(self, space: spaces.Space):
        super().__init__(space, 6)

    def forward(self, obs: Any) -> th.Tensor:
        obs = obs["a"] if isinstance(obs, dict) else obs
        return th.cat([th.nan_to_num(obs, 0.0, 0.0, 0.0), th.isnan(obs).float()], dim=1)


FILLING = {"features_extractor_class": Filling}


@pytest.mark.parametrize("fault", ["observation", "final observation"])
def test_nan_that_the_network_expects(fault: str) -> None:
    def learn(value: float = NAN, policy_kwargs: Any = FILLING, **kwargs: Any) -> None:
        ScratchPPO("MlpPolicy", FaultyEnv(fault, value), policy_kwargs=policy_kwargs, **SMALL, **kwargs).learn(32)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(nan_observations=True)
    with pytest.warns(UserWarning, match="NaN in the observations, and the network makes finite numbers of it"):
        learn()
    with pytest.raises(NonFiniteError, match=fault):
        learn(nan_observations=False)
    with pytest.raises(NonFiniteError, match=fault):
        learn(policy_kwargs=None)
    with pytest.raises(NonFiniteError):  # the policy's or the update's numbers, for this network cannot
        learn(policy_kwargs=None, nan_observations=True)
    with pytest.raises(NonFiniteError, match=fault):
        learn(float("inf"), nan_observations=True)


def test_nan_may_be_allowed_by_key() -> None:
    class DictEnv(FaultyEnv):
        def __init__(self, fault: str):
            super().__init__(fault)
            self.observation_space = spaces.Dict(a=VECTOR, b=VECTOR)

        def step(self, action: Any) -> Any:
            obs, *rest = ToyEnv.step(self, action)
            obs[self.fault][0] = NAN
            return obs, *rest

    def learn(fault: str, keys: list[str], env: Any = None) -> None:
        env = DictEnv(fault) if env is None else env
        ScratchPPO("MultiInputPolicy", env, policy_kwargs=FILLING, nan_observations=keys, **SMALL).learn(32)

    learn("a", ["a"])
    with pytest.raises(NonFiniteError, match="observation 'b'"):
        learn("b", ["a"])
    learn("a", ["a"], VecNormalize(DummyVecEnv([lambda: DictEnv("a")]), norm_obs_keys=["b"]))
    with pytest.raises(NonFiniteError, match="observation 'a'"):  # everybody's would be NaN
        learn("a", ["a"], VecNormalize(DummyVecEnv([lambda: DictEnv("a")]), norm_obs_keys=["a"]))


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize(
    "space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.Box(-1.0, 1.0, (2,))]
)
def test_weights_that_are_nan(space: spaces.Space, engine: str) -> None:
    model = ScratchPPO("MlpPolicy", ToyEnv(VECTOR, space), engine=engine, **SMALL)
    with th.no_grad():
        model.policy.action_net.weight.fill_(NAN)
    with pytest.raises(NonFiniteError, match=r"NaN|weight is not finite"):
        model.learn(32)


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), -1),
        (spaces.MultiDiscrete([2, 3]), [1, 3]),
        (spaces.Dict(a=spaces.Discrete(3), b=VECTOR), 7),
    ],
)
@pytest.mark.parametrize("at", [3, 4, 16], ids=["observation", "final observation", "last observation"])
def test_discrete_observations_outside_their_space(space: spaces.Space, value: Any, at: int, engine: str) -> None:
    class Outside(ToyEnv):
        def step(self, action: Any) -> Any:
            obs, *_ = super().step(action)
            if self.steps == at:
                obs = {**obs, "a": value} if isinstance(obs, dict) else np.asarray(value)
            return obs, 0.0, False, at == 4 and self.steps == 4, {}

    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    env = DummyVecEnv([partial(kind, space, spaces.Discrete(2), length=1000) for kind in (ToyEnv, Outside)])
    with pytest.raises(ValueError, match=r"observation .*lies outside its space"):
        ScratchPPO(policy, env, engine=engine, **SMALL).learn(64)


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1.0, 1.0, (2,)), spaces.MultiBinary(2)])
def test_numpy_may_be_set_to_raise(action_space: spaces.Space, engine: str) -> None:
    env = ToyEnv(spaces.Box(-1e4, 1e4, (3,), np.float32), action_space)  # some actions become very unlikely
    model = ScratchPPO("MlpPolicy", env, engine=engine, learning_rate=1e-2, **{**SMALL, "n_epochs": 4})
    with np.errstate(all="raise"):
        model.learn(256)


class Answering(BaseCallback):
    """Says something after each step."""

    def __init__(self, *answers: Any):
        super().__init__()
        self.answers = list(answers)

    def _on_step(self) -> Any:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.mark.parametrize(
    "callback",
    [
        lambda local, global_: None,
        Answering(None),
        [Answering(None), Answering(True)],
        [Answering(True), Answering(None)],
        CallbackList([CallbackList([Answering(None)]), Answering(True)]),
    ],
)
def test_a_callback_that_returns_nothing_is_named_and_does_not_end_training(callback: Any) -> None:
    model = ScratchPPO("MlpPolicy", ToyEnv(VECTOR, spaces.Discrete(2)), **SMALL)
    with pytest.warns(UserWarning, match=r"callback (.*lambda.*|Answering) returned None, and training goes on"):
        model.learn(32, callback)
    assert model.num_timesteps == 32


@pytest.mark.parametrize("answers", [[False, True], [True, False], [None, False], [False, None]])
@pytest.mark.filterwarnings("ignore:callback Answering returned None")
def test_one_callbacks_end_is_everybodys(answers: list[Any]) -> None:
    model = ScratchPPO("MlpPolicy", ToyEnv(VECTOR, spaces.Discrete(2)), **SMALL)
    callbacks = [Answering(True, True, answer) for answer in answers]
    model.learn(32, callbacks)
    assert model.num_timesteps == 3
    assert [callback.n_calls for callback in callbacks] == [3, 3]


def test_errors_travel_between_processes() -> None:
    for error in (EnvFailedError("environment 1 failed", 1), NonFiniteError("reward", "reward is not finite")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), vars(again)) == (str(error), vars(error))


class InfiniteRewardEnv(ToyEnv):
    """Pays infinity once."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, (float("inf") if self.steps == 5 else reward), terminated, truncated, info


def test_infinite_rewards_are_noticed() -> None:
    model = ScratchPPO("MlpPolicy", InfiniteRewardEnv(VECTOR, spaces.Discrete(2), length=1000), n_steps=64, batch_size=64)
    with pytest.raises(ValueError, match="reward is not finite"):
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
