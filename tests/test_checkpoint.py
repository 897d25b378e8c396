"""A run that is cut off anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_ppo_from_scratch import EnvFailedError, ResumableCheckpoint, ScratchPPO, UnsafeFileError, has_checkpoint
from sb3_ppo_from_scratch.checkpoint import run_state
from sb3_ppo_from_scratch.checkpoint.files import CorruptCheckpointError, checkpoint_files, read_checkpoint, write_checkpoint
from sb3_ppo_from_scratch.checkpoint.plain_data import is_plain, pack, unpack
from sb3_ppo_from_scratch.checkpoint.vec_env_state import capture_vec_env, restore_vec_env
from sb3_ppo_from_scratch.vec_env import NativeVecEnv
from tests.envs import OBSERVATION_SPACES
from tests.helpers import ToyEnv, assert_same_model
from tests.runs import rows

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"policy": "MlpPolicy", "n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 4, "device": "cpu"}
TOTAL = 16 * 2 * 8


class StopError(Exception):
    """What ends a run before its time."""


class StopAt(BaseCallback):
    """Raise, or do something else, when so many timesteps are done."""

    def __init__(self, num_timesteps: int, action: Callable[[], Any] | None = None):
        super().__init__()
        self.at = num_timesteps
        self.action = action

    def _on_step(self) -> bool:
        if self.model.num_timesteps == self.at:
            if self.action is None:
                raise StopError
            self.action()
        return True


def cartpole(folder: Path | None = None, n_envs: int = 2, **kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, monitor_dir=None if folder is None else str(folder), **kwargs)


def forked_cartpole() -> VecEnv:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    return cartpole(vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})  # costs no imports


def toy(space: spaces.Space) -> VecEnv:
    return make_vec_env(lambda: ToyEnv(deepcopy(space), spaces.Discrete(3)), n_envs=2)


def random_states() -> list[Any]:
    numpy_state = np.random.get_state()
    return [random.getstate(), numpy_state[1].tolist(), numpy_state[2], th.get_rng_state().tolist()]


def learn(env: VecEnv, callbacks: list[BaseCallback], total: int = TOTAL, **kwargs: Any) -> tuple[ScratchPPO, list[Any]]:
    model = ScratchPPO(env=env, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), **{**SMALL, **kwargs}).learn(total, callbacks)
    return model, random_states()


def cut_off_and_resumed(
    make: Callable[[], VecEnv],
    folder: Path,
    at: int = 5 * 32 + 20,
    save_freq: int = 1,
    callbacks: Callable[[], list[BaseCallback]] = list,
    **kwargs: Any,
) -> tuple[ScratchPPO, list[Any]]:
    with pytest.raises(StopError):
        learn(make(), [ResumableCheckpoint(save_freq, folder), *callbacks(), StopAt(at)], **kwargs)
    random.seed(99)
    np.random.seed(99)
    th.manual_seed(99)
    model = ScratchPPO.resume(folder, make(), device="cpu")
    assert 0 < model.num_timesteps < at
    model.continue_learning([ResumableCheckpoint(save_freq, folder), *callbacks()])
    return model, random_states()


def assert_exact(make: Callable[[], VecEnv], folder: Path, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(could not|cannot) be saved")
        ours, our_random = cut_off_and_resumed(make, folder, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("at", "save_freq", "callbacks")}
    whole, whole_random = learn(make(), [], **kwargs)
    assert_same_model(ours, whole)
    assert our_random == whole_random
    assert ours.num_timesteps == whole.num_timesteps
    episodes = [[(info["r"], info["l"]) for info in model.ep_info_buffer] for model in (ours, whole)]
    assert episodes[0] == episodes[1]
    np.testing.assert_equal(ours._last_obs, whole._last_obs)
    for model in (ours, whole):
        model.env.close()


# ------------------------------------------------------- bits


@pytest.mark.parametrize(
    "make",
    [
        cartpole,
        lambda: VecNormalize(cartpole()),
        lambda: VecFrameStack(VecMonitor(DummyVecEnv([partial(gym.make, "CartPole-v1")] * 2)), 3),
        lambda: VecNormalize(forked_cartpole()),
        lambda: VecNormalize(NativeVecEnv(gym.make_vec("CartPole-v1", 2))),
        lambda: NativeVecEnv(gym.make_vec("CartPole-v1", 2, "sync")),
        lambda: make_vec_env("Acrobot-v1", n_envs=2),
        lambda: make_vec_env("FrozenLake-v1", n_envs=2),
        *(partial(toy, OBSERVATION_SPACES[name]) for name in ("box", "multidiscrete")),
    ],
    ids=[
        "cartpole",
        "VecNormalize",
        "VecFrameStack",
        "SubprocVecEnv",
        "native",
        "sync",
        "acrobot",
        "toy-text",
        "box-space",
        "multidiscrete-space",
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(make: Callable[[], VecEnv], tmp_path: Path) -> None:
    assert_exact(make, tmp_path)


def test_gsde_and_dict_observations(tmp_path: Path) -> None:
    assert_exact(
        lambda: make_vec_env("Pendulum-v1", n_envs=2), tmp_path / "gsde", use_sde=True, sde_sample_freq=3, clip_range_vf=0.3
    )
    assert_exact(partial(toy, OBSERVATION_SPACES["dict"]), tmp_path / "dict", policy="MultiInputPolicy")


@pytest.mark.parametrize("make", [cartpole, lambda: VecNormalize(NativeVecEnv(gym.make_vec("CartPole-v1", 2)))])
def test_what_is_remembered(make: Callable[[], VecEnv], tmp_path: Path) -> None:
    """In the middle of episodes, with the engine for it; a native environment's reset rows are in between."""
    assert_exact(make, tmp_path, policy="MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 8}, engine="lstm")
    model = ScratchPPO.resume(tmp_path, make(), device="cpu")
    assert np.abs(model._last_memory).max() > 0


@pytest.mark.parametrize("at", [2, 32, 33, 2 * 32, TOTAL - 1 - TOTAL % 2])
def test_whatever_the_moment(at: int, tmp_path: Path) -> None:
    whole, _ = learn(cartpole(), [])
    with pytest.raises(StopError):
        learn(cartpole(), [ResumableCheckpoint(1, tmp_path), StopAt(at - at % 2)])
    ours = ScratchPPO.resume(tmp_path, cartpole()).continue_learning()
    assert_same_model(ours, whole)


def test_a_second_learn_keeps_its_own_horizon(tmp_path: Path) -> None:
    def two(callbacks: list[BaseCallback]) -> ScratchPPO:
        model, _ = learn(cartpole(), [], total=96)
        return model.learn(128, callbacks, reset_num_timesteps=False)

    whole = two([])
    with pytest.raises(StopError):
        two([ResumableCheckpoint(1, tmp_path), StopAt(96 + 80)])
    ours = ScratchPPO.resume(tmp_path, cartpole()).continue_learning()
    assert ours.num_timesteps == 96 + 128
    assert_same_model(ours, whole)


def test_a_run_at_its_end_has_nothing_left_to_do(tmp_path: Path) -> None:
    whole, _ = learn(cartpole(), [ResumableCheckpoint(1, tmp_path)])
    ours = ScratchPPO.resume(tmp_path, cartpole()).continue_learning()
    assert ours.num_timesteps == TOTAL
    assert_same_model(ours, whole)
    with pytest.raises(ValueError, match="nothing to continue"):
        ours.continue_learning()


def run_killed(task: str, folder: Path, kills: int) -> None:
    command = [sys.executable, "-m", "tests.runs", task, str(folder), str(kills), "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed, whole = folder / "killed", folder / "whole"
    assert rows(killed) == rows(whole)
    assert {"0.monitor.csv", "1.monitor.csv", "progress.csv"} <= set(rows(whole))
    assert len(rows(whole)["progress.csv"]) > 1
    ours, theirs = (th.load(path / "final.pt") for path in (killed, whole))
    assert all(th.equal(ours["policy"][name], tensor) for name, tensor in theirs["policy"].items())
    for index, state in theirs["optimizer"]["state"].items():
        assert all(th.equal(ours["optimizer"]["state"][index][key], value) for key, value in state.items())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize(("task", "kills"), [("cartpole", 20), ("memory", 3), ("breakout", 2)])
def test_killed_at_random_moments(task: str, kills: int, tmp_path: Path) -> None:
    if task == "breakout":
        pytest.importorskip("ale_py")
    run_killed(task, tmp_path, kills)


# ------------------------------------------------------- environments


@pytest.mark.parametrize(
    "make",
    [
        partial(make_vec_env, "FrozenLake-v1", n_envs=2),
        partial(make_vec_env, "Pendulum-v1", n_envs=2),
        forked_cartpole,
        partial(toy, OBSERVATION_SPACES["image"]),
    ],
    ids=["FrozenLake", "Pendulum", "SubprocVecEnv", "toy"],
)
def test_a_restored_environment_replays_the_same_steps(make: Callable[[], VecEnv]) -> None:
    assert_same_steps(make)


def test_a_restored_atari_environment_replays_the_same_steps() -> None:
    pytest.importorskip("ale_py")
    from stable_baselines3.common.env_util import make_atari_env

    assert_same_steps(lambda: VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=2), 4))


