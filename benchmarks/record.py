"""Where a figure comes from: commit, machine, versions and command, for the files in ``benchmarks/results/``."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch as th

from benchmarks import AVX2_ONLY

__all__ = ["RESULTS", "ROOT", "provenance", "save_result", "with_threads", "write_json"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


_PACKAGES = ("torch", "stable-baselines3", "rl_zoo3", "gymnasium", "numpy", "ale-py")


def provenance(module: str, commit: str | None = None) -> dict[str, Any]:
    """
    What it takes to judge a figure, or to get it again.

    :param module: the benchmark's name, as in ``python -m module``
    :param commit: of a tree without ``.git``, of which git knows nothing
    :return: commit (``-dirty`` if tracked files other than results differ from it, ``None`` if nobody knows), command,
        machine, and versions, of which those of packages that are not installed are ``None``
    """
    variable = f"{AVX2_ONLY}=1 " if os.environ.get(AVX2_ONLY) == "1" else ""
    return {
        "command": variable + shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit() or commit,
        "machine": {
            "cpu": _cpu_model(),
            "instructions": th.backends.cpu.get_cpu_capability(),  # the widest that torch uses: AVX2, AVX512, DEFAULT ...
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
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


def save_result(name: str | None, sources: Iterable[Path]) -> list[Path]:
    """
    Copy what a benchmark wrote to ``benchmarks/results/``, for the README and the handbook.

    :param name: of the copies, which keep their endings; ``None`` for no copies
    :param sources: the files
    :return: the copies
    """
    if name is None:
        return []
    RESULTS.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(source, RESULTS / f"{name}{source.suffix}")) for source in sources]


def keep(name: str, record: dict[str, Any], table: str, out: Path, saved_as: str | None) -> None:
    """
    Write what a benchmark has measured, and print it.

    :param name: of the file in ``out``, without its ending
    :param record: all of it
    :param table: what people read of it
    :param out: folder
    :param saved_as: see :func:`save_result`
    """
    path = out / f"{name}.json"
    write_json(path, record)
    print(f"\n{table}\n")
    for written in (path, *save_result(saved_as, [path])):
        print(f"wrote {written}")


def with_threads(n_threads: int) -> dict[str, str]:
    """Environment variables for a child process whose torch and matrix libraries have so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(n_threads))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    if not (ROOT / ".git").exists():  # the tree may lie in a repository of somebody else's
        return None
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() says no more than "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
