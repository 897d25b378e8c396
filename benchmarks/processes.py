"""
Steps per second of one agent in one process and in several, which ``torchrun`` starts.

Everybody trains the same case with the same number of environments, rows per minibatch and timesteps: one process with one
thread, one with as many threads as there are processes, and that many processes with one thread each. They take turns; a
figure is the median over the rounds of the time of one process with one thread divided by the other's in the same round::

    python -m benchmarks.processes --rounds 5 --save-result processes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch as th

from benchmarks.cases import CASES, Case, Contestant, build, scaled
from benchmarks.markdown import markdown_table
from benchmarks.options import command_line, number
from benchmarks.record import ROOT, keep, provenance, with_threads
from benchmarks.tasks import Task
from sb3_ppo_from_scratch.distributed import n_processes

_LUNAR = {"n_steps": 256, "batch_size": 64, "n_epochs": 10, "policy_kwargs": {"net_arch": [256, 256]}}
PROCESS_CASES: dict[str, Case] = {
    "cartpole_zoo": CASES["cartpole_zoo"],
    "lunar_lander": Case(
        "LunarLanderContinuous-v3, two layers of 256",
        "LunarLanderContinuous-v3",
        16_384,
        lambda: Task(0, "MlpPolicy", 8, _LUNAR),
    ),
    "breakout": CASES["breakout"],
}
"""Those of :mod:`benchmarks.cases`, and a larger network whose environments cost little."""


def shared(case: Case) -> Case:
    """What one of several processes trains: its share of the environments."""
    task = case.task()
    arguments = {**task.arguments, "data_parallel": True}
    return dataclasses.replace(case, task=lambda: task._replace(n_envs=task.n_envs // n_processes(), arguments=arguments))


def time_one(order: dict[str, Any]) -> None:
    """
    Train in this process, which may be one of several, and print how long that took.

    :param order: ``case``, ``scale``, ``threads`` and ``seed``
    """
    th.set_num_threads(order["threads"])
    case = scaled(PROCESS_CASES[order["case"]], order["scale"])
    model: Any = build(shared(case), Contestant("auto", "dummy", order["threads"]), order["seed"])
    start = time.perf_counter()
    model.learn(case.timesteps)
    if model.is_rank_zero:
        print(json.dumps({"seconds": time.perf_counter() - start, "timesteps": model.num_timesteps}))


def run(order: dict[str, Any], processes: int) -> dict[str, float]:
    """
    Training in fresh processes.

    :param order: of :func:`time_one`
    :param processes: how many
    :return: what the first of them printed
    :raises RuntimeError: if it failed
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "benchmarks.processes", "--one", json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, env=with_threads(order["threads"]), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{processes} processes failed on {order['case']}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """
    All settings in turns.

    :param name: key of :data:`PROCESS_CASES`
    :param options: of :func:`parse_options`
    """
    settings = [(1, 1), (1, options.processes), (options.processes, 1)]
    rounds: list[list[float]] = []
    for index in range(options.rounds):
        rounds.append([])
        for processes, threads in settings:
            order = {"case": name, "scale": options.scale, "threads": threads, "seed": options.seed + index}
            done = run(order, processes)
            rounds[-1].append(done["timesteps"] / done["seconds"])
        print(f"{name} {index + 1}/{options.rounds}: {', '.join(f'{speed:,.0f}' for speed in rounds[-1])} steps/s", flush=True)
    rows = []
    for column, (processes, threads) in enumerate(settings):
        speeds = [a_round[column] for a_round in rounds]
        ratios = [a_round[column] / a_round[0] for a_round in rounds]
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows.append({"processes": processes, "threads": threads, "steps_per_second": speeds, "ratio": ratio})
    return {"title": PROCESS_CASES[name].title, "rows": rows}


def table(record: dict[str, Any]) -> str:
    """
    In Markdown.

    :param record: as ``main`` writes it
    """
    columns = ("training", "processes", "threads of each", "steps per second", "times as fast as one thread (spread)")
    lines = []
    for case in record["cases"].values():
        for row in case["rows"]:
            ratio = row["ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            speed = f"{statistics.median(row['steps_per_second']):,.0f}"
            lines.append((case["title"], str(row["processes"]), str(row["threads"]), speed, spread))
    return markdown_table(columns, lines)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    defaults: dict[str, Any] = {"out": Path("runs/processes"), "rounds": 5, "scale": 1.0, "seed": 0, "save_result": None}
    parser = command_line("benchmarks.processes", "one agent in one process and in several", **defaults)
    parser.add_argument("--processes", type=number(int, 2), default=2, help="how many (%(default)s)")
    parser.add_argument("--only", action="append", choices=PROCESS_CASES, help="this case (may be given several times)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark of the command line, or one of its processes."""
    options = parse_options()
    if options.one is not None:
        time_one(options.one)
        return
    record: dict[str, Any] = {**provenance("benchmarks.processes"), "rounds": options.rounds, "scale": options.scale}
    record["cases"] = {name: run_case(name, options) for name in options.only or PROCESS_CASES}
    keep("processes", record, table(record), options.out, options.save_result)


if __name__ == "__main__":
    main()
