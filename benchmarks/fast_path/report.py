"""What was measured, in words, tables and a picture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.inference import Estimate, difference_of_means
from benchmarks.drawing import BLUE, GREEN, VERMILION, save_figure, subplots
from benchmarks.fast_path.data import KINDS, OPENING
from benchmarks.fast_path.products import CANDIDATES
from benchmarks.markdown import markdown_table

__all__ = ["differences", "load_records", "plot_starts", "report", "verdict"]

Record = dict[str, Any]


def differences(data: Record, kind: str) -> dict[str, Estimate]:
    """
    Of the agent's means in native environments from those in SB3's, with Welch's intervals.

    :param data: from :func:`measure_data`
    :param kind: of :data:`KINDS`
    """
    ours, theirs = data["kinds"][kind], data["kinds"]["sb3"]
    columns = {"score": "scores", "frames": "frames", "no-ops": "noops"}
    found = {name: difference_of_means(np.array(ours[key]), np.array(theirs[key])) for name, key in columns.items()}
    per_life = [np.array([np.mean(lives) for lives in games["life_rewards"]]) for games in (ours, theirs)]
    return {**found, "reward per life": difference_of_means(*per_life)}


def _of(estimate: Estimate, digits: int = 1) -> str:
    return f"{estimate.value:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def plot_starts(data: Record, path: Path) -> None:
    """
    With how many no-ops games begin, side by side.

    :param data: from :func:`measure_data`
    :param path: the PNG to write
    """
    figure, axes = subplots(1, len(KINDS), (10, 2.8))
    for axis, (kind, title), color in zip(axes.flat, KINDS.items(), (VERMILION, BLUE, GREEN), strict=True):
        counts = Counter(data["kinds"][kind]["noops"])
        axis.bar(list(counts), list(counts.values()), color=color)
        axis.set_title(f"{title}: {min(counts)} to {max(counts)}", fontsize=11)
        axis.set_xlim(-1, 31)
        axis.set_xlabel("no-ops at a game's start (frames)")
    axes[0, 0].set_ylabel(f"games of {data['games']}")
    save_figure(figure, path)


def load_records(folder: Path) -> list[Record]:
    """
    Of data, reset rows and products.

    :param folder: of the three
    :raises FileNotFoundError: if one is missing
    """
    return [json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("data", "reset_rows", "products")]


def verdict(data: Record, reset_rows: Record, products: Record) -> str:
    """
    What the handbook says in a sentence (``tests/test_readme.py`` compares them).

    :param data: of the record ``data.json``
    :param reset_rows: of ``reset_rows.json``
    :param products: of ``products.json``
    """
    ale, envpool = (_of(differences(data, kind)["score"]) for kind in ("ale", "envpool"))
    first, *_, last = (row["share"] for row in reset_rows["over_the_run"])
    fp32, bf16, other = (products["distance"][name][-1] for name in list(CANDIDATES)[1:])
    return (
        f"one agent's mean score over {data['games']} games differs from that in SB3's wrappers by {ale} in native ALE and by "
        f"{envpool} in native EnvPool; reset rows are {first:.1%} of the run's first steps and {last:.1%} of its last; after "
        f"{products['updates'][-1]} updates on the same minibatches the weights of `channels_last` are {fp32:.1%} as far from "
        f"the reference's as these have moved, with bf16 {bf16:.0%}, and the reference's own with its minibatches in "
        f"another order {other:.0%}"
    )


def report(data: Record, reset_rows: Record, products: Record) -> str:
    """
    Everything that was measured; parameters as in :func:`verdict`.
    """
    parts = [
        "# Is the fast path equal?",
        "Made by `python -m benchmarks.fast_path report` from the records beside this file; each names its command.",
        f"In short: {verdict(data, reset_rows, products)}.",
        "## Data",
        _data(data),
        "## Reset rows",
        _reset_rows(reset_rows),
        "## Products",
        _products(products),
    ]
    return "\n\n".join(parts) + "\n"


def _data(data: Record) -> str:
    quantities = {"score": "scores", "frames": "frames", "no-ops": "noops"}
    means = [
        [title, *(f"{np.mean(games[key]):.1f} ± {np.std(games[key]):.1f}" for games in data["kinds"].values())]
        for title, key in quantities.items()
    ]
    apart = {kind: differences(data, kind) for kind in ("ale", "envpool")}
    rows = [[name, *(_of(apart[kind][name], 2) for kind in apart)] for name in apart["ale"]]
    clear = [f"{name} in {KINDS[kind]}" for kind in apart for name, each in apart[kind].items() if each.low * each.high > 0]
    return f"""
One agent, after {data["agent"]["timesteps"]:,} steps of training, plays {data["games"]} games of Breakout in each kind of
environments, with sampled actions and raw rewards. Means ± standard deviations over games:

{markdown_table(("", *KINDS.values()), means)}

Differences of the means from SB3's, with Welch's 95% intervals:

{markdown_table(("", *(KINDS[kind] for kind in apart)), rows)}

Clear of zero: {", ".join(clear) or "none"}. Of {2 * len(rows)} such intervals, one in twenty is so by chance.

![No-ops at a game's start](starts.png)

Frames are without a game's no-ops in EnvPool, and with them in the other two. A life begins with a no-op (a game with its
no-ops), FIRE and action 2 in all three.
""".strip()


def _reset_rows(record: Record) -> str:
    shares, counted = record["over_the_run"], record["counted"]
    more = record["steps"] / record["transitions"] - 1
    answers = [
        f"- {KINDS[backend]}: " + ("yes, `step(actions, env_id)` does" if why is None else f"no, all or none (`{why}`)")
        for backend, why in record["steps_some_games"].items()
    ]
    return f"""
SB3 plays a life's opening inside `reset`; in native environments it is {OPENING} reset rows, which count as steps but are left
out of learning. Counted while an agent plays in ALE's: {counted["before training"]:.1%} of the steps before training,
{counted["agent"]:.1%} with the agent. Over the run, from the games that ended: {shares[0]["share"]:.1%} of the first
{shares[0]["timesteps"]:,} steps, {shares[-1]["share"]:.1%} of the last before {shares[-1]["timesteps"]:,}.

So far, {record["steps"]:,} steps held {record["transitions"]:,} transitions: for as many as SB3's PPO learns from in as many
steps, the run would need {more:.1%} more of them.

Can the vector environment step some of its games, so that openings are played on the side, and no row is lost?

{chr(10).join(answers)}
""".strip()


def _products(record: Record) -> str:
    shown = np.unique(np.linspace(0, len(record["updates"]) - 1, 6).astype(int))
    rows = [[name, *(f"{values[index]:.2%}" for index in shown)] for name, values in record["distance"].items()]
    return f"""
How far the weights are from the reference's, relative to how far these have moved, after so many updates (steps along a
minibatch's gradient) on the same minibatches. The last row is the yardstick: the reference itself, with its minibatches drawn
in another order.

{markdown_table(("updates", *(str(record["updates"][index]) for index in shown)), rows)}
""".strip()