def assert_same_steps(make: Callable[[], VecEnv], before: int = 60, after: int = 250) -> None:
    first, second = make(), make()
    first.seed(3)
    first.reset()
    second.reset()
    actions = [np.stack([first.action_space.sample() for _ in range(2)]) for _ in range(before + after)]
    for action in actions[:before]:
        first.step(action)
    state = unpack(pack(capture_vec_env(first)), "a test")
    assert state["problems"] == []
    restore_vec_env(second, state, from_here=True)
    dones = 0
    for action in actions[before:]:
        ours, theirs = first.step(action), second.step(action)
        for mine, other in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(mine, other)
        dones += ours[2].sum()
    assert dones > 0, "the end of an episode draws random numbers"
    first.close()
    second.close()


class Stateless(gym.Wrapper):
    """Holds what cannot be pickled."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.handle = iter(lambda: 0, 1)


class Informing(gym.Wrapper):
    """Tells what cannot be pickled."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, {**info, "handle": iter(lambda: 0, 1)}


def test_infos_may_hold_anything(tmp_path: Path) -> None:
    assert_exact(partial(wrapped, Informing), tmp_path)


class OwnState(Stateless):
    """Cannot be pickled either, but says what its state is."""

    def state_dict(self) -> dict[str, Any]:
        return {"cart": self.unwrapped.state, "random": self.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unwrapped.state = state["cart"]
        self.np_random.bit_generator.state = state["random"]


def wrapped(wrapper: type[gym.Wrapper]) -> VecEnv:
    return cartpole(wrapper_class=wrapper)


def test_an_environment_that_states_its_state(tmp_path: Path) -> None:
    assert_exact(partial(wrapped, OwnState), tmp_path)


def test_what_cannot_be_captured_is_said_once_and_reset_with_saved_seeds(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Stateless\.handle") as warned, pytest.raises(StopError):
        learn(wrapped(Stateless), [ResumableCheckpoint(1, tmp_path), StopAt(100)])
    assert len([each for each in warned if "Stateless" in str(each.message)]) == 1
    resumed = []
    for _ in range(2):
        np.random.seed()
        with pytest.warns(UserWarning, match="not bit-exact"):
            model = ScratchPPO.resume(tmp_path, wrapped(Stateless))
        assert model._last_episode_starts.all()
        resumed.append(model.continue_learning())
    assert_same_model(*resumed)


def test_box2d_worlds_are_reset(tmp_path: Path) -> None:
    pytest.importorskip("Box2D")
    with pytest.warns(UserWarning, match=r"LunarLander\.world"), pytest.raises(StopError):
        learn(make_vec_env("LunarLander-v3", n_envs=2), [ResumableCheckpoint(1, tmp_path), StopAt(100)])
    with pytest.warns(UserWarning, match="not bit-exact"):
        model = ScratchPPO.resume(tmp_path, make_vec_env("LunarLander-v3", n_envs=2))
    assert model.continue_learning().num_timesteps == TOTAL


class Note:
    """An environment's attribute of a class of its own."""

    def __init__(self, text: str):
        self.text = text


class Noting(gym.Wrapper):
    def __init__(self, env: gym.Env, note: Any = None):
        super().__init__(env)
        self.note = note


def test_objects_of_classes_that_a_fresh_environment_does_not_hold_need_trust(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        learn(cartpole(wrapper_class=partial(Noting, note=Note("x"))), [ResumableCheckpoint(1, tmp_path), StopAt(100)])
    assert (
        ScratchPPO.resume(tmp_path, cartpole(wrapper_class=partial(Noting, note=Note("y")))).env.get_attr("note")[0].text
        == "x"
    )
    with pytest.raises(ValueError, match=r"tests\.test_checkpoint\.Note.*allow_pickle=True"):
        ScratchPPO.resume(tmp_path, cartpole(wrapper_class=Noting))
    trusted = ScratchPPO.resume(tmp_path, cartpole(wrapper_class=Noting), allow_pickle=True)
    assert trusted.env.get_attr("note")[1].text == "x"


class NotingInReset(Noting):
    def reset(self, **kwargs: Any) -> Any:
        self.note = Note("z")
        return super().reset(**kwargs)


def test_objects_that_an_environment_makes_in_reset_need_none(tmp_path: Path) -> None:
    assert_exact(partial(wrapped, NotingInReset), tmp_path)


@pytest.mark.parametrize(
    "other",
    [lambda: cartpole(n_envs=3), lambda: VecNormalize(cartpole()), lambda: wrapped(Noting)],
    ids=["number", "VecEnv wrapper", "wrapper"],
)
def test_an_environment_of_another_make_is_refused(other: Callable[[], VecEnv], tmp_path: Path) -> None:
    learn(cartpole(), [ResumableCheckpoint(1, tmp_path)], total=32)
    with pytest.raises(ValueError, match="env must"):
        ScratchPPO.resume(tmp_path, other())


# ------------------------------------------------------- logs and callbacks


def test_monitors_logs_and_evaluations_have_no_gap_and_no_double(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def make(folder: Path) -> tuple[VecEnv, list[BaseCallback]]:
        eval_env = VecNormalize(cartpole(n_envs=1))
        eval_env.seed(8)
        evaluating = EvalCallback(eval_env, eval_freq=20, n_eval_episodes=2, log_path=str(folder), verbose=0)
        return VecNormalize(cartpole(folder)), [ResumableCheckpoint(64, folder / "checkpoints"), evaluating]

    def begin(folder: Path, *more: BaseCallback) -> None:
        env, callbacks = make(folder)
        model = ScratchPPO(env=env, **SMALL)
        model.set_logger(configure(str(folder), ["csv", "json", "log", "tensorboard"]))
        model.learn(TOTAL, [*callbacks, *more], log_interval=3)

    begin(tmp_path / "whole")
    with pytest.raises(StopError):
        begin(tmp_path / "cut", StopAt(200))
    env, callbacks = make(tmp_path / "cut")
    ScratchPPO.resume(tmp_path / "cut" / "checkpoints", env).continue_learning(callbacks)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert rows(cut) == rows(whole)
    assert {len(rows(whole)[name]) > 2 for name in ("0.monitor.csv", "progress.csv")} == {True}
    for name in ("progress.json", "log.txt"):
        assert (cut / name).read_text().count("\n") == (whole / name).read_text().count("\n") > 0
    with np.load(cut / "evaluations.npz") as ours, np.load(whole / "evaluations.npz") as theirs:
        for key in theirs.files:
            np.testing.assert_array_equal(ours[key], theirs[key])
    curves = []
    for folder in (cut, whole):
        events = accumulator.EventAccumulator(str(folder)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
        curves.append({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags})
    assert curves[0] == curves[1]
    assert len(curves[1]["train/loss"]) > 3


def test_sb3s_own_tensorboard_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    cut_off_and_resumed(cartpole, tmp_path / "checkpoints", tensorboard_log=str(tmp_path / "tb"))
    assert [path.name for path in (tmp_path / "tb").iterdir()] == ["ScratchPPO_1"]


class Counting(BaseCallback):
    """Has state of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def _on_step(self) -> bool:
        self.seen.append(self.num_timesteps)
        return True


class CountingItself(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"doubled": [2 * each for each in self.seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [each // 2 for each in state["doubled"]]


def test_callbacks_go_on_where_they_were(tmp_path: Path) -> None:
    made: list[list[BaseCallback]] = []

    def make() -> list[BaseCallback]:
        made.append([Counting(), CountingItself(), Counting(), StopTrainingOnMaxEpisodes(1000)])
        return made[-1]

    cut_off_and_resumed(cartpole, tmp_path, callbacks=make)
    counting, itself, last, stopping = made[-1]
    assert counting.seen == itself.seen == last.seen == list(range(2, TOTAL + 1, 2))
    assert counting.n_calls == TOTAL // 2
    whole = StopTrainingOnMaxEpisodes(1000)
    learn(cartpole(), [whole])
    assert stopping.n_episodes == whole.n_episodes > 0


def test_paths_given_to_callbacks_anew_are_heeded(tmp_path: Path) -> None:
    places = iter(["before", "after"])

    def make() -> list[BaseCallback]:
        return [EvalCallback(cartpole(n_envs=1), eval_freq=20, log_path=str(tmp_path / next(places)), verbose=0)]

    cut_off_and_resumed(cartpole, tmp_path / "checkpoints", callbacks=make)
    timesteps = [np.load(tmp_path / place / "evaluations.npz")["timesteps"].tolist() for place in ("before", "after")]
    assert timesteps == [[40, 80, 120, 160], list(range(40, TOTAL, 40))]


def test_checkpoints_may_be_taken_by_a_child_of_another_callback(tmp_path: Path) -> None:
    learn(cartpole(), [EveryNTimesteps(10**9, ResumableCheckpoint(1, tmp_path))])
    assert has_checkpoint(tmp_path)


# ------------------------------------------------------- files


def test_only_the_last_files_are_kept(tmp_path: Path) -> None:
    learn(cartpole(), [ResumableCheckpoint(64, tmp_path, keep=3)])
    assert [path.name.split("-", 1)[1] for path in checkpoint_files(tmp_path)] == [f"{n}-steps.ckpt" for n in (128, 192, 256)]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "no checkpoint"])
def test_a_damaged_file_gives_way_to_the_one_before(damage: str, tmp_path: Path) -> None:
    learn(cartpole(), [ResumableCheckpoint(64, tmp_path)])
    before, last = checkpoint_files(tmp_path)
    data = bytearray(last.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    last.write_bytes({"cut": data[:-7], "emptied": b"", "flipped": data, "no checkpoint": b"PK" + data}[damage])
    with pytest.warns(RuntimeWarning, match=f"{last.name}.*trying the one before"):
        model = ScratchPPO.resume(tmp_path, cartpole())
    assert model.num_timesteps == 192
    with pytest.raises(CorruptCheckpointError, match=last.name):
        ScratchPPO.resume(last, cartpole())
    before.write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(CorruptCheckpointError, match="no intact checkpoint"):
        read_checkpoint(tmp_path)


def test_an_unknown_format_version_is_refused(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, pack({"problems": []}), 10, keep=2)
    data = bytearray(file.read_bytes())
    data[16] = 77
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"format version 77.*reads version 3 and before"):
        ScratchPPO.resume(file, cartpole())


def test_a_good_checkpoint_is_found_among_what_is_none(tmp_path: Path) -> None:
    learn(cartpole(), [ResumableCheckpoint(64, tmp_path)])
    before, last = checkpoint_files(tmp_path)
    data = bytearray(last.read_bytes())
    (tmp_path / "1 (copy)-9-steps.ckpt").write_bytes(data)
    (tmp_path / "00000098-9-steps.ckpt").symlink_to(tmp_path / "gone")
    (tmp_path / "00000099-9-steps.ckpt").mkdir()
    data[16] = 77
    last.write_bytes(data)
    assert checkpoint_files(tmp_path) == [before, last]
    with pytest.warns(RuntimeWarning, match="format version 77.*trying the one before"):
        assert ScratchPPO.resume(tmp_path, cartpole()).num_timesteps == 192


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    file = write_checkpoint(tmp_path, pickle.dumps({"problems": Bomb()}), 10, keep=2)
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        ScratchPPO.resume(tmp_path, cartpole())
    data = bytearray(file.read_bytes())
    data[16] = 1  # the format that was a pickle
    file.write_bytes(data)
    with pytest.raises(UnsafeFileError, match=rf"{file.name} holds posix\.mkdir"):
        ScratchPPO.resume(tmp_path, cartpole())
    assert not (tmp_path / "exploded").exists()


def test_other_versions_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(cartpole(), [ResumableCheckpoint(1, tmp_path)], total=32)
    there = th.__version__.partition("+")[0]
    monkeypatch.setattr(run_state, "version", lambda name: "0.1")
    with pytest.warns(UserWarning, match=rf"may not be bit-exact, with torch 0\.1 instead of {there}"):
        ScratchPPO.resume(tmp_path, cartpole())


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        ScratchPPO.resume(tmp_path, cartpole())
    with pytest.raises(FileNotFoundError):
        ScratchPPO.resume(tmp_path / "nowhere.ckpt", cartpole())
    with pytest.raises(ValueError, match="nothing to continue"):
        ScratchPPO(env=cartpole(), **SMALL).continue_learning()


def test_another_runs_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    checkpoint = ResumableCheckpoint(1, tmp_path)
    model, _ = learn(cartpole(), [checkpoint], total=32)
    model.learn(32, checkpoint)  # the callback knows them as this model's
    for other in (checkpoint, ResumableCheckpoint(1, tmp_path)):
        with pytest.raises(ValueError, match="another run's checkpoints"):
            learn(cartpole(), [other])


def test_a_resumed_run_does_not_overwrite_another_ones_checkpoints(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        learn(cartpole(), [ResumableCheckpoint(1, tmp_path / name)], total=64)
    before = sorted(tmp_path.glob("theirs/*"))
    model = ScratchPPO.resume(checkpoint_files(tmp_path / "ours")[0], cartpole())
    with pytest.raises(ValueError, match=r"theirs.*another run's checkpoints"):
        model.continue_learning(ResumableCheckpoint(1, tmp_path / "theirs"))
    assert sorted(tmp_path.glob("theirs/*")) == before
    model = ScratchPPO.resume(checkpoint_files(tmp_path / "ours")[0], cartpole())
    model.continue_learning(ResumableCheckpoint(1, tmp_path / "elsewhere"))  # empty so far
    assert has_checkpoint(tmp_path / "elsewhere")


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX alone")
def test_two_runs_at_once_do_not_write_into_one_folder(tmp_path: Path) -> None:
    def begin_another() -> None:
        with pytest.raises(ValueError, match="is being written to by another run"):
            learn(cartpole(), [ResumableCheckpoint(1, tmp_path)])

    learn(cartpole(), [ResumableCheckpoint(1, tmp_path), StopAt(100, begin_another)])
    with pytest.raises(ValueError, match="another ResumableCheckpoint of this one"):
        learn(cartpole(), [ResumableCheckpoint(1, tmp_path / "new"), ResumableCheckpoint(1, tmp_path / "new")])


@pytest.mark.parametrize("beside", ["of another version", "a copy", "a dangling link", "a folder", "of another program"])
def test_what_lies_beside_a_good_checkpoint_does_not_hide_it(beside: str, tmp_path: Path) -> None:
    learn(cartpole(), [ResumableCheckpoint(64, tmp_path)], total=64)
    last = checkpoint_files(tmp_path)[-1]
    other = tmp_path / f"00000099-{10**6}-steps.ckpt"
    if beside == "of another version":
        data = bytearray(last.read_bytes())
        data[16] = 77
        other.write_bytes(data)
    elif beside == "a copy":
        shutil.copy(last, tmp_path / "1 (copy)-64-steps.ckpt")
        shutil.copy(last, tmp_path / "9-x-steps.ckpt")
    elif beside == "a dangling link":
        other.symlink_to("nowhere")
    elif beside == "a folder":
        other.mkdir()
    else:
        write_checkpoint(tmp_path, pickle.dumps({"problems": StopError}), 10**6, keep=9)
    assert has_checkpoint(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*trying the one before it")
        assert ScratchPPO.resume(tmp_path, cartpole()).num_timesteps == 64


def test_a_copied_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    def begin(folder: Path, *more: BaseCallback) -> None:
        model = ScratchPPO(env=cartpole(folder), **SMALL)
        model.set_logger(configure(str(folder), ["csv", "json"]))
        evaluating = EvalCallback(cartpole(n_envs=1), eval_freq=20, log_path=str(folder), verbose=0)
        model.learn(TOTAL, [ResumableCheckpoint(64, folder / "checkpoints"), evaluating, *more])

    with pytest.raises(StopError):
        begin(tmp_path / "a", StopAt(200))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        others = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file() and name not in path.parts}
        env = cartpole(tmp_path / name)
        evaluating = EvalCallback(cartpole(n_envs=1), eval_freq=20, log_path=str(tmp_path / name), verbose=0)
        ScratchPPO.resume(tmp_path / name / "checkpoints", env).continue_learning(evaluating)
        assert all(path.read_bytes() == content for path, content in others.items())
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "a")["progress.csv"]) >= TOTAL // 32


def test_a_file_does_not_choose_where_logs_are_written(tmp_path: Path) -> None:
    def begin() -> None:
        model = ScratchPPO(env=cartpole(), **SMALL)
        model.set_logger(configure(str(tmp_path / "logs"), ["csv"]))
        model.learn(TOTAL, [ResumableCheckpoint(64, tmp_path / "run" / "checkpoints"), StopAt(200)])

    with pytest.raises(StopError):
        begin()
    log = tmp_path / "logs" / "progress.csv"
    log.write_text("another run's")
    with pytest.warns(UserWarning, match=r"'csv' is not gone on with.*resume with logs="):
        model = ScratchPPO.resume(tmp_path / "run" / "checkpoints", cartpole())
    model.continue_learning()
    assert log.read_text() == "another run's"
    ScratchPPO.resume(tmp_path / "run" / "checkpoints", cartpole(), logs=tmp_path / "logs").continue_learning()
    assert len(rows(tmp_path / "logs")["progress.csv"]) == TOTAL // 32


def test_trying_environments_out_changes_nothing(tmp_path: Path) -> None:
    seen = []
    for try_out in (False, True):
        folder = tmp_path / str(try_out)
        model, states = learn(VecNormalize(cartpole(folder)), [ResumableCheckpoint(1, folder / "c", try_out=try_out)])
        seen.append((model, states, rows(folder)))
    assert_same_model(seen[0][0], seen[1][0])
    assert seen[0][1:] == seen[1][1:]


def test_a_disk_that_fills_up_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    fill = StopAt(100, lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.warns(RuntimeWarning, match="No space left on device; the last one is .*96-steps"):
        model, _ = learn(cartpole(), [ResumableCheckpoint(1, tmp_path), fill])
    assert model.num_timesteps == TOTAL
    monkeypatch.undo()
    assert sorted(path.name.split("-", 1)[1] for path in tmp_path.iterdir()) == ["64-steps.ckpt", "96-steps.ckpt"]
    assert_same_model(ScratchPPO.resume(tmp_path, cartpole()).continue_learning(), model)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # read-only folders do not stop root
    with pytest.warns(RuntimeWarning, match="no checkpoint at 0 timesteps in .*file.*there is none yet"):
        model, _ = learn(cartpole(), [ResumableCheckpoint(1, tmp_path / "file" / "folder")])
    assert model.num_timesteps == TOTAL


@pytest.mark.parametrize(("argument", "value"), [("save_freq", 0), ("keep", 0), ("save_freq", 1.5)])
def test_arguments_are_checked(argument: str, value: float) -> None:
    with pytest.raises((ValueError, TypeError), match=argument):
        ResumableCheckpoint(**{argument: value})


def test_what_is_plain() -> None:
    plain = [None, 1, 2.5, "x", b"y", np.float32(1), np.arange(3), {"a": [(1, {2})]}, range(3)]
    assert all(is_plain(value) for value in plain)
    assert not any(
        is_plain(value) for value in (object(), [StopError], {"a": print}, np.array([object()]), th.nn.Parameter(th.zeros(1)))
    )


# ------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_loses_nothing_and_exits(number: int, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    stop = StopAt(180, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as exited:
        learn(cartpole(), [ResumableCheckpoint(10**9, tmp_path), stop])
    assert exited.value.code == status
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    said = capfd.readouterr().err
    assert "192-steps.ckpt at 192 timesteps: nothing is lost" in said
    ours = ScratchPPO.resume(tmp_path, cartpole()).continue_learning()
    assert f"goes on at 192 of {TOTAL} timesteps" in capfd.readouterr().err
    whole, _ = learn(cartpole(), [])
    assert_same_model(ours, whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    def first() -> None:
        monkeypatch.setattr("sb3_ppo_from_scratch.checkpoint.callback.ResumableCheckpoint.write_last_snapshot", interrupt)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        learn(cartpole(), [ResumableCheckpoint(1, tmp_path), StopAt(100, first)])


def test_a_signal_is_not_in_the_way_of_an_iteration(tmp_path: Path) -> None:
    def write() -> None:
        signal.raise_signal(signal.SIGTERM)
        assert not has_checkpoint(tmp_path / "later")

    steps = Counting()
    with pytest.raises(SystemExit):
        learn(cartpole(), [ResumableCheckpoint(1, tmp_path), StopAt(100, write), steps])
    assert steps.seen[-1] == 128


def test_ctrl_c_in_a_terminal_does_not_end_workers(tmp_path: Path) -> None:
    env = forked_cartpole()

    def interrupt_all() -> None:
        for process in env.processes:
            os.kill(process.pid, signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit):
        learn(env, [ResumableCheckpoint(10**9, tmp_path), StopAt(100, interrupt_all)])
    assert ScratchPPO.resume(tmp_path, forked_cartpole()).num_timesteps == 128


def test_a_step_that_was_interrupted_leaves_no_processes_out_of_step(capfd: pytest.CaptureFixture[str]) -> None:
    env = forked_cartpole()
    model = ScratchPPO(env=env, **SMALL)
    wait, calls = env.step_wait, iter(range(10))

    def interrupted() -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return wait()

    env.step_wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.learn(TOTAL)
    assert "make the environments anew" in capfd.readouterr().err
    with pytest.raises(EnvFailedError, match=r"is closed: make it anew.*set_env"):
        model.learn(TOTAL)
    model.set_env(cartpole())
    model.learn(32)


def test_a_finished_run_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    learn(cartpole(), [ResumableCheckpoint(1, tmp_path)])
    ScratchPPO.resume(tmp_path, cartpole()).continue_learning()
    assert f"is finished: all its {TOTAL} timesteps are done" in capfd.readouterr().err


def test_without_checkpoints_signals_are_untouched() -> None:
    seen = []
    before = signal.getsignal(signal.SIGTERM)
    learn(cartpole(), [StopAt(100, lambda: seen.append(signal.getsignal(signal.SIGTERM)))])
    assert seen == [before]
