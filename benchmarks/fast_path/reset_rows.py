"""Reset rows: the steps of native Atari environments that only begin a life, which SB3 plays inside ``reset``."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.breakout import ENV_ID
from benchmarks.evaluation import EVALUATION_SEED
from benchmarks.fast_path.data import LIVES, OPENING
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.vec_env import make_native_atari_env

__all__ = ["measure_reset_rows", "share_of_reset_rows", "shares_over_run", "steps_some_games"]

Record = dict[str, Any]


def share_of_reset_rows(model: ScratchPPO, n_steps: int, backend: str = "ale") -> float:
    """
    Of the steps that a policy takes in native environments, as learning counts them.

    :param model: who plays, with sampled actions
    :param n_steps: of eight games each
    :param backend: of the games
    """
    env = make_native_atari_env(ENV_ID, 8, seed=EVALUATION_SEED, backend=backend)
    obs, rows = env.reset(), 0
    for _ in range(n_steps):
        obs = env.step(model.predict(obs)[0])[0]  # type: ignore[arg-type]  # no tuple
        rows += int(env.reset_rows.sum())
    env.close()
    return rows / (8 * n_steps)


def shares_over_run(training: list[Record]) -> list[dict[str, float]]:
    """
    The same over a run, from the number of games that ended.

    :param training: rows of the record of :mod:`benchmarks.breakout`
    :return: per row, the timesteps at its end and the share of reset rows
    """
    ends = [0, *(row["timesteps"] for row in training)]
    return [
        {"timesteps": row["timesteps"], "share": row["games"] * LIVES * OPENING / (row["timesteps"] - begin)}
        for row, begin in zip(training, ends, strict=False)
    ]


def steps_some_games(backend: str) -> str | None:
    """
    Ask a vector environment to step two of its four games.

    :param backend: whose
    :return: why it does not; ``None`` if it does
    """
    env = make_native_atari_env(ENV_ID, 4, seed=0, backend=backend)
    env.reset()
    actions, games = np.zeros(2, np.int64), np.array([1, 3])
    try:
        obs, *_, info = env.env.step(actions, games) if backend == "envpool" else env.env.step(actions)  # type: ignore[call-arg]
    except AssertionError as error:
        return f"AssertionError: {error}"
    finally:
        env.close()
    return None if len(obs) == 2 and info["env_id"].tolist() == games.tolist() else "it stepped others"


def measure_reset_rows(model: ScratchPPO, training: list[Record], n_steps: int) -> Record:
    """
    What share of the steps reset rows are, early and late.

    :param model: the late agent; the early one is as it was before training
    :param training: see :func:`shares_over_run`
    :param n_steps: played by each agent
    """
    fresh = ScratchPPO("CnnPolicy", make_native_atari_env(ENV_ID, 1), seed=1, device="cpu")
    counted = {"before training": share_of_reset_rows(fresh, n_steps), "agent": share_of_reset_rows(model, n_steps)}
    rows = shares_over_run(training)
    steps = np.diff([0, *(row["timesteps"] for row in rows)])
    lost = float(np.sum(steps * [row["share"] for row in rows]))
    return {
        "counted": counted,
        "over_the_run": rows,
        "steps": int(steps.sum()),
        "transitions": round(steps.sum() - lost),
        "steps_some_games": {backend: steps_some_games(backend) for backend in ("ale", "envpool")},
    }
