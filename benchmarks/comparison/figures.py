"""The comparison in pictures, made of the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.comparison.inference import Estimate, difference, mean
from benchmarks.comparison.protocol import PROTOCOL, SIDES
from benchmarks.comparison.records import CLOCKS, Records, Run, clock, commits, final_returns, paired
from benchmarks.drawing import BLACK, BLUE, GREEN, GREY, VERMILION, save_figure, subplots

__all__ = ["Curve", "learning_curve", "measured_differences", "plot_curves", "plot_differences", "titles_with_engines"]

# SB3's line is wide, so that the reference shows on top where the two coincide
_STYLES: dict[str, dict[str, Any]] = {
    "sb3": {"color": VERMILION, "linewidth": 5.0, "alpha": 0.45},
    "reference": {"color": BLACK, "linewidth": 1.3, "linestyle": (0, (4, 2))},
    "fast": {"color": BLUE, "linewidth": 2.0},
    "native": {"color": GREEN, "linewidth": 2.0, "linestyle": (0, (1, 1))},
}
_BAND = "lines: mean return over the seeds; bands: its 95% bootstrap interval; grey dots: rl-zoo3's own score"


class Curve(NamedTuple):
    """Mean return over seeds at each evaluation, ``[n_evaluations]`` each."""

    steps: np.ndarray
    seconds: np.ndarray
    """median over the seeds, of training alone"""
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def learning_curve(runs: dict[int, Run], field: str) -> Curve:
    """
    :param runs: of one side, by seed
    :param field: that holds the time, see :func:`benchmarks.comparison.records.clock`
    """
    rows = [run["evaluations"] for run in runs.values()]
    steps = np.array([[row["timesteps"] for row in run] for run in rows])
    seconds = np.array([[row[field] for row in run] for run in rows])
    returns = np.array([[np.mean(row["returns"]) for row in run] for run in rows])
    estimates = np.array([mean(column) for column in returns.T])
    return Curve(steps[0], np.median(seconds, axis=0), *estimates.T)


def plot_curves(
    records: Records, panels: Sequence[tuple[str, str]], path: Path, columns: int = 3, titles: Mapping[str, str] = SIDES
) -> None:
    """
    Learning curves of all sides of entries that have been run.

    :param records: all of them
    :param panels: an entry each, and against what: ``"steps"`` or ``"seconds"``
    :param path: the PNG to write
    :param columns: panels side by side
    :param titles: of the sides
    """
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, (10, 3.2 * rows + 0.9))
    for axis, (name, against) in zip(axes.flat, panels, strict=False):
        _plot_entry(axis, name, records[name], against)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("return of an evaluation episode")
    sides = [side for side in titles if any(side in records[name] for name, _ in panels)]
    handles = [Line2D([], [], **_STYLES[side]) for side in sides]
    figure.legend(handles, [titles[side] for side in sides], loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(_BAND, fontsize=10, color="#444444")
    save_figure(figure, path)


def _plot_entry(axis: Axes, name: str, sides: dict[str, dict[int, Run]], against: str) -> None:
    entry = PROTOCOL[name]
    axis.set_title(_title(name, sides), fontsize=11)
    thousands, field = against == "steps", clock(sides)
    for side, runs in sides.items():
        curve = learning_curve(runs, field)
        x = curve.steps / 1000 if thousands else curve.seconds
        axis.plot(x, curve.value, **_STYLES[side])
        axis.fill_between(x, curve.low, curve.high, color=_STYLES[side]["color"], alpha=0.15, linewidth=0)
    if entry.zoo is not None:
        axis.axhline(entry.zoo.mean, color="#777777", linestyle=":", linewidth=1.5, zorder=0)
    days = ", on different days" if len(commits(sides)) > 1 else ""
    axis.set_xlabel("environment steps (thousands)" if thousands else f"{CLOCKS[field]} of training (s){days}")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25)


def _title(name: str, sides: dict[str, dict[int, Run]]) -> str:
    seeds = sorted({len(runs) for runs in sides.values()})
    count = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
    return f"{name} ({count} seed{'' if count == '1' else 's'})"


def titles_with_engines(sides: Mapping[str, Mapping[int, Run]]) -> dict[str, str]:
    """
    What the sides of one entry are called in a legend, by the engines that they used.

    :param sides: runs by side and seed
    """
    titles = {}
    for side, runs in sides.items():
        run = next(iter(runs.values()))
        engine = run.get("engine_used", run["engine"])  # older records name only what was asked for, none of them "auto"
        suffix = {"reference": ", the reference", "native": ", native environments"}.get(side, "")
        titles[side] = SIDES[side] if side == "sb3" else f"ScratchPPO, engine {engine}{suffix}"
    return titles


def measured_differences(records: Records) -> list[tuple[str, str, Estimate]]:
    """
    Entry, side and difference of final returns from SB3's PPO, where two seeds or more and a margin make it mean something.

    :param records: all of them
    """
    pairs = {
        (name, side): paired(name, sides, side)
        for name, sides in records.items()
        for side in sides
        if side not in ("sb3", "reference") and PROTOCOL[name].margin
    }
    return [(*who, difference(*map(final_returns, pair))) for who, pair in pairs.items() if len(pair[0]) > 1]


def plot_differences(records: Records, path: Path) -> None:
    """
    Differences of final returns from SB3's PPO with their intervals, in units of the margin.

    :param records: with :func:`measured_differences`
    :param path: the PNG to write
    """
    rows = measured_differences(records)
    figure, axes = subplots(1, 1, (10, 0.55 * len(rows) + 1.9))
    axis = axes[0, 0]
    axis.axvspan(-1, 1, color=GREY, alpha=0.2, linewidth=0)
    axis.axvline(0, color="#777777", linewidth=1)
    for y, (name, side, apart) in enumerate(rows):
        margin = PROTOCOL[name].margin
        assert margin is not None, "as selected"
        low, value, high = (bound / margin for bound in (apart.low, apart.value, apart.high))
        color = _STYLES[side]["color"]
        axis.plot([low, high], [y, y], color=color, linewidth=2.5)
        axis.plot(value, y, "o", color=color, markerfacecolor="white" if np.isnan(low) else color, markersize=8)
    labels = [f"{name}\n{'native environments' if side == 'native' else 'fast engine'}" for name, side, _ in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=10)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    explained = "lines: 95% intervals; open circles: every seed equal; grey: equivalent"
    axis.set_xlabel(f"difference of final return from SB3's PPO, in margins\n({explained})")
    axis.grid(axis="x", alpha=0.25)
    save_figure(figure, path)
