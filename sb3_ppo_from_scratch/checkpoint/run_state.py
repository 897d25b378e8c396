"""
Everything that the rest of a training run depends on, as one object of plain data.

It is taken between two iterations. Such a *boundary* is the one moment at which the rollout buffer holds nothing that
matters: its data have been learned from and logged, and the next rollout has not begun. SB3's ``CheckpointCallback`` saves in
the middle of one (SB3 issues 1526 and 1643).
"""

from __future__ import annotations

import io
import re
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.checkpoint.callback_state import (
    capture_callback,
    named_callbacks,
    own_envs,
    restore_callback,
    unsaved,
)
from sb3_ppo_from_scratch.checkpoint.files import LOGS, CorruptCheckpointError, intact_checkpoints, read_checkpoint
from sb3_ppo_from_scratch.checkpoint.log_state import capture_logger, is_own_folder, locate_logger, make_logger, restore_logger
from sb3_ppo_from_scratch.checkpoint.plain_data import pack
from sb3_ppo_from_scratch.checkpoint.replay import generators, set_generators
from sb3_ppo_from_scratch.checkpoint.vec_env_state import (
    Trial,
    capture_vec_env,
    difference_after,
    keep_files,
    put_files_back,
    restore_vec_env,
)
from sb3_ppo_from_scratch.checkpoint.whole import whole_run
from sb3_ppo_from_scratch.distributed import ALONE, Group, group_of, n_processes, rank_folder
from sb3_ppo_from_scratch.safe_files.unpickler import errors_named

__all__ = ["Known", "Resumed", "capture_run", "dumps", "load_run"]

_FIRST = Trial(0.5, again=True)
_LATER = Trial(0.001)
"""How environments are tried out: for long at the run's first checkpoint; at others only to know them by what they do next."""


class Known(NamedTuple):
    """What was found at a run's first checkpoint, and holds for the others."""

    doubts: list[str]
    problems: list[str]
    """of the training environments"""


# ------------------------------------------------------- what a run depends on


def capture_run(
    model: OnPolicyAlgorithm, callback: BaseCallback, folder: Path, known: Known | None = None, try_out: bool = True
) -> dict[str, Any]:
    """
    Everything that the rest of a run depends on; only at a boundary.

    :param folder: where its checkpoints are written
    :param known: what was found at the run's first checkpoint, ``None`` if this is it
    :param try_out: whether to step environments in a fork
    :return: plain data; ``problems`` is what of the environments cannot be captured, ``doubts`` what else will not be the same
    """
    saved_model = io.BytesIO()
    model.save(saved_model)
    assert model.env is not None  # training has one
    trial = _FIRST if known is None else _LATER
    copies = folder.resolve() / LOGS  # other processes may stand elsewhere
    env = {**capture_vec_env(model.env, trial if try_out else None), "files": keep_files(model.env, copies)}
    if known is not None:
        env["problems"] = list(dict.fromkeys([*env["problems"], *known.problems]))
    callbacks = [(name, _capture_callback(each, copies / _place(name), try_out)) for name, each in named_callbacks(callback)]
    parts = [env, *(part for _, state in callbacks for part in state["envs"].values())]
    learn = {name: callback.locals.get(name) for name in ("total_timesteps", "log_interval", "tb_log_name")}
    return {
        "n_envs": model.n_envs,
        "n_processes": n_processes(),
        "model": saved_model.getvalue(),
        "learn": learn,
        "num_timesteps": model.num_timesteps,
        "elapsed": time.time_ns() - int(model.start_time),
        "random": _random_states(),
        "env": env,
        "callbacks": callbacks,
        "logger": capture_logger(model.logger, copies),
        "folder": str(folder.resolve()),
        "problems": list(dict.fromkeys(problem for part in parts for problem in part["problems"])),
        "doubts": _doubts(parts, callback) if known is None else known.doubts,
        "made_with": _surroundings(type(model)),
    }


def _place(name: tuple[str, int]) -> str:
    """Where the copies of a callback's files lie."""
    return re.sub(r"[^\w.]", "_", f"{name[0]}.{name[1]}")


def _capture_callback(callback: BaseCallback, copies: Path, try_out: bool) -> dict[str, Any]:
    # whoever evaluates begins with a reset, and may not have begun yet
    trial = Trial(0.002, again=True, reset_at=0) if try_out else None
    envs = {name: {**capture_vec_env(env, trial), "files": keep_files(env, copies / name)} for name, env in own_envs(callback)}
    return {**capture_callback(callback), "envs": envs}


