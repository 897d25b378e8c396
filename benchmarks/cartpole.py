"""
The main job: ScratchPPO beside SB3's PPO on CartPole-v1, with rl-zoo3's hyperparameters.

SB3's PPO, ScratchPPO's reference engine and the engine that ``engine="auto"`` takes learn from the same seed, one after the
other and each in a process of its own, and are evaluated on the same episodes on the way and at the end. Prints a table,
and writes learning curves, the models and a record of all figures. Fails if the reference did not end with SB3's bits.
``make cartpole`` runs it; the figures in ``docs/results.md`` come from::

    python -m benchmarks.cartpole --rounds 5 --save-result cartpole
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from benchmarks.cases import Contestant
from benchmarks.comparison.figures import plot_curves
from benchmarks.comparison.one_run import train
from benchmarks.comparison.protocol import PROTOCOL
from benchmarks.comparison.records import Run, same_weights, training_seconds
from benchmarks.markdown import markdown_table
from benchmarks.options import command_line, number
from benchmarks.record import provenance, save_result, with_threads, write_json

__all__ = ["ENTRY", "main", "make_record", "parse_options", "run_all", "summary", "table"]

Record = dict[str, Any]
Runs = dict[str, dict[int, Run]]
"""By side and seed."""

ENV_ID = "CartPole-v1"
ENTRY = dataclasses.replace(
    PROTOCOL[ENV_ID],
    sides={"sb3": Contestant("sb3", "dummy"), "reference": Contestant("torch", "dummy"), "fast": Contestant("auto", "dummy")},
    evaluations=10,
)
"""The comparison's, but for the sides."""


def run(side: str, seed: int, timesteps: int, model_path: Path) -> Run:
    """
    One of them, trained and evaluated, in this process, on one thread.

    :param side: key of the entry's sides
    :param seed: of the model and its environments
    :param timesteps: environment steps
    :param model_path: where the trained model is saved
    """
    th.set_num_threads(1)
    model, measured = train(ENTRY, side, seed, timesteps, tell)
    model.save(model_path)
    return measured


def tell(timesteps: int, mean: float) -> None:
    """Print a line about an evaluation."""
    print(f"  {timesteps:>9,} steps: {mean:.1f}", flush=True)


def run_all(options: argparse.Namespace) -> Runs:
    """
    All of them in turns, ``options.rounds`` times, each in a fresh process.

    :param options: see :func:`parse_options`
    """
    os.environ.update(with_threads(1))  # for the processes; this one computes nothing
    runs: Runs = {side: {} for side in ENTRY.sides}
    fresh = multiprocessing.get_context("spawn")
    for seed in range(options.seed, options.seed + options.rounds):
        for side in ENTRY.sides:
            print(f"{title(side)}: seed {seed}, {options.timesteps:,.0f} steps", flush=True)
            path = options.out / f"{side}_{seed}.zip"
            with ProcessPoolExecutor(1, fresh) as pool:
                runs[side][seed] = pool.submit(run, side, seed, int(options.timesteps), path).result()
    return runs


def title(side: str, engine_used: str = "") -> str:
    """
    :param side: key of the entry's sides
    :param engine_used: what ``"auto"`` took; empty before that is known
    """
    if side == "sb3":
        return "SB3 PPO"
    engine = ENTRY.sides[side].engine
    took = f", which took {engine_used}" if engine_used not in ("", engine) else ""
    return f"ScratchPPO, engine {engine}{took}"


def make_record(runs: Runs, options: argparse.Namespace) -> Record:
    """
    All figures, with where they come from.

    :param runs: from :func:`run_all`
    :param options: see :func:`parse_options`
    """
    return {
        **provenance("benchmarks.cartpole"),
        "env": ENV_ID,
        "hyperparameters": ENTRY.task().described(),
        "timesteps": options.timesteps,
        "rounds": options.rounds,
        "sides": {side: _figures(runs[side], runs["sb3"], side) for side in runs},
        "runs": [{"seed": seed, "side": side, **run} for side, by_seed in runs.items() for seed, run in by_seed.items()],
    }


