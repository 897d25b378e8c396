"""
Trains SB3's PPO and ScratchPPO side by side, on the environments and seeds of :mod:`benchmarks.comparison.protocol`.

Every run is a process of its own, with one thread for torch and NumPy; as many run at a time as there are cores. A finished
run leaves a record and is not run again: after Ctrl-C or a crash, the same command goes on, and only the runs in progress are
lost. ``make compare`` runs all of it, in some hours; a quick look at the whole way is::

    python -m benchmarks.compare --scale 0.01 --seeds 2 --only CartPole-v1 --out runs/tiny
    python -m benchmarks.report --results runs/tiny

:mod:`benchmarks.report` turns the records into tables and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.cases import missing
from benchmarks.comparison.one_run import PROGRESS
from benchmarks.comparison.protocol import PROTOCOL, SIDES
from benchmarks.comparison.records import read_run, record_path
from benchmarks.options import command_line, number
from benchmarks.record import ROOT, with_threads

__all__ = ["Order", "RunFailed", "Runner", "main", "parse_options", "plan"]


class Order(NamedTuple):
    """A run to be done."""

    entry: str
    side: str
    seed: int
    timesteps: int

    def __str__(self) -> str:
        return f"{self.entry} {self.side} seed {self.seed}"


class RunFailed(Exception):
    """A run ended without a record; the message is the last that it said."""


def plan(options: argparse.Namespace) -> list[Order]:
    """
    All runs that ``options`` ask for, seed by seed, and the longest of a seed first: whenever it ends, the sides are even.

    :param options: see :func:`parse_options`
    """
    orders = []
    for name in options.only or [name for name in PROTOCOL if name not in _ON_REQUEST]:
        entry = PROTOCOL[name]
        timesteps = max(1, round(entry.timesteps * options.scale))
        seeds = range(min(options.seeds or entry.seeds, entry.seeds))
        sides = [side for side in entry.sides if side in (options.side or SIDES)]
        orders += [Order(name, side, seed, timesteps) for seed in seeds for side in sides]
    return sorted(orders, key=lambda order: (order.seed, PROTOCOL[order.entry].task().policy != "CnnPolicy", -order.timesteps))


_ON_REQUEST = ("Breakout-10M",)
"""Entries that only ``--only`` runs: on a CPU they take days."""


@dataclass
class Runner:
    """
    Does runs, several at a time.

    :param folder: of the records
    :param bar: counts steps
    """

    folder: Path
    bar: tqdm
    _running: dict[Order, subprocess.Popen[str]] = field(default_factory=dict)
    _stopped: bool = False

    def run(self, order: Order) -> float:
        """
        One run, to its end.

        :param order: what to run
        :return: mean return of the final evaluation
        :raises RunFailed: if it left no record
        """
        try:
            return self._run(order)
        except OSError as error:
            raise RunFailed(str(error)) from error
        finally:
            self._running.pop(order, None)

    def _run(self, order: Order) -> float:
        with subprocess.Popen(
            self._command(order),
            cwd=ROOT,
            env=with_threads(1),
            stdout=subprocess.PIPE,  # if this process dies, the run notices when it prints its next evaluation
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process; stop() ends the runs
        ) as process:
            self._running[order] = process
            if self._stopped:  # while the process was started
                process.terminate()
            last, said = self._follow(process)
        if process.returncode != 0 or not record_path(self.folder, *order[:3]).exists():
            raise RunFailed(said)
        return last

    def _command(self, order: Order) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.comparison.one_run", "--out", str(self.folder)]
        for name in ("entry", "side", "seed"):
            command += [f"--{name}", str(getattr(order, name))]
        whole = order.timesteps == PROTOCOL[order.entry].timesteps
        return command if whole else [*command, "--timesteps", str(order.timesteps)]

    def _follow(self, process: subprocess.Popen[str]) -> tuple[float, str]:
        """Count the steps that a run reports, until it ends. Returns its last evaluation, and its last other lines."""
        done, last, said = 0, float("nan"), deque[str](maxlen=30)
        for line in process.stdout or []:
            if line.startswith(PROGRESS):
                report = json.loads(line.removeprefix(PROGRESS))
                self.bar.update(report["timesteps"] - done)
                done, last = report["timesteps"], report["return"]
            else:
                said.append(line)
        return last, "".join(said)

    def stop(self) -> None:
        """End the runs in progress."""
        self._stopped = True
        for process in list(self._running.values()):
            process.terminate()


def run_all(orders: list[Order], options: argparse.Namespace) -> list[Order]:
    """
    Do all runs, and say what came of each.

    :param orders: see :func:`plan`
    :param options: see :func:`parse_options`
    :return: the runs that failed
    """
    failed = []
    total = sum(order.timesteps for order in orders)
    with tqdm(total=total, unit=" steps", unit_scale=True, disable=not options.progress, smoothing=0.05) as bar:
        runner = Runner(options.out, bar)
        pool = ThreadPoolExecutor(options.jobs)
        futures = {pool.submit(runner.run, order): order for order in orders}
        pending: set[Future[float]] = set(futures)
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    failed += _report(futures[future], future, len(orders) - len(pending), len(orders))
        finally:  # Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            pool.shutdown()
    return failed


def _report(order: Order, future: Future[float], position: int, total: int) -> list[Order]:
    try:
        failed, said = [], f"{order}: {future.result():.1f}"
    except RunFailed as error:
        failed, said = [order], f"{order} FAILED:\n{error}"
    with tqdm.external_write_mode():
        print(f"[{position}/{total}] {said}", flush=True)  # at once into a log, too
    return failed


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    shared: dict[str, Any] = {"out": Path("runs/compare"), "scale": 1.0, "progress": True}
    parser = command_line("benchmarks.compare", "train SB3's PPO and ScratchPPO side by side, and keep records", **shared)
    at_least_1 = number(int, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--only", action="append", choices=PROTOCOL, help="this entry (may be given several times)")
    parser.add_argument("--side", action="append", choices=SIDES, help="only this side (may be given several times)")
    parser.add_argument("--seeds", type=at_least_1, help="at most so many of an entry's seeds")
    parser.add_argument("--jobs", type=at_least_1, default=cores, help="runs at a time (%(default)s, the cores)")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and run nothing")
    return parser.parse_args(arguments)


def main() -> int:
    """Do the runs that are not finished and can be done here. Returns the exit status: 1 if a run failed, 130 after Ctrl-C."""
    options = parse_options()
    orders = plan(options)
    try:
        to_do = [order for order in orders if read_run(options.out, *order) is None]
    except ValueError as error:
        sys.exit(f"compare: {error}")
    print(f"{len(orders) - len(to_do)} of {len(orders)} runs are finished in {options.out}", flush=True)
    if options.list:
        print("\n".join(f"{'to do   ' if order in to_do else 'finished'}  {order}" for order in orders))
        return 0
    left_out = {order: reason for order in to_do if (reason := missing(PROTOCOL[order.entry].sides[order.side]))}
    for reason in dict.fromkeys(left_out.values()):
        print(f"left out, for want of {reason}: {', '.join(str(order) for order, why in left_out.items() if why == reason)}")
    to_do = [order for order in to_do if order not in left_out]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run is left behind
    try:
        failed = run_all(to_do, options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped")
        return 130
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(map(str, failed))}; the same command tries them again")
        return 1
    done = "all but the runs left out are" if left_out else "all"
    print(f"{done} finished; next: python -m benchmarks.report --results {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
