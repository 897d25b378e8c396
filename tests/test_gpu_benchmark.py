"""``benchmarks.gpu``: all that runs without a GPU, on tiny budgets. What it measures on one is not measured here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch as th
import yaml

from benchmarks import breakout, record
from benchmarks.cases import Contestant
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, measure, profile
from benchmarks.gpu.checks import SUBJECTS, Check, Subject
from benchmarks.gpu.child import answer_of
from benchmarks.gpu.profile import Busy, busy_time
from benchmarks.tasks import HYPERPARAMETERS, Task, load_entry, load_task, schedule
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
def test_all_checks_pass_on_a_cpu() -> None:
    subjects = [subject for subject in SUBJECTS if subject.precision != "tf32"]  # the same as fp32 here
    results = [result for subject in subjects for result in checks.run_checks(CPU, subject)]
    assert len(results) > 20
    assert [result for result in results if not result.passed] == []


def test_checks_notice_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(outputs: Any, batch: Any, config: Any, weights: Any) -> Any:
        return minibatch_loss(outputs, batch, dataclasses.replace(config, vf_coef=0.6), weights)

    monkeypatch.setattr(learning, "minibatch_loss", wrong)
    subject = Subject("MlpPolicy, Box")
    assert not any(result.passed for result in checks.check_gradients(CPU, subject))
    assert not any(result.passed for result in checks.check_updates(CPU, subject))


def test_a_check_that_breaks_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: th.device, subject: Subject) -> Any:
        raise RuntimeError("out of order")

    def sound(device: th.device, subject: Subject) -> Any:
        yield Check("sound", 0.0, 0.0, subject)

    monkeypatch.setattr(checks, "CHECKS", {"broken": broken, "sound": sound})
    results = checks.run_checks(CPU, SUBJECTS[0])
    assert [(result.name, result.passed) for result in results] == [
        ("broken: RuntimeError: out of order", False),
        ("sound", True),
    ]
    assert not Check("", float("nan"), 1.0, SUBJECTS[0]).passed


def test_every_subject_is_checked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one of them does to CUDA is no other's accident."""
    code = {
        "CnnPolicy": "import json; print('noise'); print(json.dumps([dict(name='it', error=2.0, tolerance=1.0, subject=[])]))",
        "MlpPolicy, Discrete": "import sys; sys.exit('CUDA error: an illegal memory access')",
    }

    def start(module: str, subject: Subject) -> Any:
        assert module == "benchmarks.gpu.checks"
        command = [sys.executable, "-c", code.get(subject.kind, "print([])")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(checks, "start", start)
    found = checks.check_all(60.0)
    failed = [(check.name, *check.subject) for check in found if not check.passed]
    assert failed == [
        ("CUDA error: an illegal memory access", "MlpPolicy, Discrete", "fp32"),
        ("it", "CnnPolicy", "fp32"),
        ("it", "CnnPolicy", "tf32"),
        ("it", "CnnPolicy", "bf16"),
    ]
    assert "FAILED CnnPolicy, bf16: it: 2 <= 1" in capsys.readouterr().out


def test_a_process_that_does_not_end() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert answer_of(child, 0.1) == "its time was up"
    assert child.returncode is not None


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
    few, many = measure.contestants(8, "ale", cores=4), measure.contestants(128, "envpool", cores=8)
    assert Contestant("sb3", "subproc") in few
    assert {each.envs for each in many if each.engine == "sb3"} == {"dummy"}, "128 processes are too many for 8 cores"
    assert {(each.engine, each.precision) for each in many if each.envs == "envpool" and not each.halves} == {
        ("none", "fp32"),
        ("torch", "fp32"),
        ("cudagraph", "fp32"),
        ("cudagraph", "tf32"),
        ("cudagraph", "bf16"),
    }
    assert {(each.engine, each.precision) for each in many if each.halves} == {("cudagraph", "fp32"), ("cudagraph", "bf16")}
    assert not any(each.halves for each in measure.contestants(7, "ale", cores=4))
    assert [each.title for each in few if each.compiled_loss] == ["ScratchPPO cudagraph, compiled loss"]


@pytest.mark.parametrize(
    "contestant",
    [
        Contestant("sb3", "dummy"),
        Contestant("torch", "ale"),
        Contestant("torch", "ale", halves=True),
        Contestant("none", "ale"),
    ],
)
def test_each_is_timed(contestant: Contestant) -> None:
    pytest.importorskip("ale_py")
    found = measure.measure_one(contestant, 2, 0.01, tiny_task(), "cpu")
    assert found["fps"] > 0
    if contestant.engine != "none":
        assert found["iterations"] >= 1
        assert found["host_memory_mib"] > 50


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


class Children:
    """Stand-ins for processes that measure: an answer for each order, in :attr:`orders` in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.orders: list[dict[str, Any]] = []
        monkeypatch.setattr(measure, "start", lambda module, order: order)
        monkeypatch.setattr(measure, "answer_of", self.answer)

    def answer(self, order: dict[str, Any], seconds: float) -> Any:
        self.orders.append(order)
        if order["contestant"]["engine"] == "sb3":
            return "no memory"
        return {"fps": order["seconds"]} if order["seconds"] else {"gpu_busy_share": 0.5}


def test_rates_come_first_and_what_does_not_fit_in_the_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)
    options = gpu.parse_options(["--n-envs", "8"])
    rows = list(measure.measure(options, time.monotonic() + 200.0))
    n_timed = sum(order["seconds"] is not None for order in children.orders)
    assert all(order["seconds"] is None for order in children.orders[n_timed:]), "profiles are last"
    assert len(children.orders) - n_timed == sum(row["engine"] in ("cudagraph", "torch") for row in rows[:n_timed])
    assert {each["skipped"] for each in rows if each["engine"] == "sb3"} == {"no memory"}
    assert all("gpu_busy_share" in each for each in rows[n_timed:])
    assert {each["skipped"] for each in measure.measure(options, time.monotonic())} == {"the budget was spent"}


def test_a_failed_check_stops_what_it_concerns_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    Children(monkeypatch)
    options = gpu.parse_options(["--n-envs", "8"])
    failed = [
        Check("of another policy", 1.0, 0.0, Subject("MlpPolicy, Box")),
        Check("waits", 1.0, 0.0, Subject("CnnPolicy"), is_about_speed=True),
        Check("gradient", 1.0, 0.0, Subject("CnnPolicy", "bf16")),
    ]
    rows = [row for row in measure.measure(options, time.monotonic() + 200.0, failed) if row["engine"] != "sb3"]
    skipped = {(row["engine"], row["precision"], row["skipped"]) for row in rows if "skipped" in row}
    assert skipped == {("cudagraph", "bf16", "a check has failed: gradient")}
    assert ("cudagraph", "fp32") in {(row["engine"], row["precision"]) for row in rows if "fps" in row}


@pytest.mark.parametrize("passes", [True, False])
def test_checks_come_first_and_figures_are_written(passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("it", 0.0 if passes else 1.0, 0.5, SUBJECTS[0])
    monkeypatch.setattr(gpu, "gpu_provenance", lambda commit: {"commit": commit})
    monkeypatch.setattr(gpu, "check_all", lambda seconds: [check])
    told: list[Any] = []

    def measured(options: Any, deadline: float, failed: list[Check]) -> Any:
        told.append(failed)
        rows = [row("none", 10.0), row("sb3", 5.0)]
        yield from rows
        rows[1]["gpu_busy_share"] = 0.25
        yield rows[1]

    monkeypatch.setattr(gpu, "measure", measured)
    assert gpu.run(gpu.parse_options(["--out", str(tmp_path), "--commit", "abc"]), 0.0) is passes
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["commit"] == "abc"
    assert told == [[] if passes else [check]]
    assert [(each["name"], each["subject"], each["passed"]) for each in written["checks"]] == [
        ("it", str(SUBJECTS[0]), passes)
    ]
    assert [each.get("gpu_busy_share") for each in written["rows"]] == [None, 0.25]


# ------------------------------------------------------ a machine with few packages

NEEDED = """
torch torchgen functorch numpy gymnasium stable_baselines3 ale_py
cloudpickle farama_notifications typing_extensions filelock sympy mpmath networkx jinja2 markupsafe fsspec cv2
"""
FEW_PACKAGES = f"""
import sys
from importlib.machinery import PathFinder

NAMES = {{*{NEEDED.split()!r}}}


class Few:
    # finds what the machine with the GPU has, and nothing else
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        is_installed = spec is not None and "site-packages" in str(spec.origin or spec.submodule_search_locations)
        return None if is_installed and name.partition(".")[0] not in NAMES else spec

    @staticmethod
    def find_distributions(*args, **kwargs):
        found = PathFinder.find_distributions(*args, **kwargs)
        return (each for each in found if each.metadata["Name"].replace("-", "_") in NAMES)


sys.meta_path[:] = [Few if finder is PathFinder else finder for finder in sys.meta_path]
"""
USE = """
import json, sys, warnings
from pathlib import Path
from benchmarks import breakout
from benchmarks.gpu import __main__ as gpu, measure
from benchmarks.record import provenance

for name in ("pandas", "matplotlib", "rl_zoo3", "optuna", "yaml", "threadpoolctl"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is not hidden")
print(json.dumps(provenance("x")["versions"]))
sys.argv[1:] = [json.dumps({"contestant": {"engine": "none", "envs": "ale"}, "n_envs": 2, "seconds": 0.1, "seed": 0})]
measure.main()
warnings.simplefilter("ignore")
breakout._GAMES_AT_ONCE = 1
breakout.load_task = lambda name, load=breakout.load_task: load(name)._replace(
    n_envs=2, arguments={**load(name).arguments, "n_steps": 4, "batch_size": 4, "n_epochs": 1}
)
sys.argv[1:] = ["--out", "run", "--minutes", "0", "--timesteps", "40", "--pack", "pieces"]
breakout.main()
assert gpu.main([]) == 3
"""


@pytest.mark.skipif(th.cuda.is_available(), reason="what is asked is what happens without CUDA")
def test_few_packages_are_enough(tmp_path: Path) -> None:
    """For the checks and measurements, and for Breakout in pieces; what is not installed has no version."""
    pytest.importorskip("ale_py")
    (tmp_path / "sitecustomize.py").write_text(FEW_PACKAGES, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    versions, rate = map(json.loads, done.stdout.splitlines()[:2])
    assert versions["rl_zoo3"] is None
    assert versions["torch"] == th.__version__
    assert rate["fps"] > 0
    assert "not done yet" in done.stdout
    assert (tmp_path / "pieces" / "pieces.json").exists()
    assert not (tmp_path / "run" / "learning_curve.png").exists()


def visit(tmp_path: Path, *arguments: str, python: str = sys.executable) -> tuple[int, str]:
    """Status and output of the script for a visit, with OUT in a folder of the test's and no wheels."""
    command = [str(ROOT / "benchmarks" / "gpu" / "visit.sh"), *arguments]
    environment = {**os.environ, "PYTHON": python}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a script for a shell")
def test_a_visits_commands_are_what_the_programs_understand(tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    echo.chmod(0o755)
    out = str(tmp_path / "out")
    status, said = visit(tmp_path, "measure", "no wheels", out, "abc", python=str(echo))
    assert status == 0
    options = gpu.parse_options(next(line for line in said.splitlines() if "benchmarks.gpu" in line).split()[2:])
    assert (options.command, options.n_envs, options.commit, options.out) == ("all", [8, 128], "abc", Path(out))
    assert "tests/test_cuda.py" in (tmp_path / "out" / "test_cuda.txt").read_text(encoding="utf-8")
    status, said = visit(tmp_path, "breakout", "no wheels", out, "abc", "4", str(tmp_path / "carried"), python=str(echo))
    assert status == 0
    chosen = breakout.parse_options(said.split()[2:])
    assert (chosen.device, chosen.engine, chosen.minutes, chosen.commit) == ("cuda", "cudagraph", 4.0, "abc")
    assert chosen.halves
    assert (chosen.pack, chosen.unpack, chosen.timesteps) == (Path(out) / "pieces", tmp_path / "carried", 1e7)
    status, said = visit(tmp_path, "breakout", "no wheels", out, "abc", "4", python=str(echo))
    assert breakout.parse_options(said.split()[2:]).unpack is None
    assert visit(tmp_path, "fly", "no wheels", out, "abc", python=str(echo))[0] == 2


def test_the_hyperparameter_file_is_read_as_pyyaml_reads_it() -> None:
    expected = yaml.safe_load(HYPERPARAMETERS.read_text(encoding="utf-8"))
    for name, entry in expected.items():
        found = load_entry(name)
        if name == "CarRacing-v3":  # a list of mappings, which nobody reads
            assert [text.partition(":")[0] for text in found["env_wrapper"]] == [next(iter(x)) for x in entry["env_wrapper"]]
            del found["env_wrapper"], entry["env_wrapper"]
        assert found == entry, name
        assert [*map(type, found.values())] == [*map(type, entry.values())], name
    with pytest.raises(KeyError):
        load_entry("no game")


def test_a_schedule_without_the_zoo_is_the_zoos(monkeypatch: pytest.MonkeyPatch) -> None:
    zoos = schedule("lin_2.5e-4")
    monkeypatch.setitem(sys.modules, "rl_zoo3.utils", None)
    ours = schedule("lin_2.5e-4")
    assert type(ours) is not type(zoos)
    for progress in (1.0, 0.7, 1e-3, 0.0):
        assert ours(progress) == pytest.approx(zoos(progress), rel=1e-12, abs=1e-18)
    task = load_task("atari")
    assert task.described()["learning_rate"] == "lin_0.00025"
    assert task.described()["clip_range"] == "lin_0.1"


def test_a_tree_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert record.provenance("x", "told")["commit"] != "told", "git knows better, where there is git"
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.provenance("x", "told")["commit"] == "told"
    assert record.provenance("x")["commit"] is None


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
