"""
One timed run in a process of its own, so that nobody's memory, caches or threads are another's.

``benchmarks.throughput`` starts it and reads the JSON that it prints::

    python -m benchmarks.timed_run '{"case": "cartpole_zoo", "contestant": {"engine": "sb3", "envs": "dummy"}, "started": 0}'
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch as th

from benchmarks.cases import CASES, Case, Contestant, build, scaled
from benchmarks.floor import environment_seconds, product_seconds

__all__ = ["main", "peak_memory", "subprocess_memory", "subprocesses", "time_floor", "time_training"]


def peak_memory() -> float:
    """
    The most memory that this process has held at once, in MiB; that of its subprocesses is :func:`subprocess_memory`.

    Linux lets a child begin with its parent's ``ru_maxrss``, so that ``VmHWM`` is asked for where there is one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    if found is not None:
        return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def subprocess_memory() -> float:
    """
    What the processes that this one has started, and theirs, hold now, in MiB; 0 where there is no ``/proc`` to tell.

    It is their *proportional set size*: a page that n processes share counts as 1/n of a page for each.
    """
    return sum(map(_proportional_set_size, subprocesses()))


def subprocesses() -> set[int]:
    """The processes that this one has started, and theirs, by ``/proc``; ended ones too, until they are waited for."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # processes end at any time
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()  # names may hold spaces
            parents[int(stat.parent.name)] = int(fields[1])
    family = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return family - {os.getpid()}


def _proportional_set_size(pid: int) -> float:
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8"), re.MULTILINE)
        return 0.0 if found is None else int(found[1]) / 1024
    return 0.0


def time_training(case: Case, contestant: Contestant, seed: int, started: float) -> dict[str, Any]:
    """
    Only ``learn`` is timed; besides, how long it took from the process's start to the end of the first update, and what memory
    was held, environments in processes of their own included.

    :param case: what is trained
    :param contestant: by whom
    :param seed: of the run
    :param started: ``time.time()`` when the process was started
    """
    model = build(case, contestant, seed)
    train = model.train
    first_update: list[float] = []

    def timed_train() -> None:
        train()
        if not first_update:
            first_update.append(time.time() - started)

    model.train = timed_train  # type: ignore[method-assign]  # the algorithm calls it by this name
    start = time.perf_counter()
    model.learn(case.timesteps)
    seconds = time.perf_counter() - start
    memory = peak_memory() + subprocess_memory()  # environments hold the same all the time
    model.get_env().close()  # type: ignore[union-attr]  # it has one
    return {"seconds": seconds, "first_update_seconds": first_update[0], "peak_memory_mib": memory}


def time_floor(case: Case, contestant: Contestant, seed: int) -> dict[str, Any]:
    """
    What ``contestant`` cannot do without.

    :param case: what is trained
    :param contestant: for the environments, threads and precision
    :param seed: of the environments
    """
    policy = build(case, Contestant("sb3", "dummy"), seed).policy
    products = product_seconds(policy, case.task(), case.timesteps, contestant.precision)
    return {"environments": environment_seconds(case, contestant, seed), "products": products}


def main() -> None:
    """Do what the first argument says, and print what was measured."""
    order = json.loads(sys.argv[1])
    contestant = Contestant(**order["contestant"])
    case = scaled(CASES[order["case"]], order.get("scale", 1.0))
    th.set_num_threads(contestant.threads)
    seed = order.get("seed", 0)
    if order.get("floor"):
        print(json.dumps(time_floor(case, contestant, seed)))
    else:
        print(json.dumps(time_training(case, contestant, seed, order["started"])))


if __name__ == "__main__":
    main()
