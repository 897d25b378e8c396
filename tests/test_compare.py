"""The comparison with SB3's PPO: what is compared, how runs are kept, and what the figures say of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rl_zoo3.exp_manager import ExperimentManager

from benchmarks import compare, report
from benchmarks.cases import build
from benchmarks.catch import ENV_ID
from benchmarks.comparison import figures, inference, one_run, tables
from benchmarks.comparison import records as records_module
from benchmarks.comparison.protocol import PROTOCOL, Entry
from benchmarks.comparison.records import load_records, read_run, record_path, write_record
from benchmarks.drawing import subplots
from benchmarks.evaluation import Evaluation
from benchmarks.record import RESULTS, ROOT
from benchmarks.tasks import HYPERPARAMETERS
from tests.helpers import FASTEST, is_built
from tests.pages import TEXT, WORDS

COMMITTED = RESULTS / "compare"


# --------------------------------------------------------------------- protocol


@pytest.mark.parametrize("entry", PROTOCOL.values(), ids=PROTOCOL)
def test_tasks_are_what_the_zoo_makes_of_its_file(entry: Entry) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        # the zoo knows no Catch, and no module before a name
        named = entry.hyperparameters or entry.env_id.rpartition(":")[2]
        env_id = "BreakoutNoFrameskip-v4" if named == "atari" else named
        zoo = ExperimentManager(argparse.Namespace(), "ppo", env_id, "", config=str(HYPERPARAMETERS))
        theirs: dict[str, Any] = zoo._preprocess_hyperparams(zoo.read_hyperparameters()[0])[0]
    ours = entry.task()
    assert entry.env_id in (ENV_ID, "Taxi-v4") or zoo.deterministic_eval is entry.deterministic
    assert (zoo.n_envs, zoo.n_timesteps) == (ours.n_envs, ours.n_timesteps)
    assert ours.normalize == (zoo.normalize_kwargs if zoo.normalize else None)
    assert ours.policy == theirs.pop("policy")
    for name, value in {**theirs, **entry.overrides}.items():
        assert _at(ours.arguments[name], 0.3) == _at(value, 0.3), name
    assert ours.arguments.keys() == theirs.keys() | entry.overrides.keys()


def _at(value: Any, progress: float) -> Any:
    return value(progress) if callable(value) else value


# ------------------------------------------------------------------------- runs


def here(entry: Entry) -> Entry:
    """With the engine that serves small networks on this machine, which may have no C compiler."""
    sides = {
        side: dataclasses.replace(who, engine=FASTEST) if who.engine == "compiled" else who
        for side, who in entry.sides.items()
    }
    return dataclasses.replace(entry, sides=sides)


TINY = dataclasses.replace(here(PROTOCOL["CartPole-v1"]), evaluations=3, episodes=2, final_episodes=4)


@pytest.mark.parametrize("side", ["sb3", "fast", "native"])
def test_evaluations_leave_training_alone(side: str) -> None:
    undisturbed = build(TINY.case(), TINY.sides[side], seed=5).learn(1024)
    model, measured = one_run.train(TINY, side, 5, 1024)
    for ours, theirs in zip(model.policy.parameters(), undisturbed.policy.parameters(), strict=True):
        assert np.array_equal(ours.detach(), theirs.detach())
    rows = measured["evaluations"]
    assert [row["timesteps"] for row in rows] == [0, 344, 688, 1024], "evenly spaced, to the next vector step of 8"
    assert [len(row["returns"]) for row in rows] == [2, 2, 2, 4]
    assert rows[0]["training_return"] is None
    assert rows[-1]["training_return"] == pytest.approx(np.mean(measured["last_training_returns"]), abs=1e-3)


def test_evaluations_on_atari_leave_training_alone() -> None:
    """Their actions are drawn at random."""
    entry = dataclasses.replace(PROTOCOL["Breakout-500k"], evaluations=2, episodes=1, final_episodes=1)
    digests = [
        one_run.train(dataclasses.replace(entry, evaluations=n), "reference", 0, 1024)[1]["weights_sha256"] for n in (1, 2)
    ]
    assert digests[0] == digests[1]


def test_the_same_initial_states_for_every_side() -> None:
    first = [one_run.train(TINY, side, 1, 256)[1]["evaluations"][0]["returns"] for side in ("sb3", "fast")]
    assert first[0] == first[1]


def test_the_time_of_evaluations_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> Evaluation:
        time.sleep(0.2)
        return Evaluation([0.0], [1])

    monkeypatch.setattr(one_run, "evaluate", slow)
    start = time.perf_counter()
    _, measured = one_run.train(TINY, "fast", 0, 256)
    assert measured["evaluations"][-1]["seconds"] < time.perf_counter() - start - 0.6


def test_normalization_is_that_of_training() -> None:
    entry = dataclasses.replace(here(PROTOCOL["Acrobot-v1"]), evaluations=1, episodes=1, final_episodes=1)
    callback = one_run.Evaluations(entry, 512, one_run.print_progress)
    model = build(entry.case(), entry.sides["fast"], 0).learn(512, callback=callback)
    callback.evaluate(1)
    training = model.get_vec_normalize_env()
    assert np.array_equal(callback._env.obs_rms.mean, training.obs_rms.mean)
    assert callback._env.obs_rms is not training.obs_rms
    assert not callback._env.training
    assert not callback._env.norm_reward


# ---------------------------------------------------------------------- records


def a_run(seed: int = 0, score: float = 100.0, side: str = "sb3", **changes: Any) -> dict[str, Any]:
    """A record as ``one_run`` writes it: two evaluations of two episodes."""
    entry = changes.get("entry", "CartPole-v1")
    contestant = PROTOCOL[entry].sides[side]
    rows = [
        {"timesteps": steps, "seconds": seconds, "cpu_seconds": seconds, "returns": [mean - 1, mean + 1]}
        for steps, seconds, mean in ((0, 0.0, 20.0), (100_000, 10.0 if side == "sb3" else 2.0, score))
    ]
    made = {"machine": {"cpu": "a", "cores": 2, "system": "b"}, "versions": {"torch": "2"}, "commit": "c" * 40}
    return {
        "entry": entry,
        "side": side,
        "seed": seed,
        "timesteps": PROTOCOL[entry].timesteps,
        "margin": PROTOCOL[entry].margin,
        "hyperparameters": PROTOCOL[entry].task().described(),
        "evaluations": rows,
        "last_training_returns": [score - 10],
        "weights_sha256": f"{side} {seed}",
        "engine": contestant.engine,
        "precision": contestant.precision,
        "envs": contestant.envs,
        **made,
        **changes,
    }


def keep(folder: Path, *runs: dict[str, Any]) -> None:
    for run in runs:
        write_record(record_path(folder, run["entry"], run["side"], run["seed"]), run)


def test_records_are_whole_or_not_there(tmp_path: Path) -> None:
    path = record_path(tmp_path, "CartPole-v1", "sb3", 3)
    with pytest.raises(TypeError):
        write_record(path, a_run(3, broken=object()))
    assert read_run(tmp_path, "CartPole-v1", "sb3", 3) is None
    path.with_suffix(".part").write_text('{"entry": "CartP')  # a crash while writing
    assert read_run(tmp_path, "CartPole-v1", "sb3", 3) is None
    keep(tmp_path, a_run(3))
    assert read_run(tmp_path, "CartPole-v1", "sb3", 3) == a_run(3)
    assert list(load_records(tmp_path)["CartPole-v1"]["sb3"]) == [3]


def test_a_margin_is_not_changed_after_the_runs(tmp_path: Path) -> None:
    keep(tmp_path, a_run(margin=30.0))
    with pytest.raises(ValueError, match=r"sb3_0\.json was run under the margin 30\.0, not the protocol's 25\.0"):
        load_records(tmp_path)


HYPERPARAMETERS_OF_CARTPOLE = PROTOCOL["CartPole-v1"].task().described()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": "warp"}, "engine 'warp', not the protocol's 'compiled'"),
        ({"precision": "bf16"}, "precision 'bf16', not the protocol's 'fp32'"),
        ({"envs": "native"}, "envs 'native', not the protocol's 'dummy'"),
        (
            {"hyperparameters": HYPERPARAMETERS_OF_CARTPOLE | {"gamma": 0.5}},
            "hyperparameter gamma 0.5, not the protocol's 0.98",
        ),
        (
            {"hyperparameters": HYPERPARAMETERS_OF_CARTPOLE | {"use_sde": True}},
            "hyperparameter use_sde True, not the protocol's None",
        ),
        (
            {"hyperparameters": HYPERPARAMETERS_OF_CARTPOLE | {"learning_rate": "lin_0.1"}},
            "hyperparameter learning_rate 'lin_0.1', not the protocol's 'lin_0.001'",
        ),
    ],
)
def test_runs_under_other_conditions_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    keep(tmp_path, a_run(side="fast", **changes))
    with pytest.raises(ValueError, match=rf"fast_0\.json was run under the {re.escape(says)}"):
        load_records(tmp_path)


@pytest.mark.parametrize("entry", PROTOCOL.values(), ids=PROTOCOL)
def test_json_gives_hyperparameters_back(entry: Entry) -> None:
    told = entry.task().described()
    assert json.loads(json.dumps(told)) == told


def test_hyperparameters_are_told_as_the_file_has_them() -> None:
    told = PROTOCOL["CartPole-v1"].task().described()
    assert (told["learning_rate"], told["n_envs"], told["normalize"]) == ("lin_0.001", 8, None)
    assert PROTOCOL["CartPoleNoVel-v1"].task().described()["policy_kwargs"]["activation_fn"] == "nn.ReLU"


def test_runs_of_several_commits_are_named(tmp_path: Path) -> None:
    keep(tmp_path, a_run(0), a_run(0, side="fast"))
    assert "commits**" not in tables.report(load_records(tmp_path), [])
    keep(tmp_path, a_run(0, side="fast", commit="d" * 40))
    text = tables.report(load_records(tmp_path), [])
    assert text.count("**These runs are of 2 commits**, whose code may differ.") == 2, "of the entry, and of all"
    assert f"1 runs at commit `{'d' * 40}`" in text


def test_the_reference_may_stand_for_sb3(tmp_path: Path) -> None:
    keep(tmp_path, *(a_run(seed, 7.0 + seed / 10, "reference", entry="Catch") for seed in range(8)))
    keep(tmp_path, *(a_run(seed, 7.1 + seed / 9, "fast", entry="Catch") for seed in range(8)))
    records = load_records(tmp_path)
    row = next(line for line in tables.headline(records).splitlines() if line.startswith("| Catch |"))
    assert (
        "| 8 | 7.3 [7.2, 7.5], reference | 7.5 [7.3, 7.7], `channels_last` | +0.1 [+0.1, +0.2] | equivalent within ±1.4 |"
        in row
    )
    said = tables.details("Catch", records["Catch"])
    assert "- ScratchPPO, fast engine: differs from the reference by +0.1" in said
    assert "In 0 of 0 pairs" in tables.identity(records)


def test_runs_of_other_lengths_are_not_mixed(tmp_path: Path) -> None:
    keep(tmp_path, a_run(0), a_run(1, timesteps=1000))
    with pytest.raises(ValueError, match=r"sb3_1\.json holds a run of 1,000 steps, not 100,000"):
        load_records(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "--only", "CartPole-v1", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "compare: " in done.stderr
    assert "choose another --out" in done.stderr


# ------------------------------------------------------------------------- plan


def test_the_plan() -> None:
    orders = compare.plan(compare.parse_options([]))
    asked = {(order.entry, order.side): 0 for order in orders}
    for order in orders:
        asked[order.entry, order.side] += 1
        assert order.timesteps == PROTOCOL[order.entry].timesteps
    assert all(asked["CartPole-v1", side] == 10 for side in ("sb3", "reference", "fast", "native"))
    assert all(asked[name, "sb3"] >= 5 for name in ("Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0", "LunarLander-v3"))
    assert all(asked["Breakout-500k", side] >= 1 for side in ("sb3", "reference", "fast"))
    assert "Breakout-10M" not in {entry for entry, _ in asked}
    assert [order.seed for order in orders] == sorted(order.seed for order in orders)
    few = compare.plan(compare.parse_options(["--only", "Acrobot-v1", "--side", "sb3", "--seeds", "2", "--scale", "0.1"]))
    assert few == [compare.Order("Acrobot-v1", "sb3", seed, 100_000) for seed in (0, 1)]


@pytest.mark.parametrize("arguments", [["--only", "Pong"], ["--seeds", "0"], ["--scale", "0"], ["--jobs", "x"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.parse_options(arguments)
    assert caught.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


# ------------------------------------------------------------------- statistics


def test_interquartile_mean_by_hand() -> None:
    assert inference.interquartile_mean(np.array([1.0, 100.0, 2.0, 3.0])).value == 2.5
    assert inference.interquartile_mean(np.array([0.0, 1.0, 2.0, 6.0, 50.0])).value == 3.0


def test_probability_of_improvement_by_hand() -> None:
    def value(x: list[float], y: list[float]) -> float:
        return inference.probability_of_improvement(np.array(x), np.array(y)).value

    assert value([3, 4], [1, 2]) == 1.0
    assert value([1, 2], [1, 2]) == 0.5
    assert value([1, 5, 5], [2, 5]) == (0 + 0 + 1 + 0.5 + 1 + 0.5) / 6
    assert value([1], [2]) == 0.0


def test_difference_by_hand() -> None:
    """Mean 2, standard deviation 1; Student's t at 97.5% with two degrees of freedom is 4.303."""
    estimate = inference.difference(np.array([11.0, 22.0, 33.0]), np.array([10.0, 20.0, 30.0]))
    assert estimate.value == 2.0
    assert estimate.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3)
    assert estimate.high == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3)


