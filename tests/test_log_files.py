"""Files that grow while a run goes on: checkpoints stay small, and a resumed run goes on in its own, without gap or double."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from sb3_ppo_from_scratch.checkpoint import env_state
from sb3_ppo_from_scratch.checkpoint.files import checkpoint_files
from sb3_ppo_from_scratch.checkpoint.log_files import holds, keep, put_all_back
from sb3_ppo_from_scratch.checkpoint.log_state import capture_logger, locate_logger, make_logger, restore_logger
from sb3_ppo_from_scratch.vec_env import NativeVecEnv
from tests.runs import rows
from tests.test_checkpoint import SMALL, TOTAL, StopAt, StopError

BULK = "1.0,9,0.1\n" * 500_000
"""5 MB of episodes."""


def monitored(folder: Path) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=2, monitor_dir=str(folder))


def appended(folder: Path) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=2, monitor_dir=str(folder), monitor_kwargs={"override_existing": False})


def forked(folder: Path) -> VecEnv:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    kwargs: dict[str, Any] = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}}
    return make_vec_env("CartPole-v1", n_envs=2, monitor_dir=str(folder), **kwargs)


def vec_monitored(folder: Path) -> VecEnv:
    return VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), str(folder / "0"))


def native(folder: Path) -> VecEnv:
    return NativeVecEnv(gym.make_vec("CartPole-v1", 2), filename=str(folder / "0"))


ALL = pytest.mark.parametrize("make", [monitored, appended, forked, vec_monitored, native])


def begin(make: Callable[[Path], VecEnv], folder: Path, *more: BaseCallback) -> None:
    model = ScratchPPO(env=make(folder), **SMALL)
    model.set_logger(configure(str(folder), ["csv", "json", "log"]))
    model.learn(TOTAL, [ResumableCheckpoint(64, folder / "checkpoints"), *more])


def resumed(make: Callable[[Path], VecEnv], folder: Path) -> ScratchPPO:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(episodes of an earlier run|a callback (StopAt|Each))")
        warnings.filterwarnings("error", ".*missing")
        return ScratchPPO.resume(folder / "checkpoints", make(folder))


def go_on(model: ScratchPPO) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a callback (StopAt|Each)")
        model.continue_learning()
    model.env.close()


def written(folder: Path) -> list[Any]:
    """The episodes of all monitors, without times, and the log. Monitors that append write no header."""
    files = {path.name: path.read_text().splitlines() for path in folder.glob("*.monitor.csv*")}
    episodes = {name: [line.split(",")[:2] for line in lines if line[0].isdigit()] for name, lines in files.items()}
    return [episodes, rows(folder)["progress.csv"]]


class Each(BaseCallback):
    """Notes what the monitor files hold when checkpoints are taken, and may have one write a lot."""

    def __init__(self, folder: Path, bulk: str = ""):
        super().__init__()
        self.folder, self.bulk = folder, bulk
        self.seen: dict[int, dict[str, bytes]] = {}

    def state_dict(self) -> None: ...

    def load_state_dict(self, state: None) -> None: ...

    def _on_step(self) -> bool:
        if self.num_timesteps == 70 and self.bulk:
            self.training_env.get_attr("results_writer")[0].file_handler.write(self.bulk)
        self.seen[self.num_timesteps] = {path.name: path.read_bytes() for path in self.folder.glob("*.monitor.csv")}
        return True


@pytest.mark.parametrize("make", [monitored, appended])
def test_a_checkpoint_does_not_grow_with_a_monitors_file(make: Callable[[Path], VecEnv], tmp_path: Path) -> None:
    begin(make, tmp_path, Each(tmp_path, BULK))
    sizes = [path.stat().st_size for path in checkpoint_files(tmp_path / "checkpoints")]
    assert max(sizes) < 300_000
    before = (tmp_path / "0.monitor.csv").read_bytes()
    assert len(before) > len(BULK)
    assert resumed(make, tmp_path).num_timesteps == TOTAL
    assert (tmp_path / "0.monitor.csv").read_bytes() == before


@ALL
def test_files_are_cut_where_they_were(make: Callable[[Path], VecEnv], tmp_path: Path) -> None:
    each = Each(tmp_path)
    with pytest.raises(StopError):
        begin(make, tmp_path, each, StopAt(250))
    assert each.seen[250] != each.seen[192], "there is something to cut"
    model = resumed(make, tmp_path)
    assert model.num_timesteps == 192
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.monitor.csv*")} == each.seen[192]
    go_on(model)
    begin(make, tmp_path / "whole")
    assert written(tmp_path) == written(tmp_path / "whole")


@ALL
def test_a_copied_run_goes_on_in_its_own_files(make: Callable[[Path], VecEnv], tmp_path: Path) -> None:
    with pytest.raises(StopError):
        begin(make, tmp_path / "a", StopAt(250))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    go_on(resumed(make, tmp_path / "a"))
    theirs = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*") if path.is_file()}
    go_on(resumed(make, tmp_path / "b"))
    assert all(path.read_bytes() == content for path, content in theirs.items())
    assert written(tmp_path / "b") == written(tmp_path / "a")


def test_another_runs_file_is_not_touched_and_named(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        begin(appended, tmp_path, StopAt(250))
    file, theirs = tmp_path / "0.monitor.csv", "#another run's\n" + "r,l,t\n" * 2000
    file.write_text(theirs)
    with pytest.warns(UserWarning, match=r"missing in \S*/0\.monitor\.csv: "):
        model = ScratchPPO.resume(tmp_path / "checkpoints", appended(tmp_path))
    assert file.read_text() == theirs
    go_on(model)
    assert file.read_text().startswith(theirs)
    assert len(file.read_text()) > len(theirs), "new episodes are added"


def test_a_copied_run_does_not_cut_the_file_of_the_one_it_was_copied_of(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        begin(native, tmp_path / "a", StopAt(250))
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    before = (tmp_path / "a" / "0.monitor.csv").read_bytes()
    with pytest.warns(UserWarning, match="kept as"):
        ScratchPPO.resume(tmp_path / "b" / "checkpoints", native(tmp_path / "a"))
    assert (tmp_path / "a" / "0.monitor.csv.1").read_bytes() == before


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        begin(monitored, tmp_path, StopAt(250))
    shutil.rmtree(tmp_path / "checkpoints" / "logs")
    (tmp_path / "progress.json").unlink()
    with pytest.warns(UserWarning, match="missing") as warned:
        model = ScratchPPO.resume(tmp_path / "checkpoints", monitored(tmp_path))
    said = [str(each.message) for each in warned if "missing" in str(each.message)]
    assert len(said) == 2
    assert "progress.json" in said[0]
    assert all(f"{index}.monitor.csv" in said[1] for index in (0, 1))
    go_on(model)
    assert len(rows(tmp_path)["progress.csv"]) == TOTAL // 32, "this one still held what it did"
    assert len(rows(tmp_path)["0.monitor.csv"]) > 0


def test_files_of_evaluations_too(tmp_path: Path) -> None:
    def evaluating() -> EvalCallback:
        env = make_vec_env("CartPole-v1", n_envs=1, monitor_dir=str(tmp_path / "eval"), seed=3)
        return EvalCallback(env, eval_freq=20, log_path=str(tmp_path), verbose=0)

    with pytest.raises(StopError):
        begin(monitored, tmp_path, evaluating(), StopAt(250))
    model = resumed(monitored, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a callback StopAt")
        model.continue_learning(evaluating())
    assert len(rows(tmp_path / "eval")["0.monitor.csv"]) == 5 * (TOTAL // 40)


def test_a_copy_follows_a_file_that_has_gone_back(tmp_path: Path) -> None:
    path, copy = tmp_path / "file", tmp_path / "copies" / "file"
    first, second = "".join(f"{i}\n" for i in range(50_000)), "".join(f"{i}\n" for i in range(70_000, 90_000))
    path.write_text(first + second)
    with path.open("r+") as file:
        assert holds(copy, keep(file, copy) or {})
        os.truncate(path, len(first))
        file.seek(0, os.SEEK_END)
        mark = keep(file, copy)
        file.write("another way\n" * 30_000)
        later = keep(file, copy)
        assert copy.read_bytes() == path.read_bytes()
        assert all(holds(copy, each or {}) for each in (mark, later))
        path.unlink()
        assert keep(file, copy) is None
        path.write_text("x")
        assert put_all_back({"file": file}, {"file": None}, tmp_path, None) == [str(path)]
        assert path.read_text() == "x"


def test_checkpoints_that_hold_contents_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of formats 1 and 2, for monitors and loggers."""
    env = monitored(tmp_path)
    world = env.envs[0]
    writer = world.results_writer
    writer.write_row({"r": 1.0, "l": 2, "t": 3.0})
    before = Path(writer.file_handler.name).read_bytes()
    whole = env_state._Kind(lambda each: Path(each.file_handler.name).read_bytes(), env_state._WRITER.set)
    with monkeypatch.context() as patch:
        patch.setattr(env_state, "_WRITER", whole)
        state = env_state.capture(world)
    writer.write_row({"r": 4.0, "l": 5, "t": 6.0})
    env_state.restore(world, state)
    assert Path(writer.file_handler.name).read_bytes() == before

    logger = configure(str(tmp_path), ["csv"])
    logger.record("a", 1)
    logger.dump(1)
    saved = capture_logger(logger, tmp_path / "checkpoints" / "logs")
    saved["formats"][0]["text"] = (tmp_path / "progress.csv").read_bytes()
    del saved["formats"][0]["mark"]
    located = locate_logger(saved, None, tmp_path / "checkpoints", None)
    shutil.rmtree(tmp_path / "checkpoints")
    restore_logger(make_logger(located), located)
    assert (tmp_path / "progress.csv").read_text() == "a\n1\n"
