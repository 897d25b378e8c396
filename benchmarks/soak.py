"""
Does a process that trains for long hold no more in the end than at its beginning?

Rounds of what programs do with :class:`ScratchPPO`: learn with every engine of the CPU, save, load, go on from a checkpoint
after an environment has raised, died or observed NaN, in this process and in others, and be refused a file. After each one,
memory, descriptors, threads, processes and temporary files are counted; the first quarter after a warm-up is compared with the
last.
Linux only, which counts them in ``/proc``::

    python -m benchmarks.soak --minutes 30 --save-result soak
"""

from __future__ import annotations

import gc
import multiprocessing.util
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from benchmarks.markdown import markdown_table
from benchmarks.options import command_line, number
from benchmarks.record import provenance, save_result, write_json
from benchmarks.timed_run import subprocesses
from sb3_ppo_from_scratch import EnvFailedError, NonFiniteError, ResumableCheckpoint, ScratchPPO, UnsafeFileError

MakeVecEnv = Callable[[list[Callable[[], gym.Env]]], VecEnv]

ALLOWED = {
    "memory": 0.02,
    "subprocess_memory": 0.02,
    "objects": 0.01,
    "descriptors": 0,
    "threads": 0,
    "children": 0,
    "files": 0,
}
"""By what share of its first quarter each may grow: memory (resident, MiB) is the allocator's, and caches fill up."""

WARM_UP = 0.1
"""Share of the rounds that is not looked at."""

MIN_ROUNDS = 8

SIZES: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "device": "cpu"}
FRAMES = partial(FakeImageEnv, screen_height=36, screen_width=36, n_channels=1, discrete=True)
LEARNERS: list[tuple[str, str, Callable[[], gym.Env]]] = [
    *(
        ("MlpPolicy", engine, partial(gym.make, env))
        for engine in ("numpy", "torch")
        for env in ("CartPole-v1", "Pendulum-v1")
    ),
    *(("CnnPolicy", engine, FRAMES) for engine in ("channels_last", "torch")),
]
"""Policy, engine and environment."""


class Faulty(gym.Wrapper):
    """CartPole that from its step 50 on has the fault that is written in a file, until the file is gone."""

    def __init__(self, order: Path):
        super().__init__(gym.make("CartPole-v1"))
        self.order = str(order)
        self.steps = 0

    def step(self, action: Any) -> Any:
        """Raise, die, observe NaN, or do what CartPole does."""
        obs, *others = super().step(action)
        self.steps += 1
        fault = Path(self.order).read_text(encoding="utf-8") if self.steps >= 50 and Path(self.order).exists() else None
        if fault == "raise":
            raise LookupError("the simulator lost its marbles")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return obs * np.nan if fault == "nan" else obs, *others


def learn_save_load(folder: Path) -> None:
    """Every engine learns, and goes on from the file that it is saved in."""
    for policy, engine, make_env in LEARNERS:
        with closing(VecNormalize(DummyVecEnv([make_env] * 2), norm_obs=policy == "MlpPolicy")) as env:
            ScratchPPO(policy, env, engine=engine, **SIZES).learn(128).save(folder / "model")
            model = ScratchPPO.load(folder / "model", env=env)
            model.learn(128, reset_num_timesteps=False)
            model.predict(env.reset())


def fail_and_resume(folder: Path, fault: str, make_vec_env: MakeVecEnv) -> None:
    """Learn until an environment fails, and go on from the checkpoint to the end."""
    path, order = folder / "checkpoints", folder / "order"
    folder.mkdir(exist_ok=True)
    order.write_text(fault, encoding="utf-8")
    faulty: list[Callable[[], gym.Env]] = [partial(gym.make, "CartPole-v1"), partial(Faulty, order)]
    with closing(VecNormalize(make_vec_env(faulty))) as env, suppress(EnvFailedError, NonFiniteError):
        ScratchPPO("MlpPolicy", env, **SIZES).learn(256, ResumableCheckpoint(1, path))
        raise AssertionError(f"no error came from an environment that should {fault}")
    order.unlink()
    with closing(VecNormalize(make_vec_env(faulty))) as env:
        model = ScratchPPO.resume(path, env)
        assert 0 < model.num_timesteps < 256, "the checkpoint is one of before the failure"
        assert model.continue_learning(callback=ResumableCheckpoint(1, path)).num_timesteps == 256


def refuse(folder: Path) -> None:
    """Files that are not opened: one that would run a program, and one that is cut."""
    model = ScratchPPO("MlpPolicy", "CartPole-v1", **SIZES)
    model.policy_kwargs = {"activation_fn": subprocess.run}
    model.save(folder / "hostile")
    cut = folder / "cut.zip"
    cut.write_bytes((folder / "hostile.zip").read_bytes()[:-40])
    for file, error in ((folder / "hostile.zip", UnsafeFileError), (cut, ValueError)):
        with suppress(error):
            ScratchPPO.load(file)
            raise AssertionError(f"{file.name} was opened")


