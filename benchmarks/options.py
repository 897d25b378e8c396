"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["command_line", "number"]


def number(kind: type[int] | type[float], low: float) -> Callable[[str], float]:
    """
    A type for argparse: a number of at least ``low``.

    :param kind: ``int`` or ``float``
    :param low: the smallest that is allowed
    """

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


_SHARED: dict[str, dict[str, Any]] = {
    "commit": {"metavar": "ID", "help": "of this tree, where there is no .git to ask"},
    "out": {"type": Path, "help": "where to write (%(default)s)"},
    "results": {"type": Path, "help": "folder of records, the --out of benchmarks.compare (%(default)s)"},
    "rounds": {"type": number(int, 1), "help": "in each of which everybody has a turn (%(default)s)"},
    "scale": {"type": number(float, 1e-9), "help": "share of the steps, for a quick look (%(default)g)"},
    "seed": {"type": number(int, 0), "help": "of the first run; the next ones count on (%(default)s)"},
    "threads": {"type": number(int, 1), "help": "of torch, on a CPU (%(default)s)"},
    "save_result": {"metavar": "NAME", "help": "write record and picture to benchmarks/results/NAME.* as well"},
    "progress": {"action": argparse.BooleanOptionalAction, "help": "show a progress bar"},
}


def command_line(module: str, description: str, **defaults: Any) -> argparse.ArgumentParser:
    """
    A command's parser, to which it adds what only it has.

    :param module: as in ``python -m module``
    :param description: for ``--help``
    :param defaults: of those shared options that it takes, by the names in ``_SHARED``
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **_SHARED[name])
    return parser