def _doubts(parts: list[dict[str, Any]], callback: BaseCallback) -> list[str]:
    of_envs = [doubt for part in parts for doubt in part["doubts"]]
    of_callbacks = [f"callback: {what} is not saved" for _, each in named_callbacks(callback) for what in unsaved(each)]
    return list(dict.fromkeys([*of_envs, *of_callbacks]))


def _surroundings(algorithm: type) -> dict[str, str]:
    """What else the bits depend on, as far as it can be named; a subclass may have a loss of its own, say."""
    packages = ("torch", "numpy", "stable_baselines3", "gymnasium")
    versions = {name: version(name) for name in packages}
    return {**versions, "torch threads": str(th.get_num_threads()), "class": algorithm.__qualname__}


def _random_states() -> dict[str, Any]:
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else []
    return {**generators(), "cuda": [state.numpy() for state in cuda]}


def _set_random_states(states: dict[str, Any]) -> None:
    set_generators(states)
    if states["cuda"] and th.cuda.device_count() == len(states["cuda"]):
        th.cuda.set_rng_state_all([th.from_numpy(state.copy()) for state in states["cuda"]])


# ------------------------------------------------------- resuming


class Resumed:
    """
    What is left to restore of a run once its model is loaded.

    :param state: of :func:`load_run`
    :param allow_pickle: whether to make whatever objects the environments' states ask for
    :param logs: a folder that the run's logs may lie in, besides the one that holds the checkpoints' folder
    """

    def __init__(self, state: dict[str, Any], allow_pickle: bool, logs: Path | None = None):
        self._state = state
        self._trust = allow_pickle
        self._fresh = True
        self._lost: list[str] = []
        self.folder: Path = state["here"]
        self.learn: dict[str, Any] = state["learn"]
        with errors_named(str(self.folder), "there is no way to read it"):
            self._logger = locate_logger(state["logger"], state["folder"], self.folder, logs)

    def announce(self, num_timesteps: int) -> None:
        """Say where the run goes on, or that it has nothing left to do."""
        total = self.learn["total_timesteps"]
        if num_timesteps >= total:
            said = f"The run in {self.folder} is finished: all its {total} timesteps are done"
        else:
            said = f"The run in {self.folder} goes on at {num_timesteps} of {total} timesteps"
        print(said, file=sys.stderr)

    def restore_env(self, model: OnPolicyAlgorithm) -> None:
        """The environments and the random generators; and if the former could not be captured, new first observations."""
        env = model.env
        assert env is not None  # resume() takes one
        _set_random_states(self._state["random"])
        fresh, self._fresh = self._fresh, False
        exact = _restore_env(env, self._state["env"], self._trust, fresh)
        self._put_files_back(env, self._state["env"], self.folder / LOGS)
        if exact:
            return
        model._last_obs = env.reset()  # type: ignore[assignment]  # SB3 narrows the type of VecEnvObs
        model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)
        vars(model)["_last_action_masks"] = None  # those of the new episodes are in the infos of this reset

    def restore_run(self, model: OnPolicyAlgorithm, callback: BaseCallback) -> None:
        """All the rest, when the callbacks are ready to go on."""
        if model.tensorboard_log is not None and not is_own_folder(self._logger, model.tensorboard_log):
            warnings.warn(f"tensorboard_log={str(model.tensorboard_log)!r} is not of this run: set it anew", stacklevel=3)
            model.tensorboard_log = None
        _set_random_states(self._state["random"])
        differences: list[str | None] = [*self._restore_callbacks(callback)]
        restore_logger(model.logger, self._logger)
        self.restore_env(model)
        assert model.env is not None  # as above
        if not self._state["env"]["problems"]:
            differences.append(difference_after(model.env, self._state["env"]))
        if found := [each for each in differences if each is not None]:
            warnings.warn(f"this resume is not bit-exact: {'; '.join(found)}", stacklevel=4)
        model.start_time = time.time_ns() - self._state["elapsed"]

    def _restore_callbacks(self, callback: BaseCallback) -> list[str]:
        """:return: which are missing"""
        states = dict(self._state["callbacks"])
        for name, each in named_callbacks(callback):
            state = states.pop(name, None)
            if state is None:
                continue
            restore_callback(each, state)
            envs = dict(own_envs(each))
            for attribute, env_state in state["envs"].items():
                if attribute in envs:
                    _restore_env(envs[attribute], env_state, self._trust, fresh=True)
                    self._put_files_back(envs[attribute], env_state, self.folder / LOGS / _place(name) / attribute)
        forgotten = [name.rpartition(".")[2] for (name, _), state in states.items() if state["is_needed"]]
        return [f"the run had a callback {name}, which was not given" for name in forgotten]

    def _put_files_back(self, env: VecEnv, state: dict[str, Any], copies: Path) -> None:
        moved = self._state["folder"] != str(self.folder)
        lost = put_files_back(env, state["files"], copies, self.folder.parent if moved else None)
        if new := [path for path in lost if path not in self._lost]:
            self._lost += new
            warnings.warn(
                f"episodes from before this resume are missing in {', '.join(new)}: neither the file nor its copy in {copies} "
                "holds what this run had written at the checkpoint; new ones are added to what is there",
                stacklevel=4,
            )

    def make_logger(self) -> Logger:
        """A logger with the outputs that the run had."""
        return make_logger(self._logger)


