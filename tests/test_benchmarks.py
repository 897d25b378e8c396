"""The speed benchmarks, end to end on a tiny budget, and the pieces that their figures are made of. Nothing here is timed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from benchmarks import (
    cartpole,
    components,
    contrib,
    floor,
    record,
    rounding,
    soak,
    throughput,
    timed_run,
    vector_envs,
    zoo_engines,
)
from benchmarks.cases import CASES, Contestant, build, contestants, missing, scaled
from benchmarks.comparison.protocol import PROTOCOL
from benchmarks.tasks import Task, load_task
from sb3_ppo_from_scratch import ScratchPPO
from tests.helpers import FASTEST

ROOT = Path(__file__).resolve().parent.parent


def run_module(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_throughput_end_to_end(tmp_path: Path) -> None:
    arguments = ("--pairs", "1", "--scale", "1e-9", "--only", "cartpole_zoo", "--only", "import", "--out", str(tmp_path))
    printed = run_module("throughput", *arguments, "--engine", FASTEST, "--engine", "torch")
    record = json.loads((tmp_path / "throughput.json").read_text(encoding="utf-8"))
    assert list(record["cases"]) == ["cartpole_zoo"]
    case = record["cases"]["cartpole_zoo"]
    assert case["origin"]["versions"].keys() >= {"torch", "stable-baselines3"}
    assert case["origin"]["pairs"] == 1
    assert record["imports"]["origin"] == case["origin"]
    assert case["timesteps"] == 8 * 32
    assert case["contestants"][0]["engine"] == "sb3"
    ran = {(row["engine"], row["envs"]) for row in case["contestants"]}
    assert ran == {("sb3", "dummy"), (FASTEST, "dummy"), (FASTEST, "native"), ("torch", "dummy")}
    for row in case["contestants"]:
        assert len(row["seconds"]) == 1
        assert min(row["seconds"]) > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert row["floor_seconds"].keys() == {"environments", "products"}
        assert row["share_of_floor"] > 0
        assert row["peak_memory_mib"] > 50
        assert row["first_update_seconds"] > 0
    assert case["contestants"][0]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert record["imports"]["scratch_minus_sb3"].keys() == {"median", "min", "max"}
    assert throughput.table(record) in printed
    assert (tmp_path / "throughput.md").read_text(encoding="utf-8").strip() in printed
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_components_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "components.json"
    printed = run_module("components", "--rounds", "1", "--only", "cartpole_zoo", "--out", str(out))
    timings = json.loads(out.read_text(encoding="utf-8"))["microseconds"]["cartpole_zoo"]
    assert len(timings) == 6
    for part, by_whom in timings.items():
        assert "SB3 PPO" in by_whom
        assert len(by_whom) >= 2
        assert min(by_whom.values()) > 0
        assert f"| {part} |" in printed


@pytest.mark.slow
def test_cartpole_end_to_end(tmp_path: Path) -> None:
    """Three processes, three rows, identical bits; the picture has both axes, and names the engines."""
    printed = run_module("cartpole", "--timesteps", "512", "--out", str(tmp_path))
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert list(record["sides"]) == ["sb3", "reference", "fast"]
    bits = {who: side["same_bits_as_sb3"] for who, side in record["sides"].items()}
    assert bits["reference"]
    assert not bits["fast"]
    assert record["sides"]["fast"]["title"] == f"ScratchPPO, engine auto, which took {FASTEST}"
    assert record["hyperparameters"] == load_task("CartPole-v1").described()
    assert {(run["side"], run["seed"]) for run in record["runs"]} == {(who, 0) for who in record["sides"]}
    assert cartpole.table(record) in printed
    assert "| ScratchPPO, engine torch |" in printed
    assert "| identical to SB3's |" in printed
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for who in record["sides"]:
        assert (tmp_path / f"{who}_0.zip").exists()


def test_cartpole_fails_if_the_bits_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_all(options: argparse.Namespace) -> cartpole.Runs:
        rows = [{"timesteps": n, "seconds": n + 1.0, "cpu_seconds": n + 1.0, "returns": [9.0, 11.0]} for n in (0, 99)]
        return {side: {0: {"engine_used": side, "weights_sha256": side, "evaluations": rows}} for side in cartpole.ENTRY.sides}

    monkeypatch.setattr(cartpole, "run_all", run_all)
    monkeypatch.setattr("sys.argv", ["cartpole", "--out", str(tmp_path / "new")])
    assert cartpole.main() == 1
    printed = capsys.readouterr()
    assert "the reference did not end with SB3's parameters" in printed.err
    assert "| SB3 PPO | 10.0 ± 1.0 | 100.0 | 1.00 |  |" in printed.out


def test_the_shells_choice_of_kernels_is_dropped() -> None:
    """For whatever a benchmark starts, and before NumPy is imported by itself."""
    code = (
        "import benchmarks, os, threadpoolctl, numpy\n"
        "assert 'OPENBLAS_CORETYPE' not in os.environ\n"
        "print([each['architecture'] for each in threadpoolctl.threadpool_info() if each['internal_api'] == 'openblas'])"
    )
    kernels = []
    for variables in ({}, {"OPENBLAS_CORETYPE": "Prescott"}):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True
        )
        kernels.append(done.stdout)
    assert kernels[0] == kernels[1]
    assert "Prescott" not in kernels[0]


def test_measuring_as_without_avx512() -> None:
    """Torch, OpenBLAS and the compiled kernel are asked what they use; the record's command says how it was measured."""
    code = (
        "import benchmarks, threadpoolctl, numpy, warnings\n"
        "warnings.simplefilter('error')\n"
        "from benchmarks.record import provenance\n"
        "from sb3_ppo_from_scratch.engines.compiled.library import VARIABLE\n"
        "import json, os\n"
        "found = provenance('benchmarks.throughput')\n"
        "blas = [each['architecture'] for each in threadpoolctl.threadpool_info() if each['internal_api'] == 'openblas']\n"
        "print(json.dumps([found['machine']['instructions'], blas, os.environ[VARIABLE], found['command']]))"
    )
    if th.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("there is no AVX2 here")
    environment = os.environ | {"BENCHMARK_AVX2": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    instructions, blas, kernel, command = json.loads(done.stdout)
    assert (instructions, kernel) == ("AVX2", "avx2")
    assert set(blas) <= {"Haswell"}
    assert command.startswith("BENCHMARK_AVX2=1 python -m benchmarks.throughput")


def tiny_breakout(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("atari")
    arguments = {**task.arguments, "n_steps": 4, "batch_size": 4, "n_epochs": 1}
    monkeypatch.setitem(
        CASES, "breakout", dataclasses.replace(CASES["breakout"], task=lambda: Task(0, "CnnPolicy", 2, arguments), timesteps=8)
    )


@pytest.mark.parametrize("contestant", [Contestant("sb3", "dummy"), Contestant("channels_last", "dummy", precision="bf16")])
def test_breakout(contestant: Contestant, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_breakout(monkeypatch)
    case = scaled(CASES["breakout"], 1.0)
    timed = timed_run.time_training(case, contestant, seed=0, started=0.0)
    assert timed.keys() == {"seconds", "first_update_seconds", "peak_memory_mib"}
    assert timed["first_update_seconds"] > timed["seconds"] > 0
    assert timed_run.time_floor(case, contestant, seed=0)["products"] > 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what processes share")
def test_subprocesses_and_theirs_count_towards_memory() -> None:
    before = timed_run.subprocess_memory()
    hold = "import sys; held = b'x' * (100 << 20); print(flush=True); sys.stdin.read()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        grown = timed_run.subprocess_memory() - before
        process.communicate()
    assert 100 < grown < 150
    assert timed_run.subprocess_memory() == pytest.approx(before, abs=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a process holds")
@pytest.mark.parametrize("leaks", ["nothing", "descriptors", "threads", "children", "files", "objects", "memory"])
def test_a_soak_notices_what_is_left_behind(leaks: str) -> None:
    kept: list[Any] = []
    end = threading.Event()

    def one_round() -> None:
        Path(tempfile.gettempdir(), "written-over").write_text("once and again", encoding="utf-8")
        if leaks == "descriptors":
            kept.append(open(os.devnull, "rb"))  # noqa: SIM115  # that it stays open is what is tested
        elif leaks == "threads":
            threading.Thread(target=end.wait, daemon=True).start()
        elif leaks == "children":
            kept.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        elif leaks == "files":
            tempfile.mkstemp(dir=tempfile.gettempdir())
        elif leaks == "objects":
            kept.extend([] for _ in range(10_000))
        elif leaks == "memory":
            kept.append(b"x" * (16 << 20))

    try:
        record = soak.soak(0, one_round)
    finally:
        end.set()
        for each in kept:
            if isinstance(each, subprocess.Popen):
                each.communicate()
            elif hasattr(each, "close"):
                each.close()
    grown = {name for name, verdict in record["verdicts"].items() if not verdict["flat"]}
    assert (leaks in grown) if leaks != "nothing" else not grown
    assert record["rounds"] == soak.MIN_ROUNDS == len(record["counted"]["files"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a process holds")
def test_a_round_of_the_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines, files, and failures in this process; the whole one, with processes, takes too long."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        soak.learn_save_load(tmp_path)
        soak.refuse(tmp_path)
        soak.fail_and_resume(tmp_path, "nan", DummyVecEnv)
        with pytest.raises(AssertionError, match="no error came from an environment that should be well"):
            soak.fail_and_resume(tmp_path / "other", "be well", DummyVecEnv)


def test_what_the_kl_costs_is_measured() -> None:
    ratio = components.kl_cost("CartPole-v1", {"n_steps": 8, "batch_size": 16, "n_epochs": 1}, rounds=3)
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert components.kl_table({"it": ratio}).endswith(f"({ratio['min']:.3f} to {ratio['max']:.3f}) |")


def test_components_of_breakout(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_breakout(monkeypatch)
    timings = components.measure(CASES["breakout"], threads=1, rounds=1)
    assert timings["act"].keys() == {
        "SB3 PPO",
        "ScratchPPO channels_last bf16",
        "ScratchPPO channels_last",
        "ScratchPPO torch",
    }
    assert timings["optimizer step"].keys() == {"SB3 PPO", "channels_last"}


# ------------------------------------------------------------------------ floor


def test_products_of_a_small_network() -> None:
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), ConstantSchedule(1e-3))
    tower = [(32, 4, 64, True), (32, 64, 64, False)]
    assert sorted(floor.forward_products(policy, 32)) == sorted([*tower, *tower, (32, 64, 2, False), (32, 64, 1, False)])
    assert not any(module._forward_hooks for module in policy.modules())


def test_products_of_a_convolutional_network() -> None:
    policy = ActorCriticCnnPolicy(spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(4), ConstantSchedule(1e-3))
    assert floor.forward_products(policy, 3) == [
        (3 * 20 * 20, 4 * 8 * 8, 32, True),
        (3 * 9 * 9, 32 * 4 * 4, 64, False),
        (3 * 7 * 7, 64 * 3 * 3, 64, False),
        (3, 7 * 7 * 64, 512, False),
        (3, 512, 1, False),
        (3, 512, 4, False),
    ]


def test_products_are_counted_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product takes a second: two layers of which the first's input needs no gradient make five per minibatch."""
    monkeypatch.setattr(floor, "forward_products", lambda *_: [floor.Product(2, 3, 4, True), floor.Product(2, 4, 5, False)])
    monkeypatch.setattr(floor, "_seconds", lambda *_: 1.0)
    policy = ActorCriticPolicy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), ConstantSchedule(1e-3))
    task = Task(0, "MlpPolicy", n_envs=4, arguments={"n_steps": 8, "batch_size": 16, "n_epochs": 3})
    steps_of_the_policy, minibatches = 320 / 4, 320 / 16 * 3
    assert floor.product_seconds(policy, task, 320) == 2 * steps_of_the_policy + 5 * minibatches


# -------------------------------------------------------------------- contestants


def test_who_takes_part() -> None:
    candidates, others = contestants(CASES["breakout"], threads=2)
    assert {(each.envs, each.threads) for each in candidates} == {("dummy", 1), ("dummy", 2), ("subproc", 1), ("subproc", 2)}
    assert {(each.envs, each.precision) for each in others if each.engine == "channels_last"} == {
        (envs, precision) for envs in ("dummy", "ale", "envpool") for precision in ("fp32", "bf16")
    }
    assert {each.threads for each in others} == {2}
    candidates, others = contestants(CASES["cartpole_zoo"], threads=2)
    assert candidates == [Contestant("sb3", "dummy", threads=1)]
    assert {each.threads for each in others} == {1}
    assert {(each.engine, each.envs) for each in others} >= {("numpy", "native"), ("numpy", "dummy"), ("torch", "dummy")}


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing(Contestant("sb3", "dummy")) is None
    assert missing(Contestant("torch", "dummy")) is None
    assert missing(Contestant("warp", "dummy")) == "engine 'warp'"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("sbx", "envpool") else object())
    assert missing(Contestant("sbx", "dummy")) == "module 'sbx'"
    assert missing(Contestant("channels_last", "envpool")) == "module 'envpool'"


@pytest.mark.parametrize("case", [name for name in CASES if name != "breakout"])
def test_the_same_task_for_all(case: str) -> None:
    if CASES[case].needs is not None:
        pytest.importorskip(CASES[case].needs)
    sb3, scratch = (build(CASES[case], Contestant(engine, "dummy"), seed=4) for engine in ("sb3", "torch"))
    assert type(sb3) is PPO
    assert type(scratch) is ScratchPPO
    for name in ("n_envs", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "seed"):
        assert getattr(sb3, name) == getattr(scratch, name), name


def test_cases_whose_environments_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "find_spec", lambda name: None)
    options = throughput.parse_options(["--only", "hopper", "--only", "half_cheetah"])
    record = throughput.make_record(options)
    assert record["cases"] == {}
    assert "Left out: Hopper-v5, rl-zoo3's settings, which needs module 'mujoco'." in throughput.table(record)


def test_what_is_measured_again_takes_the_place_of_the_same() -> None:
    old = {"cases": {"breakout": "old", "cartpole_zoo": "old"}, "imports": "old", "left_out": {"hopper": "needs"}}
    new: dict[str, Any] = {"cases": {"hopper": "new", "cartpole_zoo": "new"}, "left_out": {"half_cheetah": "needs"}}
    both = throughput.merged(old, new)
    assert list(both["cases"].items()) == [("cartpole_zoo", "new"), ("hopper", "new"), ("breakout", "old")]
    assert both["imports"] == "old"
    assert both["left_out"] == {"half_cheetah": "needs"}
    assert throughput.merged({}, new)["cases"].keys() == new["cases"].keys()


def test_hyperparameters_may_name_modules_of_torch() -> None:
    arguments = load_task("HalfCheetah-v4").arguments["policy_kwargs"]
    assert arguments["activation_fn"] is nn.ReLU
    assert arguments["net_arch"] == {"pi": [256, 256], "vf": [256, 256]}


def test_engines_of_the_hyperparameter_files_entries() -> None:
    found = {name: choice.engine.name for name, choice in zoo_engines.choices().items()}
    assert found.keys() >= {"CartPole-v1", "HalfCheetah-v4", "MiniGrid-Unlock-v0"}
    assert found["atari"] == "channels_last"
    assert {engine for name, engine in found.items() if "NoVel" in name} == {"lstm"}
    assert found["CartPole-v1"] == found["default"] != "torch"
    assert "torch" not in found.values()
    if FASTEST == "compiled":
        assert zoo_engines.table().strip() in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "theirs", "ours", "steps"),
    [("CartPoleNoVel-v1", "RecurrentPPO", "lstm", 256), ("Taxi-v4", "MaskablePPO", FASTEST, 1024)],
)
def test_beside_sb3_contrib(
    task: str,
    theirs: str,
    ours: str,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(contrib, "TASKS", {task: (contrib.TASKS[task][0], ours)})
    contrib.main(["--rounds", "2", "--scale", "0.01", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "contrib.json").read_text(encoding="utf-8"))
    result = record["tasks"][task]
    assert result["steps"] == steps
    assert result["ratios"][theirs] == [1, 1]
    assert result["ratios"][ours][1] == result["speeds"][ours][1] / result["speeds"][theirs][1]
    assert contrib.table(record) in capsys.readouterr().out


def test_updates_beside_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two fast engines, with gSDE and with an LSTM; measuring changes nothing about a run."""
    monkeypatch.setattr(rounding, "TASKS", ("MountainCarContinuous-v0", "CartPoleNoVel-v1"))
    monkeypatch.setattr(rounding, "_MOMENTS", 2)
    rounding.main(["--scale", "0.02", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "rounding.json").read_text(encoding="utf-8"))
    assert rounding.table(record) in capsys.readouterr().out
    for found in record["tasks"].values():
        assert len(found["fast"]) == len(found["last_bit"]) == len(found["timesteps"]) == 2
        assert 0 < max(found["last_bit"]) < 1e-4
        assert 0 < max(found["fast"]) < 1e-4
    entry = PROTOCOL["MountainCarContinuous-v0"]
    model: Any = build(entry.case(), entry.sides["fast"], 0).learn(16)
    once = rounding.change(model, "torch")
    assert th.equal(rounding.change(model, "torch"), once)
    assert not th.equal(rounding.change(model, "torch", 1e-3), once)


def test_a_commit_is_dirty_where_files_but_results_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(record, "ROOT", tmp_path)
    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "record.json"
    result.parent.mkdir(parents=True)
    for path in (code, result):
        path.write_text("old")
    assert record.provenance("x", "told")["commit"] == "told"
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    result.write_text("new")
    (tmp_path / "untracked").write_text("")
    assert record.provenance("x")["commit"] == git("rev-parse", "HEAD")
    code.write_text("new")
    assert record.provenance("x")["commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_scaled_to_whole_rollouts() -> None:
    case = CASES["cartpole_zoo"]
    assert scaled(case, 1.0).timesteps == 391 * 256
    assert scaled(case, 0.01).timesteps == 4 * 256
    assert scaled(case, 1e-9).timesteps == 256


# ---------------------------------------------------------------------- figures


def test_ratios_are_of_the_same_round() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": each, "first_update_seconds": 1.0, "peak_memory_mib": 100.0} for each in seconds]

    floor_seconds = {"environments": 1.0, "products": 1.0}
    row = throughput._row(Contestant("torch", "dummy"), runs(5.0, 4.0, 10.0), runs(10.0, 12.0, 10.0), floor_seconds)
    assert row["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert row["share_of_floor"] == 2.0 / 5.0
    assert throughput._cells(row) == ["ScratchPPO torch", "dummy", "1", "5.0", "2.00 (1.00 to 3.00)", "40%", "100", "1.0"]


def test_sb3_runs_with_what_is_fastest_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str, int]] = []

    def run(case: str, contestant: Contestant, options: Any, **order_details: Any) -> dict[str, float]:
        if order_details.get("floor"):
            return {"environments": 0.1, "products": 0.1}
        order.append((contestant.engine, contestant.envs, contestant.threads))
        seconds = 1.0 if order[-1][1:] == ("subproc", 2) else 2.0
        return {"seconds": seconds, "first_update_seconds": 1.0, "peak_memory_mib": 1.0}

    monkeypatch.setattr(throughput, "run", run)
    monkeypatch.setattr(throughput, "missing", lambda each: None if each.envs in ("dummy", "subproc") else "it")
    options = argparse.Namespace(pairs=3, threads=2, scale=1.0, seed=0, engine=None)
    result = throughput.run_case("breakout", options)
    assert len(result["sb3_settings_tried"]) == 4
    a_round = order[4 : 4 + len(result["contestants"])]
    assert a_round[0] == ("sb3", "subproc", 2)
    assert order[4:] == 3 * a_round, "everybody runs once before anybody runs again"
    assert result["contestants"][1]["ratio"]["median"] == 0.5
    assert result["skipped"]["ScratchPPO channels_last (envpool)"] == "needs it"


def test_a_failed_run_says_why() -> None:
    options = argparse.Namespace(scale=1e-9)
    with pytest.raises(RuntimeError, match=r"ScratchPPO warp on dummy failed on cartpole_zoo(.|\n)*engine must be"):
        throughput.run("cartpole_zoo", Contestant("warp", "dummy"), options)


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--scale", "0"], ["--threads", "x"], ["--only", "pong"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        throughput.parse_options(arguments)
    assert caught.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_ways_to_step_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a task that needs no mujoco."""
    kinds = {kind: lambda n_envs: make_vec_env("Pendulum-v1", n_envs) for kind in ("DummyVecEnv", "another")}
    monkeypatch.setattr(vector_envs, "KINDS", kinds)
    speeds = vector_envs.measure(n_envs=2, n_steps=32, rounds=2)
    assert list(speeds) == list(kinds)
    for each in speeds.values():
        for speed in each.values():
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert each["training"]["max"] < each["alone"]["max"]
    assert f"| DummyVecEnv | {speeds['DummyVecEnv']['alone']['median']:,} (" in vector_envs.table(speeds)
