"""
Whose memory an observation is in. Some environments go on writing into the array that they have handed out: whoever keeps
what such an array held must copy it in time.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv

__all__ = ["ObservationGuard", "keep_finals_of_class", "keep_finals_of_vector_env", "own_copy"]


class ObservationGuard:
    """
    Passes observations on as they are, but copies them if the environment goes on writing into what it has handed out.

    Whoever holds an observation may rely on it during the next step. Most environments hand out new arrays; those that do not
    show it when two of their observations overlap. Until two steps have been compared, copies are made.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._compared = -2  # the first comparison is with a reset's, which may be handed out in another way
        self._copies = False

    def __call__(self, obs: Any) -> Any:
        """
        :param obs: ``[n_envs, *obs_shape]`` or a dict of such
        :return: the same, or a copy of it
        """
        if not self._copies:
            self._compared += 1
            self._copies = self._previous is not None and _overlap(obs, self._previous)
            self._previous = obs
        return obs if self._compared > 0 and not self._copies else own_copy(obs)


def _overlap(obs: Any, other: Any) -> bool:
    if isinstance(obs, dict):
        return any(map(np.may_share_memory, obs.values(), other.values()))
    return np.may_share_memory(obs, other)


def own_copy(obs: Any) -> Any:
    """
    An observation, or a batch of them, in memory of its own: an array, or a dict of arrays.

    The order in memory stays, for a network's bits depend on it: SB3 shows images transposed, channels last in memory.
    """
    if isinstance(obs, dict):
        return {key: own_copy(value) for key, value in obs.items()}
    return _copy_in_order(obs) if isinstance(obs, np.ndarray) else obs


def _copy_in_order(array: np.ndarray) -> np.ndarray:
    """``copy(order="K")`` may put axes of length 1 anywhere; torch reads from their strides whether channels are last."""
    copy = array.copy(order="K")
    if copy.strides != array.strides:
        order = sorted(range(array.ndim), key=lambda axis: (-array.strides[axis], -array.shape[axis]))
        copy = array.transpose(order).copy().transpose(np.argsort(order))
    return copy


# ------------------------------------------------------- final observations, which a reset may write over


def keep_finals_of_vector_env(env: gym.vector.VectorEnv) -> None:
    """
    Let Gymnasium's ``SyncVectorEnv`` copy final observations, for in the mode ``SAME_STEP`` it resets before it is asked.

    For a ``DummyVecEnv`` :func:`~.lean.make_lean` sees to it.
    """
    base = env.unwrapped
    if type(base) is SyncVectorEnv:
        base.__class__ = _CarefulSyncVectorEnv


class _CarefulSyncVectorEnv(SyncVectorEnv):
    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (SyncVectorEnv,), self.__dict__

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        if "final_obs" in env_info:
            env_info = {**env_info, "final_obs": own_copy(env_info["final_obs"])}
        return super()._add_info(vector_infos, env_info, env_num)


def keep_finals_of_class(env_class: type[gym.Env]) -> None:
    """Likewise for all environments of a class: for processes that hold one environment, and call its ``step``."""
    step = env_class.step

    def step_and_copy(self: gym.Env, action: Any) -> Any:
        obs, reward, terminated, truncated, info = step(self, action)
        return own_copy(obs) if terminated or truncated else obs, reward, terminated, truncated, info

    env_class.step = step_and_copy  # type: ignore[method-assign]  # that is the purpose
