"""The files of the comparison: one record per run, a model beside each, and what is read from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.protocol import PROTOCOL, Entry
from benchmarks.record import write_json

__all__ = [
    "CLOCKS",
    "Records",
    "Run",
    "clock",
    "commits",
    "final_returns",
    "load_records",
    "model_path",
    "paired",
    "read_run",
    "record_path",
    "same_weights",
    "training_returns",
    "training_seconds",
    "write_record",
]

Run = dict[str, Any]
Records = dict[str, dict[str, dict[int, Run]]]
"""Runs by entry, side and seed."""

CLOCKS = {"seconds": "wall-clock time", "cpu_seconds": "CPU time"}
"""What :func:`clock` chooses from."""


def record_path(folder: Path, entry: str, side: str, seed: int) -> Path:
    """
    :param folder: of all records
    :param entry: key of the protocol
    :param side: key of the entry's sides
    :param seed: the run's
    """
    return folder / entry / f"{side}_{seed}.json"


def model_path(folder: Path, entry: str, side: str, seed: int) -> Path:
    """As :func:`record_path`, for the trained model, which is too large to commit."""
    return folder / "models" / entry / f"{side}_{seed}.zip"


def write_record(path: Path, run: Run) -> None:
    """
    Write a finished run's record, whole or not at all.

    :param path: from :func:`record_path`
    :param run: what JSON can hold
    """
    unfinished = path.with_suffix(".part")
    write_json(unfinished, run)
    os.replace(unfinished, path)


def read_run(folder: Path, entry: str, side: str, seed: int, timesteps: int | None = None) -> Run | None:
    """
    A finished run's record.

    :param folder: of all records
    :param entry: key of the protocol
    :param side: key of the entry's sides
    :param seed: the run's
    :param timesteps: that it must have been trained for; ``None`` for any number
    :return: ``None`` if the run has not been finished
    :raises ValueError: if it was made under another margin, with other hyperparameters, steps, engine or environments
    """
    path = record_path(folder, entry, side, seed)
    if not path.exists():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    for what, had, has in _as_planned(run, PROTOCOL[entry], side):
        if had != has:
            raise ValueError(f"{path} was run under the {what} {had!r}, not the protocol's {has!r}")
    if timesteps is not None and run["timesteps"] != timesteps:
        raise ValueError(f"{path} holds a run of {run['timesteps']:,} steps, not {timesteps:,}: choose another --out")
    return run


def _as_planned(run: Run, entry: Entry, side: str) -> Iterator[tuple[str, Any, Any]]:
    """What a run had beside what the protocol has for it. The first records did not name their hyperparameters."""
    yield "margin", run["margin"], entry.margin
    for what in ("engine", "precision", "envs"):
        yield what, run[what], getattr(entry.sides[side], what)
    if "hyperparameters" in run:
        planned = entry.task().described()
        for name in sorted(run["hyperparameters"].keys() | planned):
            yield f"hyperparameter {name}", run["hyperparameters"].get(name), planned.get(name)


def load_records(folder: Path) -> Records:
    """
    Every finished run of a folder.

    :param folder: of all records
    :raises ValueError: if runs of one entry differ in their steps, or from the protocol as in :func:`read_run`
    """
    records: Records = {}
    for name, entry in PROTOCOL.items():
        records[name] = {}
        timesteps: int | None = None
        for side in entry.sides:
            seeds = sorted(int(path.stem.rpartition("_")[2]) for path in (folder / name).glob(f"{side}_*.json"))
            runs = {}
            for seed in seeds:
                run = read_run(folder, name, side, seed, timesteps)
                assert run is not None, "the file is there"
                timesteps = run["timesteps"]
                runs[seed] = run
            if runs:
                records[name][side] = runs
    return records


def paired(name: str, sides: dict[str, dict[int, Run]], side: str) -> tuple[dict[int, Run], dict[int, Run]]:
    """
    What can be compared seed by seed: nothing else is.

    :param name: an entry's
    :param sides: its runs
    :param side: whose
    :return: its runs and those of the entry's baseline, of the seeds that both have been run with; maybe none
    """
    ours, theirs = sides.get(side, {}), sides.get(PROTOCOL[name].baseline, {})
    seeds = sorted(ours.keys() & theirs.keys())
    return {seed: ours[seed] for seed in seeds}, {seed: theirs[seed] for seed in seeds}


def same_weights(ours: dict[int, Run], theirs: dict[int, Run]) -> bool:
    """Whether there are runs, and each ended with the weights of the other side's run of its seed, to the last bit."""
    return bool(ours) and all(ours[seed]["weights_sha256"] == theirs[seed]["weights_sha256"] for seed in ours)


def final_returns(runs: dict[int, Run]) -> np.ndarray:
    """Mean return over the evaluation episodes after training, ``[n_seeds]``."""
    return np.array([np.mean(run["evaluations"][-1]["returns"]) for run in runs.values()])


def training_returns(runs: dict[int, Run]) -> np.ndarray:
    """Mean return over the last (at most 100) training episodes, ``[n_seeds]``; ``nan`` where none has ended."""
    last = [run["last_training_returns"] for run in runs.values()]
    return np.array([np.mean(returns) if returns else np.nan for returns in last])


def commits(sides: dict[str, dict[int, Run]]) -> set[str]:
    """That an entry's runs are of; none where one record holds them all and names its own."""
    return {run["commit"] for by_seed in sides.values() for run in by_seed.values() if "commit" in run}


def clock(sides: dict[str, dict[int, Run]]) -> str:
    """
    The field of an entry's evaluations by which its runs' times may be compared: ``"seconds"``, by the wall clock.

    If a run had to wait for its core, for more than 5% of its time, or runs are of several commits, and so of different
    days, the wall clock says nothing, and curves are drawn over ``"cpu_seconds"``. These too grow with what else the
    machine does, and no speed is quoted from them. Threads of environments count in full.

    :param sides: the entry's runs
    """
    ends = [run["evaluations"][-1] for runs in sides.values() for run in runs.values()]
    disturbed = any(end["seconds"] > 1.05 * end["cpu_seconds"] for end in ends)
    return "cpu_seconds" if disturbed or len(commits(sides)) > 1 else "seconds"


def training_seconds(runs: dict[int, Run], field: str) -> np.ndarray:
    """
    Time of training without evaluations, ``[n_seeds]``.

    :param runs: of one side, by seed
    :param field: of :func:`clock`
    """
    return np.array([run["evaluations"][-1][field] for run in runs.values()])
