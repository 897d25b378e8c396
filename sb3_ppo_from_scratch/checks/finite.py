"""
NaN and infinity are stopped before they reach the weights: in what the environments send, in a rollout, in a minibatch.

A weight that is NaN makes every later one NaN, and the run is lost since then, however late somebody notices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer
from sb3_ppo_from_scratch.errors import NonFiniteError

__all__ = ["NAN_POLICIES", "StepCheck", "check_minibatch", "check_rollout"]

NAN_POLICIES = ("raise", "skip")
"""What may happen to a minibatch whose loss or gradient is not finite."""

_CAUSES = {
    "environment": "the environment divides by zero or overflows, or its observations need VecNormalize(clip_obs=...). If "
    "NaN stands for what is missing, and the network knows: nan_observations=True, or a list of keys",
    "policy": "the weights or observations have grown very large: try a lower learning_rate, or VecNormalize",
    "update": "very large rewards or returns, or too high a learning_rate: try VecNormalize, or a lower learning_rate",
}


_SMALL = 10_000
"""Numbers that BLAS sums on one thread"""


def check_minibatch(name: str, value: float) -> None:
    """
    Before a step along a minibatch's gradient.

    :param name: of its number, ``"loss"`` or ``"gradient"``
    :param value: the number
    :raises NonFiniteError: if it is NaN or infinite
    """
    if not math.isfinite(value):
        raise NonFiniteError(
            name,
            f"the {name} of a minibatch is not finite ({value}). No step was taken on it; the model is as it was before. "
            f"Likely causes: {_CAUSES['update']}; nan_policy='skip' leaves out such minibatches",
        )


class StepCheck:
    """
    What the environments send, looked at in each step of a rollout: whether it is finite, and of the size of its space.

    Under ``VecNormalize`` one NaN would become everybody's, and stay in the running statistics: they are put back as they were
    before the step, and what the environments sent before it was normalized says whose NaN it was.

    :param env: the environments
    :param space: their observation space
    :param may_be_nan: from an observation's key (empty where there are none) and all observations to whether NaN may be there
    """

    def __init__(self, env: VecEnv, space: spaces.Space, may_be_nan: Callable[[str, Any], bool] = lambda key, obs: False):
        leaves = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._n_envs = env.num_envs
        self._sizes = {key: env.num_envs * math.prod(leaf.shape or ()) for key, leaf in leaves.items()}
        self._is_dict = isinstance(space, spaces.Dict)
        self._may_be_nan = may_be_nan
        self._normalizers = [level for level in _levels(env) if isinstance(level, VecNormalize)]
        self._statistics = [rms for level in self._normalizers for rms in _running(level)]
        self._kept: list[tuple[Any, ...]] = []

    def before_step(self) -> None:
        """Called before the environments are stepped or reset: their statistics may have to be put back."""
        if self._statistics:
            self._kept = [(rms, rms.mean, rms.var, rms.count) for rms in self._statistics]

    def __call__(self, observations: Any, rewards: np.ndarray | None, step: int) -> None:
        """
        :param observations: ``[n_envs, *obs_shape]`` or a dict of such; integers are finite
        :param rewards: ``[n_envs]``; ``None`` after a reset
        :param step: number of the step within the rollout, for the message
        :raises NonFiniteError: naming the tensor, the environment and the step
        :raises ValueError: for an array of another size than the space's
        """
        for key, size in self._sizes.items():
            array = observations[key] if self._is_dict else observations
            if array.size != size:
                shape = f"{array.shape}, which is not {self._n_envs} times that of its space"
                raise ValueError(f"{_named(key)} has shape {shape} (at step {step} of the rollout)")
            if not _is_finite(array) and not self._is_allowed(key, observations, array):
                self._raise(_named(key), array, self._raw("old_obs", key, array), step)
        if rewards is not None and not _is_finite(rewards):
            self._raise("reward", rewards, self._raw("old_reward", "", rewards), step)

    def final(self, observation: Any, env: int, step: int) -> None:
        """
        The final observation of an episode that a time limit has cut: its value is asked for.

        :param observation: ``[*obs_shape]`` or a dict of such
        :param env: index of its environment
        :raises NonFiniteError: see above
        """
        for key in self._sizes:
            array = np.asarray(observation[key] if self._is_dict else observation)
            batch = {name: np.asarray(value)[None] for name, value in observation.items()} if self._is_dict else array[None]
            if not _is_finite(array) and not self._is_allowed(key, batch, array):
                at = np.argwhere(~np.isfinite(array))[0].tolist()
                _raise_at(f"final {_named(key)}", array[tuple(at)], at, env, step, "environment")

    def _is_allowed(self, key: str, observations: Any, array: np.ndarray) -> bool:
        learned = any(
            level.training and level.norm_obs and key in (level.norm_obs_keys or [key]) for level in self._normalizers
        )
        return not learned and not np.isinf(array).any() and self._may_be_nan(key, observations)

    def _raw(self, name: str, key: str, array: np.ndarray) -> np.ndarray:
        """What came before the innermost ``VecNormalize``, if the fault is there already."""
        raw = getattr(self._normalizers[-1], name, None) if self._normalizers else None
        raw = raw[key] if isinstance(raw, dict) else raw
        return array if raw is None or _is_finite(raw) else raw

    def _raise(self, name: str, array: np.ndarray, raw: np.ndarray, step: int) -> None:
        for rms, mean, var, count in self._kept:
            rms.mean, rms.var, rms.count = mean, var, count
        at = np.argwhere(~np.isfinite(raw))[0].tolist()
        _raise_at(name, raw[tuple(at)], at[1:], at[0], step, "environment")


def _levels(env: VecEnv) -> Iterator[VecEnv]:
    yield env
    while isinstance(env, VecEnvWrapper):
        env = env.venv
        yield env


def _running(env: VecNormalize) -> list[Any]:
    """All running statistics of a ``VecNormalize``."""
    by_key = getattr(env, "obs_rms", {})  # there is none if observations are not normalized
    return [*(by_key.values() if isinstance(by_key, dict) else [by_key]), env.ret_rms]


def _named(key: str) -> str:
    return f"observation {key!r}" if key else "observation"


def _is_finite(array: np.ndarray) -> bool:
    """A sum of squares that is finite has no term that is not; the numbers are looked at one by one only where it is not."""
    if array.dtype.kind != "f" or (array.size < _SMALL and math.isfinite(np.vdot(array, array))):
        return True
    return bool(np.logical_and.reduce(np.isfinite(array), axis=None))  # faster than all(), a detour


def check_rollout(buffer: RolloutBuffer) -> None:
    """
    What the policy made of it, rewards with the values behind time limits included.

    :param buffer: full, its arrays ``[n_steps, n_envs]``
    :raises NonFiniteError: naming the tensor, the environment and the step
    """
    if isinstance(buffer, ScratchRolloutBuffer) and buffer.is_known_finite():
        return
    for name in ("values", "log_probs", "rewards", "advantages", "returns"):
        array: Any = getattr(buffer, name, None)  # a class of the user's may keep others
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            step, env, *_ = np.argwhere(~np.isfinite(array))[0].tolist()
            _raise_at(name, array[step, env], [], env, step, "policy" if name in ("values", "log_probs") else "update")


def _raise_at(name: str, value: float, at: list[int], env: int, step: int, cause: str) -> NoReturn:
    """:param at: where ``value`` stands in the environment's array, empty for a scalar"""
    where = f" at index {at}" if at else ""
    raise NonFiniteError(
        name,
        f"{name} is not finite ({value}{where}) in environment {env} at step {step} of the rollout. Nothing was learned from "
        f"it; the model is as it was before. Likely causes: {_CAUSES[cause]}",
    )
