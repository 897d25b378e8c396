"""
Training runs that can be killed and resumed, and what they leave behind.

As a program, ``python -m tests.runs TASK FOLDER KILLS SEED``: trains in a process that is killed KILLS times, each time at
another random moment, and resumed; then once more without a break, in FOLDER/whole. A forked process costs no imports.
"""

from __future__ import annotations

import csv
import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO, has_checkpoint


def cartpole(folder: Path | None) -> VecEnv:
    return VecNormalize(make_vec_env("CartPole-v1", n_envs=2, monitor_dir=None if folder is None else str(folder)))


def pendulum(folder: Path | None) -> VecEnv:
    return VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, monitor_dir=None if folder is None else str(folder)))


def breakout(folder: Path | None) -> VecEnv:
    import ale_py  # registers the games; an optional dependency

    assert ale_py

    directory = None if folder is None else str(folder)
    return VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=2, monitor_dir=directory), 4)


TASKS: dict[str, tuple[Callable[[Path | None], VecEnv], int, dict[str, Any]]] = {
    "cartpole": (cartpole, 64 * 60, {"policy": "MlpPolicy", "n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    "memory": (
        pendulum,
        64 * 10,
        {
            "policy": "MlpLstmPolicy",
            "n_steps": 32,
            "batch_size": 24,
            "n_epochs": 2,
            "policy_kwargs": {"lstm_hidden_size": 8},
        },
    ),
    "breakout": (breakout, 32 * 6, {"policy": "CnnPolicy", "n_steps": 16, "batch_size": 16, "n_epochs": 1}),
}


class Ticking(BaseCallback):
    """Writes a byte for every step."""

    def __init__(self, pipe: int):
        super().__init__()
        self.pipe = pipe

    def _on_step(self) -> bool:
        os.write(self.pipe, b".")
        return True


def train(task: str, folder: Path, pipe: int) -> None:
    """Begin or resume, end, and save everything that could differ."""
    make_env, total_timesteps, kwargs = TASKS[task]
    env = make_env(folder)
    callbacks = [ResumableCheckpoint(1, folder / "checkpoints"), Ticking(pipe)]
    if has_checkpoint(folder / "checkpoints"):
        model = ScratchPPO.resume(folder / "checkpoints", env, allow_pickle=task == "breakout")  # for its emulators
        model.continue_learning(callbacks)
    else:
        model = ScratchPPO(
            env=env, seed=5, device="cpu", learning_rate=LinearSchedule(1e-3, 0.0, 1.0), engine="torch", **kwargs
        )
        model.set_logger(configure(str(folder), ["csv"]))
        model.learn(total_timesteps, callbacks)
    th.save({"policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict()}, folder / "final.pt")
    env.close()


def rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of all monitors and of the log, without times."""
    found = {}
    for path in folder.glob("*.csv"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        found[path.name] = [
            {key: value for key, value in row.items() if key != "t" and not key.startswith("time/")}
            for row in csv.DictReader(lines)
        ]
    return found


def in_a_process(task: str, folder: Path, ticks: int | None, delay: float = 0.0) -> int:
    """Train in a fork, killed after so many steps and seconds; return its exit status."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            train(task, folder, write)
        except BaseException:  # noqa: BLE001  # a fork must never go on as its parent would
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    while ticks is None or ticks > 0:
        received = os.read(read, 1 if ticks is not None else 4096)
        if not received:
            break
        ticks = None if ticks is None else ticks - 1
    if ticks == 0:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(task: str, folder: Path, kills: int, seed: int) -> None:
    th.set_num_threads(1)
    th.optim.Adam([th.zeros(1)])  # imports what every child would import for a second or two
    if "Lstm" in TASKS[task][2]["policy"]:
        importlib.import_module("sb3_contrib")  # likewise
    moments = random.Random(seed)
    steps_per_rollout = TASKS[task][2]["n_steps"]
    for _ in range(kills):
        ticks = moments.randint(1, 3 * steps_per_rollout)
        delay = moments.uniform(0.0, 0.03)  # about an iteration, with its update and the writing of its checkpoint
        status = in_a_process(task, folder / "killed", ticks, delay)
        assert status == -signal.SIGKILL, "it was to be killed before its end"
    for name in ("killed", "whole"):
        assert in_a_process(task, folder / name, None) == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
