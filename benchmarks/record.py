"""Where a figure comes from: commit, machine, versions and command, for the files in ``benchmarks/results/``."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch as th

__all__ = ["RESULTS", "ROOT", "provenance", "write_json"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance(module: str) -> dict[str, Any]:
    """
    What it takes to judge a figure, or to get it again.

    :param module: the benchmark's name, as in ``python -m module``
    :return: commit (``-dirty`` if tracked files differ from it, ``None`` outside a checkout), command, machine, versions
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "stable-baselines3", "rl_zoo3", "gymnasium", "numpy")},
        },
        "torch_threads": th.get_num_threads(),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """
    Write ``record`` so that people can read it and git can compare it.

    :param path: the file; its folder is made if need be
    :param record: anything that JSON can hold
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() says no more than "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