def test_bootstrap_intervals_cover_the_mean() -> None:
    """In about 95% of all samples; a little less often for few seeds, since the percentile bootstrap is narrow then."""
    samples = np.random.default_rng(0).normal(3.0, 1.0, size=(100, 20))
    covered = sum(low <= 3.0 <= high for _, low, high in map(inference.mean, samples))
    assert 85 <= covered <= 99
    value, low, high = inference.mean(samples[0])
    assert value == pytest.approx(samples[0].mean())
    assert low < value < high


def test_one_seed_gives_no_interval() -> None:
    one = np.array([5.0])
    for estimate in (
        inference.mean(one),
        inference.interquartile_mean(one),
        inference.difference(one, one),
        inference.probability_of_improvement(one, one),
    ):
        assert np.isnan(estimate.low)
        assert np.isnan(estimate.high)
        assert "nan" not in tables._interval(estimate)


def test_seeds_that_agree_give_an_interval_of_one_point() -> None:
    same = np.full(5, 500.0)
    assert inference.mean(same) == (500.0, 500.0, 500.0)
    value, low, high = inference.difference(same, same)
    assert value == 0.0
    assert np.isnan([low, high]).all(), "at a ceiling there is no variance to estimate"


@pytest.mark.parametrize(
    ("interval", "margin", "says"),
    [
        ((-1, 2), 5.0, "equivalent within ±5"),
        ((1, 2), 5.0, "equivalent within ±5"),
        ((-5, 2), 5.0, "**not shown** to be equivalent within ±5"),
        ((-9, 9), 5.0, "**not shown** to be equivalent within ±5"),
        ((-9, -1), 5.0, "**worse**"),
        ((1, 9), 5.0, "**better**"),
        ((-1, 2), None, "too few seeds for a test"),
        ((np.nan, np.nan), 5.0, "too few seeds for a test"),
    ],
)
def test_verdict(interval: tuple[float, float], margin: float | None, says: str) -> None:
    assert inference.verdict(inference.Estimate(0.0, *interval), margin) == says


