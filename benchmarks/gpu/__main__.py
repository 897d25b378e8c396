"""
The engine of CUDA graphs on one GPU: is it right, how fast is it, and what does it reach on Breakout?

One command checks and measures, and ends within the budget::

    python -m benchmarks.gpu --out runs/gpu

``check`` or ``measure`` does one of the two. A check that fails stops the measurements that it concerns, and no other. A whole
training of 10 million steps, in as many commands as it takes, is :mod:`benchmarks.breakout`'s::

    python -m benchmarks.breakout --device cuda --engine cudagraph --minutes 9 --out runs/breakout-gpu

All of it needs a CUDA device, and says so where there is none. Of packages it needs torch, NumPy, Gymnasium, Stable-Baselines3
and ale-py, and OpenCV for SB3's own environments.

A visit to a machine with a GPU, of 15 minutes and two commands, is ``benchmarks/gpu/visit.sh``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch as th

from benchmarks.gpu.checks import Check, check_all
from benchmarks.gpu.measure import measure, table
from benchmarks.options import command_line, number
from benchmarks.record import provenance, write_json
from sb3_ppo_from_scratch.vec_env import ATARI_BACKENDS

__all__ = ["COMMANDS", "main", "parse_options", "run"]

COMMANDS = ("all", "check", "measure")
_RESERVE = 10.0
"""Seconds of the budget that are left for starting and for writing."""
_CHECKS = 120.0
"""Seconds that the checks may take."""


def gpu_provenance(commit: str | None = None) -> dict[str, Any]:
    """As for all figures, and the GPU."""
    properties = th.cuda.get_device_properties(0)
    gpu = {"name": properties.name, "memory_mib": properties.total_memory // 2**20, "cuda": th.version.cuda}
    return {**provenance("benchmarks.gpu", commit), "gpu": gpu | {"cudnn": th.backends.cudnn.version()}}


def run(options: argparse.Namespace, deadline: float) -> bool:
    """
    Do what the command line asks for; figures are written as they come.

    :param options: see :func:`parse_options`
    :param deadline: ``time.monotonic()`` by which to have ended
    :return: whether all checks passed
    """
    record, path = {**gpu_provenance(options.commit), "checks": [], "rows": []}, options.out / "gpu.json"
    checks: list[Check] = []
    if options.command in ("all", "check"):
        checks = check_all(min(_CHECKS, deadline - time.monotonic()))
        record["checks"] = [{**check._asdict(), "subject": str(check.subject), "passed": check.passed} for check in checks]
        write_json(path, record)
    failed = [check for check in checks if not check.passed]
    if options.command in ("all", "measure"):
        rows = record["rows"]
        for row in measure(options, deadline, failed):
            rows += [row] if row not in rows else []
            write_json(path, record)
            print(told(row), flush=True)
        print(f"\n{table(rows)}\n")
    print(f"{len(failed)} of {len(checks)} checks failed; wrote {path}")
    return not failed


def told(row: dict[str, Any]) -> str:
    """A row in a line, as soon as it is there."""
    said = row.get("skipped") or f"{row['fps']:,.0f} steps/s"
    if "gpu_busy_share" in row:
        said += f", GPU busy {row['gpu_busy_share']:.0%}"
    return f"{row['n_envs']} {row['envs']}, {row['title']}: {said}"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    parser = command_line("benchmarks.gpu", __doc__ or "", out=Path("runs/gpu"), seed=0, commit=None)
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="all", help="check and measure by default")
    parser.add_argument(
        "--budget-seconds",
        type=number(float, 2 * _RESERVE),
        default=570.0,
        help="when to have ended, from the start on (%(default)g)",
    )
    parser.add_argument("--n-envs", type=number(int, 1), nargs="+", default=[8, 32, 128], help="to measure with (%(default)s)")
    parser.add_argument("--backend", choices=ATARI_BACKENDS, default="ale", help="of native environments (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """
    Run the benchmark of the command line.

    :return: 0; 1 if a check failed; 3 if there is no CUDA device
    """
    started = time.monotonic()
    options = parse_options(arguments)
    if not th.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none here; nothing was measured", file=sys.stderr)
        return 3
    return 0 if run(options, started + options.budget_seconds - _RESERVE) else 1


if __name__ == "__main__":
    sys.exit(main())
