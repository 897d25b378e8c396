"""Where nobody looks at a step, only its actions are computed in it, and the rest after the rollout: with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_ppo_from_scratch import NonFiniteError, ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.buffer import rates_later
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES, ClockEnv
from tests.helpers import ToyEnv

BOX = OBSERVATION_SPACES["box"]
FIELDS = (
    "observations",
    "actions",
    "rewards",
    "episode_starts",
    "values",
    "log_probs",
    "dist_params",
    "advantages",
    "returns",
)
NETWORKS: dict[str, dict[str, Any]] = {
    "two towers": {},
    "one trunk": {"policy": "SharedMlpPolicy"},
    "unlike towers": {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [16, 8]}, "activation_fn": nn.SiLU}},
    "no layers": {"policy_kwargs": {"net_arch": []}},
    "relu, elsewhere no layers": {"policy_kwargs": {"net_arch": {"pi": [], "vf": [8]}, "activation_fn": nn.ReLU}},
    "leaky relu": {"policy_kwargs": {"net_arch": [5, 6, 7], "activation_fn": nn.LeakyReLU}},
    "elu": {"policy_kwargs": {"activation_fn": nn.ELU}},
    "gSDE": {"use_sde": True, "sde_sample_freq": 3},
}


class Looking(BaseCallback):
    """Code of the user's, which looks at each step. What it was shown is what the rollout holds afterwards."""

    def _on_rollout_start(self) -> None:
        self.seen: list[tuple[np.ndarray, ...]] = []

    def _on_step(self) -> bool:
        shown = (self.locals[name] for name in ("values", "log_probs", "dist_params"))
        self.seen.append(tuple(each.numpy().reshape(self.training_env.num_envs, -1) for each in shown))
        tensors = self.locals["obs_tensor"]
        assert all(map(th.is_tensor, tensors.values() if isinstance(tensors, dict) else [tensors]))
        if len(self.seen) > 1:  # the step before this one is in the buffer by now
            np.testing.assert_array_equal(self.model.rollout_buffer.values[len(self.seen) - 2, :, None], self.seen[-2][0])
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        for steps, array in zip(
            zip(*self.seen, strict=True), (buffer.values, buffer.log_probs, buffer.dist_params), strict=True
        ):
            np.testing.assert_allclose(np.array(steps).reshape(array.shape), array, rtol=1e-6, atol=1e-6)


class Counting(NumpyEngine):
    """Counts the steps that it has computed in one way and in the other."""

    whole = deferred = 0

    def act(self, obs: Any) -> Any:
        self.whole += 1
        return super().act(obs)

    def sample_actions(self, obs: Any) -> Any:
        self.deferred += 1
        return super().sample_actions(obs)


def toys(observations: spaces.Space = BOX, actions: spaces.Space = ACTION_SPACES["discrete"], n_envs: int = 3) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(ToyEnv(observations, actions, length=7)) for _ in range(n_envs)])


def collected(env: VecEnv, callback: Any = None, rollouts: int = 2, n_steps: int = 40, **kwargs: Any) -> ScratchPPO:
    """A model after rollouts from which nothing was learned."""
    arguments: dict[str, Any] = {
        "policy": "MlpPolicy",
        "n_steps": n_steps,
        "batch_size": 10,
        "seed": 4,
        "device": "cpu",
        **kwargs,
    }
    model = ScratchPPO(env=env, **arguments)
    model._engine = Counting(model.policy)
    model.train = lambda: None  # type: ignore[method-assign]  # what a rollout holds is to be seen
    return model.learn(rollouts * n_steps * env.num_envs, callback=callback)


def counts(model: ScratchPPO) -> tuple[int, int]:
    engine = model._engine
    assert isinstance(engine, Counting)
    return engine.whole, engine.deferred


def assert_same_rollout(deferred: ScratchPPO, whole: ScratchPPO, exact: bool = True) -> None:
    """To the last bit; or where no step was left for later, up to rounding."""
    ours, theirs = deferred.rollout_buffer, whole.rollout_buffer
    assert not ours.unrated.any()
    if isinstance(ours.observations, dict):
        assert ours.observations.keys() == theirs.observations.keys()
        for key, each in ours.observations.items():
            np.testing.assert_array_equal(each, theirs.observations[key], err_msg=key)
    for name in FIELDS[isinstance(ours.observations, dict) :]:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if exact:
            np.testing.assert_array_equal(a, b, err_msg=name)
        tolerance = 1e-5 if name in ("advantages", "returns") else 1e-6
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
    assert [info["l"] for info in deferred.ep_info_buffer] == [info["l"] for info in whole.ep_info_buffer]


