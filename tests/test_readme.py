"""The figures of the README and of the handbook are those that were measured. What else they promise: ``test_docs.py``."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from typing import Any

import pytest

from benchmarks import breakout, cartpole, contrib, processes, rounding, soak, throughput
from benchmarks.comparison import tables
from benchmarks.comparison.one_run import weights_digest
from benchmarks.comparison.records import load_records
from benchmarks.fast_path import report as fast_path
from sb3_ppo_from_scratch import ScratchPPO
from tests.pages import README, ROOT, TEXT, WORDS

RESULTS = ROOT / "benchmarks" / "results"


def test_what_the_kl_costs() -> None:
    record = json.loads((RESULTS / "kl_cost.json").read_text(encoding="utf-8"))
    medians = [case["median"] for case in record["update_time_ratio"].values()]
    bound = int(re.search(r"the KL costs less than (\d+)% of an update", WORDS)[1])
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
    sessions = [session for session in record["sessions"] if "from" in session]
    starts = [f"{session['from']:,}" for session in sessions if "--start" in session["command"]]
    assert f"Three times, at {starts[0]}, {starts[1]} and {starts[2]} steps," in WORDS
    assert len(starts) == 3
    again = [one for i, one in enumerate(sessions) if any(later["from"] <= one["from"] for later in sessions[i + 1 :])]
    assert f"{sum(session['seconds'] for session in again) / 3600:.1f} of the hours" in WORDS
    for row in record["evaluations"]:
        if row["timesteps"] // 250_000 in (22, 34, 35):
            assert breakout.described(row["returns"]).partition(" over")[0] in WORDS
    final = record["final"]
    assert len(final["returns"]) == 100
    assert final["mean"] == pytest.approx(statistics.fmean(final["returns"]))
    assert final["std"] == pytest.approx(statistics.pstdev(final["returns"]))
    scores = sorted(final["returns"])
    middle, worst, best = statistics.median(scores), scores[0], scores[-1]
    below = breakout.PUBLISHED["rl-zoo3"][0] - final["mean"]
    assert f"The score is {below:.0f} below rl-zoo3's" in WORDS
    assert f"half reach {middle:g} and the best {best:g}; a few end early, from {worst:g} on" in WORDS
    assert f"scores **{final['mean']:.1f} ± {final['std']:.1f}** over 100 games" in " ".join(README.split())


def test_the_agent_that_plays_breakout() -> None:
    """The committed file is the one that was evaluated, and the film shows it."""
    folder = RESULTS / "breakout"
    record, told = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("record", "Breakout-10M"))
    path = breakout.agent_file(folder / breakout.AGENT)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["model"]["sha256"]
    model = ScratchPPO.load(path, device="cpu")
    assert model.num_timesteps >= record["timesteps"]
    assert weights_digest(model) == told["agent"]["weights_sha256"]
    assert re.fullmatch("[0-9a-f]{40}", told["commit"]), "played on a commit, not on changes to one"
    assert told["return"] > 100
    assert f"with a return of {told['return']:g} at its end" in WORDS
    assert "benchmarks/results/breakout/Breakout-10M.gif" in README


def test_whether_the_fast_path_is_equal() -> None:
    """The README's sentence and the report are those of the records, which are of one agent and of clean commits."""
    folder = RESULTS / "fast_path"
    records = fast_path.load_records(folder)
    assert fast_path.verdict(*records) in WORDS
    assert fast_path.report(*records) == (folder / "report.md").read_text(encoding="utf-8")
    assert len({record["agent"]["weights_sha256"] for record in records}) == 1
    assert all(re.fullmatch("[0-9a-f]{40}", record["commit"]) for record in records)
    assert tables.learned("Catch", load_records(RESULTS / "compare")["Catch"]) in WORDS


