"""Atari games from ALE's or EnvPool's C++, preprocessed as SB3's ``AtariWrapper`` and ``VecFrameStack`` do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_ppo_from_scratch.checks.arguments import check_flag, check_integer, check_number
from sb3_ppo_from_scratch.vec_env.native import Infos, NativeVecEnv

__all__ = ["ATARI_BACKENDS", "NativeAtariEnv", "make_native_atari_env"]

ATARI_BACKENDS = ("ale", "envpool")
"""Whose C++ runs the games: the Arcade Learning Environment's own (ale-py), or EnvPool's."""

_MAX_FRAMES = 108_000
"""Frames after which a game is cut, half an hour of playing, as in the games that ale-py registers with Gymnasium."""

_OPENING = (0, 1, 2)
"""What SB3 plays before a life: ``EpisodicLifeEnv`` a no-op, ``FireResetEnv`` FIRE (action 1) and action 2."""


class NativeAtariEnv(NativeVecEnv):
    """
    Atari games as SB3's ``AtariWrapper`` shows them to learning, with statistics of whole games.

    The vector environment does what costs time: emulation, frame skip, maximum over two frames, greys, size, no-ops at the
    start, the stack of frames. This class does the rest, in SB3's way:

    - A lost life ends an episode, and the game goes on. ALE's own option would begin a new game, and later lives would never
      be played; EnvPool's plays up to 30 no-ops and no action 2.
    - A life begins with a no-op (or the game's reset) and, in games that have it, FIRE and action 2, whatever the policy says.
      SB3 hides these steps in ``reset``; here they are reset rows (:attr:`reset_rows`), one or three per life.
    - The stack holds no frame from before the episode's first observation.
    - Rewards are clipped to their sign.
    - ``infos[i]["episode"]`` comes at the end of a game: its return in raw rewards, and its length in frames, as ``Monitor``
      counts inside ``AtariWrapper``.

    :param env: games in next-step mode, with raw rewards, without ends at lost lives and without FIRE at the reset, and
        with ``[n_envs, n_stack, height, width]`` observations
    :param has_fire: whether action 1 is FIRE
    :param frame_skip: frames per step
    :param terminal_on_life_loss: whether a lost life ends an episode
    :param clip_reward: whether rewards are clipped
    :param filename: as in :class:`NativeVecEnv`
    :param reseeded: from a seed to another such ``env``, for one whose ``reset`` takes no seed
    """

    def __init__(
        self,
        env: VectorEnv,
        has_fire: bool,
        frame_skip: int = 4,
        terminal_on_life_loss: bool = True,
        clip_reward: bool = True,
        filename: str | None = None,
        reseeded: Callable[[int], VectorEnv] | None = None,
    ):
        self._opening = np.array(_OPENING if has_fire else _OPENING[:1])
        self._frame_skip = frame_skip
        self._terminal_on_life_loss = terminal_on_life_loss
        self._clip_reward = clip_reward
        self._reseeded = reseeded
        super().__init__(env, filename)

    # ---------------------------------------------------------- reset and step

    def reset(self) -> VecEnvObs:
        """
        Begin a new game everywhere.

        :return: first observations, ``[n_envs, n_stack, height, width]``
        """
        if self._reseeded is not None and self._seeds[0] is not None:
            self._settle()
            self.env.close()
            self.env = self._reseeded(self._next_seed())
            self._reset_seeds()
        obs = super().reset()
        self._lives = np.array([info["lives"] for info in self.reset_infos])
        self._blank_older_frames(obs)
        for action in self._opening[1:]:
            self.step_async(np.full(self.num_envs, action))
            obs = self.step_wait()[0]
        self.reset_rows = np.zeros(self.num_envs, dtype=bool)
        return obs

    def _next_seed(self) -> Any:
        """ALE and EnvPool take 31 bits, and give game ``i`` this seed plus ``i``."""
        return None if self._seeds[0] is None else self._seeds[0] % (2**31 - self.num_envs)

    def _begin_episodes(self) -> None:
        super()._begin_episodes()
        self._steps = np.ones(self.num_envs, dtype=np.int64)  # since a life began; the reset is the first of its opening
        self._lives = np.zeros(self.num_envs, dtype=np.int64)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Begin the step, or the next one of the opening where a life begins.

        :param actions: ``[n_envs]``
        """
        n_opening = len(self._opening)
        opening = self._opening[np.minimum(self._steps, n_opening - 1)]
        super().step_async(np.where(self._steps < n_opening, opening, actions))

    def step_wait(self) -> VecEnvStepReturn:
        """
        Take the step.

        :return: as in :class:`NativeVecEnv`
        """
        n_opening = len(self._opening)
        self.reset_rows = self._steps < n_opening
        obs, rewards, terminated, truncated, info = self._end_step()
        obs = self._obs_guard(obs)
        self._steps += 1
        self._blank_older_frames(obs)
        game_over = np.logical_or(terminated, truncated)
        lost_life = self._lost_life(info["lives"])
        dones = (game_over | lost_life) & ~self.reset_rows
        self._steps[game_over | dones] = 0
        self.resetting = self._steps < n_opening

        cut = truncated & ~(terminated | lost_life)
        infos = [{"TimeLimit.truncated": flag, "lives": n} for flag, n in zip(cut.tolist(), self._lives.tolist(), strict=True)]
        for row in np.flatnonzero(dones).tolist():
            infos[row]["terminal_observation"] = obs[row].copy()
        self._count_games(rewards, game_over, info, infos)
        rewards = np.sign(rewards) if self._clip_reward else rewards
        return obs, np.where(self.reset_rows, 0, rewards).astype(np.float32), dones, infos

    def _blank_older_frames(self, obs: VecEnvObs) -> None:
        """A stack is as young as its episode: empty but for the frames since the opening's last step, in place."""
        assert isinstance(obs, np.ndarray)
        n_empty = len(self._opening) + obs.shape[1] - 1 - self._steps
        for row in np.flatnonzero((n_empty > 0) & (self._steps >= len(self._opening))).tolist():
            obs[row, : n_empty[row]] = 0

    def _lost_life(self, lives: np.ndarray) -> np.ndarray:
        """Whether there are fewer lives than before, ``[n_envs]``; Qbert shows 0 for some frames before its game is over."""
        lost = (lives > 0) & (lives < self._lives)
        self._lives = lives
        return lost if self._terminal_on_life_loss else np.zeros_like(lost)

    def _count_games(self, rewards: np.ndarray, game_over: np.ndarray, info: dict[str, Any], infos: Infos) -> None:
        self._returns += rewards
        frames = info.get("episode_frame_number")
        self._lengths = info["elapsed_step"] * self._frame_skip if frames is None else frames
        for row in np.flatnonzero(game_over).tolist():
            self._report(row, infos[row])
            self._returns[row] = 0.0


def make_native_atari_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    backend: str = "ale",
    *,
    noop_max: int = 30,
    frame_skip: int = 4,
    screen_size: int = 84,
    terminal_on_life_loss: bool = True,
    clip_reward: bool = True,
    action_repeat_probability: float = 0.0,
    n_stack: int = 4,
    num_threads: int = 0,
    filename: str | None = None,
) -> NativeAtariEnv:
    """
    What SB3's ``VecFrameStack(make_atari_env(env_id, n_envs, seed), n_stack)`` makes, from ALE's or EnvPool's C++.

    On the same actions after the same no-ops, rewards, ends and statistics are SB3's. What differs:

    - Images are ``[n_stack, height, width]``, not ``[height, width, n_stack]``: what SB3 transposes them to for ``CnnPolicy``.
    - Greys are taken before the maximum over two frames, not after it. Where something moves over a background of another
      colour, its edge can be up to 30 of 255 levels darker than SB3's: in no pixel in Breakout, in 1.6% of them in Freeway.
    - The number of no-ops at a game's start comes from another generator; with ``"ale"`` it can also be 0.
    - The time limit of 108,000 frames counts them from the last no-op on.
    - A new call of ``reset`` begins new games, even in the middle of one.
    - With ``"envpool"``, an episode's length is without the no-ops, and rounded up to a multiple of ``frame_skip``.

    :param env_id: a game without frame skip, such as ``"BreakoutNoFrameskip-v4"``
    :param n_envs: number of games played in parallel
    :param seed: game ``i`` gets ``seed + i``; ``None`` for any. A model's own ``seed`` replaces it.
    :param backend: ``"ale"``, or ``"envpool"``, which is faster, and needs the package envpool besides ale-py
    :param noop_max: up to so many no-ops at a game's start, at least 1 with ``"envpool"``
    :param frame_skip: frames per step, over which the action is repeated
    :param screen_size: height and width of an observation
    :param terminal_on_life_loss: whether a lost life ends an episode
    :param clip_reward: whether rewards are clipped to their sign
    :param action_repeat_probability: probability in each frame that the game repeats the last frame's action
    :param n_stack: frames per observation
    :param num_threads: threads that run the games; 0 leaves the choice to the backend
    :param filename: as in :class:`NativeVecEnv`
    :raises ModuleNotFoundError: if the backend is not installed
    :raises ValueError: for an unknown game or backend, or an argument out of range
    """
    if backend not in ATARI_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ATARI_BACKENDS))}, not {backend!r}")
    check_integer("n_envs", n_envs, 1)
    check_integer("noop_max", noop_max, 1 if backend == "envpool" else 0)
    for name, value, low in (("frame_skip", frame_skip, 1), ("screen_size", screen_size, 36), ("n_stack", n_stack, 1)):
        check_integer(name, value, low)
    check_integer("num_threads", num_threads, 0)
    check_flag("terminal_on_life_loss", terminal_on_life_loss)
    check_flag("clip_reward", clip_reward)
    check_number("action_repeat_probability", action_repeat_probability, 0.0, 1.0)
    game = _game(env_id)
    options = {
        "num_envs": n_envs,
        "num_threads": num_threads,
        "img_height": screen_size,
        "img_width": screen_size,
        "stack_num": n_stack,
        "use_fire_reset": False,
        "episodic_life": False,
        "repeat_action_probability": action_repeat_probability,
    }
    make = partial(_make_ale if backend == "ale" else _make_envpool, game, noop_max, frame_skip, options)
    env = NativeAtariEnv(
        make(0),  # before the first reset it gets its seed
        has_fire="FIRE" in _action_names(game),
        frame_skip=frame_skip,
        terminal_on_life_loss=terminal_on_life_loss,
        clip_reward=clip_reward,
        filename=filename,
        reseeded=make if backend == "envpool" else None,
    )
    env.seed(seed)
    return env