def compare(make: Callable[[], VecEnv], n_steps: int = 40, **kwargs: Any) -> None:
    kwargs["n_steps"] = n_steps
    deferred, random_state = collected(make(), **kwargs), th.get_rng_state()
    whole = collected(make(), Looking(), **kwargs)
    assert counts(deferred)[0] == counts(whole)[1] == 0
    assert counts(deferred)[1] == counts(whole)[0] == 2 * n_steps
    assert th.equal(random_state, th.get_rng_state())
    assert_same_rollout(deferred, whole)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("actions", [*ACTION_SPACES])
def test_every_action_space(actions: str, n_envs: int) -> None:
    compare(lambda: toys(actions=ACTION_SPACES[actions], n_envs=n_envs))


@pytest.mark.parametrize("observations", [name for name in OBSERVATION_SPACES if name != "box"])
def test_every_observation_space(observations: str) -> None:
    policy = "MultiInputPolicy" if observations == "dict" else "MlpPolicy"
    compare(lambda: toys(OBSERVATION_SPACES[observations]), policy=policy)


@pytest.mark.parametrize("kwargs", NETWORKS.values(), ids=NETWORKS)
def test_every_network(kwargs: dict[str, Any]) -> None:
    compare(lambda: toys(actions=ACTION_SPACES["box"]), **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: VecNormalize(toys(OBSERVATION_SPACES["box-float64"])), id="float32 in a space of float64"),
        pytest.param(lambda: toys(BOX, spaces.Box(-1.0, 1.0, (2,), np.float64)), id="actions of float64"),
    ],
)
def test_kinds_of_numbers(make: Callable[[], VecEnv]) -> None:
    compare(make)


def test_more_rows_than_go_in_one_go() -> None:
    compare(toys, n_steps=210)


def test_reset_rows() -> None:
    """Their values are needed, though they are no transitions."""

    def run(callback: Any) -> ScratchPPO:
        env = gym.make_vec("CartPole-v1", 3, max_episode_steps=12)
        return collected(ScratchPPO._wrap_env(env), callback, n_steps=40)

    deferred, whole = run(None), run(Looking())
    assert counts(deferred)[0] == counts(whole)[1] == 0
    assert_same_rollout(deferred, whole)
    assert np.array_equal(deferred.rollout_buffer.valid, whole.rollout_buffer.valid)
    assert not deferred.rollout_buffer.valid.all()


