"""``benchmarks.gpu``: all that runs without a GPU, on tiny budgets. What it measures on one is not measured here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch as th

from benchmarks.cases import Contestant
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, measure, profile
from benchmarks.gpu.checks import Check
from benchmarks.gpu.profile import Busy, busy_time
from benchmarks.tasks import Task, load_task
from sb3_ppo_from_scratch.engines.cudagraph import learning
from sb3_ppo_from_scratch.update import minibatch_loss

ROOT = Path(__file__).resolve().parent.parent
CPU = th.device("cpu")


def tiny_task(n_envs: int = 2, **changes: Any) -> Task:
    task = load_task("atari")
    arguments = {**task.arguments, "n_steps": 4, "batch_size": 4, "n_epochs": 1, **changes}
    return Task(0, "CnnPolicy", n_envs, arguments)


# ------------------------------------------------------------------ without a GPU


@pytest.mark.skipif(th.cuda.is_available(), reason="what is asked is what happens without CUDA")
@pytest.mark.parametrize("command", gpu.COMMANDS)
def test_says_that_there_is_no_gpu(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([command, "--out", str(tmp_path / "out")]) == 3
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(th.cuda.is_available(), reason="what is asked is what happens without CUDA")
def test_as_a_program() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    assert done.stderr.strip() == "benchmarks.gpu needs a CUDA device, and torch sees none here; nothing was measured"


@pytest.mark.parametrize("arguments", [["fly"], ["--budget-seconds", "10"], ["--n-envs", "0"], ["--backend", "dummy"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.parse_options(arguments)
    assert caught.value.code == 2
    assert (arguments[0] if arguments[0].startswith("--") else "command") in capsys.readouterr().err


def test_options() -> None:
    options = gpu.parse_options([])
    assert (options.command, options.n_envs) == ("all", [8, 32, 128])
    assert options.budget_seconds < 600, "one command ends inside ten minutes"
    assert gpu.parse_options(["measure", "--seed", "3"]).seed == 3


# ------------------------------------------------------------------------- checks


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    results = checks.run_checks(CPU)
    assert len(results) > 20
    assert [result.name for result in results if not result.passed] == []
    assert "FAILED" not in capsys.readouterr().out


def test_checks_notice_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(outputs: Any, batch: Any, config: Any, weights: Any) -> Any:
        return minibatch_loss(outputs, batch, dataclasses.replace(config, vf_coef=0.6), weights)

    monkeypatch.setattr(learning, "minibatch_loss", wrong)
    monkeypatch.setattr(checks, "_KINDS", {"MlpPolicy, Box": checks._KINDS["MlpPolicy, Box"]})
    assert not any(result.passed for result in checks.check_gradients(CPU))
    assert not any(result.passed for result in checks.check_updates(CPU))


def test_a_check_that_breaks_has_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(device: th.device) -> Any:
        raise RuntimeError("out of order")

    def sound(device: th.device) -> Any:
        yield Check("sound", 0.0, 0.0)

    monkeypatch.setattr(checks, "CHECKS", {"broken": broken, "sound": sound})
    results = checks.run_checks(CPU)
    assert [result.passed for result in results] == [False, True]
    assert "FAILED broken: RuntimeError: out of order" in capsys.readouterr().out
    assert not Check("", float("nan"), 1.0).passed


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch warns of each, and the switch is put back."""
    modes: list[Any] = []
    monkeypatch.setattr(th.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(th.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        for text in ("called a synchronizing CUDA operation", "something else", "called a synchronizing CUDA operation"):
            warnings.warn(text, stacklevel=1)

    assert checks.count_waits(waits) == 2
    assert modes == ["warn", 0]


# -------------------------------------------------------------------- measurements


def test_busy_time_is_that_of_the_union() -> None:
    busy = busy_time([(5.0, 6.0), (0.0, 1.0), (0.5, 2.0), (0.6, 0.7)])
    assert busy == Busy(busy=3.0, total=6.0, n_kernels=4, largest_gap=3.0)
    assert busy.share == 0.5
    assert busy_time([]).share == 0.0


def test_who_takes_part() -> None:
    few, many = measure.contestants(8, "ale", cores=4), measure.contestants(128, "envpool", cores=4)
    assert Contestant("sb3", "subproc") in few
    assert {each.envs for each in many if each.engine == "sb3"} == {"dummy"}, "128 processes are too many for 4 cores"
    assert {(each.engine, each.precision) for each in many if each.envs == "envpool"} == {
        ("none", "fp32"),
        ("torch", "fp32"),
        ("cudagraph", "fp32"),
        ("cudagraph", "bf16"),
    }


@pytest.mark.parametrize("contestant", [Contestant("sb3", "dummy"), Contestant("torch", "ale"), Contestant("none", "ale")])
def test_each_is_timed(contestant: Contestant) -> None:
    pytest.importorskip("ale_py")
    record = measure.measure_one(contestant, 2, 0.01, tiny_task(), "cpu")
    assert record["fps"] > 0
    assert (record["engine"], record["n_envs"]) == (contestant.engine, 2)
    if contestant.engine != "none":
        assert record["iterations"] >= 1
        assert record["host_memory_mib"] > 50


def test_the_first_iteration_is_not_timed() -> None:
    watch = measure.Stopwatch(0.0)
    watch.boundaries = [(0.0, 0), (100.0, 1000), (101.0, 2000), (104.0, 4000)]
    assert watch.fps == 3000 / 4.0


def row(engine: str, fps: float, envs: str = "ale", **more: Any) -> dict[str, Any]:
    return {"engine": engine, "envs": envs, "n_envs": 8, "title": engine, "fps": fps, **more}


def test_table() -> None:
    rows = [
        row("none", 1000.0),
        row("sb3", 100.0, "dummy"),
        row("sb3", 200.0, "subproc"),
        row("cudagraph", 800.0, gpu_busy_share=0.5, gpu_memory_mib=1234.5),
        {**row("torch", 0.0), "skipped": "the budget was spent"},
        {**row("cudagraph", 9999.0), "n_envs": 32},
    ]
    del rows[4]["fps"]
    lines = measure.table(rows).splitlines()
    assert lines[2] == "| 8 ale | none | 1,000 |  |  |  |  |"
    assert lines[4] == "| 8 subproc | sb3 | 200 | 1.00 |  |  |  |"
    assert lines[5] == "| 8 ale | cudagraph | 800 | 4.00 | 80% | 50% | 1,234 |"
    assert "left out: the budget was spent" in lines[6]
    assert lines[7] == "| 32 ale | cudagraph | 9,999 |  |  |  |  |"


def test_what_does_not_fit_in_the_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_one(contestant: Contestant, n_envs: int, seconds: float, *_: Any) -> dict[str, Any]:
        if contestant.engine == "sb3":
            raise RuntimeError("no memory")
        return row(contestant.engine, seconds)

    monkeypatch.setattr(measure, "measure_one", measure_one)
    options = gpu.parse_options(["--n-envs", "8"])
    rows = list(measure.measure(options, time.monotonic() + 100.0))
    assert {each["skipped"] for each in rows if each["engine"] == "sb3"} == {"RuntimeError: no memory"}
    assert sum("fps" in each for each in rows) == 4
    assert {each["skipped"] for each in measure.measure(options, time.monotonic())} == {"the budget was spent"}


@pytest.mark.parametrize("passes", [True, False])
def test_checks_come_first_and_figures_are_written(passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_provenance", lambda: {"commit": "x"})
    monkeypatch.setattr(gpu, "run_checks", lambda device: [Check("it", 0.0 if passes else 1.0, 0.5)])
    monkeypatch.setattr(gpu, "measure", lambda options, deadline: iter([row("none", 10.0), row("sb3", 5.0)]))
    assert gpu.run(gpu.parse_options(["--out", str(tmp_path)]), 0.0) is passes
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert record["commit"] == "x"
    assert record["checks"] == [{"name": "it", "error": 0.0 if passes else 1.0, "tolerance": 0.5, "passed": passes}]
    assert len(record["rows"]) == (2 if passes else 0), "what is wrong is not worth timing"


def test_a_profile_of_the_minibatch_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic, with a stand-in for the device."""

    @dataclasses.dataclass
    class Learner:
        calls: int = 0

        def _minibatch(self) -> None:
            self.calls += 1

    monkeypatch.setattr(th.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(profile, "count_waits", lambda function: (function(), 0)[1])
    monkeypatch.setattr(profile, "profiled", lambda function: (function(), Busy(0.04, 0.05, 500, 0.001))[1])
    learner = Learner()
    found = profile.minibatch_profile(learner)  # type: ignore[arg-type]
    assert learner.calls == 1 + 2 * 50
    assert (found["kernels"], found["waits"]) == (10, 0)
    assert found["kernel_microseconds"] == pytest.approx(800)
    assert found["gap_microseconds"] == pytest.approx(200)
