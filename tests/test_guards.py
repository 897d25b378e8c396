"""NaN and infinity never reach the weights; and whatever the constructor is given, it says no or makes a model that trains."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_from_scratch import NonFiniteError, ScratchPPO
from sb3_ppo_from_scratch.engines.numpy_mlp.network import ActorCriticNetwork
from sb3_ppo_from_scratch.engines.reference.engine import TorchLearner
from tests.helpers import BY_HAND, ToyEnv

NAN, INF = float("nan"), float("inf")
BOX = spaces.Box(-1.0, 1.0, (3,))


class Failing(ToyEnv):
    """Sends ``value`` in its ``what`` at step ``when``, or at reset if that is 0."""

    def __init__(self, what: str = "", value: float = NAN, when: int = 5, space: spaces.Space = BOX, length: int = 1000):
        super().__init__(space, spaces.Discrete(2), length)
        self.what, self.value, self.when, self.total = what, value, when, 0

    def _spoil(self, obs: Any) -> Any:
        if self.what == "observation" and self.total == self.when:
            (obs["vector"] if isinstance(obs, dict) else obs)[1] = self.value
        return obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed, options=options)
        return (self._spoil(obs) if self.total == 0 else obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, _, truncated, info = super().step(action)
        self.total += 1
        return (
            self._spoil(obs),
            (self.value if self.what == "reward" and self.total == self.when else reward),
            False,
            truncated,
            info,
        )


def model_of(*envs: Callable[[], gym.Env], policy: str = "MlpPolicy", **kwargs: Any) -> ScratchPPO:
    arguments = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 1, "device": "cpu", "engine": "torch", **kwargs}
    return ScratchPPO(policy, DummyVecEnv(list(envs)), **arguments)


def state_of(model: ScratchPPO) -> list[th.Tensor]:
    """Parameters and moments, copied."""
    moments = [value for state in model.policy.optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*model.policy.parameters(), *moments)]


def assert_unchanged(model: ScratchPPO, before: list[th.Tensor]) -> None:
    after = state_of(model)
    assert len(after) == len(before)
    assert all(th.equal(a, b) for a, b in zip(after, before, strict=True))


# ---------------------------------------------------------------------- the rollout


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_what_an_environment_sends(what: str, value: float, tmp_path: Path) -> None:
    model = model_of(Failing, lambda: Failing(what, value, when=21))
    checkpoint = CheckpointCallback(16, str(tmp_path), name_prefix="model")
    with pytest.raises(
        NonFiniteError, match=rf"{what} is not finite .*{value}.* in environment 1 at step 4 of the rollout"
    ) as caught:
        model.learn(320, callback=checkpoint)
    assert caught.value.name == what
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "Likely causes" in str(caught.value)
    assert len(state_of(ScratchPPO.load(tmp_path / "model_32_steps"))) > 0
    before = state_of(model)
    assert all(value.isfinite().all() for value in before)
    model.learn(64, reset_num_timesteps=False)  # the environment has recovered
    assert not all(th.equal(a, b) for a, b in zip(state_of(model), before, strict=True))


def test_the_first_observation() -> None:
    with pytest.raises(NonFiniteError, match=r"observation is not finite \(nan at index \[1\]\) in environment 0 at step 0"):
        model_of(lambda: Failing("observation", when=0)).learn(16)


def test_an_observation_in_a_dict() -> None:
    space = spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3), "pixels": spaces.Box(0, 255, (2,), np.uint8)})
    with pytest.raises(NonFiniteError, match="observation 'vector' is not finite"):
        model_of(lambda: Failing("observation", space=space), policy="MultiInputPolicy").learn(16)


def test_the_observation_behind_a_time_limit() -> None:
    """It is never acted on: its value goes into a reward."""
    with pytest.raises(NonFiniteError, match=r"final observation is not finite .* in environment 0 at step 4"):
        model_of(lambda: Failing("observation", when=5, length=5)).learn(16)


def test_a_policy_that_is_already_lost() -> None:
    model = model_of(Failing)
    with th.no_grad():
        model.policy.value_net.bias.fill_(NAN)
    with pytest.raises(NonFiniteError, match=r"values is not finite .* at step 0"):
        model.learn(16)
    with th.no_grad():
        model.policy.action_net.bias.fill_(NAN)
    with pytest.raises(NonFiniteError, match="probabilities are NaN"):
        model.learn(16)


# ----------------------------------------------------------------------- the update


class Spoiler:
    """Multiplies the critic's bias' gradient by ``factor`` in some of its calls."""

    def __init__(self, model: ScratchPPO, calls: set[int], factor: float, monkeypatch: pytest.MonkeyPatch):
        self.calls, self.factor, self.count = calls, factor, 0
        self.states: list[list[th.Tensor]] = []
        clip = TorchLearner.clip_gradient

        def spoiled(learner: TorchLearner) -> th.Tensor:
            self.states.append([parameter.detach().clone() for parameter in model.policy.parameters()])
            if self.count in self.calls:
                model.policy.value_net.bias.grad.mul_(self.factor)
            self.count += 1
            return clip(learner)

        monkeypatch.setattr(TorchLearner, "clip_gradient", spoiled)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "RMSprop": {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}},
}


@pytest.mark.parametrize("kwargs", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("factor", [NAN, INF])
def test_a_gradient_that_is_not_finite(kwargs: dict[str, Any], factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Failing, batch_size=4, **kwargs)
    spoiler = Spoiler(model, {5}, factor, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"the gradient of a minibatch is not finite .* nan_policy='skip'"):
        model.learn(16)
    assert spoiler.count == 6
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), spoiler.states[5], strict=True))
    steps = {float(state["step"]) for state in model.policy.optimizer.state.values()}
    assert steps == {5.0}
    model.learn(16, reset_num_timesteps=False)
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {5.0 + 8.0}


def test_the_very_first_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Failing)
    before = state_of(model)
    Spoiler(model, {0}, NAN, monkeypatch)
    with pytest.raises(NonFiniteError):
        model.learn(16)
    assert_unchanged(model, before)


def test_a_loss_that_is_not_finite() -> None:
    model = model_of(Failing, vf_coef=1e38)
    before = state_of(model)
    with th.no_grad():
        model.policy.value_net.bias.fill_(1e6)
    before[-1] = model.policy.value_net.bias.detach().clone()
    with pytest.raises(NonFiniteError, match="the loss of a minibatch is not finite") as caught:
        model.learn(16)
    assert caught.value.name == "loss"
    assert_unchanged(model, before)


@pytest.mark.parametrize("kwargs", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_minibatches_may_be_left_out(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Failing, batch_size=4, nan_policy="skip", **kwargs)
    rows: list[dict[str, Any]] = []
    train = model.train
    monkeypatch.setattr(model, "train", lambda: (train(), rows.append(dict(model.logger.name_to_value))))
    Spoiler(model, {2, 7, 9}, NAN, monkeypatch)
    with pytest.warns(UserWarning, match="2 minibatches of this update were left out") as caught:
        model.learn(48)
    assert len([warning for warning in caught if "left out" in str(warning.message)]) == 1
    assert [row["train/skipped_minibatches"] for row in rows] == [2, 1, 0]
    assert all(np.isfinite(value) for row in rows for key, value in row.items() if key.startswith("train/"))
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {24.0 - 3.0}
    assert "train/skipped_minibatches" not in model_of(Failing).learn(16).logger.name_to_value


def test_all_minibatches_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Failing, nan_policy="skip")
    before = state_of(model)
    Spoiler(model, {0, 1}, NAN, monkeypatch)
    with pytest.warns(UserWarning, match="2 minibatches"):
        model.learn(16)
    assert_unchanged(model, before)


def spoil_numpys_gradient(calls: set[int], factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1000))
    backward = ActorCriticNetwork.backward

    def spoiled(self: ActorCriticNetwork, *arguments: Any) -> None:
        backward(self, *arguments)
        if next(count) in calls:
            self.grad_value_bias *= factor

    monkeypatch.setattr(ActorCriticNetwork, "backward", spoiled)


@pytest.mark.parametrize("factor", [NAN, INF])
def test_the_numpy_engine_takes_no_step_either(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_numpys_gradient({8 + 5}, factor, monkeypatch)
    model, until_then = (model_of(Failing, batch_size=4, engine="numpy") for _ in range(2))
    with pytest.raises(NonFiniteError, match="the gradient of a minibatch is not finite"):
        model.learn(32)
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {13.0}
    assert all(value.isfinite().all() for value in state_of(model))
    model.learn(16, reset_num_timesteps=False)
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {13.0 + 8.0}
    until_then.learn(16)
    assert {float(state["step"]) for state in until_then.policy.optimizer.state.values()} == {8.0}


def test_the_numpy_engine_may_leave_out_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_numpys_gradient({2, 7}, NAN, monkeypatch)
    model = model_of(Failing, batch_size=4, nan_policy="skip", engine="numpy")
    with pytest.warns(UserWarning, match="2 minibatches of this update were left out"):
        model.learn(16)
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {6.0}
    assert all(value.isfinite().all() for value in state_of(model))


@pytest.mark.parametrize("engine", [*BY_HAND, "torch"])
def test_a_loss_beyond_float32_changes_nothing(engine: str) -> None:
    model = model_of(Failing, vf_coef=1e38, engine=engine)
    with th.no_grad():
        model.policy.value_net.bias.fill_(1e6)
    before = state_of(model)[: len(list(model.policy.parameters()))]
    with pytest.raises(NonFiniteError, match="of a minibatch is not finite"):
        model.learn(16)
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), before, strict=True))


# ------------------------------------------------------------ constructor arguments

numbers = st.one_of(st.floats(), st.integers(-3, 40), st.sampled_from([NAN, INF, -INF, 1e38, 1e-45, True, "0.5", None, [0.5]]))
counts = st.one_of(st.integers(-2, 40), st.sampled_from([1.0, 2.5, True, "8", None, np.int64(8)]))
ARGUMENTS = {
    "learning_rate": st.one_of(numbers, st.just(lambda progress: 1e-3 * progress)),
    "n_steps": counts,
    "batch_size": counts,
    "n_epochs": st.one_of(st.integers(-1, 3), st.sampled_from([1.0, "2", None])),
    "gamma": numbers,
    "gae_lambda": numbers,
    "clip_range": numbers,
    "clip_range_vf": numbers,
    "normalize_advantage": st.sampled_from([True, False, 1, None, "yes"]),
    "ent_coef": numbers,
    "vf_coef": numbers,
    "max_grad_norm": numbers,
    "use_sde": st.sampled_from([True, False]),
    "sde_sample_freq": counts,
    "target_kl": numbers,
    "stats_window_size": counts,
    "policy_kwargs": st.sampled_from(
        [None, {}, {"net_arch": []}, {"net_arch": [4]}, {"log_std_init": -2.0}, {"ortho_init": False}]
    ),
    "seed": counts,
    "engine": st.sampled_from(["auto", "torch", "numpy", "compiled", "channels_last", "cudagraph", "warp", None, 1]),
    "nan_policy": st.sampled_from(["raise", "skip", "ignore", None, 1]),
}


@given(st.fixed_dictionaries({}, optional=ARGUMENTS))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_clear_error_or_a_working_run(arguments: dict[str, Any]) -> None:
    """Never a crash elsewhere: what is refused is refused by name, and what is accepted trains."""
    small = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = ScratchPPO("MlpPolicy", ToyEnv(BOX, spaces.Box(-1, 1, (2,))), device="cpu", **{**small, **arguments})
        except (TypeError, ValueError) as error:
            assert any(name in str(error) for name in (*arguments, "batch_size", "n_steps")), error  # noqa: PT017  # either outcome
            return
        with contextlib.suppress(NonFiniteError):  # an extreme coefficient
            model.learn(20)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