def test_training_is_the_same() -> None:
    """A callback that only looks changes nothing, not a bit, in several iterations."""
    ends = []
    for callback in (None, Looking()):
        env = make_vec_env("CartPole-v1", 4, seed=0)
        model = ScratchPPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=2, seed=0, device="cpu", engine="numpy")
        model.learn(512, callback=callback)
        ends.append(nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    assert th.equal(*ends)


# ----------------------------------------------------------------------- who has a say


class Own(ScratchRolloutBuffer):
    def add(self, *args: Any, **kwargs: Any) -> None:
        assert th.is_tensor(args[4])
        super().add(*args, **kwargs)


class Extras(ScratchPPO):
    def row_extras(self, infos: Any) -> dict[str, np.ndarray]:
        return {"row": np.arange(len(infos))}


def test_classes_of_the_users_own_see_whole_steps() -> None:
    for buffer_class in (Own, RolloutBuffer, DeviceRolloutBuffer):
        model = collected(toys(), rollout_buffer_class=type("Theirs", (buffer_class,), {}))
        assert counts(model) == (80, 0)
        assert not rates_later(model.rollout_buffer)
    model = Extras("MlpPolicy", toys(), n_steps=10, batch_size=10, n_epochs=1, device="cpu")
    model._engine = Counting(model.policy)
    model.learn(30)
    assert counts(model) == (10, 0)
    assert model.rollout_buffer.extras["row"].shape == (10, 3)
    assert rates_later(ScratchRolloutBuffer(4, BOX, spaces.Discrete(2)))


@pytest.mark.parametrize(
    ("space", "seen", "keeps"),
    [
        ("float32", "float32", True),
        ("float32", "float64", True),  # the policy rounds it likewise
        ("float64", "float32", True),
        ("float16", "float32", False),
        ("uint8", "uint8", True),
        ("uint8", "float32", False),
        ("uint8", "int64", False),
        ("int64", "int32", True),
        ("int32", "int64", False),
    ],
)
def test_what_a_buffer_would_round_is_not_left_for_later(space: str, seen: str, keeps: bool) -> None:
    buffer = ScratchRolloutBuffer(4, spaces.Box(0, 100, (3,), np.dtype(space)), spaces.Discrete(2), n_envs=2)
    assert buffer.keeps(np.zeros((2, 3), seen)) is keeps
    assert not buffer.keeps({"key": np.zeros((2, 3), seen)})


def collected_with(keeps: Callable[[ScratchRolloutBuffer, Any], bool], *args: Any, **kwargs: Any) -> ScratchPPO:
    """:param keeps: instead of the buffer's method"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScratchRolloutBuffer, "keeps", keeps)
        return collected(*args, **kwargs)


@pytest.mark.parametrize("actions", [*ACTION_SPACES])
def test_against_steps_that_are_computed_at_once(actions: str) -> None:
    """And an environment may change the type of its numbers, so that only some steps are: here every third."""

    def run(keeps: Callable[[ScratchRolloutBuffer, Any], bool], callback: Any = None) -> ScratchPPO:
        return collected_with(keeps, toys(actions=ACTION_SPACES[actions]), callback)

    whole, mixed = run(lambda buffer, obs: False), run(lambda buffer, obs: buffer.pos % 3 > 0)
    assert counts(whole) == (80, 0)
    assert counts(mixed) == (28, 52)
    assert_same_rollout(mixed, whole, exact=False)
    assert_same_rollout(mixed, run(lambda buffer, obs: buffer.pos % 3 > 0, Looking()))


class Changing(Looking):
    """Changes the weights in some steps, in one way or another; what was shown before stays true."""

    def __init__(self, change: Callable[[Any], None]):
        super().__init__()
        self.change = change

    def _on_step(self) -> bool:
        super()._on_step()
        if len(self.seen) in (6, 7, 14, 30):  # in the 7th and 14th, episodes are cut by their time limit
            self.change(self.model.policy)
        return True


def louder(policy: Any) -> None:
    with th.no_grad():
        policy.value_net.weight.mul_(1.5)
        policy.action_net.bias.add_(0.3)


def elsewhere(policy: Any) -> None:
    policy.value_net.bias.data = policy.value_net.bias.data + 1.0


def by_hook(policy: Any) -> None:
    """From then on another engine goes on."""
    policy.value_net.register_forward_hook(lambda module, inputs, output: output + 1.0)


@pytest.mark.parametrize("change", [louder, elsewhere, by_hook])
def test_weights_that_a_callback_changes_in_a_rollout(change: Callable[[Any], None]) -> None:
    """Steps before it are by the old weights, steps after it by the new ones, as where each is computed at once."""
    model, whole = (
        collected_with(keeps, toys(actions=ACTION_SPACES["box"]), Changing(change), rollouts=1)
        for keeps in (lambda buffer, obs: True, lambda buffer, obs: False)
    )
    assert_same_rollout(model, whole, exact=False)
    assert (model._engine.name == "torch") == (change is by_hook)


def test_a_discount_that_a_callback_changes_in_a_rollout() -> None:
    class Impatient(BaseCallback):
        def _on_step(self) -> bool:
            self.model.gamma = 0.5 if self.n_calls > 10 else 0.9
            return True

    model, whole = (
        collected_with(keeps, toys(), Impatient(), rollouts=1)
        for keeps in (lambda buffer, obs: True, lambda buffer, obs: False)
    )
    assert_same_rollout(model, whole, exact=False)


def test_the_steps_left_for_later_come_in_runs() -> None:
    buffer = ScratchRolloutBuffer(10, BOX, spaces.Discrete(2), n_envs=2)
    assert list(buffer.unrated_steps(100)) == []
    buffer.unrated[[0, 1, 2, 4, 7, 8, 9]] = True
    assert list(buffer.unrated_steps(5)) == [slice(0, 2), slice(2, 3), slice(4, 5), slice(7, 9), slice(9, 10)]
    assert list(buffer.unrated_steps(1)) == [slice(step, step + 1) for step in (0, 1, 2, 4, 7, 8, 9)]
    assert list(buffer.unrated_steps(100)) == [slice(0, 3), slice(4, 5), slice(7, 10)]


def test_a_rollout_that_a_callback_of_sb3s_ends_is_complete_so_far() -> None:
    model = collected(toys(), StopTrainingOnMaxEpisodes(4))
    buffer, done = model.rollout_buffer, counts(model)[1] - 1
    assert 0 < done == buffer.pos < 40
    assert not buffer.unrated.any()
    with th.no_grad():
        values, log_probs, _ = model.policy.evaluate_actions(
            th.from_numpy(buffer.observations[:done].reshape(-1, 3)), th.from_numpy(buffer.actions[:done].reshape(-1))
        )
    np.testing.assert_allclose(buffer.values[:done].reshape(-1, 1), values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buffer.log_probs[:done].reshape(-1), log_probs, rtol=1e-5, atol=1e-6)


def test_weights_that_somebody_else_changes_in_a_rollout_count_from_the_next_one_on() -> None:
    """No callback, but the environment: log-probabilities are those of the weights that the actions come from."""

    class Meddling(ToyEnv):
        model: Any = None

        def step(self, action: Any) -> Any:
            if self.model is not None and self.model.num_timesteps == 21:
                with th.no_grad():
                    self.model.policy.action_net.weight.add_(3.0)
            return super().step(action)

    def run(model_known: bool) -> ScratchPPO:
        env = Meddling(BOX, ACTION_SPACES["box"])
        model = ScratchPPO("MlpPolicy", env, n_steps=40, batch_size=10, seed=4, device="cpu", engine="numpy")
        env.model = model if model_known else None
        model.train = lambda: None  # type: ignore[method-assign]  # likewise
        return model.learn(40)

    meddled, left_alone = run(True), run(False)
    assert np.array_equal(meddled.rollout_buffer.log_probs, left_alone.rollout_buffer.log_probs)
    change = meddled.policy.action_net.weight - left_alone.policy.action_net.weight
    th.testing.assert_close(change, th.full_like(change, 3.0))


# ------------------------------------------------------------------------------ guards


class Spoiled(ClockEnv):
    """Sends NaN at step ``when``."""

    def __init__(self, what: str, when: int):
        super().__init__(length=4)
        self.what, self.when = what, when

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        if len(self.actions) == self.when:
            obs, reward = (obs * np.nan, reward) if self.what == "observation" else (obs, np.nan)
        return obs, reward, *rest


@pytest.mark.parametrize(
    ("what", "when", "message"),
    [
        ("observation", 6, r"observation is not finite \(nan at index \[0\]\) in environment 1 at step 5"),
        ("observation", 4, r"final observation is not finite .* in environment 1 at step 3"),
        ("reward", 6, r"reward is not finite \(nan\) in environment 1 at step 5"),
    ],
)
def test_what_an_environment_sends_is_looked_at_in_each_step(what: str, when: int, message: str) -> None:
    envs = [ClockEnv(length=4), Spoiled(what, when)]
    model = ScratchPPO("MlpPolicy", DummyVecEnv([lambda env=env: env for env in envs]), n_steps=16, batch_size=8, device="cpu")  # type: ignore[misc]
    with pytest.raises(NonFiniteError, match=message):
        model.learn(64)
    assert len(envs[1].actions) == when


@pytest.mark.parametrize("actions", [*ACTION_SPACES])
def test_weights_that_are_lost_are_noticed_before_an_action_comes_of_them(actions: str) -> None:
    stepped = []

    class Watched(ToyEnv):
        def step(self, action: Any) -> Any:
            stepped.append(action)
            return super().step(action)

    for value in (np.nan, np.inf):
        model = collected(DummyVecEnv([lambda: Watched(BOX, ACTION_SPACES[actions])]), rollouts=0)
        with th.no_grad():
            model.policy.action_net.bias[0] = value
        with pytest.raises(NonFiniteError, match="probabilities are NaN"):
            model.learn(40)
        assert counts(model) == (0, 1)
    assert not stepped


def test_a_critic_that_is_lost_is_noticed_after_the_rollout() -> None:
    model = collected(toys(), rollouts=0)
    with th.no_grad():
        model.policy.value_net.bias.fill_(np.nan)
    with pytest.raises(NonFiniteError, match=r"values is not finite .* in environment 0 at step 0"):
        model.learn(40)


def test_a_choice_that_is_never_made() -> None:
    """A logit of minus infinity is a probability of 0, and no fault."""
    model = collected(toys(), rollouts=0)
    with th.no_grad():
        model.policy.action_net.bias[1] = -np.inf
    model.learn(120)
    assert set(np.unique(model.rollout_buffer.actions)) == {0, 2}
    assert np.isfinite(model.rollout_buffer.log_probs).all()