def do_everything() -> None:
    """One round."""
    methods = [method for method in ("fork", "forkserver") if method in multiprocessing.get_all_start_methods()]
    processes: list[MakeVecEnv] = [partial(SubprocVecEnv, start_method=method) for method in methods]
    for fault, make_vec_env in [("raise", DummyVecEnv), ("nan", DummyVecEnv), *zip(("raise", "die"), processes, strict=True)]:
        with tempfile.TemporaryDirectory() as folder:
            fail_and_resume(Path(folder), fault, make_vec_env)
    with tempfile.TemporaryDirectory() as folder:
        learn_save_load(Path(folder))
        refuse(Path(folder))


def held() -> dict[str, float]:
    """What this process and those that it has started hold now, by the names of :data:`ALLOWED`."""
    gc.collect()
    children = subprocesses()
    return {
        "memory": _status("self", "VmRSS") / 1024,
        "subprocess_memory": sum(_status(pid, "VmRSS") for pid in children) / 1024,
        "objects": len(gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": _status("self", "Threads"),
        "children": len(children),
        # SB3 makes an empty folder for the log of every model that has none, and leaves it there
        "files": sum(1 for path in Path(tempfile.gettempdir()).rglob("*") if not path.is_dir()),
    }


def _status(process: int | str, name: str) -> int:
    with suppress(OSError):  # it may have ended meanwhile
        found = re.search(rf"^{name}:\s*(\d+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"), re.MULTILINE)
        return 0 if found is None else int(found[1])
    return 0


def judge(values: list[float], allowed: float) -> dict[str, Any]:
    """
    Is it flat?

    :param values: one per round, at least :data:`MIN_ROUNDS`
    :param allowed: growth, as a share of the first quarter
    :return: medians of the first quarter after the warm-up and of the last, the slope of all after the warm-up, and whether
        the last median is at most ``1 + allowed`` times the first
    """
    after = values[round(WARM_UP * len(values)) :]
    quarter = len(after) // 4 or 1
    first, last = statistics.median(after[:quarter]), statistics.median(after[-quarter:])
    slope = statistics.linear_regression(range(len(after)), after).slope
    return {
        "first": round(first, 3),
        "last": round(last, 3),
        "per_100_rounds": round(100 * slope, 3),
        "allowed": allowed,
        "flat": last <= first * (1 + allowed),
    }


def soak(minutes: float, one_round: Callable[[], object] = do_everything) -> dict[str, Any]:
    """
    :param minutes: for which rounds are begun, of which there are at least :data:`MIN_ROUNDS`
    :param one_round: what is done again and again; its temporary files are counted in a folder of their own
    :return: minutes, number of rounds, :func:`judge`'s answers and what was counted after each round
    """
    start = time.monotonic()
    rounds: list[dict[str, float]] = []
    before = tempfile.tempdir
    multiprocessing.util.get_temp_dir()  # lives until the program ends, and so longer than the folder made here
    with tempfile.TemporaryDirectory(prefix="soak-") as tempfile.tempdir:
        try:
            while len(rounds) < MIN_ROUNDS or time.monotonic() - start < 60 * minutes:
                one_round()
                rounds.append(held())
                print(f"{(time.monotonic() - start) / 60:6.1f} min, round {len(rounds)}: {rounds[-1]}", flush=True)
        finally:
            tempfile.tempdir = before
    counted = {name: [each[name] for each in rounds] for name in ALLOWED}
    verdicts = {name: judge(counted[name], ALLOWED[name]) for name in ALLOWED}
    took = round((time.monotonic() - start) / 60, 1)
    return {"minutes": took, "rounds": len(rounds), "verdicts": verdicts, "counted": counted}


def main() -> None:
    """Run for as long as the command line says, write the record, and exit with 1 if anything grew."""
    parser = command_line(
        "benchmarks.soak", "does a process that trains for long grow?", out=Path("runs/soak"), save_result=None
    )
    parser.add_argument("--minutes", type=number(float, 0), default=30.0, help="of training (%(default)g)")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.exit(2, "benchmarks.soak counts in /proc, which only Linux has\n")
    th.set_num_threads(1)
    warnings.simplefilter("ignore")  # failing environments and files are what it is about
    record = {**provenance("benchmarks.soak"), **soak(options.minutes)}
    write_json(options.out / "record.json", record)
    save_result(options.save_result, [options.out / "record.json"])
    rows = [(name, *map(str, verdict.values())) for name, verdict in record["verdicts"].items()]
    print(markdown_table(("", "first quarter", "last quarter", "per 100 rounds", "may grow by", "flat"), rows))
    sys.exit(not all(verdict["flat"] for verdict in record["verdicts"].values()))


if __name__ == "__main__":
    main()
