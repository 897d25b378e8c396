"""What an environment is given, and the value behind a time limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch import MlpPolicy, ScratchPPO
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.rollout import bootstrap_time_limits, cut_short, to_env_actions
from sb3_ppo_from_scratch.vec_env.memory import own_copy
from tests.envs import ClockEnv

ASYMMETRIC = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32))


def make_policy(action_space: spaces.Space, **kwargs: Any) -> MlpPolicy:
    return MlpPolicy(spaces.Box(-1, 1, (2,)), action_space, ConstantSchedule(1e-3), **kwargs)


def test_gaussian_actions_are_clipped_and_left_as_they_were() -> None:
    actions = np.array([[-3.0, 0.7], [0.5, 0.25]], np.float32)
    given = to_env_actions(actions, ASYMMETRIC, make_policy(ASYMMETRIC))
    assert given.tolist() == [[-2.0, 0.5], [0.5, 0.25]]
    assert actions[0].tolist() == pytest.approx([-3.0, 0.7])


def test_squashed_actions_are_scaled_to_the_bounds() -> None:
    policy = make_policy(ASYMMETRIC, use_sde=True, squash_output=True)
    given = to_env_actions(np.array([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]], np.float32), ASYMMETRIC, policy)
    assert given.tolist() == [[-2.0, 0.0], [1.0, 0.5], [-0.5, 0.25]]


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_other_actions_pass_unchanged(space: spaces.Space) -> None:
    actions = np.stack([space.sample() for _ in range(4)])
    assert to_env_actions(actions, space, make_policy(space)) is actions


def test_trap_1_only_a_time_limit_is_bootstrapped_from_the_final_observation() -> None:
    """Trap 1, and trap 2: one call per environment."""
    final = np.array([7.0])
    infos = [
        {"terminal_observation": final, "TimeLimit.truncated": True},
        {"terminal_observation": final, "TimeLimit.truncated": False},
        {"TimeLimit.truncated": True},
        {},
        {"terminal_observation": 2 * final, "TimeLimit.truncated": True},
    ]
    asked: list[float] = []

    def value(observations: np.ndarray) -> np.ndarray:
        asked.append(float(observations[0, 0]))
        return 10 * observations[:, 0]

    rows = cut_short(np.array([True, True, True, False, True]), infos)
    rewards = bootstrap_time_limits(np.ones(5), rows, infos, value, gamma=0.5)
    assert rewards.tolist() == [36.0, 1.0, 1.0, 1.0, 71.0]
    assert asked == [7.0, 14.0]


@pytest.mark.parametrize("key", [None, "state"])
def test_trap_2_other_engines_may_be_asked_for_all_values_in_one_call(key: str | None) -> None:
    """Trap 2: the reference engine may not, for a batched call may round differently."""
    assert not TorchEngine.batched_bootstrap
    finals = [np.array([7.0]), np.array([9.0]), np.array([14.0])]
    infos: list[dict[str, Any]] = [
        {"terminal_observation": final if key is None else {key: final}, "TimeLimit.truncated": cut}
        for final, cut in zip(finals, (True, False, True), strict=True)
    ]
    asked: list[list[list[float]]] = []

    def values(observations: Any) -> np.ndarray:
        batch = observations if key is None else observations[key]
        asked.append(batch.tolist())
        return 10 * batch[:, 0]

    rows = cut_short(np.array([True, True, True, False]), infos)
    rewards = bootstrap_time_limits(np.ones(4), rows, [*infos, {}], values, gamma=0.5, at_once=True)
    assert rewards.tolist() == [36.0, 1.0, 71.0, 1.0]
    assert asked == [[[7.0], [14.0]]]
    assert cut_short(np.zeros(4, bool), [{}] * 4) == []


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", ["int64", "bool", "read-only", "float16", "float32", "float64"])
def test_rewards_of_any_kind_take_a_value_and_stay_the_environments_own(at_once: bool, kind: str) -> None:
    rewards = np.ones(2, np.float32 if kind == "read-only" else kind)
    rewards.setflags(write=kind != "read-only")
    infos = [{"terminal_observation": np.array([0.5], np.float32), "TimeLimit.truncated": True}, {}]
    got = bootstrap_time_limits(rewards, [0], infos, lambda obs: obs[:, 0], gamma=0.9, at_once=at_once)
    assert got.tolist() == pytest.approx([1.45, 1.0], rel=1e-3)
    assert got.dtype == (rewards.dtype if rewards.dtype.kind == "f" else np.float32)
    assert rewards.tolist() == [1, 1]


def clock_model(truncated: bool, **kwargs: Any) -> tuple[ScratchPPO, ClockEnv]:
    """On episodes of 3 steps; the critic's value of an observation is 100 times it."""
    env = ClockEnv(3, truncated)
    model = ScratchPPO("MlpPolicy", env, n_steps=7, batch_size=7, n_epochs=1, gamma=0.5, seed=1, device="cpu", **kwargs)
    return model, env