@pytest.mark.parametrize("name", ["throughput", "throughput_avx2"])
def test_speeds_are_those_measured(name: str) -> None:
    """Every row of the table; medians over at least five rounds, and memory no higher than SB3's where the README says so."""
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert throughput.summary(record) in TEXT
    if name == "throughput_avx2":
        origins = [case["origin"] for case in record["cases"].values()]
        assert {origin["machine"]["instructions"] for origin in origins} == {"AVX2"}
        assert all(origin["command"].startswith("BENCHMARK_AVX2=1 ") for origin in origins)
    for case in record["cases"].values():
        origin = case["origin"]
        assert origin["pairs"] >= 5
        assert origin["scale"] == 1.0
        assert re.fullmatch("[0-9a-f]{40}", origin["commit"]), "measured on a commit, not on changes to one"
        for row in case["contestants"]:
            ratios = [sb3 / own for sb3, own in zip(case["contestants"][0]["seconds"], row["seconds"], strict=True)]
            assert row["ratio"]["median"] == pytest.approx(statistics.median(ratios), rel=2e-3)
            assert row["ratio"]["min"] == pytest.approx(min(ratios), rel=2e-3)
            assert row["ratio"]["max"] == pytest.approx(max(ratios), rel=2e-3)


@pytest.mark.parametrize(
    ("benchmark", "options"),
    [(processes, "--rounds 5"), (contrib, "--rounds 5"), (rounding, "--save-result rounding")],
    ids=["processes", "contrib", "rounding"],
)
def test_tables_of_a_page_are_those_of_the_record(benchmark: Any, options: str) -> None:
    record = json.loads((RESULTS / f"{benchmark.__name__.rpartition('.')[2]}.json").read_text(encoding="utf-8"))
    assert benchmark.table(record).strip() in TEXT
    assert options in record["command"]
    assert "--scale" not in record["command"]
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "measured on a commit, not on changes to one"


def test_the_front_page_has_the_figures_of_the_records() -> None:
    record, beside_contrib = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("throughput", "contrib")
    )

    def measured(case: str, **wanted: str) -> dict:
        rows = record["cases"][case]["contestants"]
        return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))

    def speed(case: str, engine: str, **wanted: str) -> str:
        return f"{measured(case, engine=engine, **wanted)['ratio']['median']:.1f}"

    def faster_than_contrib(task: str, engine: str) -> str:
        return f"{statistics.median(beside_contrib['tasks'][task]['ratios'][engine]):.1f}"

    breakout_row = {"engine": "channels_last", "envs": "ale", "precision": "bf16"}
    memory = measured("breakout", **breakout_row)["peak_memory_mib"] / measured("breakout", engine="sb3")["peak_memory_mib"]
    zoo = speed("cartpole_zoo", "compiled", envs="dummy")
    assert f"**{zoo} times as fast as SB3's PPO**" in README
    watched = json.loads((RESULTS / "cartpole.json").read_text(encoding="utf-8"))["sides"]["fast"]["ratio"]["median"]
    assert f"and {watched:.1f} times in `make cartpole`" in WORDS
    # beside SB3's PPO, sb3-contrib, SBX, CleanRL
    for row, figures in {
        "CartPole-v1, training speed": (zoo, "1", "", speed("cartpole_zoo", "sbx"), ""),
        "the same, native environments": (speed("cartpole_zoo", "compiled", envs="native"), "", "", "", ""),
        "CartPole-v1, SB3's defaults": (speed("cartpole_default", "compiled"), "1", "", speed("cartpole_default", "sbx"), ""),
        "Pendulum-v1, SB3's defaults": (speed("continuous", "compiled"), "1", "", speed("continuous", "sbx"), ""),
        "HalfCheetah-v5": (speed("half_cheetah", "compiled"), "1", "", "", ""),
        "Breakout with bf16 and ALE's native environments": (speed("breakout", **breakout_row), "1", "", "", ""),
        "the same, memory": (f"{memory:.2f}", "1", "", "", ""),
        "CartPole without velocities, with an LSTM": (faster_than_contrib("CartPoleNoVel-v1", "lstm"), "", "1", "", ""),
        "Taxi with masks": (faster_than_contrib("Taxi-v4", "compiled"), "", "1", "", ""),
    }.items():
        cells = " | ".join((f"**{figures[0]}**", *figures[1:]))
        assert f"| {row} | {cells} |".replace("|  ", "| ") in README, row
    acrobot = tables.headline(load_records(RESULTS / "compare")).split("| Acrobot-v1 ")[1].split("\n")[0]
    assert "equivalent within ±5" in acrobot
    assert "on Acrobot it is equivalent within ±5" in WORDS.replace("On", "on")
