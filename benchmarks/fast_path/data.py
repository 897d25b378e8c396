"""Data: the same agent in SB3's wrappers, in ALE's vector environment and in EnvPool's."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from benchmarks.breakout import ENV_ID
from benchmarks.evaluation import EVALUATION_SEED, evaluate
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.vec_env import NativeAtariEnv, make_native_atari_env

__all__ = ["GAMES_AT_ONCE", "KINDS", "LIVES", "OPENING", "Game", "LifeLog", "count_noops", "measure_data", "noops_before"]

Record = dict[str, Any]

KINDS = {"sb3": "SB3's wrappers", "ale": "native ALE", "envpool": "native EnvPool"}
"""Where games come from, SB3's first."""
LIVES, OPENING = 5, 3
"""Of a game of Breakout, and the reset rows of each life."""
GAMES_AT_ONCE = 10


def make_games(kind: str, n_games: int, seed: int) -> VecEnv:
    """
    Breakout as learning sees it, but with raw rewards.

    :param kind: of :data:`KINDS`
    :param n_games: played side by side
    :param seed: of the games
    """
    if kind == "sb3":
        env = make_atari_env(f"ale_py:{ENV_ID}", n_games, seed=seed, wrapper_kwargs={"clip_reward": False})
        return VecFrameStack(env, n_stack=4)
    return make_native_atari_env(ENV_ID, n_games, seed=seed, backend=kind, clip_reward=False)


class Game(NamedTuple):
    """A whole game."""

    score: float
    frames: int
    life_rewards: list[float]
    """what each life brought"""


class LifeLog(VecEnvWrapper):
    """
    Notes whole games, life by life.

    :param venv: of :func:`make_games`
    """

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self.games: list[list[Game]] = [[] for _ in range(self.num_envs)]
        """of each environment, in their order"""
        self._lives: list[list[float]] = [[] for _ in range(self.num_envs)]
        self._rewards = np.zeros(self.num_envs)

    def reset(self) -> VecEnvObs:
        """Begin new games."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Pass on what came of the step."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self._rewards += rewards
        for row in np.flatnonzero(dones).tolist():
            self._lives[row].append(float(self._rewards[row]))
            self._rewards[row] = 0.0
            if "episode" in infos[row]:
                told = infos[row]["episode"]
                self.games[row].append(Game(float(told["r"]), int(told["l"]), self._lives[row]))
                self._lives[row] = []
        return obs, rewards, dones, infos


def play_games(model: ScratchPPO, kind: str, n_games: int) -> list[Game]:
    """
    Whole games with sampled actions, as many in each environment: longer ones are as likely to be among them.

    :param model: who plays
    :param kind: of :data:`KINDS`
    :param n_games: in all, a multiple of ten
    """
    log = LifeLog(make_games(kind, GAMES_AT_ONCE, EVALUATION_SEED))
    evaluate(model, log, n_games, deterministic=False)
    log.close()
    return [game for games in log.games for game in games[: n_games // GAMES_AT_ONCE]]


def noops_before(ram: np.ndarray) -> int:
    """
    How many no-ops a game began with.

    :param ram: the console's memory then, ``[128]``: Breakout counts its frames there
    :raises ValueError: if it is none that up to 40 no-ops lead to
    """
    if not _NOOPS:
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        ale = ALEInterface()
        ale.loadROM(roms.get_rom_path("breakout"))  # type: ignore[arg-type]  # None is for unknown games
        ale.reset_game()
        for n in range(41):
            _NOOPS[ale.getRAM().tobytes()] = n
            ale.act(0)
    try:
        return _NOOPS[np.asarray(ram, np.uint8).tobytes()]
    except KeyError:
        raise ValueError("ram must be that of Breakout after 0 to 40 no-ops") from None


_NOOPS: dict[bytes, int] = {}


def count_noops(kind: str, n_games: int, seed: int = EVALUATION_SEED) -> list[int]:
    """
    With how many no-ops games begin.

    :param kind: of :data:`KINDS`
    :param n_games: how many
    :param seed: of the games
    """
    env = make_games(kind, n_games, seed)
    env.reset()
    if kind == "sb3":  # here FIRE and action 2, four frames each, have been played
        frames = [game.ale.getEpisodeFrameNumber() for game in env.get_attr("unwrapped")]
        return [n - 4 * (OPENING - 1) for n in frames]
    assert isinstance(env, NativeAtariEnv)
    info = env.env.reset()[1]
    env.close()
    return [int(n) for n in info["episode_frame_number"]] if kind == "ale" else list(map(noops_before, info["ram"]))


def measure_data(model: ScratchPPO, n_games: int) -> Record:
    """
    The same agent in each kind of environments.

    :param model: who plays
    :param n_games: in each, a multiple of ten
    :return: per kind, games with their scores, frames and rewards per life, and the no-ops that games begin with
    """
    kinds = {}
    for kind in KINDS:
        games = play_games(model, kind, n_games)
        kinds[kind] = {**_columns(games), "noops": count_noops(kind, n_games)}
        print(f"{KINDS[kind]}: mean score {np.mean(kinds[kind]['scores']):.2f} over {len(games)} games", flush=True)
    return {"games": n_games, "kinds": kinds}


def _columns(games: list[Game]) -> Record:
    scores, frames, lives = zip(*games, strict=True)
    return {"scores": scores, "frames": frames, "life_rewards": lives}
