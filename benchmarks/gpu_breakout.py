"""Breakout for 10 million steps with rl-zoo3's hyperparameters, in as many commands as it takes; the last one evaluates."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.tasks import EVALUATION_SEED, Task, load_task
from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO, has_checkpoint
from sb3_ppo_from_scratch.vec_env import make_native_atari_env

__all__ = ["Deadline", "curve", "train_breakout"]

Record = dict[str, Any]

_POINTS = 200
"""Of the learning curve in the record."""
_LAST = 100
"""Training episodes whose mean score is told beside the evaluation's."""
_EVALUATION_SECONDS = 120.0
"""What must be left of a command for it to evaluate as well."""
_FRAMES_PER_STEP = 4  # a game's length is in frames


class Deadline(BaseCallback):
    """
    Ends training after a moment, at the next boundary between iterations, with a checkpoint of it: nothing is lost.

    :param deadline: ``time.monotonic()``
    :param checkpoint: what writes checkpoints, before this callback in the list
    """

    def __init__(self, deadline: float, checkpoint: ResumableCheckpoint):
        super().__init__()
        self.deadline = deadline
        self.checkpoint = checkpoint
        self.is_over = False
        self.stopped = False
        """Whether there is something left to do"""

    def _on_rollout_start(self) -> None:
        self.stopped = self.is_over  # the boundary before this rollout has been written

    def _on_step(self) -> bool:
        if not self.is_over and time.monotonic() >= self.deadline:
            self.is_over = True
            self.checkpoint.save_freq = 1
        return not self.stopped

    def state_dict(self) -> None:
        """The next command has a deadline of its own."""

    def load_state_dict(self, state: None) -> None:
        """Nothing, in turn."""


def train_breakout(options: argparse.Namespace, device: str, deadline: float, task: Task | None = None) -> Record:
    """
    Begin or go on; evaluate if that was the end.

    :param options: ``out``, ``seed``, ``backend``, ``precision``, ``timesteps``, ``eval_episodes``
    :param device: of the networks
    :param deadline: ``time.monotonic()`` at which to stop training
    :param task: hyperparameters; ``None`` for rl-zoo3's
    :return: what there is to say by now; ``done`` tells whether training and evaluation have ended
    """
    task = task or load_task("atari")
    folder = options.out / f"breakout_seed{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    session_number = len(list(folder.glob("train_*.monitor.csv")))
    env = make_native_atari_env(
        "BreakoutNoFrameskip-v4",
        task.n_envs,
        seed=options.seed + 1000 * session_number,  # games in C++ cannot be saved: each command begins new ones
        backend=options.backend,
        filename=str(folder / f"train_{session_number:03}"),  # one that is there would be overwritten
    )
    checkpoint = ResumableCheckpoint(None, folder / "checkpoints")
    stop = Deadline(deadline, checkpoint)
    started = time.perf_counter()
    if has_checkpoint(folder / "checkpoints"):
        model = ScratchPPO.resume(folder / "checkpoints", env, device=device)
        begun_at = model.num_timesteps
        model.continue_learning([checkpoint, stop])
    else:
        begun_at = 0
        engine: Record = {"engine": "cudagraph"} if device.startswith("cuda") else {}
        model = ScratchPPO(
            task.policy, env, seed=options.seed, device=device, precision=options.precision, **engine, **task.arguments
        )
        model.learn(options.timesteps, callback=[checkpoint, stop])
    session = {"from": begun_at, "to": model.num_timesteps, "seconds": time.perf_counter() - started}
    env.close()
    record: Record = {
        "seed": options.seed,
        "precision": model.precision,
        "engine": model._current_engine().name,
        "backend": options.backend,
        "timesteps": model.num_timesteps,
        "sessions": _noted(folder / "sessions.json", session),
        "curve": curve(_games(folder)),
        "done": not stop.stopped,
    }
    if stop.stopped:
        return record
    if session["to"] > begun_at and time.monotonic() > deadline - _EVALUATION_SECONDS:
        return record | {"done": False}  # the next command has nothing left to train, and evaluates
    return record | _evaluated(model, folder, options)


def _noted(path: Path, session: Record) -> list[Record]:
    """All commands' sessions so far, this one included."""
    sessions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    sessions.append(session)
    path.write_text(json.dumps(sessions), encoding="utf-8")
    return sessions


def _evaluated(model: ScratchPPO, folder: Path, options: argparse.Namespace) -> Record:
    """
    Save the model, and play whole games with unclipped scores. Actions are sampled, as rl-zoo3 does for Atari.
    """
    path = folder / "model.zip"
    model.save(path)
    games = make_native_atari_env(
        "BreakoutNoFrameskip-v4", 8, seed=EVALUATION_SEED, backend=options.backend, clip_reward=False
    )
    returns, _ = evaluate_policy(model, games, options.eval_episodes, deterministic=False, return_episode_rewards=True)
    games.close()
    assert isinstance(returns, list)  # as asked for
    last = [score for _, score in _games(folder)[-_LAST:]]
    return {
        "evaluation": {"mean": statistics.fmean(returns), "std": statistics.pstdev(returns), "returns": returns},
        "last_training_episodes": {"mean": statistics.fmean(last) if last else None, "count": len(last)},
        "model": {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size},
    }


def _games(folder: Path) -> list[tuple[int, float]]:
    """Steps and score of each game of the training, from the monitors' files, of which each command has written one."""
    games = []
    for path in sorted(folder.glob("train_*.monitor.csv")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        games += [(int(row["l"]) // _FRAMES_PER_STEP, float(row["r"])) for row in csv.DictReader(lines)]
    return games


def curve(games: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """
    A learning curve of so many points at most: the mean score of the games that ended in each stretch.

    :param games: steps and score of each, in the order in which they ended
    :return: steps in all games so far, and mean scores
    """
    stretch = max(1, -(-len(games) // _POINTS))
    points, steps = [], 0
    for first in range(0, len(games), stretch):
        part = games[first : first + stretch]
        steps += sum(length for length, _ in part)
        points.append((steps, statistics.fmean(score for _, score in part)))
    return points
