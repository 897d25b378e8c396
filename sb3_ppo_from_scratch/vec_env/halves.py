"""Two groups of environments that can be stepped in turn: while one plays, somebody thinks about the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_ppo_from_scratch.vec_env.memory import ObservationGuard, own_copy
from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv

__all__ = ["TwoHalves", "halves_of", "joined", "joined_step"]


class TwoHalves(VecEnv):
    """
    Two equal groups of environments as one ``VecEnv``, in which either half can be stepped by itself.

    To SB3 it is the ``VecEnv`` of all of them. ``ScratchPPO`` takes the halves in turn: as soon as one has made its step it
    gets its next actions, and plays on while the policy answers the other. The data are those of the same policy; only the
    order of random draws is another. It is for environments that play in threads or processes of their own (ALE's and
    EnvPool's games, ``SubprocVecEnv``, ``AsyncVectorEnv``), and pays the more, the nearer the policy's time is to theirs.

    It is to be the outermost ``VecEnv``; wrappers go around each half::

        TwoHalves(make_native_atari_env(game, n_envs=64), make_native_atari_env(game, n_envs=64))

    :param first: environments ``0`` to ``n - 1``
    :param second: as many more, with the same spaces. With one seed, all get those that one ``VecEnv`` would give them.
    :raises TypeError: if a half is no ``VecEnv``
    :raises ValueError: if the halves are the same object, of unequal sizes or spaces, or inside a ``VecNormalize``, whose
        statistics would be half the environments'
    """

    def __init__(self, first: VecEnv, second: VecEnv):
        self.halves = (first, second)
        for name, half in zip(("first", "second"), self.halves, strict=True):
            if not isinstance(half, VecEnv):
                raise TypeError(f"{name} must be a VecEnv, not {type(half).__name__}")
            if unwrap_vec_normalize(half) is not None:
                raise ValueError(f"{name} must not be inside a VecNormalize, whose statistics would be of its half only")
        if first is second:
            raise ValueError("second must not be the same object as first")
        for name in ("num_envs", "observation_space", "action_space"):
            if getattr(first, name) != getattr(second, name):
                raise ValueError(f"second must have first's {name}, {getattr(first, name)}, not {getattr(second, name)}")
        self._is_playing = [False, False]
        self._received: list[VecEnvStepReturn | None] = [None, None]
        self._guards = [ObservationGuard(), ObservationGuard()]
        super().__init__(2 * first.num_envs, first.observation_space, first.action_space)

    @property
    def rows(self) -> tuple[slice, slice]:
        """Which of all environments each half has."""
        n = self.num_envs // 2
        return slice(0, n), slice(n, 2 * n)

    # ---------------------------------------------------------- reset and step

    def reset(self) -> VecEnvObs:
        """:return: first observations, ``[n_envs, *obs_shape]`` or a dict of such"""
        self.settle()
        obs = [self._reset_half(index) for index in range(2)]
        self._guards = [ObservationGuard(), ObservationGuard()]
        self._gather_reset_infos()
        return joined([guard(part) for guard, part in zip(self._guards, obs, strict=True)])

    def _reset_half(self, index: int) -> VecEnvObs:
        return self.halves[index].reset()

    def step_async(self, actions: np.ndarray) -> None:
        """:param actions: ``[n_envs, *action_shape]``"""
        self.settle()
        for index, rows in enumerate(self.rows):
            self.send(index, actions[rows])

    def step_wait(self) -> VecEnvStepReturn:
        """:return: as any ``VecEnv``, of all environments"""
        return joined_step([self.receive(index) for index in range(2)])

    def send(self, index: int, actions: np.ndarray) -> None:
        """
        Let one half begin its step.

        :param index: 0 or 1
        :param actions: ``[n_envs / 2, *action_shape]``
        """
        self._is_playing[index] = True  # before it is, for Ctrl-C may come in between
        try:
            self.halves[index].step_async(actions)
        except Exception:
            self._is_playing[index] = False
            raise

    def receive(self, index: int) -> VecEnvStepReturn:
        """
        Wait for one half's step.

        :return: observations, rewards, dones and infos of ``n_envs / 2`` environments, in memory that they leave alone while
            they take the next step
        """
        self._is_playing[index] = False  # whatever comes of it
        received, self._received[index] = self._received[index], None
        if received is not None:
            return received
        obs, rewards, dones, infos = self.halves[index].step_wait()
        self._gather_reset_infos()
        return self._guards[index](obs), rewards.copy(), dones.copy(), [_kept(info) for info in infos]

    def _pause(self) -> None:
        """Let both halves finish their steps, which are kept for who waits for them: who plays cannot answer."""
        for index in range(2):
            if self._is_playing[index]:
                self._received[index] = self.receive(index)
                self._is_playing[index] = True

    def settle(self) -> None:
        """Wait for what is still being played, for nobody: a training was ended in the middle of a rollout."""
        for index, is_playing in enumerate(self._is_playing):
            if is_playing:
                self.receive(index)

    def _gather_reset_infos(self) -> None:
        self.reset_infos = [info for half in self.halves for info in half.reset_infos]

    @property
    def waiting(self) -> bool:
        """Whether nobody knows how much of the answers of a ``SubprocVecEnv`` has been read: after Ctrl-C amid them."""
        awaited = (playing and got is None for playing, got in zip(self._is_playing, self._received, strict=True))
        waiting = (getattr(half.unwrapped, "waiting", None) for half in self.halves)
        return any(is_one is not None and is_one != ours for is_one, ours in zip(waiting, awaited, strict=True))

    # ---------------------------------------------------------- reset rows

    @property
    def has_reset_rows(self) -> bool:
        """Whether a step can be a reset row, see :class:`NativeVecEnv`."""
        return any(_has_reset_rows(half) for half in self.halves)

    @property
    def reset_rows(self) -> np.ndarray:
        """``[n_envs]``, bool, see :class:`NativeVecEnv`."""
        return self._flags("reset_rows")

    @property
    def resetting(self) -> np.ndarray:
        """``[n_envs]``, bool, see :class:`NativeVecEnv`."""
        return self._flags("resetting")

    def _flags(self, name: str) -> np.ndarray:
        none = np.zeros(self.num_envs // 2, dtype=bool)
        return np.concatenate([getattr(half.unwrapped, name) if _has_reset_rows(half) else none for half in self.halves])

    # ---------------------------------------------------------- what both halves have

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        :param seed: of the first environment; each later one has one more. ``None`` for a random one.
        :return: one seed per environment
        """
        first = int(np.random.randint(0, np.iinfo(np.uint32).max, dtype=np.uint32)) if seed is None else seed
        return [*self.halves[0].seed(first), *self.halves[1].seed(first + self.num_envs // 2)]

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """:param options: for the next reset: one dict per environment, or one for all"""
        super().set_options(options)
        for half, rows in zip(self.halves, self.rows, strict=True):
            half.set_options(self._options[rows])
        self._reset_options()

    def close(self) -> None:
        """Close both, the second also where the first cannot be."""
        with contextlib.ExitStack() as both:
            for half in self.halves:
                both.callback(half.close)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment."""
        return self._of_each(indices, lambda half, own: half.get_attr(attr_name, own))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each environment."""
        self._of_each(indices, lambda half, own: half.set_attr(attr_name, value, own) or [None] * len(own))

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of each environment."""
        return self._of_each(indices, lambda half, own: half.env_method(method_name, *args, indices=own, **kwargs))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether each environment is inside such a wrapper."""
        return self._of_each(indices, lambda half, own: half.env_is_wrapped(wrapper_class, own))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture per environment."""
        self._pause()
        return [image for half in self.halves for image in half.get_images()]

    def _of_each(self, indices: VecEnvIndices, question: Callable[[VecEnv, list[int]], Sequence[Any]]) -> list[Any]:
        """The halves' answers for some of their environments, in the order that was asked for."""
        self._pause()
        n = self.num_envs // 2
        wanted = [range(self.num_envs)[index] for index in self._get_indices(indices)]  # an error for one that is not there
        answers = []
        for number, half in enumerate(self.halves):
            own = [index % n for index in wanted if index // n == number]
            answers.append(iter(question(half, own) if own else ()))
        return [next(answers[index // n]) for index in wanted]


def halves_of(env: VecEnv) -> tuple[VecEnv, ...]:
    """Those of the :class:`TwoHalves` inside a ``VecEnv``; none if there is no such thing."""
    return env.unwrapped.halves if isinstance(env.unwrapped, TwoHalves) else ()


def joined(parts: Sequence[Any]) -> Any:
    """What both halves have, ``[n_envs, ...]``: arrays, tensors, or dicts of such."""
    if isinstance(parts[0], dict):
        return {key: joined([part[key] for part in parts]) for key in parts[0]}
    return th.cat(list(parts)) if isinstance(parts[0], th.Tensor) else np.concatenate(parts)


def joined_step(steps: Sequence[VecEnvStepReturn]) -> VecEnvStepReturn:
    """The steps of both halves as one."""
    obs, rewards, dones, infos = zip(*steps, strict=True)
    return joined(obs), np.concatenate(rewards), np.concatenate(dones), [info for half in infos for info in half]


def _has_reset_rows(half: VecEnv) -> bool:
    return isinstance(half.unwrapped, NativeVecEnv | TwoHalves) and half.unwrapped.has_reset_rows


def _kept(info: dict[str, Any]) -> dict[str, Any]:
    """A copy that its maker does not write into."""
    final = info.get("terminal_observation")
    return dict(info) if final is None else {**info, "terminal_observation": own_copy(final)}
