"""What the README promises: links that lead somewhere, examples that run, figures that were measured."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import breakout, cartpole, soak, throughput
from benchmarks.comparison import tables
from benchmarks.comparison.records import load_records
from benchmarks.fast_path import report as fast_path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = [(text, target) for text, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", README) if "://" not in target]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"
WORDS = " ".join(README.split())


@pytest.mark.parametrize("target", sorted({target for _, target in LINKS}))
def test_links_lead_somewhere(target: str) -> None:
    path, _, fragment = target.partition("#")
    assert (ROOT / path).exists()
    assert not re.fullmatch(r"L\d+.*", fragment), "line numbers go stale"


@pytest.mark.parametrize(("text", "target"), [link for link in LINKS if link[0].startswith("`")])
def test_linked_files_hold_what_the_link_names(text: str, target: str) -> None:
    name = text.strip("`").rpartition(".")[2]
    assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "example",
    EXAMPLES,
    ids=["example", "native", "masks", "long runs", "processes", "loading", "own loss", "equality"],
)
def test_examples_run(example: str, tmp_path: Path) -> None:
    if "atari" in example:
        pytest.importorskip("ale_py")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_tables_are_whole() -> None:
    """Lines with bars that follow each other are one table, with a rule below its head; a blank line would cut it in two."""
    tables = re.findall(r"(?:^\|.*\|\n)+", README, re.MULTILINE)
    assert len(tables) > 3
    for table in tables:
        rows = table.splitlines()
        assert re.fullmatch(r"\|( *:?-+:? *\|)+", rows[1]), rows[0]
        assert len({row.count("|") - row.count("\\|") for row in rows}) == 1, rows[0]


def test_what_the_kl_costs() -> None:
    record = json.loads((RESULTS / "kl_cost.json").read_text(encoding="utf-8"))
    medians = [case["median"] for case in record["update_time_ratio"].values()]
    bound = int(re.search(r"the KL costs less than (\d+)% of an update", README)[1])
    assert len(medians) == 3
    assert max(medians) < 1 + bound / 100
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"


def test_whether_anything_piles_up() -> None:
    """The README's figures are the record's, whose verdicts follow from what was counted after each round; half an hour."""
    record = json.loads((RESULTS / "soak.json").read_text(encoding="utf-8"))
    assert record["verdicts"] == {name: soak.judge(record["counted"][name], share) for name, share in soak.ALLOWED.items()}
    assert all(verdict["flat"] for verdict in record["verdicts"].values())
    for name in ("descriptors", "threads", "children", "files"):
        assert record["verdicts"][name]["first"] == record["verdicts"][name]["last"], name
    memory = record["verdicts"]["memory"]
    assert f"in {record['minutes']:.0f} minutes of learning" in WORDS
    assert f"memory went from {memory['first']:.1f} to {memory['last']:.1f} MiB" in WORDS
    assert f"between the first quarter of {record['rounds']} rounds" in WORDS
    assert record["minutes"] >= 30
    assert {len(values) for values in record["counted"].values()} == {record["rounds"]}
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"


def test_figures_are_those_measured() -> None:
    """Ratios of the runs' own times; the reference's bits are SB3's; one thread, 1e5 steps; on a clean commit."""
    record = json.loads((RESULTS / "cartpole.json").read_text(encoding="utf-8"))
    assert cartpole.summary(record) in WORDS
    seconds = {(run["side"], run["seed"]): run["evaluations"][-1]["seconds"] for run in record["runs"]}
    for side, figures in record["sides"].items():
        ratios = [seconds["sb3", seed] / own for (who, seed), own in seconds.items() if who == side]
        assert len(ratios) == record["rounds"]
        assert figures["ratio"]["median"] == pytest.approx(statistics.median(ratios), abs=2e-3)
        assert (figures["ratio"]["min"], figures["ratio"]["max"]) == pytest.approx((min(ratios), max(ratios)), abs=2e-3)
    assert record["sides"]["reference"]["same_bits_as_sb3"]
    assert {run["engine_used"] for run in record["runs"] if run["side"] == "reference"} == {"torch"}
    assert record["timesteps"] == 1e5
    assert record["hyperparameters"] == cartpole.ENTRY.task().described()
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"


def test_how_far_breakout_got() -> None:
    record = json.loads((RESULTS / "breakout" / "record.json").read_text(encoding="utf-8"))
    assert breakout.summary(record) in WORDS
    assert record["timesteps"] == 1e7
    assert all(re.fullmatch("[0-9a-f]{40}", session["commit"]) for session in record["sessions"])


def test_whether_the_fast_path_is_equal() -> None:
    """The README's sentence and the report are those of the records, which are of one agent and of clean commits."""
    folder = RESULTS / "fast_path"
    records = fast_path.load_records(folder)
    assert fast_path.verdict(*records) in WORDS
    assert fast_path.report(*records) == (folder / "report.md").read_text(encoding="utf-8")
    assert len({record["agent"]["weights_sha256"] for record in records}) == 1
    assert all(re.fullmatch("[0-9a-f]{40}", record["commit"]) for record in records)
    assert tables.learned("Catch", load_records(RESULTS / "compare")["Catch"]) in WORDS


def test_speeds_are_those_measured() -> None:
    """Every row of the table; medians over at least five rounds, and memory no higher than SB3's where the README says so."""
    record = json.loads((RESULTS / "throughput.json").read_text(encoding="utf-8"))
    assert throughput.summary(record) in README
    assert record["pairs"] >= 5
    assert record["scale"] == 1.0
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"
    for case in record["cases"].values():
        for row in case["contestants"]:
            ratios = [sb3 / own for sb3, own in zip(case["contestants"][0]["seconds"], row["seconds"], strict=True)]
            assert row["ratio"]["median"] == pytest.approx(statistics.median(ratios), rel=2e-3)
            assert row["ratio"]["min"] == pytest.approx(min(ratios), rel=2e-3)
            assert row["ratio"]["max"] == pytest.approx(max(ratios), rel=2e-3)


def test_the_headline_is_in_the_record() -> None:
    record = json.loads((RESULTS / "throughput.json").read_text(encoding="utf-8"))
    row = next(row for row in record["cases"]["cartpole_zoo"]["contestants"] if row["engine"] == "numpy")
    assert f"**{row['ratio']['median']:.1f} times as fast as SB3's PPO**" in README