# ----------------------------------------------------------------------- report


def test_the_headline_is_of_common_seeds(tmp_path: Path) -> None:
    keep(tmp_path, a_run(0, 100.0), a_run(1, 200.0), a_run(7, 999.0))
    keep(tmp_path, a_run(0, 101.0, side="fast"), a_run(1, 203.0, side="fast"))
    text = tables.headline(load_records(tmp_path))
    row = next(line for line in text.splitlines() if line.startswith("| CartPole-v1 |"))
    assert "| 100,000 | 2 of 10 | 150.0 [100.0, 200.0] | 152.0 [101.0, 203.0], `compiled` | +2.0 [-10.7, +14.7] |" in row
    assert row.endswith("| no verdict before all seeds and steps are run | 5.00 (5.00 to 5.00) |")
    assert text.count("*not run yet*") == 2 * (len(PROTOCOL) - 1)


def test_the_same_bits_are_told_from_equal_scores(tmp_path: Path) -> None:
    keep(tmp_path, a_run(0), a_run(0, side="reference", weights_sha256="sb3 0"), a_run(0, side="fast"))
    keep(tmp_path, a_run(1), a_run(1, side="reference", weights_sha256="sb3 1"), a_run(1, side="fast"))
    records = load_records(tmp_path)
    assert "In 2 of 2 pairs of runs" in tables.identity(records)
    said = tables.details("CartPole-v1", records["CartPole-v1"])
    assert "- ScratchPPO, reference: differs from SB3's PPO by +0.0: the same bits; times as fast: 5.00" in said
    assert "- ScratchPPO, fast engine: differs from SB3's PPO by +0.0: no verdict before" in said
    keep(tmp_path, a_run(1, side="reference"))
    assert "In 1 of 2 pairs of runs" in tables.identity(load_records(tmp_path))


