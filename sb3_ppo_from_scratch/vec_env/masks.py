"""
Which actions each environment allows, and how it says so.

An environment has a method ``action_masks()`` (sb3-contrib's protocol, through every wrapper; ``ActionMasker`` adds one), or a
Dict observation with the key ``"action_mask"``, or puts ``"action_mask"`` into its infos, those of ``reset`` included. A mask
has one entry per choice: n for ``Discrete(n)``, those of all dimensions side by side for ``MultiDiscrete``, and two per bit
(0, then 1) for ``MultiBinary``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_ppo_from_scratch.distributions import choices
from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv
from sb3_ppo_from_scratch.vec_env.wrappers import with_reset_rows

__all__ = [
    "KEY",
    "METHOD",
    "MaskSource",
    "as_masks",
    "find_masks",
    "keep_infos",
    "kept_infos",
    "leave_masks_raw",
    "masks_given",
]

METHOD = "action_masks"
"""The name of an environment's method."""
KEY = "action_mask"
"""The key in a Dict observation, or in an info."""


class MaskSource(ABC):
    """
    One of the three ways.

    :param env: the environments
    :param action_space: theirs
    """

    name: ClassVar[str]

    def __init__(self, env: VecEnv, action_space: spaces.Space):
        self.env = env
        self.sizes = choices(action_space)
        self._starts = starts(self.sizes)
        self._native = with_reset_rows(env)

    def __call__(self, obs: Any, kept: np.ndarray | None, step: int) -> np.ndarray:
        """
        Which actions may be chosen in the next step.

        :param obs: the observations to act on, ``[n_envs, *obs_shape]`` or a dict of such
        :param kept: what :meth:`after_step` returned; ``None`` after a reset
        :param step: number of the step within the rollout, for messages
        :return: ``[n_envs, n_choices]``, bool
        :raises TypeError: for masks that are not numbers
        :raises ValueError: for masks of another shape, or one that allows nothing, naming the environment; the action before a
            reset row is none, and what its mask says does not matter
        """
        masks = as_masks(self._ask(obs, kept), self.env.num_envs, sum(self.sizes), f"at step {step} of the rollout")
        if self._native is not None and self._native.resetting.any():
            masks = masks | self._native.resetting[:, None]
        check_allowed(masks, self._starts, f"at step {step} of the rollout")
        return masks

    @abstractmethod
    def _ask(self, obs: Any, kept: np.ndarray | None) -> Any:
        """Masks as the environments give them."""

    def after_step(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray | None:
        """
        What a step said about the next one's masks, for a checkpoint to keep.

        :param dones: ``[n_envs]``, of the step
        :param infos: of the step, one per environment
        :return: ``[n_envs, n_choices]``; ``None`` where the masks are asked for when they are needed
        """
        return None


class _FromMethod(MaskSource):
    """One call per step for all environments; where these are one, or have the method together, one call of that."""

    name = f"the environment's method {METHOD}()"

    def __init__(self, env: VecEnv, action_space: spaces.Space):
        super().__init__(env, action_space)
        self._of_all = _method_of_all(env)

    def _ask(self, obs: Any, kept: np.ndarray | None) -> Any:
        return self.env.env_method(METHOD) if self._of_all is None else self._of_all()


class _FromObservation(MaskSource):
    name = f"the observation's key {KEY!r}"

    def _ask(self, obs: Any, kept: np.ndarray | None) -> Any:
        return obs[KEY]


class _FromInfo(MaskSource):
    """Where an episode has ended, the info of the step belongs to it, and that of the reset to the next one."""

    name = f"the infos' key {KEY!r}"

    def _ask(self, obs: Any, kept: np.ndarray | None) -> Any:
        return self._stack(self._reset_infos()) if kept is None else kept

    def after_step(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        if self._native is not None:
            dones = dones | self._native.reset_rows  # what follows a reset row begins an episode
        current = [reset if done else info for done, reset, info in zip(dones, self._reset_infos(), infos, strict=True)]
        return self._stack(current)

    def _reset_infos(self) -> Any:
        return self.env.unwrapped.reset_infos  # wrappers have an attribute of that name too, which nobody fills

    def _stack(self, infos: Any) -> np.ndarray:
        masks = [info.get(KEY) for info in infos]
        ignored = np.zeros(len(masks), bool) if self._native is None else self._native.resetting
        for row, mask in enumerate(masks):
            if mask is None and not ignored[row]:
                raise ValueError(
                    f"the info of environment {row} has no {KEY!r}; it is needed in every step's, and in every reset's"
                )
        like = next((np.shape(mask) for mask in masks if mask is not None), sum(self.sizes))
        given = [np.ones(like, bool) if mask is None else mask for mask in masks]
        return as_masks(given, len(masks), sum(self.sizes), f"in the infos under {KEY!r}")


def find_masks(env: VecEnv, action_space: spaces.Space, kept: np.ndarray | None = None) -> MaskSource:
    """
    How the environments say which actions they allow.

    :param env: the environments, which have been reset
    :param action_space: theirs
    :param kept: masks that infos have given before, where training goes on
    :raises ValueError: if they do not
    """
    if _has_method(env):
        return _FromMethod(env, action_space)
    if isinstance(env.observation_space, spaces.Dict) and KEY in env.observation_space.spaces:
        return _FromObservation(env, action_space)
    if kept is not None or all(KEY in info for info in env.unwrapped.reset_infos):
        return _FromInfo(env, action_space)
    raise ValueError(
        f"env does not say which actions it allows: it needs a method {METHOD}() (sb3-contrib's wrapper ActionMasker adds "
        f"one), a Dict observation with the key {KEY!r}, or {KEY!r} in the infos of reset and step. "
        "learn(use_masking=False) trains without masks"
    )


def leave_masks_raw(env: VecEnv) -> None:
    """
    Let ``VecNormalize`` leave the key of masks in Dict observations alone, where they are what says which actions are allowed.

    :param env: any ``VecEnv``; its wrappers stay the same objects
    """
    space = env.observation_space
    if not isinstance(space, spaces.Dict) or KEY not in space.spaces or _has_method(env):
        return
    for level in _levels(env):
        if isinstance(level, VecNormalize) and level.norm_obs and KEY in (level.norm_obs_keys or ()):
            level.norm_obs_keys = [key for key in level.norm_obs_keys or () if key != KEY]


# ------------------------------------------------------- the infos of evaluations


class _InfoKeeper(VecEnvWrapper):
    """Remembers what the last step said, for those who are shown observations only."""

    kept_infos: tuple[np.ndarray, list[dict[str, Any]]] | None = None

    def reset(self) -> VecEnvObs:
        self.kept_infos = None
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        self.kept_infos = dones, infos
        return obs, rewards, dones, infos


def keep_infos(env: VecEnv) -> VecEnv:
    """
    Keep the infos of each step for :func:`kept_infos`, if nothing but them can say which actions are allowed.

    :param env: any ``VecEnv``. Its wrappers stay the outer ones: SB3 compares those of training and evaluation.
    :return: ``env``, or what stands for it now
    """
    levels = _levels(env)
    in_observations = isinstance(env.observation_space, spaces.Dict) and KEY in env.observation_space.spaces
    if in_observations or isinstance(levels[-2:][0], _InfoKeeper) or _has_method(env):
        return env
    keeper = _InfoKeeper(levels[-1])
    if len(levels) == 1:
        return keeper
    levels[-2].venv = keeper  # type: ignore[attr-defined]  # a wrapper
    return env


def kept_infos(env: VecEnv) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """``dones`` and ``infos`` of the last step; ``None`` after a reset, or where they are not kept."""
    keeper = next((level for level in _levels(env) if isinstance(level, _InfoKeeper)), None)
    return None if keeper is None else keeper.kept_infos


# ------------------------------------------------------- checks


def starts(sizes: list[int]) -> np.ndarray:
    """Where the entries of each part of an action begin in a mask."""
    return np.cumsum([0, *sizes[:-1]])


def check_allowed(masks: np.ndarray, starts: np.ndarray, where: str) -> None:
    """
    :param masks: ``[n_envs, n_choices]``, bool
    :param starts: of the parts of an action
    :param where: the end of the message
    :raises ValueError: if one allows nothing: sb3-contrib would then choose among all actions, without a word
    """
    allowed = np.logical_or.reduceat(masks, starts, axis=1)
    if not allowed.all():
        row, part = np.argwhere(~allowed)[0].tolist()
        which = f" in dimension {part}" if len(starts) > 1 else ""
        raise ValueError(f"the mask of environment {row} allows no action{which}{_end(where)}")


def masks_given(value: Any, observation: Any, observation_space: spaces.Space, action_space: spaces.Space) -> np.ndarray:
    """
    Masks as ``predict`` is given them.

    :param value: ``[n_choices]`` or ``[n_envs, n_choices]``
    :param observation: one, or ``[n_envs, *obs_shape]``, or a dict of such
    :param observation_space: theirs
    :param action_space: of the actions
    :return: ``[n_envs, n_choices]``, bool
    :raises TypeError: if they are not numbers
    :raises ValueError: if they do not fit, or if one allows no action
    """
    sizes = choices(action_space)
    if isinstance(observation_space, spaces.Dict):
        key, observation_space = next(iter(observation_space.spaces.items()))
        observation = observation[key]
    n_envs = np.size(observation) // max(1, math.prod(observation_space.shape or ()))
    where = "as given to predict(); VecNormalize's norm_obs_keys must leave out 'action_mask'"
    masks = as_masks(value, n_envs, sum(sizes), where if np.asarray(value).dtype.kind == "f" else "as given to predict()")
    check_allowed(masks, starts(sizes), "as given to predict()")
    return masks


def as_masks(value: Any, n_envs: int, n_choices: int, where: str = "") -> np.ndarray:
    """
    Masks as they may be given: of bool, or of the numbers 0 and 1.

    :param value: ``[n_envs, n_choices]``, or as many entries per environment in another shape
    :param n_envs: number of environments
    :param n_choices: entries of a mask
    :param where: the end of messages
    :return: ``[n_envs, n_choices]``, bool
    :raises TypeError: if they are not numbers
    :raises ValueError: if they are of another shape, or other numbers
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"action masks must be one array of bool per environment{_end(where)}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"action masks must be of bool, not of dtype {array.dtype}{_end(where)}")
    if array.size != n_envs * n_choices or (n_envs > 1 and len(array) != n_envs):
        raise ValueError(
            f"action masks must have shape ({n_envs}, {n_choices}), one entry per environment and choice, not "
            f"{array.shape}{_end(where)}"
        )
    masks = array.astype(bool, copy=False).reshape(n_envs, n_choices)
    if array.dtype.kind != "b" and not (array.reshape(masks.shape) == masks).all():
        raise ValueError(f"action masks must be of bool, or of 0 and 1; there are other numbers in them{_end(where)}")
    return masks


def _end(where: str) -> str:
    return f" ({where})" if where else ""


def _levels(env: VecEnv) -> list[VecEnv]:
    levels = [env]
    while isinstance(levels[-1], VecEnvWrapper):
        levels.append(levels[-1].venv)
    return levels


def _method_of_all(env: VecEnv) -> Any:
    """A method that answers for all environments at once, of a ``VecEnv`` or vector environment; ``None`` if there is none."""
    for level in _levels(env):
        if callable(getattr(type(level), METHOD, None)):
            return getattr(level, METHOD)
    inner = getattr(env.unwrapped, "env", None)
    return getattr(inner, METHOD, None) if isinstance(env.unwrapped, NativeVecEnv) else None


def _has_method(env: VecEnv) -> bool:
    return _method_of_all(env) is not None or env.has_attr(METHOD)
