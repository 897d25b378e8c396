"""
A pixel game that PPO learns in minutes on one core: catch falling balls with a paddle, on 36 x 36 pixels.

A caught ball is worth 1, and the next one falls faster; a missed one ends the episode. Balls start anywhere, fly aslant and
bounce off the walls, so that the paddle must be sent where the ball *will* be. In the end they are too fast for anybody, so
that returns have no ceiling that all agents could reach. Observations are the last two frames.

The same rules as one environment and as a vector environment of Gymnasium's, whose next episode begins in the step after an
episode's end: with and without reset rows. ``gym.make("benchmarks.catch:Catch-v0")`` and ``gym.make_vec`` know both.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

__all__ = ["BEST_RETURN", "ENV_ID", "CatchEnv", "CatchGames", "CatchVectorEnv"]

ENV_ID = "benchmarks.catch:Catch-v0"
SIZE, PADDLE, BALL = 36, 7, 2
"""Pixels: of the square screen, and the widths of the paddle and the ball."""
BEST_RETURN = 14.0
"""Mean return of :meth:`CatchGames.best_actions`, rounded."""
_FIRST_SPEED, _FASTER = 1.5, 1.1
"""Pixels that the first ball falls per step, and by what factor each next one is faster."""
_STRIDE = 2
"""Pixels that the paddle moves per step."""
_OBSERVATIONS, _ACTIONS = spaces.Box(0, 255, (2, SIZE, SIZE), np.uint8), spaces.Discrete(3)


class CatchGames:
    """
    The rules, for games side by side.

    :param n_games: how many
    """

    def __init__(self, n_games: int):
        self.x, self.y, self.drift, self.speed = np.zeros((4, n_games))
        """of the balls, in pixels and pixels per step"""
        self.paddle = np.zeros(n_games, np.int64)
        """each one's left end"""
        self.frames = np.zeros((n_games, *_OBSERVATIONS.shape), np.uint8)
        """``[n_games, 2, SIZE, SIZE]``, the older one first"""

    def begin(self, game: int, rng: np.random.Generator) -> None:
        """
        A new episode.

        :param game: which
        :param rng: the game's own
        """
        self.speed[game], self.paddle[game] = _FIRST_SPEED, (SIZE - PADDLE) // 2
        self._drop(game, rng)
        self.frames[game] = 0
        self._draw(np.array([game]))

    def _drop(self, game: int, rng: np.random.Generator) -> None:
        self.y[game], self.x[game] = 0.0, rng.uniform(0, SIZE - BALL)
        self.drift[game] = self.speed[game] * rng.uniform(-1.0, 1.0)

    def step(self, actions: np.ndarray, rngs: list[np.random.Generator], playing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param actions: left, stay, right, ``[n_games]``
        :param rngs: one per game
        :param playing: games to step, ``[n_games]``; the others stay as they are
        :return: rewards and whether the ball was missed, ``[n_games]`` each
        """
        games = np.flatnonzero(playing)
        self.paddle[games] = np.clip(self.paddle[games] + _STRIDE * (actions[games] - 1), 0, SIZE - PADDLE)
        x, wall = self.x[games] + self.drift[games], SIZE - BALL
        self.drift[games] *= np.where((x < 0) | (x > wall), -1.0, 1.0)
        self.x[games] = wall - np.abs(wall - np.abs(x))
        self.y[games] += self.speed[games]
        down = games[self.y[games] >= SIZE - BALL]
        rewards, missed = np.zeros(len(playing), np.float32), np.zeros(len(playing), bool)
        caught = (self.x[down] > self.paddle[down] - BALL) & (self.x[down] < self.paddle[down] + PADDLE)
        rewards[down[caught]], missed[down[~caught]] = 1.0, True
        for game in down[caught].tolist():
            self.speed[game] *= _FASTER
            self._drop(game, rngs[game])
        self.y[down[~caught]] = SIZE - BALL
        self._draw(games)
        return rewards, missed

    def best_actions(self) -> np.ndarray:
        """Those of a player who knows where each ball will come down, ``[n_games]``."""
        wall, steps = SIZE - BALL, np.ceil((SIZE - BALL - self.y) / self.speed)
        x = (self.x + self.drift * steps) % (2 * wall)  # as if it flew on behind the wall
        ahead = np.minimum(x, 2 * wall - x) + BALL / 2 - (self.paddle + PADDLE / 2)
        return np.where(np.abs(ahead) < _STRIDE / 2, 1, np.where(ahead > 0, 2, 0))

    def _draw(self, games: np.ndarray) -> None:
        self.frames[games, 0] = self.frames[games, 1]
        self.frames[games, 1] = 0
        for game in games.tolist():
            x, y, paddle = int(self.x[game]), int(self.y[game]), self.paddle[game]
            self.frames[game, 1, y : y + BALL, x : x + BALL] = 255
            self.frames[game, 1, -1, paddle : paddle + PADDLE] = 255


class CatchEnv(gym.Env):
    """
    One game.

    :param render_mode: ``"rgb_array"`` or ``None``
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012  # Gymnasium's name and kind
    observation_space, action_space = _OBSERVATIONS, _ACTIONS

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self._game = CatchGames(1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self._game.begin(0, self.np_random)
        return self._game.frames[0].copy(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; nothing cuts an episode short of a missed ball."""
        rewards, missed = self._game.step(np.array([action]), [self.np_random], np.ones(1, bool))
        return self._game.frames[0].copy(), float(rewards[0]), bool(missed[0]), False, {}

    def render(self) -> np.ndarray:
        """The newest frame, ``[height, width, 3]``."""
        return np.repeat(self._game.frames[0, 1, :, :, None], 3, axis=2)


class CatchVectorEnv(VectorEnv):
    """
    Games side by side; game ``i`` of seed ``s`` is :class:`CatchEnv` of seed ``s + i``.

    :param num_envs: how many
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  # Gymnasium's name and kind

    def __init__(self, num_envs: int = 1):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _OBSERVATIONS, _ACTIONS
        self.observation_space, self.action_space = (batch_space(space, num_envs) for space in (_OBSERVATIONS, _ACTIONS))
        self._games = CatchGames(num_envs)
        self._rngs = [np.random.default_rng() for _ in range(num_envs)]
        self._ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode everywhere."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        for game, own in enumerate(seeds):
            if own is not None:
                self._rngs[game] = gym.utils.seeding.np_random(own)[0]
            self._games.begin(game, self._rngs[game])
        self._ended[:] = False
        return self._games.frames.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step; where the last one ended an episode, only the beginning of the next."""
        rewards, missed = self._games.step(np.asarray(actions), self._rngs, ~self._ended)
        for game in np.flatnonzero(self._ended).tolist():
            self._games.begin(game, self._rngs[game])
        self._ended = missed
        return self._games.frames.copy(), rewards, missed.copy(), np.zeros(self.num_envs, bool), {}


gym.register("Catch-v0", entry_point=f"{__name__}:CatchEnv", vector_entry_point=f"{__name__}:CatchVectorEnv")
