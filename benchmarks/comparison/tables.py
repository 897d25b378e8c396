"""The comparison in words and numbers: Markdown, made of the records alone."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from benchmarks.comparison.inference import (
    Estimate,
    difference,
    interquartile_mean,
    mean,
    probability_of_improvement,
    verdict,
)
from benchmarks.comparison.protocol import PROTOCOL, SIDES, Entry
from benchmarks.comparison.records import (
    CLOCKS,
    Records,
    Run,
    clock,
    commits,
    final_returns,
    paired,
    same_weights,
    training_returns,
    training_seconds,
)
from benchmarks.markdown import markdown_table

__all__ = ["appendix", "details", "headline", "identity", "learned", "origins", "report"]

Sides = dict[str, dict[int, Run]]

_HEADLINE = ("environment", "steps", "seeds", "SB3's PPO", "ScratchPPO", "difference", "verdict", "times as fast")
_DETAILS = (
    "",
    "seeds",
    "mean",
    "interquartile mean",
    "last 100 training episodes",
    "mean ± std over episodes",
    "P(better than SB3)",
    "training, s",
    "of CPU time",
)

_INTRODUCTION = """
Made by `python -m benchmarks.report` from the records beside this file, one per run; each names its own command. Question,
margins and settings stand in [protocol.py](../../comparison/protocol.py), and were fixed before the runs.

Returns are means over the evaluation episodes after training, averaged over seeds, with 95% percentile bootstrap intervals in
brackets; with few seeds these are too narrow (for normal scores, those of five seeds cover the mean about 85 times in 100, of
ten 90). *Difference* is ScratchPPO minus SB3, paired by seed, with Student's 95% interval: within the margin, the two are
*equivalent*; clear of zero, one is better; else it is *not shown* that they are equivalent. Where every seed scores the same
on both sides, as at a ceiling, there is no variance to estimate and no interval. *Times as fast* is SB3's training time over
ScratchPPO's by the wall clock: the median over seeds, with the smallest and the largest, while another run had the other core.
Where a run had to wait for its core for more than 5% of its time, no speed is given, and curves are drawn over CPU time.
"""


def headline(records: Records) -> str:
    """
    One row per entry: SB3's PPO beside ScratchPPO with its fastest engine, on the same environments.

    :param records: all of them
    """
    return markdown_table(_HEADLINE, [_headline_row(name, entry, records[name]) for name, entry in PROTOCOL.items()])


def _headline_row(name: str, entry: Entry, sides: Sides) -> list[str]:
    ours, theirs = paired(name, sides, "fast" if "fast" in entry.sides else "reference")
    if not ours:
        return [name, f"{entry.timesteps:,}", _count(0, entry), "*not run yet*", "*not run yet*", "", "", ""]
    one = next(iter(ours.values()))
    return [
        name,
        f"{one['timesteps']:,}",
        _count(len(ours), entry),
        _interval(mean(final_returns(theirs))) + ("" if entry.baseline == "sb3" else ", reference"),
        f"{_interval(mean(final_returns(ours)))}, `{one['engine']}`",
        _interval(difference(final_returns(ours), final_returns(theirs)), sign="+"),
        _judgement(entry, ours, theirs),
        _speed(ours, theirs),
    ]


def _judgement(entry: Entry, ours: dict[int, Run], theirs: dict[int, Run]) -> str:
    """What may be said of a side; nothing before the protocol's seeds and steps have been run."""
    if same_weights(ours, theirs):
        return "the same bits"
    if len(ours) < entry.seeds or any(run["timesteps"] < entry.timesteps for run in ours.values()):
        return "no verdict before all seeds and steps are run"
    if len(ours) > 1 and np.array_equal(final_returns(ours), final_returns(theirs)):
        return "equal with every seed"
    return verdict(difference(final_returns(ours), final_returns(theirs)), entry.margin)


def details(name: str, sides: Sides) -> str:
    """
    Everything about an entry: a row per side, and how each compares with SB3's PPO.

    :param name: the entry's
    :param sides: its runs
    """
    entry = PROTOCOL[name]
    text = [f"### {name}", ""]
    if entry.note:
        text += [entry.note, ""]
    if not sides:
        return "\n".join([*text, "*Not run yet.*", ""])
    rows = [_details_row(name, side, sides) for side in sides]
    whole = all(run["timesteps"] >= entry.timesteps for runs in sides.values() for run in runs.values())
    if entry.zoo is not None and whole:
        rows.append(["rl-zoo3's own score", "1", "", "", "", f"{entry.zoo.mean:.1f} ± {entry.zoo.std:.1f}", "", "", ""])
    text += [markdown_table(_DETAILS, rows), ""]
    text += [_compared(name, side, sides) for side in sides if side != entry.baseline]
    mixed = _mixed({name: sides})
    text += [f"- {mixed}"] if mixed else []
    return "\n".join([*text, ""])


def _mixed(records: Records) -> str:
    """A warning where runs are not of one commit; the report names the commits at its end."""
    found = set().union(*map(commits, records.values()))
    return f"**These runs are of {len(found)} commits**, whose code may differ." if len(found) > 1 else ""