def _figures(ours: dict[int, Run], theirs: dict[int, Run], side: str) -> Record:
    """Of one side, beside SB3's runs of the same seeds."""
    ratios = training_seconds(theirs, "seconds") / training_seconds(ours, "seconds")
    returns = np.concatenate([run["evaluations"][-1]["returns"] for run in ours.values()])
    return {
        "title": title(side, next(iter(ours.values()))["engine_used"]),
        "seconds": float(np.median(training_seconds(ours, "seconds"))),
        "ratio": {name: round(float(of(ratios)), 3) for name, of in (("median", np.median), ("min", np.min), ("max", np.max))},
        "returns": {"mean": round(returns.mean(), 2), "std": round(returns.std(), 2), "episodes": len(returns)},
        "same_bits_as_sb3": same_weights(ours, theirs),
    }


def summary(record: Record) -> str:
    """
    The handbook's sentence about a record (``tests/test_readme.py`` compares them).

    :param record: from :func:`make_record`
    """
    fast, reference = record["sides"]["fast"], record["sides"]["reference"]
    bits = "the same bits" if reference["same_bits_as_sb3"] else "other bits"
    rounds = (
        f"medians of {record['rounds']} rounds, with the smallest and the largest" if record["rounds"] > 1 else "one round"
    )
    return (
        f"the reference ends with {bits} and is {_speed(reference)} times as fast as SB3's PPO; `auto` is **{_speed(fast)} "
        f"times as fast** and returns {_returns(fast)} over {fast['returns']['episodes']} evaluation episodes ({rounds})"
    )


def table(record: Record) -> str:
    """
    A row for each of the three.

    :param record: from :func:`make_record`
    """
    rows = []
    for who, side in record["sides"].items():
        bits = "" if who == "sb3" else "identical to SB3's" if side["same_bits_as_sb3"] else "others"
        rows.append((side["title"], _returns(side), f"{side['seconds']:.1f}", _speed(side), bits))
    episodes = record["sides"]["sb3"]["returns"]["episodes"]
    return markdown_table(("", f"return, {episodes} episodes", "training, s", "times as fast", "parameters"), rows)


def _returns(figures: Record) -> str:
    return f"{figures['returns']['mean']:.1f} ± {figures['returns']['std']:.1f}"


def _speed(figures: Record) -> str:
    ratio = figures["ratio"]
    spread = "" if ratio["min"] == ratio["max"] else f" ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return f"{ratio['median']:.2f}{spread}"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    shared: dict[str, Any] = {"out": Path("runs/cartpole"), "seed": 0, "rounds": 1, "save_result": None}
    parser = command_line("benchmarks.cartpole", "ScratchPPO beside SB3's PPO on CartPole-v1", **shared)
    parser.add_argument("--timesteps", type=number(float, 1), default=ENTRY.timesteps, help="environment steps (%(default)g)")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the benchmark of the command line. Returns 1 if the reference's bits were not SB3's."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = run_all(options)
    record = make_record(runs, options)
    curves, figures = options.out / "learning_curve.png", options.out / "record.json"
    titles = {side: figures_of["title"] for side, figures_of in record["sides"].items()}
    plot_curves({ENV_ID: runs}, [(ENV_ID, "steps"), (ENV_ID, "seconds")], curves, columns=2, titles=titles)
    write_json(figures, record)
    print(f"\n{table(record)}\n")
    for path in (curves, figures, *options.out.glob("*.zip"), *save_result(options.save_result, [curves, figures])):
        print(f"wrote {path}")
    if options.save_result is not None:
        print(f"\nfor docs/results.md: {summary(record)}")
    if not record["sides"]["reference"]["same_bits_as_sb3"]:
        print("\nthe reference did not end with SB3's parameters, as it must", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