def _restore_env(env: VecEnv, state: dict[str, Any], trust: bool, fresh: bool) -> bool:
    """:return: whether the environments go on where they were; if not, they are to be reset, and are seeded for it"""
    if fresh and not state["problems"]:
        env.reset()  # many make the objects of their state only here, and only their classes are then allowed in the file
    restore_vec_env(env, state, trust)
    if state["problems"]:
        env.seed(int(np.random.randint(2**31)))  # from the saved stream
    return not state["problems"]


def load_run(path: str | Path, algorithm: type = OnPolicyAlgorithm) -> dict[str, Any]:
    """
    Read a checkpoint's file, or a folder's newest intact one; where several processes train one agent, each reads its own part
    of the newest that all of them hold.

    :param algorithm: the class that goes on

    :return: what :func:`capture_run` returned, and the checkpoints' folder as ``here``
    :raises FileNotFoundError: if there is none
    :raises ValueError: if it is damaged, of an unknown format, or of another number of processes
    """
    group = group_of(data_parallel=True)
    state = read_checkpoint(path) if group is ALONE else _read_part(Path(path), group)
    with errors_named(str(path), "there is no way to read it"):
        state = whole_run(state)
    if state["n_processes"] != group.size:
        raise ValueError(_of_others(path, state["n_processes"], group.size))
    if state["problems"]:
        warnings.warn(
            f"this resume is not bit-exact: environments start new episodes, for their state could not be saved "
            f"({'; '.join(state['problems'])})",
            stacklevel=3,
        )
    if state["doubts"]:
        warnings.warn(f"this resume is not bit-exact: {'; '.join(state['doubts'])}", stacklevel=3)
    here, there = _surroundings(algorithm), state["made_with"]
    if differences := [f"{name} {here.get(name)} instead of {there[name]}" for name in there if there[name] != here.get(name)]:
        warnings.warn(f"this resume may not be bit-exact, with {', '.join(differences)}", stacklevel=3)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return {**state, "here": rank_folder(folder.resolve())}


def _read_part(path: Path, group: Group) -> dict[str, Any]:
    """What this rank has of a run's newest checkpoint, or of one that a file of rank 0 names."""
    is_file = path.is_file()
    parts = intact_checkpoints(rank_folder(path.parent if is_file else path))
    mine = {steps: state.get("n_processes", 1) for steps, (file, state) in parts.items()}
    named = int(path.name.split("-")[1]) if is_file else None
    theirs = group.gather(mine)
    others = {n for parts_of_rank in theirs for n in parts_of_rank.values()} - {group.size}
    if others:
        raise ValueError(_of_others(path, others.pop(), group.size))
    common = set.intersection(*map(set, theirs)) & ({named} if is_file else set(mine))
    if not any(theirs):
        raise FileNotFoundError(f"path={str(path)!r} holds no checkpoint")
    if not common:
        raise CorruptCheckpointError(f"path={str(path)!r} holds no checkpoint that all {group.size} processes have a part of")
    return parts[max(common)][1]


def _of_others(path: str | Path, then: int, now: int) -> str:
    return (
        f"path={str(path)!r} is of a run of {then} processes, which goes on in as many (torchrun --nproc_per_node {then}), "
        f"not in {now}"
    )


def dumps(state: dict[str, Any]) -> bytes:
    """The content of a checkpoint's file."""
    return pack(state)
