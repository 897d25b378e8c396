"""
Tables and pictures of the comparison with SB3's PPO, from the records of :mod:`benchmarks.compare` alone.

``make report`` makes the committed ones anew, from the committed records::

    python -m benchmarks.report
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison.figures import measured_differences, plot_curves, plot_differences, titles_with_engines
from benchmarks.comparison.protocol import PROTOCOL
from benchmarks.comparison.records import Records, load_records
from benchmarks.comparison.tables import headline, report
from benchmarks.options import command_line
from benchmarks.record import RESULTS

__all__ = ["HEADLINE_ENTRY", "main", "write_report"]

HEADLINE_ENTRY = "CartPole-v1"
"""In the first picture; the first that was run where this one was not."""

_FIGURES = {
    "headline.png": "Return over steps and over the time of training",
    "differences.png": "Differences from SB3's PPO in units of the margin",
    "sample_efficiency.png": "Return against environment steps",
    "training_time.png": "Return against the time of training",
}


def write_report(records: Records, out: Path) -> list[Path]:
    """
    Write ``report.md`` and its pictures, which show only what was run.

    :param records: see :func:`benchmarks.comparison.records.load_records`, not empty
    :param out: folder
    :return: the files written
    """
    out.mkdir(parents=True, exist_ok=True)
    headline_png, differences, steps, seconds = (out / name for name in _FIGURES)
    run = [name for name in PROTOCOL if records[name]]
    first = HEADLINE_ENTRY if HEADLINE_ENTRY in run else run[0]
    titles = titles_with_engines(records[first])
    plot_curves(records, [(first, "steps"), (first, "seconds")], headline_png, columns=2, titles=titles)
    plot_curves(records, [(name, "steps") for name in run], steps, columns=min(3, len(run)))
    plot_curves(records, [(name, "seconds") for name in run], seconds, columns=min(3, len(run)))
    pictures = [headline_png, steps, seconds]
    if measured_differences(records):
        plot_differences(records, differences)
        pictures.insert(1, differences)
    text = out / "report.md"
    text.write_text(report(records, [(path.name, _FIGURES[path.name]) for path in pictures]), encoding="utf-8")
    return [text, *pictures]


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