def _game(env_id: str) -> str:
    """ALE's name of the game, such as ``"space_invaders"`` of ``"SpaceInvadersNoFrameskip-v4"``."""
    from ale_py import roms

    match = re.fullmatch(r"(\w+)NoFrameskip-v4", env_id)
    games = {game.replace("_", ""): game for game in roms.get_all_rom_ids()}
    if match is None or match[1].lower() not in games:
        raise ValueError(f"env_id must be an Atari game without frame skip, such as 'BreakoutNoFrameskip-v4', not {env_id!r}")
    return games[match[1].lower()]


def _action_names(game: str) -> list[str]:
    """Names of a game's actions."""
    from ale_py import ALEInterface, LoggerMode, roms

    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.loadROM(roms.get_rom_path(game))  # type: ignore[arg-type]  # None is for unknown games
    return [action.name for action in ale.getMinimalActionSet()]


def _make_ale(game: str, noop_max: int, frame_skip: int, options: dict[str, Any], seed: int) -> VectorEnv:
    """From ALE; its seed is given to ``reset``."""
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv(
        game,
        noop_max=noop_max + 1,  # it plays one less at most
        frameskip=frame_skip,
        reward_clipping=False,
        max_num_frames_per_episode=_MAX_FRAMES,
        **options,
    )


def _make_envpool(game: str, noop_max: int, frame_skip: int, options: dict[str, Any], seed: int) -> VectorEnv:
    """From EnvPool; it is seeded when it is made."""
    envpool = import_module("envpool")  # it ships types, but not for every version of Python
    task = "".join(map(str.capitalize, game.split("_")))
    return envpool.make_gymnasium(
        f"{task}-v5",
        noop_max=noop_max,
        frame_skip=frame_skip,
        reward_clip=False,
        max_episode_steps=_MAX_FRAMES // frame_skip,
        seed=seed,
        **options,
    )
