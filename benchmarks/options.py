"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["number"]


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