def test_every_number_is_in_the_report(tmp_path: Path) -> None:
    keep(tmp_path, a_run(0, 123.25), a_run(4, 234.5), a_run(0, 345.75, side="native"))
    text = tables.report(load_records(tmp_path), [("a.png", "What it shows")])
    assert "| 0 | 123.25 (113.25) | 345.75 (335.75) |" in text
    assert "| 4 | 234.50 (224.50) |  |" in text
    assert "![What it shows](a.png)" in text
    assert f"3 runs at commit `{'c' * 40}` on 2 cores of a (b)" in text
    assert "rl-zoo3's own score | 1 |  |  |  | 500.0 ± 0.0 |" in text
    assert "### Breakout-10M\n\nBoth sides want a GPU; ScratchPPO's alone: `make breakout`.\n\n*Not run yet.*" in text


@pytest.mark.parametrize(
    ("ours", "timesteps", "says"),
    [
        ([500.0] * 10, 100_000, "equal with every seed"),
        ([499.0 - seed % 2 for seed in range(10)], 100_000, "equivalent within ±25"),
        ([400.0 - seed for seed in range(10)], 100_000, "**worse**"),
        ([500.0] * 9, 100_000, "no verdict before all seeds and steps are run"),
        ([500.0] * 10, 1_000, "no verdict before all seeds and steps are run"),
    ],
)
def test_no_verdict_before_its_time(ours: list[float], timesteps: int, says: str, tmp_path: Path) -> None:
    for seed, score in enumerate(ours):
        keep(tmp_path, a_run(seed, 500.0, timesteps=timesteps), a_run(seed, score, "fast", timesteps=timesteps))
    sides = load_records(tmp_path)["CartPole-v1"]
    assert f": {says}; times as fast" in tables.details("CartPole-v1", sides)
    assert f"| {says} |" in tables.headline(load_records(tmp_path))
    assert ("rl-zoo3's own score" in tables.details("CartPole-v1", sides)) is (timesteps == 100_000)


