"""
The speed of ScratchPPO's engines beside SB3's PPO (and SBX's, where it is installed), in one command.

Every run is a process of its own, on the same hyperparameters, steps and seed. SB3 and all others take turns, and a figure is
the median over the rounds of SB3's time divided by the other's in the same round. Where threads and kinds of environments are
open, SB3 runs with those that are fastest for it. The floor is what nobody can do without: the environments' steps alone,
plus the bare matrix products. ``make throughput`` runs it; the figures in the README and ``docs/results.md`` come from::

    python -m benchmarks.throughput --save-result throughput

All of it takes more than an hour. What ``--only`` measures takes the place of the same in the saved record, where each case
has its own origin: machines differ from day to day, and only what has run in turns is compared.

The reference engine's speed is that of :mod:`benchmarks.cartpole`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.cases import CASES, Contestant, contestants, missing, scaled
from benchmarks.drawing import BLUE, GREY, VERMILION, save_figure, subplots
from benchmarks.markdown import markdown_table
from benchmarks.options import command_line, number
from benchmarks.record import RESULTS, ROOT, provenance, with_threads, write_json
from sb3_ppo_from_scratch.engines import ENGINE_NAMES

Record = dict[str, Any]

IMPORTS = {
    "sb3": "import stable_baselines3; from stable_baselines3 import PPO",
    "scratch": "import sb3_ppo_from_scratch",
}


# --------------------------------------------------------------------- running


def run(case: str, contestant: Contestant, options: argparse.Namespace, **order: Any) -> dict[str, float]:
    """
    One run in a process of its own.

    :param case: key of :data:`benchmarks.cases.CASES`
    :param contestant: who runs
    :param options: see :func:`parse_options`
    :param order: more for ``benchmarks.timed_run``
    :return: what that printed
    :raises RuntimeError: if it failed
    """
    order |= {"case": case, "contestant": asdict(contestant), "scale": options.scale, "started": time.time()}
    command = [sys.executable, "-m", "benchmarks.timed_run", json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, env=with_threads(contestant.threads), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{contestant.title} on {contestant.envs} failed on {case}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case: str, options: argparse.Namespace) -> Record:
    """
    All contestants in turns, ``options.pairs`` times, and the floor of each.

    :param case: key of :data:`benchmarks.cases.CASES`
    :param options: see :func:`parse_options`
    """
    candidates, others = contestants(CASES[case], options.threads)
    skipped = {f"{other.title} ({other.envs})": missing(other) for other in others}
    wanted = options.engine or [other.engine for other in others]
    present = [other for other in others if missing(other) is None and other.engine in wanted]
    tried = _try_settings(case, candidates, options) if len(candidates) > 1 else {}
    baseline = min(tried, key=lambda each: tried[each]) if tried else candidates[0]
    field = [baseline, *present]
    rounds = []
    for index in range(options.pairs):
        rounds.append([run(case, each, options, seed=options.seed + index) for each in field])
        speeds = ", ".join(
            f"{other.title} ({other.envs}) {r:.2f}" for other, r in zip(present, _ratios(rounds[-1]), strict=True)
        )
        print(f"{case} {index + 1}/{options.pairs}: SB3 {rounds[-1][0]['seconds']:.1f} s; times as fast: {speeds}", flush=True)
    return {
        "title": CASES[case].title,
        "timesteps": scaled(CASES[case], options.scale).timesteps,
        "sb3_settings_tried": [asdict(each) | {"seconds": round(seconds, 3)} for each, seconds in tried.items()],
        "skipped": {who: f"needs {what}" for who, what in skipped.items() if what is not None},
        "contestants": [
            _row(each, [a_round[i] for a_round in rounds], [a_round[0] for a_round in rounds], _floor(case, each, options))
            for i, each in enumerate(field)
        ],
    }


def _try_settings(case: str, candidates: list[Contestant], options: argparse.Namespace) -> dict[Contestant, float]:
    """Seconds that each takes, once."""
    seconds = {}
    for each in candidates:
        seconds[each] = run(case, each, options)["seconds"]
        print(f"{case}: {each.title} on {each.envs} with {each.threads} threads {seconds[each]:.1f} s", flush=True)
    return seconds


def _ratios(a_round: list[dict[str, float]]) -> list[float]:
    return [a_round[0]["seconds"] / other["seconds"] for other in a_round[1:]]


def _floor(case: str, contestant: Contestant, options: argparse.Namespace) -> dict[str, float]:
    return run(case, contestant, options, floor=True)


def _row(
    contestant: Contestant, runs: list[dict[str, float]], baseline: list[dict[str, float]], floor: dict[str, float]
) -> Record:
    """One contestant's figures; the ratios are to SB3's run of the same round."""
    ratios = [sb3["seconds"] / own["seconds"] for sb3, own in zip(baseline, runs, strict=True)]
    seconds = statistics.median(own["seconds"] for own in runs)
    return {
        **asdict(contestant),
        "title": contestant.title,
        "seconds": [round(own["seconds"], 3) for own in runs],
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "floor_seconds": floor,
        "share_of_floor": sum(floor.values()) / seconds,
        "peak_memory_mib": statistics.median(own["peak_memory_mib"] for own in runs),
        "first_update_seconds": statistics.median(own["first_update_seconds"] for own in runs),
    }


def time_imports(pairs: int) -> Record:
    """
    What the two packages take to import, in fresh processes, in turns.

    :param pairs: how often each
    """
    seconds: dict[str, list[float]] = {who: [] for who in IMPORTS}
    for _ in range(pairs):
        for who, statement in IMPORTS.items():
            code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
            seconds[who].append(float(done.stdout))
    extra = [ours - theirs for ours, theirs in zip(seconds["scratch"], seconds["sb3"], strict=True)]
    return {
        "seconds": seconds,
        "scratch_minus_sb3": {"median": statistics.median(extra), "min": min(extra), "max": max(extra)},
    }


# -------------------------------------------------------------------- reporting


def table(record: Record) -> str:
    """
    All figures as a table in Markdown.

    :param record: from :func:`make_record`
    """
    columns = ("", "environments", "threads", "s", "times SB3 (spread)", "of the floor", "peak MiB", "first update, s")
    lines = []
    for case in record["cases"].values():
        lines += [f"**{case['title']}, {case['timesteps']:,} steps**", ""]
        lines.append(markdown_table(columns, map(_cells, case["contestants"])))
        lines += [f"\nLeft out: {who} {why}." for who, why in case["skipped"].items()]
        lines.append("")
    lines += [f"Left out: {CASES[case].title}, which {why}.\n" for case, why in record.get("left_out", {}).items()]
    if "imports" in record:
        extra = record["imports"]["scratch_minus_sb3"]
        lines.append(f"Import: {extra['median']:+.2f} s beside SB3 ({extra['min']:+.2f} to {extra['max']:+.2f}).")
    return "\n".join(lines)


def _cells(row: Record) -> list[str]:
    ratio = row["ratio"]
    return [
        row["title"],
        row["envs"],
        str(row["threads"]),
        f"{statistics.median(row['seconds']):.1f}",
        "1" if row["engine"] == "sb3" else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{row['share_of_floor']:.0%}",
        f"{row['peak_memory_mib']:.0f}",
        f"{row['first_update_seconds']:.1f}",
    ]


def summary(record: Record) -> str:
    """
    The table in ``docs/results.md``: how many times as fast as SB3, and what memory.

    :param record: from :func:`make_record`
    """
    columns = ("training", "engine", "environments", "times as fast as SB3", "memory, SB3 = 1", "machine")
    rows = []
    for case in record["cases"].values():
        sb3, *others = case["contestants"]
        machine = case["origin"]["machine"].get("instructions", "")
        for row in others:
            ratio, memory = row["ratio"], row["peak_memory_mib"] / sb3["peak_memory_mib"]
            engine = (
                "SBX"
                if row["engine"] == "sbx"
                else f"`{row['engine']}`" + f" {row['precision']}" * (row["precision"] != "fp32")
            )
            speed = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            rows.append((case["title"], engine, row["envs"], speed, f"{memory:.2f}", machine))
    return markdown_table(columns, rows)


def plot(record: Record, path: Path) -> None:
    """
    Bars: how many times as fast as SB3, with the spread over the rounds, and where the floor would be.

    :param record: from :func:`make_record`
    :param path: the PNG to write
    """
    cases = record["cases"].values()
    heights = [len(case["contestants"]) + 1.5 for case in cases]
    figure, axes = subplots(len(heights), 1, (9, 0.45 * sum(heights)), heights)
    for axis, case in zip(axes.flat, cases, strict=True):
        _plot_case(axis, case)
    figure.supxlabel("times as fast as SB3's PPO (median; lines: smallest and largest; diamonds: the floor)", fontsize=11)
    save_figure(figure, path)


def _plot_case(axis: Axes, case: Record) -> None:
    rows = case["contestants"]
    sb3_seconds = statistics.median(rows[0]["seconds"])
    for y, row in enumerate(rows):
        ratio = row["ratio"]
        axis.barh(y, ratio["median"], color=VERMILION if row["engine"] == "sb3" else BLUE)
        axis.plot([ratio["min"], ratio["max"]], [y, y], color="black", linewidth=1)
        axis.plot(sb3_seconds / sum(row["floor_seconds"].values()), y, "D", color=GREY, markersize=5)
    axis.set_yticks(range(len(rows)), [f"{row['title']}, {row['envs']}" for row in rows])
    axis.invert_yaxis()
    axis.set_title(case["title"], loc="left", fontsize=11)
    axis.grid(axis="x", alpha=0.25)


def make_record(options: argparse.Namespace) -> Record:
    """
    Run everything that ``options`` ask for.

    :param options: see :func:`parse_options`
    :return: all figures, with where they come from
    """
    wanted = options.only or [*CASES, "import"]
    chosen = {name: getattr(options, name) for name in ("pairs", "seed", "scale")}
    origin = {"origin": {**provenance("benchmarks.throughput"), **chosen}}
    needed = {case: CASES[case].needs for case in CASES if case in wanted}
    absent = {case: module for case, module in needed.items() if module is not None and find_spec(module) is None}
    record: Record = {"left_out": {case: f"needs module {module!r}" for case, module in absent.items()}}
    record["cases"] = {case: run_case(case, options) | origin for case in needed if case not in absent}
    if "import" in wanted:
        record["imports"] = time_imports(options.pairs) | origin
    return record


def merged(before: Record, now: Record) -> Record:
    """
    :param before: what had been measured, maybe nothing
    :param now: what takes its place, from :func:`make_record`
    :return: both, in the order of :data:`benchmarks.cases.CASES`
    """
    cases = {**before.get("cases", {}), **now["cases"]}
    left_out = {case: why for case, why in now["left_out"].items() if case not in cases}
    return {**before, **now, "left_out": left_out, "cases": {case: cases[case] for case in CASES if case in cases}}


def write_results(record: Record, options: argparse.Namespace) -> list[Path]:
    """
    Write the record, the table and the figure.

    :param record: from :func:`make_record`
    :param options: see :func:`parse_options`
    :return: the files written
    """
    options.out.mkdir(parents=True, exist_ok=True)
    figures, text, chart = (options.out / f"throughput.{kind}" for kind in ("json", "md", "png"))
    text.write_text(table(record) + "\n", encoding="utf-8")
    written = [text, *_write(record, figures, chart)]
    if options.save_result is not None:
        saved = RESULTS / f"{options.save_result}.json"
        before = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        written += _write(merged(before, record), saved, saved.with_suffix(".png"))
    return written


def _write(record: Record, figures: Path, chart: Path) -> list[Path]:
    write_json(figures, record)
    if not record["cases"]:
        return [figures]
    plot(record, chart)
    return [figures, chart]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    shared: dict[str, Any] = {"out": Path("runs/throughput"), "scale": 1.0, "seed": 0, "threads": 2, "save_result": None}
    parser = command_line("benchmarks.throughput", "the speed of ScratchPPO's engines beside SB3's PPO", **shared)
    parser.add_argument(
        "--pairs", type=number(int, 1), default=5, help="rounds, in each of which everybody runs once (%(default)s)"
    )
    parser.add_argument("--only", action="append", choices=[*CASES, "import"], help="this case (may be given several times)")
    parser.add_argument(
        "--engine", action="append", choices=ENGINE_NAMES[1:], help="only this one (may be given several times)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark of the command line."""
    options = parse_options()
    record = make_record(options)
    print(f"\n{table(record)}\n")
    for path in write_results(record, options):
        print(f"wrote {path}")
    if options.save_result is not None:
        saved = json.loads((RESULTS / f"{options.save_result}.json").read_text(encoding="utf-8"))
        print(f"\nfor docs/results.md:\n{summary(saved)}")


if __name__ == "__main__":
    main()