def _details_row(name: str, side: str, sides: Sides) -> list[str]:
    entry, runs = PROTOCOL[name], sides[side]
    one = next(iter(runs.values()))
    episodes = np.concatenate([run["evaluations"][-1]["returns"] for run in runs.values()])
    precision = "" if one["precision"] == "fp32" else f" {one['precision']}"
    return [
        f"{SIDES[side]} (`{one['engine']}`{precision}, {one['envs']})" if side != "sb3" else SIDES[side],
        _count(len(runs), entry),
        _interval(mean(final_returns(runs))),
        _interval(interquartile_mean(final_returns(runs))),
        _interval(mean(training_returns(runs))),
        f"{episodes.mean():.1f} ± {episodes.std():.1f}",
        "" if side == entry.baseline else _better(*paired(name, sides, side)),
        *(f"{np.median(training_seconds(runs, field)):.1f}" for field in CLOCKS),
    ]


def _better(ours: dict[int, Run], theirs: dict[int, Run]) -> str:
    if len(ours) < 2 or same_weights(ours, theirs):
        return ""
    return _interval(probability_of_improvement(final_returns(ours), final_returns(theirs)), digits=2)


def _compared(name: str, side: str, sides: Sides) -> str:
    entry, (ours, theirs) = PROTOCOL[name], paired(name, sides, side)
    other = "SB3's PPO" if entry.baseline == "sb3" else "the reference"
    if not ours:
        return f"- {SIDES[side]}: no seed in common with {other} yet"
    apart = _interval(difference(final_returns(ours), final_returns(theirs)), sign="+")
    judgement = _judgement(entry, ours, theirs)
    return f"- {SIDES[side]}: differs from {other} by {apart}: {judgement}; times as fast: {_speed(ours, theirs)}"


def learned(name: str, sides: Sides) -> str:
    """
    Whether the fast engine's agents are as good, in a sentence.

    :param name: an entry's
    :param sides: its runs
    """
    ours, theirs = paired(name, sides, "fast")
    apart = _interval(difference(final_returns(ours), final_returns(theirs)), sign="+", digits=2)
    return f"{len(ours)} seeds a side of {name} differ by {apart}: {_judgement(PROTOCOL[name], ours, theirs)}"


def identity(records: Records) -> str:
    """
    In how many runs the reference engine ended with the weights that SB3's PPO ended with.

    :param records: all of them
    """
    same = total = 0
    for name, sides in records.items():
        ours, theirs = paired(name, sides, "reference") if PROTOCOL[name].baseline == "sb3" else ({}, {})
        total += len(ours)
        same += sum(same_weights({seed: run}, theirs) for seed, run in ours.items())
    return f"In {same} of {total} pairs of runs, the reference engine ended with SB3's weights, to the last bit."


def appendix(records: Records) -> str:
    """
    Every seed's final return, with that of the last 100 training episodes in parentheses.

    :param records: all of them
    """
    text = []
    for name, sides in records.items():
        if sides:
            seeds = sorted(set().union(*sides.values()))
            rows = [[str(seed), *(_one_seed(runs, seed) for runs in sides.values())] for seed in seeds]
            text += [f"### {name}, seed by seed", "", markdown_table(["seed", *(SIDES[side] for side in sides)], rows), ""]
    return "\n".join(text)


def _one_seed(runs: dict[int, Run], seed: int) -> str:
    if seed not in runs:
        return ""
    one = {seed: runs[seed]}
    return f"{final_returns(one)[0]:.2f} ({training_returns(one)[0]:.2f})"


def origins(records: Records) -> str:
    """
    On which machines, with which versions and from which commits the runs were made.

    :param records: all of them
    """
    runs = [run for sides in records.values() for by_seed in sides.values() for run in by_seed.values()]
    made = [json.dumps([run["machine"], run["versions"], run["commit"]]) for run in runs]
    lines = []
    for origin in dict.fromkeys(made):
        machine, versions, commit = json.loads(origin)
        with_versions = ", ".join(f"{name} {number}" for name, number in versions.items())
        lines.append(
            f"- {made.count(origin)} runs at commit `{commit}` on {machine['cores']} cores of {machine['cpu']} "
            f"({machine['system']}), one thread each for torch and NumPy: {with_versions}"
        )
    return "\n".join(lines)


def report(records: Records, figures: Iterable[tuple[str, str]]) -> str:
    """
    The whole report.

    :param records: all of them
    :param figures: file names of the pictures, with what they show
    """
    parts = [
        "# ScratchPPO beside SB3's PPO",
        _INTRODUCTION,
        headline(records),
        identity(records),
        *([_mixed(records)] if _mixed(records) else []),
        *(f"![{shown}]({name})" for name, shown in figures),
        "## Entry by entry",
        *(details(name, sides) for name, sides in records.items()),
        "## Appendix: all seeds",
        "Mean return of the evaluation after training (in parentheses: of the last 100 training episodes).",
        appendix(records),
        "## Where the figures come from",
        origins(records),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _count(seeds: int, entry: Entry) -> str:
    return str(seeds) if seeds >= entry.seeds else f"{seeds} of {entry.seeds}"


def _speed(ours: dict[int, Run], theirs: dict[int, Run]) -> str:
    if clock({"ours": ours, "theirs": theirs}) != "seconds":
        return "not measured"
    ratios = training_seconds(theirs, "seconds") / training_seconds(ours, "seconds")
    spread = f" ({ratios.min():.2f} to {ratios.max():.2f})" if len(ratios) > 1 else ""
    return f"{np.median(ratios):.2f}{spread}"


def _interval(estimate: Estimate, sign: str = "", digits: int = 1) -> str:
    if np.isnan(estimate.value):
        return "none"
    number = f"{sign}.{digits}f"
    bounds = "" if np.isnan(estimate.low) else f" [{estimate.low:{number}}, {estimate.high:{number}}]"
    return f"{estimate.value:{number}}{bounds}"
