"""A process of its own for each check and each figure: nobody's memory, caches or accidents are another's."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.record import ROOT

__all__ = ["answer_of", "start"]


def start(module: str, order: Any) -> subprocess.Popen[str]:
    """
    Begin ``python -m module`` with the order as its only argument.

    :param module: prints one line of JSON at its end
    :param order: anything that JSON can hold
    """
    command = [sys.executable, "-m", module, json.dumps(order)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer_of(child: subprocess.Popen[str], seconds: float) -> Any:
    """
    What a process has printed at its end; a text if there is nothing, that says why.

    :param child: of :func:`start`
    :param seconds: after which it is ended
    """
    try:
        printed, errors = child.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return "its time was up"
    if child.returncode == 0:
        return json.loads(printed.splitlines()[-1])
    return (errors.strip().splitlines() or [f"it ended with status {child.returncode}"])[-1]