@pytest.mark.parametrize("truncated", [True, False])
def test_trap_1_in_a_whole_rollout(truncated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 1: the final observation is 0.53; the one before it 0.52, the reset's 0.5."""
    model, _ = clock_model(truncated, policy_kwargs={"net_arch": []})
    with th.no_grad():
        model.policy.value_net.weight.fill_(100.0)
        model.policy.value_net.bias.zero_()
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(7)
    last = 1 + 0.5 * 53 if truncated else 1.0
    assert model.rollout_buffer.rewards[:, 0].tolist() == pytest.approx([1, 1, last, 1, 1, last, 1])
    assert model.rollout_buffer.episode_starts[:, 0].tolist() == [1, 0, 0, 1, 0, 0, 1]
    # GAE is cut there all the same: that step's advantage is its reward minus its value
    assert model.rollout_buffer.advantages[2, 0] == pytest.approx(last - 52, rel=1e-5)


def test_trap_6_the_buffer_keeps_the_unclipped_action() -> None:
    """Trap 6: an action space of +-0.1 under a standard deviation of 1 clips nearly every action."""
    model, env = clock_model(True)
    model.learn(7)
    stored = model.rollout_buffer.actions[:, 0, 0]
    assert np.abs(stored).max() > 0.1
    assert env.actions == pytest.approx(np.clip(stored, -0.1, 0.1).tolist())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_trap_6_the_log_probability_is_that_of_the_stored_action(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 6: evaluating what the buffer holds with the policy that acted gives the log-probabilities it holds."""
    monkeypatch.setattr(ClockEnv, "action_space", spaces.Box(-0.1, 0.1, (1,), dtype))
    model, _ = clock_model(True)
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(7)
    data = model.rollout_buffer.dataset()
    with th.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(data.observations, data.actions)
    th.testing.assert_close(log_prob, data.old_log_prob)


class Reusing(VecEnv):
    """Two environments that observe their clock; whatever it hands out is one of ``n_buffers`` arrays, written over."""

    def __init__(self, kind: str = "box", n_buffers: int = 1, fresh: bool = False):
        box = spaces.Box(-1, 1000, (3,), np.float32)
        super().__init__(2, spaces.Dict(clock=box) if kind == "dict" else box, spaces.Discrete(2))
        self.buffers = [np.zeros((2, 3), np.float32) for _ in range(n_buffers)]
        self.rewards, self.dones = np.ones(2, np.float32), np.zeros(2, bool)
        self.fresh = fresh
        self.t = 0

    def observe(self) -> Any:
        obs = self.buffers[self.t % len(self.buffers)]
        obs[:] = self.t
        obs = obs.copy() if self.fresh else obs
        return {"clock": obs} if isinstance(self.observation_space, spaces.Dict) else obs

    def reset(self) -> Any:
        return self.observe()

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> Any:
        self.t += 1
        self.dones[:] = self.t % 5 == 0
        info = {"TimeLimit.truncated": True, "terminal_observation": self.observation_space.sample()} if self.dones[0] else {}
        rewards, dones = (array.copy() if self.fresh else array for array in (self.rewards, self.dones))
        return self.observe(), rewards, dones, [dict(info), dict(info)]

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None, None]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None, None]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False, False]


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("n_buffers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_one_array_for_ever_is_as_good_as_new_ones(kind: str, n_buffers: int, engine: str) -> None:
    """The buffer holds what was acted on, in several rollouts, and every array besides observations is read in time."""
    held = []

    class Looking(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            obs = buffer.observations["clock"] if kind == "dict" else buffer.observations
            held.append((obs[:, 0, 0].tolist(), buffer.rewards.tolist(), buffer.episode_starts.tolist()))

    def learn(env: VecEnv) -> Any:
        held.clear()
        env.observation_space.seed(0)
        policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
        model = ScratchPPO(policy, env, engine=engine, n_steps=8, batch_size=16, n_epochs=1, gamma=0.9, seed=1, device="cpu")
        model.learn(48, Looking())
        return list(held)

    got = learn(Reusing(kind, n_buffers))
    assert [obs for obs, *_ in got] == [list(range(first, first + 8)) for first in (0, 8, 16)]
    assert got == learn(Reusing(kind, n_buffers, fresh=True))


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 8, 6, 1), (4, 1, 8, 1), (3, 1, 1, 1), (2, 8, 1, 2)])
def test_copies_of_images_stay_channels_last(shape: tuple[int, ...]) -> None:
    """Or else SB3's convolutions would sum in another order."""
    seen = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape).transpose(0, 3, 1, 2)
    copy = own_copy(seen)
    assert copy.strides == seen.strides
    assert not np.shares_memory(copy, seen)
    assert np.array_equal(copy, seen)


def test_episodes_go_on_from_one_rollout_to_the_next() -> None:
    model = ScratchPPO("MlpPolicy", make_vec_env(lambda: ClockEnv(5), 1), n_steps=4, batch_size=4, n_epochs=1, device="cpu")
    model.learn(8)
    assert model.rollout_buffer.observations[:, 0, 0].tolist() == pytest.approx([0.54, 0.5, 0.51, 0.52])
    assert model.rollout_buffer.episode_starts[:, 0].tolist() == [0, 1, 0, 0]


def test_an_episode_that_ends_with_the_rollout_hides_the_next_ones_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The observation after the last step is the next episode's first; a constant critic of 7 must not leak from it."""
    model = ScratchPPO("MlpPolicy", ClockEnv(3, False), n_steps=6, batch_size=6, n_epochs=1, gamma=0.5, device="cpu")
    with th.no_grad():
        model.policy.value_net.weight.zero_()
        model.policy.value_net.bias.fill_(7.0)
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(6)
    assert model.rollout_buffer.advantages[[2, 5], 0].tolist() == [1.0 - 7.0] * 2
