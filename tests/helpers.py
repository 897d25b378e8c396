"""What several test files need: toy environments, and a training run that keeps all it measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.gpu.material import config
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.engines import Engine, choose_engine
from sb3_ppo_from_scratch.engines.compiled.library import kernel_reason
from sb3_ppo_from_scratch.update import UpdateConfig

KERNEL_REASON = kernel_reason()
"""Why there is no engine "compiled" here; ``None`` if there is."""
is_built = pytest.mark.skipif(KERNEL_REASON is not None, reason=str(KERNEL_REASON))
BY_HAND = [pytest.param("compiled", marks=is_built), pytest.param("numpy")]
"""Engines for small networks on a CPU"""
FASTEST = "numpy" if KERNEL_REASON else "compiled"
"""What ``"auto"`` chooses for those"""


class ToyEnv(gym.Env):
    """Random observations of any space, reward that depends on the action; seeded, and cut off after ``length`` steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = 17):
        self.observation_space = observation_space
        self.action_space = action_space
        self.length = length
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(np.sum(action)) + float(self.np_random.normal())
        terminated = self.np_random.random() < 0.05
        return self.observation_space.sample(), reward, bool(terminated), self.steps >= self.length, {}


@dataclass
class Trained:
    """A model after training, and what it left behind."""

    model: OnPolicyAlgorithm
    metrics: list[dict[str, Any]]
    """``train/*`` after each update"""
    random_states: list[Any]
    """of Python, NumPy and torch"""


def train(
    algorithm: type[OnPolicyAlgorithm],
    policy: Any,
    make_env: Callable[[], VecEnv],
    total_timesteps: int,
    learns: tuple[dict[str, Any], ...] = ({},),
    **kwargs: Any,
) -> Trained:
    """Train from seed 3, in one or several calls of ``learn`` with the given arguments."""
    metrics: list[dict[str, Any]] = []

    class Recording(algorithm):  # type: ignore[misc, valid-type]  # a class given as an argument
        def train(self) -> None:
            super().train()
            metrics.append({key: value for key, value in self.logger.name_to_value.items() if key.startswith("train/")})

    model = Recording(policy, make_env(), seed=3, device="cpu", **kwargs)
    for arguments in learns:
        model.learn(total_timesteps, **arguments)
    model.env.close()
    numpy_state = np.random.get_state()
    return Trained(model, metrics, [random.getstate(), numpy_state[1].tolist(), numpy_state[2], th.get_rng_state().tolist()])


def assert_same_model(ours: OnPolicyAlgorithm, theirs: OnPolicyAlgorithm) -> None:
    """Parameters and the optimizer's state, to the last bit."""
    for (name, a), b in zip(ours.policy.state_dict().items(), theirs.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), f"{name} differs by {(a - b).abs().max()}"
    our_state, their_state = ours.policy.optimizer.state_dict(), theirs.policy.optimizer.state_dict()
    assert our_state["param_groups"] == their_state["param_groups"]
    assert our_state["state"].keys() == their_state["state"].keys()
    for index, state in their_state["state"].items():
        assert our_state["state"][index].keys() == state.keys()
        for key, value in state.items():
            mine = our_state["state"][index][key]
            assert mine is value is None or th.equal(mine, value), f"{key} of parameter {index} differs"


def assert_equal_runs(
    policy: Any, make_env: Callable[[], VecEnv], total_timesteps: int, iterations: int = 3, **kwargs: Any
) -> Trained:
    """
    SB3's PPO and the reference engine end with the same bits everywhere; returns our run.

    :param iterations: at least so many updates must have happened
    """
    theirs = train(PPO, policy, make_env, total_timesteps, **kwargs)
    ours = train(ScratchPPO, policy, make_env, total_timesteps, engine="torch", **kwargs)
    assert_same_model(ours.model, theirs.model)
    assert ours.random_states == theirs.random_states, "a random number more or less was drawn"
    assert len(ours.metrics) == len(theirs.metrics) >= iterations
    for mine, reference in zip(ours.metrics, theirs.metrics, strict=True):
        for key, value in reference.items():
            np.testing.assert_array_equal(mine[key], value, err_msg=key)
    return ours


def update_config(**changes: Any) -> UpdateConfig:
    """Two epochs of small minibatches."""
    return config(**{"batch_size": 8, "clip_range": 0.2, **changes})


def make_engine(name: str, policy: ActorCriticPolicy, precision: str = "fp32") -> Engine:
    """The engine of that name, at work on ``policy``."""
    return choose_engine(name, policy, precision).engine(policy, precision)
