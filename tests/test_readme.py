"""What the README promises: links that lead somewhere, examples that run, figures that were measured."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import throughput
from benchmarks.cartpole import summary

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = [(text, target) for text, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", README) if "://" not in target]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
RESULT = ROOT / "benchmarks" / "results" / "cartpole_reference.json"


@pytest.mark.parametrize("target", sorted({target for _, target in LINKS}))
def test_links_lead_somewhere(target: str) -> None:
    path, _, fragment = target.partition("#")
    assert (ROOT / path).exists()
    assert not re.fullmatch(r"L\d+.*", fragment), "line numbers go stale"


@pytest.mark.parametrize(("text", "target"), [link for link in LINKS if link[0].startswith("`")])
def test_linked_files_hold_what_the_link_names(text: str, target: str) -> None:
    name = text.strip("`").rpartition(".")[2]
    assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=["example", "native", "long runs", "loading", "own loss", "equality"])
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
    record = json.loads((ROOT / "benchmarks" / "results" / "kl_cost.json").read_text(encoding="utf-8"))
    medians = [case["median"] for case in record["update_time_ratio"].values()]
    bound = int(re.search(r"the KL costs less than (\d+)% of an update", README)[1])
    assert len(medians) == 3
    assert max(medians) < 1 + bound / 100
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"


def test_figures_are_those_measured() -> None:
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    assert " ".join(summary(record).split()) in " ".join(README.split())


def test_measured_figures_are_what_the_readme_says_of_them() -> None:
    """Ratios of the pairs' own times; reference engine, one thread, 1e5 steps; equal results; on a clean commit."""
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    ratios = [pair["sb3_seconds"] / pair["scratch_seconds"] for pair in record["pairs"]]
    assert record["ratio"]["median"] == pytest.approx(statistics.median(ratios), abs=2e-3)
    assert record["ratio"]["min"] == pytest.approx(min(ratios), abs=2e-3)
    assert record["ratio"]["max"] == pytest.approx(max(ratios), abs=2e-3)
    assert (record["engine"], record["torch_threads"], record["timesteps"]) == ("torch", 1, 1e5)
    assert record["max_parameter_difference"] == 0.0
    assert record["evaluation"]["scratch"] == record["evaluation"]["sb3"]
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"


def test_speeds_are_those_measured() -> None:
    """Every row of the table; medians over at least five rounds, and memory no higher than SB3's where the README says so."""
    record = json.loads((ROOT / "benchmarks" / "results" / "throughput.json").read_text(encoding="utf-8"))
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
    record = json.loads((ROOT / "benchmarks" / "results" / "throughput.json").read_text(encoding="utf-8"))
    row = next(row for row in record["cases"]["cartpole_zoo"]["contestants"] if row["engine"] == "numpy")
    assert f"**{row['ratio']['median']:.1f} times as fast as SB3's PPO**" in README
