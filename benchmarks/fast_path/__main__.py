"""``python -m benchmarks.fast_path``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch as th

from benchmarks import fast_path
from benchmarks.breakout import ENV_ID
from benchmarks.comparison.one_run import weights_digest
from benchmarks.fast_path.data import GAMES_AT_ONCE, measure_data
from benchmarks.fast_path.products import measure_products
from benchmarks.fast_path.report import load_records, plot_starts, report
from benchmarks.fast_path.reset_rows import measure_reset_rows
from benchmarks.options import command_line, number
from benchmarks.record import RESULTS, provenance, write_json
from benchmarks.tasks import load_task
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.vec_env import make_native_atari_env

__all__ = ["load_agent", "main", "parse_options"]

Record = dict[str, Any]


def load_agent(path: Path) -> tuple[ScratchPPO, Record]:
    """
    :param path: a model's file, or a checkpoint of :mod:`benchmarks.breakout`
    :return: the agent, and what is known of it
    """
    if path.suffix == ".zip":
        model = ScratchPPO.load(path, device="cpu")
    else:
        env = make_native_atari_env(ENV_ID, load_task("atari").n_envs)
        model = ScratchPPO.resume(path, env, device="cpu")
    return model, {"file": path.name, "timesteps": model.num_timesteps, "weights_sha256": weights_digest(model)}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    parser = command_line("benchmarks.fast_path", fast_path.__doc__ or "", out=RESULTS / "fast_path", threads=1)
    parser.add_argument("command", choices=("data", "reset-rows", "products", "report"), help="what to measure, or tell")
    parser.add_argument("--agent", type=Path, help="a model's file, or a checkpoint")
    parser.add_argument("--games", type=number(int, 10), default=100, help="in each kind of environments (%(default)s)")
    parser.add_argument("--run", type=Path, help="record of the run that the agent is of")
    parser.add_argument("--steps", type=number(int, 1), default=2_000, help="of eight games, to count rows in (%(default)s)")
    parser.add_argument("--updates", type=number(int, 4), default=100, help="of each engine (%(default)s)")
    options = parser.parse_args(arguments)
    if options.command != "report" and options.agent is None:
        parser.error(f"--agent is needed for {options.command}")
    if options.command == "reset-rows" and options.run is None:
        parser.error("--run is needed for reset-rows")
    if options.games % GAMES_AT_ONCE:
        parser.error(f"--games must be a multiple of {GAMES_AT_ONCE}, not {options.games}")
    return options


def main() -> None:
    """Do what the command line says."""
    options = parse_options()
    th.set_num_threads(options.threads)
    if options.command == "report":
        try:
            records = load_records(options.out)
        except FileNotFoundError as error:
            sys.exit(f"fast_path: {error.filename} is missing; python -m benchmarks.fast_path --help says what makes it")
        text = report(*records)
        (options.out / "report.md").write_text(text, encoding="utf-8")
        plot_starts(records[0], options.out / "starts.png")
        print(text)
        return
    model, told = load_agent(options.agent)
    if options.command == "data":
        measured = measure_data(model, options.games)
    elif options.command == "reset-rows":
        run = json.loads(options.run.read_text(encoding="utf-8"))
        training = [row for row in run["training"] if row["timesteps"] <= model.num_timesteps]
        measured = measure_reset_rows(model, training, options.steps)
    else:
        measured = measure_products(model, options.updates)
    path = options.out / f"{options.command.replace('-', '_')}.json"
    write_json(path, {**provenance("benchmarks.fast_path"), "agent": told, **measured})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
