"""
Whose memory an observation is in. Some environments go on writing into the array that they have handed out: whoever keeps
what such an array held must copy it in time.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

__all__ = ["ObservationGuard", "keep_final_observations", "keep_finals_of_class", "keep_finals_of_vector_env", "own_copy"]


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


def keep_final_observations(env: VecEnv) -> VecEnv:
    """
    Let a ``DummyVecEnv`` copy each final observation before it resets the environment, and take no observation of another
    size. Its subclasses are left as they are.

    :param env: any ``VecEnv``; it stays the same object, and is saved as what it was
    :return: ``env``
    """
    base = env.unwrapped
    if type(base) is DummyVecEnv:
        base.__class__ = _CarefulDummyVecEnv
    return env


class _CarefulDummyVecEnv(DummyVecEnv):
    """SB3's, but what an environment shows is looked at, and copied where the environment may write over it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (DummyVecEnv,), self.__dict__  # it opens where this package is not installed

    def step_wait(self) -> VecEnvStepReturn:
        """As SB3 does, but for the copy and the check; tests compare the two."""
        places = [(key, place, place.shape[1:]) for key, place in self.buf_obs.items()]
        actions, rewards, dones, infos = self.actions, self.buf_rews, self.buf_dones, self.buf_infos
        for env_idx, env in enumerate(self.envs):
            obs, rewards[env_idx], terminated, truncated, info = env.step(actions[env_idx])
            infos[env_idx] = info
            dones[env_idx] = done = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = own_copy(obs)
                obs, self.reset_infos[env_idx] = env.reset()
            for key, place, shape in places:
                value = obs if key is None else obs[key]
                if getattr(value, "shape", None) != shape:
                    _check_size(key, value, shape)
                place[env_idx] = value
        return self._obs_from_buf(), np.copy(rewards), np.copy(dones), deepcopy(infos)

    def _save_obs(self, env_idx: int, obs: VecEnvObs) -> None:
        for key, place in self.buf_obs.items():
            _check_size(key, obs if key is None else obs[key], place.shape[1:])  # type: ignore[call-overload]
        super()._save_obs(env_idx, obs)


def _check_size(key: str | None, value: Any, shape: tuple[int, ...]) -> None:
    """NumPy would repeat what there is. As many numbers in another shape are fine."""
    if np.size(value) != math.prod(shape):
        which = "an observation" if key is None else f"an observation {key!r}"
        raise ValueError(f"{which} has shape {np.shape(value)}, and its space {shape}")


def keep_finals_of_vector_env(env: gym.vector.VectorEnv) -> None:
    """Likewise for Gymnasium's ``SyncVectorEnv``, which in the mode ``SAME_STEP`` resets before it is asked."""
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