@pytest.mark.parametrize("runs", [[a_run(0, side="fast")], [a_run(0, side="fast"), a_run(1)]], ids=["one side", "other seeds"])
def test_sides_without_a_seed_in_common(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    """Nothing is claimed of them, and nothing breaks."""
    keep(tmp_path, *runs)
    report.write_report(load_records(tmp_path), tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "- ScratchPPO, fast engine: no seed in common with SB3's PPO yet" in text
    assert "In 0 of 0 pairs" in text
    assert "nan" not in text


def test_labels_name_engine_precision_and_environments(tmp_path: Path) -> None:
    keep(tmp_path, a_run(0, entry="Breakout-500k"), a_run(0, side="fast", entry="Breakout-500k"))
    records = load_records(tmp_path)
    assert "ScratchPPO, fast engine (`channels_last` bf16, ale)" in tables.details("Breakout-500k", records["Breakout-500k"])
    assert "`channels_last`" in tables.headline(records)


def test_learning_curves_are_means_over_seeds() -> None:
    curve = figures.learning_curve({0: a_run(0, 100.0), 1: a_run(1, 300.0)}, "seconds")
    assert curve.steps.tolist() == [0, 100_000]
    assert curve.seconds.tolist() == [0.0, 10.0]
    assert curve.value.tolist() == [20.0, 200.0]
    assert curve.low.tolist() == [20.0, 100.0]
    assert curve.high.tolist() == [20.0, 300.0]


def test_a_run_that_waited_for_its_core_is_not_compared_by_the_wall_clock() -> None:
    undisturbed, waited = a_run(0, side="fast"), a_run(0)
    assert records_module.clock({"sb3": {0: waited}, "fast": {0: undisturbed}}) == "seconds"
    waited["evaluations"][-1]["seconds"] = 20.0  # of which it ran for 10
    sides = {"sb3": {0: waited}, "fast": {0: undisturbed}}
    assert records_module.clock(sides) == "cpu_seconds"
    assert "times as fast: not measured" in tables.details("CartPole-v1", sides)
    later = {"sb3": {0: a_run(0)}, "fast": {0: a_run(0, side="fast", commit="of another day")}}
    assert records_module.clock(later) == "cpu_seconds"
    _figure, axes = subplots(1, 1, (4, 3))
    figures._plot_entry(axes[0, 0], "CartPole-v1", sides, "seconds")
    assert axes[0, 0].get_xlabel() == "CPU time of training (s)"
    assert [line.get_xdata()[-1] for line in axes[0, 0].lines[:2]] == [10.0, 2.0]


def test_pictures_show_only_what_has_been_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every panel has curves; with one seed there is no difference to draw, and the report links no such picture."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    keep(tmp_path, *(a_run(seed, side=side) for seed in (0, 1) for side in ("sb3", "fast")), a_run(0, entry="Acrobot-v1"))
    report.write_report(load_records(tmp_path), tmp_path)
    for name, titles in {
        "headline.png": ["CartPole-v1 (2 seeds)"] * 2,
        "sample_efficiency.png": ["CartPole-v1 (2 seeds)", "Acrobot-v1 (1 seed)"],
        "training_time.png": ["CartPole-v1 (2 seeds)", "Acrobot-v1 (1 seed)"],
    }.items():
        panels = [axis for axis in drawn[name].axes if axis.get_visible()]
        assert [axis.get_title() for axis in panels] == titles, name
        assert all(axis.lines for axis in panels), name
    assert [text.get_text() for text in drawn["headline.png"].legends[0].texts] == ["SB3 PPO", "ScratchPPO, engine compiled"]
    assert "(differences.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")

    keep(tmp_path / "one", a_run(0), a_run(0, side="fast"))
    written = report.write_report(load_records(tmp_path / "one"), tmp_path / "one")
    assert "differences.png" not in [path.name for path in written]
    assert "(differences.png)" not in (tmp_path / "one" / "report.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------- end to end

TINY_BUDGET = ("--scale", "0.01", "--only", "CartPole-v1", "--no-progress")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's shell has it ignored
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == status, printed
    return printed


@is_built
@pytest.mark.slow
def test_compare_and_report_end_to_end(tmp_path: Path) -> None:
    """Stopped by Ctrl-C after its first run, the comparison goes on where it was; the report needs nothing but its files."""
    out = tmp_path / "records"
    command = ("benchmarks.compare", *TINY_BUDGET, "--seeds", "2", "--jobs", "1", "--out", str(out))
    interrupted = start(*command)
    assert interrupted.stdout is not None
    assert interrupted.stdout.readline() == f"0 of 8 runs are finished in {out}\n"
    assert interrupted.stdout.readline().startswith("[1/8] CartPole-v1 sb3 seed 0: ")
    interrupted.send_signal(signal.SIGINT)
    assert "interrupted; the same command goes on" in finish(interrupted, 130)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert 1 <= len(finished) < 8
    printed = finish(start(*command))
    assert f"{len(finished)} of 8 runs are finished" in printed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "they were not run again"
    assert "8 of 8 runs are finished" in finish(start(*command, "--list"))

    records = load_records(out)["CartPole-v1"]
    assert {side: list(runs) for side, runs in records.items()} == {
        side: [0, 1] for side in ("sb3", "reference", "fast", "native")
    }
    run = records["fast"][1]
    assert re.fullmatch(
        rf"python -m benchmarks\.comparison\.one_run --out {re.escape(str(out))} --entry CartPole-v1 --side fast --seed 1 "
        r"--timesteps 1000",
        run["command"],
    )
    assert run.keys() >= {"commit", "machine", "versions", "margin", "started", "engine", "last_training_returns"}
    assert len(run["evaluations"]) == PROTOCOL["CartPole-v1"].evaluations + 1
    for seed in (0, 1):
        assert records["reference"][seed]["weights_sha256"] == records["sb3"][seed]["weights_sha256"]
        assert records["fast"][seed]["weights_sha256"] != records["sb3"][seed]["weights_sha256"]

    printed = finish(start("benchmarks.report", "--results", str(out), "--out", str(tmp_path / "report")))
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert tables.headline(load_records(out)) in text
    assert tables.headline(load_records(out)) in printed
    assert "In 2 of 2 pairs of runs" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")

    gif = ("--entry", "CartPole-v1", "--every", "3", "--width", "100")
    printed = finish(start("benchmarks.episode", *gif, "--results", str(out), "--out", str(tmp_path)))
    told = json.loads((tmp_path / "CartPole-v1.json").read_text(encoding="utf-8"))
    assert told["agent"]["weights_sha256"] == records["fast"][0]["weights_sha256"]
    assert f"of {told['steps']} steps, return {told['return']:g}" in printed
    with Image.open(tmp_path / "CartPole-v1.gif") as picture:
        assert picture.width == 100
        assert picture.n_frames > 1


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(self: compare.Runner, order: compare.Order) -> list[str]:
        path = record_path(tmp_path, order.entry, order.side, order.seed)
        good = f"import pathlib; p = pathlib.Path({str(path)!r}); p.parent.mkdir(exist_ok=True); p.write_text('')"
        bad = "print('{not ours}\\nno such luck', flush=True); 1 / 0"
        return [sys.executable, "-c", bad if order.side == "sb3" else good]

    monkeypatch.setattr(compare.Runner, "_command", command)
    options = compare.parse_options(["--only", "CartPole-v1", "--seeds", "1", "--out", str(tmp_path), "--no-progress"])
    orders = compare.plan(options)
    assert compare.run_all(orders, options) == [orders[0]]
    printed = capsys.readouterr().out
    assert "CartPole-v1 sb3 seed 0 FAILED:\n{not ours}\nno such luck\nTraceback" in printed
    assert "ZeroDivisionError" in printed
    assert "[4/4]" in printed


def test_runs_for_which_something_is_missing_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setattr(compare.Runner, "run", lambda self, order: done.append(order.side) or 1.0)
    monkeypatch.setattr(compare, "missing", lambda each: "a compiler" if each.engine == "compiled" else None)
    monkeypatch.setattr(
        "sys.argv", ["compare", "--only", "CartPole-v1", "--seeds", "1", "--out", str(tmp_path), "--no-progress"]
    )
    assert compare.main() == 0
    printed = capsys.readouterr().out
    assert sorted(done) == ["reference", "sb3"]
    assert "left out, for want of a compiler: CartPole-v1 fast seed 0, CartPole-v1 native seed 0" in printed
    assert "all but the runs left out are finished" in printed


@pytest.mark.parametrize("module", ["report", "episode"])
def test_says_what_makes_the_files_that_are_missing(module: str, tmp_path: Path) -> None:
    entry = ("--entry", "CartPole-v1") if module == "episode" else ()
    assert "benchmarks.compare" in finish(start(f"benchmarks.{module}", *entry, "--results", str(tmp_path)), 1)


# -------------------------------------------------------------------- committed


@pytest.fixture(scope="module")
def records() -> Any:
    return load_records(COMMITTED)


def test_the_committed_report_is_that_of_the_committed_records(records: Any, tmp_path: Path) -> None:
    again = report.write_report(records, tmp_path)
    for path in again:
        if path.suffix == ".md":
            assert path.read_text(encoding="utf-8") == (COMMITTED / path.name).read_text(encoding="utf-8")
        else:
            with Image.open(path) as new, Image.open(COMMITTED / path.name) as old:
                assert new.size == old.size
                if new.info["Software"] == old.info["Software"]:  # matplotlib, and which
                    assert np.array_equal(np.asarray(new), np.asarray(old)), path.name


RUN_SO_FAR = {"LunarLander-v3": 1}
"""Seeds of what has been run in part; the tables show it."""


def test_committed_runs_are_whole_and_of_clean_commits(records: Any) -> None:
    for name, sides in records.items():
        for side, runs in sides.items():
            assert list(runs) == list(range(RUN_SO_FAR.get(name, PROTOCOL[name].seeds))), (name, side)
            for run in runs.values():
                assert run["timesteps"] == PROTOCOL[name].timesteps
                assert re.fullmatch("[0-9a-f]{40}", run["commit"]), "run on a commit, not on changes to one"
                assert len(run["evaluations"][-1]["returns"]) == PROTOCOL[name].final_episodes
                contestant = PROTOCOL[name].sides[side]
                assert (run["engine"], run["envs"], run["precision"]) == (
                    contestant.engine,
                    contestant.envs,
                    contestant.precision,
                )
        assert not sides or sides.keys() == PROTOCOL[name].sides.keys(), name
    assert {name for name, sides in records.items() if not sides} == {"Breakout-10M"}


def test_the_handbook_says_what_the_records_say(records: Any) -> None:
    assert tables.headline(records) in TEXT
    assert tables.identity(records) in WORDS


@pytest.mark.parametrize("name", ["CartPole-v1", "Breakout-500k"])
def test_the_handbooks_agents_are_those_of_the_records(name: str, records: Any) -> None:
    told = json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))
    agent = told["agent"]
    trained = records[agent["entry"]][agent["side"]][agent["seed"]]
    assert agent["weights_sha256"] == trained["weights_sha256"]
    assert f"benchmarks/results/compare/{name}.gif" in TEXT
    assert f"a return of {told['return']:g}" in WORDS
    with Image.open(COMMITTED / f"{name}.gif") as picture:
        assert picture.n_frames > 20
