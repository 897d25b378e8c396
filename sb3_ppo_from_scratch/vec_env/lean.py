"""SB3's ``DummyVecEnv`` and ``VecNormalize`` with the same results, to the last bit, for fewer copies and calls."""

from __future__ import annotations

import math
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_ppo_from_scratch.vec_env.halves import halves_of
from sb3_ppo_from_scratch.vec_env.memory import own_copy

__all__ = ["LeanDummyVecEnv", "LeanVecNormalize", "make_lean"]

Infos = list[dict[str, Any]]


def make_lean(env: VecEnv) -> VecEnv:
    """
    Let SB3's ``DummyVecEnv`` and ``VecNormalize`` take the steps of :class:`LeanDummyVecEnv` and :class:`LeanVecNormalize`.

    ``ScratchPPO`` does this to its own environments. Subclasses are left as they are, and so is whatever has had a method
    replaced, be it the object's or the class's.

    :param env: any ``VecEnv``; it and its wrappers stay the same objects, and are saved as what they were
    :return: ``env``
    """
    for half in halves_of(env):
        make_lean(half)
    level: VecEnv | None = env
    while level is not None:
        lean = _LEAN.get(type(level))
        if lean is not None and not _is_patched(level):
            level.__class__ = lean
        level = level.venv if isinstance(level, VecEnvWrapper) else None
    return env


