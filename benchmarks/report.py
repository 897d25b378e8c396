"""
Tables and pictures of the comparison with SB3's PPO, from the records of :mod:`benchmarks.compare` alone.

``make report`` makes the committed ones anew, from the committed records::

    python -m benchmarks.report
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison.figures import plot_curves, plot_differences
from benchmarks.comparison.protocol import PROTOCOL
from benchmarks.comparison.records import Records, load_records
from benchmarks.comparison.tables import headline, report
from benchmarks.options import command_line
from benchmarks.record import RESULTS

__all__ = ["HEADLINE_ENTRIES", "main", "write_report"]

HEADLINE_ENTRIES = ("CartPole-v1", "Breakout-500k", "Breakout-10M")
"""In the README's picture."""

_FIGURES = {
    "headline.png": "Return against the time of training on CartPole and Breakout",
    "differences.png": "Differences from SB3's PPO in units of the margin",
    "sample_efficiency.png": "Return against environment steps",
    "training_time.png": "Return against the time of training",
}


def write_report(records: Records, out: Path) -> list[Path]:
    """
    Write ``report.md`` and its pictures.

    :param records: see :func:`benchmarks.comparison.records.load_records`
    :param out: folder
    :return: the files written
    """
    out.mkdir(parents=True, exist_ok=True)
    headline_png, differences, steps, seconds = (out / name for name in _FIGURES)
    plot_curves(records, [(name, "seconds") for name in HEADLINE_ENTRIES], headline_png)
    plot_differences(records, differences)
    plot_curves(records, [(name, "steps") for name in PROTOCOL], steps)
    plot_curves(records, [(name, "seconds") for name in PROTOCOL], seconds)
    text = out / "report.md"
    text.write_text(report(records, _FIGURES.items()), encoding="utf-8")
    return [text, headline_png, differences, steps, seconds]


def main() -> None:
    """Write the report of the command line's records, and print the headline."""
    shared: dict[str, Any] = {"results": RESULTS / "compare", "out": None}
    parser = command_line("benchmarks.report", "tables and pictures of what benchmarks.compare kept", **shared)
    options = parser.parse_args()
    try:
        records = load_records(options.results)
    except ValueError as error:
        sys.exit(f"report: {error}")
    if not any(records.values()):
        sys.exit(f"report: no records in {options.results}; python -m benchmarks.compare --out {options.results} makes them")
    for path in write_report(records, options.out or options.results):
        print(f"wrote {path}")
    print(f"\n{headline(records)}")


if __name__ == "__main__":
    main()
