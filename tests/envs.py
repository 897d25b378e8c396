"""Spaces of every kind, and an environment whose observation is its clock."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)

OBSERVATION_SPACES: dict[str, spaces.Space] = {
    "box": BOX,
    "box-float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "box-2d": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "image": spaces.Box(0, 255, (4, 4, 1), np.uint8),
    "discrete": spaces.Discrete(5),
    "multidiscrete": spaces.MultiDiscrete([3, 4]),
    "multibinary": spaces.MultiBinary(4),
    "multibinary-2d": spaces.MultiBinary([2, 3]),
    "dict": spaces.Dict({"vector": BOX, "choice": spaces.Discrete(4), "bits": spaces.MultiBinary(3)}),
}

ACTION_SPACES: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "box-2d": spaces.Box(-1.0, 1.0, (2, 2), np.float32),
    "multidiscrete": spaces.MultiDiscrete([2, 3, 4]),
    "multibinary": spaces.MultiBinary(3),
}


class ClockEnv(gym.Env):
    """
    Observes the number of steps since its reset, out of 100, plus 1/2; every reward is 1.

    :param length: steps after which an episode ends
    :param truncated: whether by a time limit, or in a terminal state
    """

    observation_space = spaces.Box(0.0, 2.0, (1,), np.float32)
    action_space = spaces.Box(-0.1, 0.1, (1,), np.float32)

    def __init__(self, length: int = 3, truncated: bool = True):
        self.length = length
        self.truncated = truncated
        self.actions: list[float] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._clock = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._clock += 1
        self.actions.append(float(action[0]))
        ended = self._clock == self.length
        return self._observe(), 1.0, ended and not self.truncated, ended and self.truncated, {}

    def _observe(self) -> np.ndarray:
        return np.array([0.5 + self._clock / 100], np.float32)