class LeanDummyVecEnv(DummyVecEnv):
    """
    SB3's ``DummyVecEnv`` with two more cares, and with copies where they make a difference.

    A final observation is copied before its environment is reset, which may write over it; and no observation of another size
    than its space's is taken. What is handed out is new memory, as with SB3's: tests compare the two.

    :param env_fns: functions that make the environments
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (DummyVecEnv,), self.__dict__  # it opens where this package is not installed

    def step_wait(self) -> VecEnvStepReturn:
        """As SB3 does it, but for what the class says; its variable ``env_idx`` tells which environment has failed."""
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
        return self._obs_from_buf(), rewards.copy(), dones.copy(), copy_infos(infos)

    def _save_obs(self, env_idx: int, obs: VecEnvObs) -> None:
        for key, place in self.buf_obs.items():
            _check_size(key, obs if key is None else obs[key], place.shape[1:])  # type: ignore[call-overload]
        super()._save_obs(env_idx, obs)

    def _obs_from_buf(self) -> VecEnvObs:
        if self.keys == [None]:
            return self.buf_obs[None].copy()  # type: ignore[index]  # SB3's types: always a string
        copies = OrderedDict((key, place.copy()) for key, place in self.buf_obs.items())
        return dict_to_obs(self.observation_space, copies)


def _check_size(key: str | None, value: Any, shape: tuple[int, ...]) -> None:
    """NumPy would repeat what there is. As many numbers in another shape are fine."""
    if np.size(value) != math.prod(shape):
        which = "an observation" if key is None else f"an observation {key!r}"
        raise ValueError(f"{which} has shape {np.shape(value)}, and its space {shape}")


_PLAIN = {type(None), bool, int, float, complex, str, bytes, *(np.dtype(code).type for code in "?bBhHiIlLqQefdg")}
"""Types whose values nobody can change."""


def copy_infos(infos: Infos) -> Infos:
    """
    ``copy.deepcopy``, for less where the values are plain numbers and strings.

    :param infos: one dict per environment; two may be one, or share what they hold, and then their copies do
    """
    copies: dict[int, Any] = {}
    return [_copy_info(info, copies) for info in infos]


def _copy_info(info: dict[str, Any], copies: dict[int, Any]) -> dict[str, Any]:
    """:param copies: by identity of the original, the ``memo`` of ``copy.deepcopy``"""
    if id(info) in copies:
        return copies[id(info)]
    if type(info) is dict and _PLAIN.issuperset(map(type, info.values())) and _PLAIN.issuperset(map(type, info)):
        copies[id(info)] = copy = info.copy()
        return copy
    return deepcopy(info, copies)


class LeanVecNormalize(VecNormalize):
    """
    SB3's ``VecNormalize``, whose step does not copy what it is about to replace, and sums each batch once instead of twice.

    Its arguments are ``VecNormalize``'s.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (VecNormalize,), self.__getstate__()  # it opens where this package is not installed

    def save(self, save_path: str) -> None:
        """As SB3's own class, which every reader knows."""
        plain = object.__new__(VecNormalize)
        plain.__dict__.update(self.__dict__)
        plain.save(save_path)

    def step_wait(self) -> VecEnvStepReturn:
        """As SB3 does it, in the same order: observations first, then rewards, then final observations."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self.old_obs, self.old_reward = obs, rewards  # type: ignore[assignment]  # SB3's types also allow tuples
        if self.training and self.norm_obs:
            if isinstance(obs, dict) and isinstance(self.obs_rms, dict):
                for key, statistics in self.obs_rms.items():
                    update_statistics(statistics, obs[key])
            else:
                update_statistics(self.obs_rms, obs)  # type: ignore[arg-type]  # likewise
        obs = self.normalize_obs(obs)  # type: ignore[arg-type]  # likewise
        if self.training:
            self._update_reward(rewards)
        rewards = self.normalize_reward(rewards)
        ended = [index for index, done in enumerate(dones.tolist()) if done]
        for index in ended:
            if "terminal_observation" in infos[index]:
                infos[index]["terminal_observation"] = self.normalize_obs(infos[index]["terminal_observation"])
        if ended:
            self.returns[dones] = 0
        return obs, rewards, dones, infos

    def _update_reward(self, reward: np.ndarray) -> None:
        self.returns = self.returns * self.gamma + reward
        update_statistics(self.ret_rms, self.returns)

    def normalize_obs(self, obs: np.ndarray | dict[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """
        By the statistics so far, which stay as they are.

        :param obs: ``[n_envs, *obs_shape]`` or a dict of such, which is left as it is; or a single observation
        """
        if not self.norm_obs or isinstance(obs, dict):
            return super().normalize_obs(obs)
        return self._normalize_obs(obs, self.obs_rms).astype(np.float32)  # type: ignore[arg-type]  # SB3's types: always a dict

    def _normalize_obs(self, obs: np.ndarray, obs_rms: RunningMeanStd) -> np.ndarray:
        centred, scale = obs - obs_rms.mean, obs_rms.var + self.epsilon
        return (centred / np.sqrt(scale)).clip(-self.clip_obs, self.clip_obs)  # np.clip does this by a detour

    def normalize_reward(self, reward: np.ndarray) -> np.ndarray:
        """
        By the statistics so far, which stay as they are.

        :param reward: ``[n_envs]``
        """
        if self.norm_reward:
            scaled = reward / np.sqrt(self.ret_rms.var + self.epsilon)
            reward = scaled.clip(-self.clip_reward, self.clip_reward)
        return reward.astype(np.float32)


def update_statistics(statistics: RunningMeanStd, batch: np.ndarray) -> None:
    r"""
    ``RunningMeanStd.update``: the same operations in the same order, hence the same bits, with the batch summed once.

    .. math::
        \delta &= \bar x - \mu, \qquad \mu \leftarrow \mu + \frac{\delta n}{N + n} \\
        \sigma^2 &\leftarrow \frac{1}{N + n} \Big(\sigma^2 N + s^2 n + \frac{\delta^2 N n}{N + n}\Big),
            \qquad N \leftarrow N + n

    Source: Chan et al., https://en.wikipedia.org/wiki/Algorithms_for_calculating_variance#Parallel_algorithm.

    :param statistics: SB3's; another class does what it does. They get new arrays: whoever kept the old ones still has them.
    :param batch: ``[n, *shape]``
    """
    plain = type(statistics) is RunningMeanStd and type(batch) is np.ndarray and batch.dtype in _FLOATS
    if not plain or np.asarray(statistics.mean).dtype != np.float64 or not 0 < len(batch) < 2**24:
        statistics.update(batch)
    elif batch.ndim > 1:
        _update_arrays(statistics, batch)
    else:
        _update_numbers(statistics, batch)


_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def _update_arrays(statistics: RunningMeanStd, batch: np.ndarray) -> None:
    size, count, total = len(batch), statistics.count, statistics.count + len(batch)
    batch_mean = np.add.reduce(batch)
    batch_mean /= size
    squares = batch - batch_mean
    np.square(squares, out=squares)
    batch_var = np.add.reduce(squares)
    batch_var /= size
    delta = batch_mean - statistics.mean
    mean = delta * size
    mean /= total
    mean += statistics.mean
    var = statistics.var * count
    batch_var *= size
    var += batch_var
    np.square(delta, out=delta)
    for factor in (count, size):
        delta *= factor
    delta /= total
    var += delta
    var /= total
    statistics.mean, statistics.var, statistics.count = mean, var, total


def _update_numbers(statistics: RunningMeanStd, batch: np.ndarray) -> None:
    """One number per environment: Python's are float64 as well, and faster one by one."""
    size, mean, var, count = len(batch), float(statistics.mean), float(statistics.var), statistics.count
    batch_mean = batch.dtype.type(np.add.reduce(batch) / np.float64(size))
    squares = batch - batch_mean
    batch_var = batch.dtype.type(np.add.reduce(np.square(squares, out=squares)) / np.float64(size))
    delta, total = float(batch_mean) - mean, count + size
    within, between = float(batch_var * size), delta * delta * count * size / total
    statistics.mean = np.float64(mean + delta * size / total)  # SB3's become numbers, too
    statistics.var = np.float64((var * count + within + between) / total)
    statistics.count = total


_LEAN: dict[type[VecEnv], type[Any]] = {DummyVecEnv: LeanDummyVecEnv, VecNormalize: LeanVecNormalize}
_AS_IMPORTED = [
    (kind, name, vars(kind).get(name))
    for kind, lean in (*_LEAN.items(), (RunningMeanStd, RunningMeanStd))
    for name in vars(lean)
]
"""SB3's own of what is done otherwise here"""


def _is_patched(env: VecEnv) -> bool:
    """Whether some method is not SB3's own: one of the object's, or one that somebody has put into SB3's class."""
    if any(callable(getattr(type(env), name, None)) for name in vars(env)):
        return True
    concerned = (DummyVecEnv,) if isinstance(env, DummyVecEnv) else (VecNormalize, RunningMeanStd)
    return any(kind in concerned and vars(kind).get(name) is not value for kind, name, value in _AS_IMPORTED)
