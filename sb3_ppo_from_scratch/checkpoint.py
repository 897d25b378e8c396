"""
Exact resume: everything that the rest of a training run depends on, in one file, taken between two iterations.

Such a *boundary* is the one moment at which the rollout buffer holds nothing that matters: its data have been learned from and
logged, and the next rollout has not begun (SB3's ``CheckpointCallback`` saves in the middle of one: SB3 issues 1526 and 1643).
A run that ends elsewhere goes on from the boundary before, and computes again, with the same bits, what it had done since.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.checkpoint_file import checkpoint_files, read_checkpoint, write_checkpoint
from sb3_ppo_from_scratch.env_failure import EnvFailedError, end_workers, watch_workers
from sb3_ppo_from_scratch.env_state import capture_vec_env, restore_vec_env
from sb3_ppo_from_scratch.log_state import capture_logger, make_logger, restore_logger
from sb3_ppo_from_scratch.plain_pickle import is_plain
from sb3_ppo_from_scratch.validation import check_integer

if TYPE_CHECKING:
    from sb3_ppo_from_scratch.ppo import ScratchPPO

__all__ = ["ResumableCheckpoint", "Resumed", "guarded_training", "has_checkpoint", "load_run"]

_COST = 0.005
"""Share of the training time that snapshots may take; at the default frequency with their files, else without."""


# ------------------------------------------------------- what a run depends on


def capture_run(model: ScratchPPO, callback: BaseCallback) -> tuple[bytes, list[str]]:
    """
    Everything that the rest of a run depends on; only at a boundary.

    :return: a pickle of plain data, and what of the environments cannot be captured
    """
    saved_model = io.BytesIO()
    model.save(saved_model)
    env = capture_vec_env(model.env)  # type: ignore[arg-type]  # training has one
    callbacks = [(name, _capture_callback(each)) for name, each in _named(callback)]
    of_callbacks = [part for _, state in callbacks for part in state["envs"].values()]
    problems = [problem for part in (env, *of_callbacks) for problem in part["problems"]]
    learn = {name: callback.locals.get(name) for name in ("total_timesteps", "log_interval", "tb_log_name")}
    state = {
        "n_envs": model.n_envs,
        "model": saved_model.getvalue(),
        "learn": learn,
        "elapsed": time.time_ns() - int(model.start_time),
        "random": _random_states(),
        "engine": model._current_engine().get_state(),
        "env": env,
        "callbacks": callbacks,
        "logger": capture_logger(model.logger),
        "problems": list(dict.fromkeys(problems)),
    }
    return pickle.dumps(state, pickle.HIGHEST_PROTOCOL), state["problems"]


def _random_states() -> dict[str, Any]:
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in cuda],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(th.from_numpy(states["torch"].copy()))
    if states["cuda"] and th.cuda.device_count() == len(states["cuda"]):
        th.cuda.set_rng_state_all([th.from_numpy(state.copy()) for state in states["cuda"]])


# ------------------------------------------------------- callbacks


def _flat(callback: BaseCallback) -> Iterator[BaseCallback]:
    """Every callback in a tree of them, but for the lists."""
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children += callback.callbacks
    else:
        yield callback
    if isinstance(callback, EventCallback):
        children += [callback.callback, getattr(callback, "callback_on_new_best", None)]
    for child in children:
        if child is not None:
            yield from _flat(child)


def _named(callback: BaseCallback) -> Iterator[tuple[tuple[str, int], BaseCallback]]:
    """Every callback but the checkpoints' own, under its class and how many of this class came before it."""
    seen: Counter[str] = Counter()
    for each in _flat(callback):
        if not isinstance(each, ResumableCheckpoint):
            name = f"{type(each).__module__}.{type(each).__qualname__}"
            yield (name, seen[name]), each
            seen[name] += 1


def _capture_callback(callback: BaseCallback) -> dict[str, Any]:
    """What the callback offers as ``state_dict()``, or else its plain attributes; and its environments."""
    own = getattr(callback, "state_dict", None)
    return {
        "attributes": None if own is not None else _plain_attributes(callback),
        "state": None if own is None else own(),
        "envs": {name: capture_vec_env(env) for name, env in _own_envs(callback)},
    }


def _plain_attributes(callback: BaseCallback) -> dict[str, Any]:
    """Without texts that are constructor's arguments: such are paths and names, which may be others by then."""
    arguments = inspect.signature(type(callback).__init__).parameters
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in ("locals", "globals", "verbose")
        and not (isinstance(value, str) and name in arguments)
        and is_plain(value)
    }


def _own_envs(callback: BaseCallback) -> list[tuple[str, VecEnv]]:
    return [(name, value) for name, value in vars(callback).items() if isinstance(value, VecEnv)]


def _restore_callbacks(callback: BaseCallback, saved: list[Any], trust: bool) -> None:
    states = dict(saved)
    for name, each in _named(callback):
        state = states.get(name)
        if state is None:
            continue
        if state["attributes"] is None:
            each.load_state_dict(state["state"])  # type: ignore[attr-defined]  # it had a state_dict
        else:
            vars(each).update(state["attributes"])
        envs = dict(_own_envs(each))
        for attribute, env_state in state["envs"].items():
            if attribute in envs:
                _restore_env(envs[attribute], env_state, trust, fresh=True)


# ------------------------------------------------------- resuming


class Resumed:
    """
    What is left to restore of a run once its model is loaded.

    :param state: of :func:`load_run`
    :param allow_pickle: whether to make whatever objects the environments' states ask for
    """

    def __init__(self, state: dict[str, Any], allow_pickle: bool):
        self._state = state
        self._trust = allow_pickle
        self._fresh = True
        self.learn: dict[str, Any] = state["learn"]
        self.exact = not state["problems"]

    def restore_env(self, model: ScratchPPO) -> None:
        """The environments and the random generators; and if the former could not be captured, new first observations."""
        env = model.env
        assert env is not None  # resume() takes one
        _set_random_states(self._state["random"])
        fresh, self._fresh = self._fresh, False
        if _restore_env(env, self._state["env"], self._trust, fresh):
            return
        model._last_obs = env.reset()  # type: ignore[assignment]  # SB3 narrows the type of VecEnvObs
        model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)

    def restore_run(self, model: ScratchPPO, callback: BaseCallback) -> None:
        """All the rest, when the callbacks are ready to go on."""
        _set_random_states(self._state["random"])
        _restore_callbacks(callback, self._state["callbacks"], self._trust)
        restore_logger(model.logger, self._state["logger"])
        self.restore_env(model)
        model._current_engine().set_state(self._state["engine"])
        model.start_time = time.time_ns() - self._state["elapsed"]

    def make_logger(self) -> Any:
        """A logger with the outputs that the run had."""
        return make_logger(self._state["logger"])


def _restore_env(env: VecEnv, state: dict[str, Any], trust: bool, fresh: bool) -> bool:
    """:return: whether the environments go on where they were; if not, they are to be reset, and are seeded for it"""
    if fresh and not state["problems"]:
        env.reset()  # many make the objects of their state only here, and only their classes are then allowed in the file
    restore_vec_env(env, state, trust)
    if state["problems"]:
        env.seed(int(np.random.randint(2**31)))  # from the saved stream
    return not state["problems"]


def load_run(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint's file, or a folder's newest intact one.

    :raises FileNotFoundError: if there is none
    :raises ValueError: if it is damaged, or of an unknown format
    """
    state = read_checkpoint(path)
    if state["problems"]:
        warnings.warn(
            f"this resume is not bit-exact: environments start new episodes, for their state could not be saved "
            f"({'; '.join(state['problems'])})",
            stacklevel=3,
        )
    return state


def has_checkpoint(path: str | Path) -> bool:
    """Whether a folder holds a checkpoint that :meth:`ScratchPPO.resume` could read."""
    return bool(checkpoint_files(Path(path)))


# ------------------------------------------------------- writing


class Interrupted(SystemExit):
    """Training was ended by a signal; the exit status is 128 plus its number, as shells have it."""


class ResumableCheckpoint(BaseCallback):
    """
    Writes checkpoints from which training continues with the same bits, at the boundaries between iterations.

    While training goes on, SIGTERM and Ctrl-C write one last checkpoint and end the program; a second Ctrl-C stops at once. So
    does any error write one. For this a snapshot is kept in memory, as recent as 0.5% of the training time allows.

    :param save_freq: timesteps (over all environments) between checkpoints, at the next boundary; ``None`` for as often as
        0.5% of the training time allows
    :param path: folder for the checkpoints, and for nothing else
    :param keep: checkpoints to keep, at least 1; with 2 there is another one if the last is damaged
    :param verbose: 1 for a line per checkpoint
    """

    def __init__(self, save_freq: int | None = None, path: str | Path = "checkpoints", keep: int = 2, verbose: int = 0):
        super().__init__(verbose)
        if save_freq is not None:
            check_integer("save_freq", save_freq, 1)
        check_integer("keep", keep, 1)
        self.save_freq = save_freq
        self.path = Path(path)
        self.keep = keep
        self._written: Path | None = None
        self._root: BaseCallback = self
        self._snapshot: tuple[int, bytes] | None = None
        self._saved_at = -1
        self._next_time = 0.0
        self._told = False
        self.signal: int | None = None

    def begin(self, root: BaseCallback, resumed: bool) -> None:
        """
        Called when training begins.

        :param root: the callback that training was given, of which this one is a part
        :param resumed: whether training continues a checkpoint
        :raises ValueError: if another run's checkpoints are in the folder
        """
        if not resumed and self._written is None and has_checkpoint(self.path):
            raise ValueError(
                f"path={str(self.path)!r} holds another run's checkpoints: continue that run with ScratchPPO.resume, or give "
                "an empty folder"
            )
        self._root = root
        self._snapshot = None
        self._saved_at = -1
        self._next_time = 0.0
        self.signal = None

    def at_boundary(self) -> None:
        """Called between two iterations: take a snapshot, write a file, or neither."""
        self._stop_if_asked()
        start = time.perf_counter()
        cheap = start >= self._next_time
        due = self._saved_at < 0 or (
            cheap if self.save_freq is None else self.model.num_timesteps - self._saved_at >= self.save_freq
        )
        if due or cheap:
            self._take_snapshot()
            if due:
                self._write()
            end = time.perf_counter()
            self._next_time = end + (end - start) / _COST

    def _take_snapshot(self) -> None:
        try:
            content, problems = capture_run(self.model, self._root)  # type: ignore[arg-type]  # ScratchPPO calls this
        except OSError as error:  # of a log file that is part of the run
            self._warn(error)
            return
        self._snapshot = (self.model.num_timesteps, content)
        if problems and not self._told:
            self._told = True
            warnings.warn(
                f"the state of environments cannot be saved ({'; '.join(problems)}): a resumed run will start new episodes "
                "in them, and will not be bit-exact",
                stacklevel=2,
            )

    def _write(self) -> None:
        if self._snapshot is None:
            return
        steps, content = self._snapshot
        try:
            self._written = write_checkpoint(self.path, content, steps, self.keep)
        except OSError as error:
            self._warn(error)
        else:
            if self.verbose >= 1:
                print(f"Wrote {self._written}")
        self._saved_at = steps

    def _warn(self, error: OSError) -> None:
        last = f"the last one is {self._written}" if self._written else "there is none yet"
        steps = self.model.num_timesteps
        warnings.warn(f"no checkpoint at {steps} timesteps in {self.path}: {error}; {last}", RuntimeWarning, stacklevel=3)

    def write_last_snapshot(self) -> Path | None:
        """Write the snapshot in memory, if it is newer than the last file. Returns the last file written, if any."""
        if self._snapshot is not None and self._snapshot[0] > self._saved_at:
            self._write()
        return self._written

    def _on_step(self) -> bool:
        self._stop_if_asked()
        return True

    def _stop_if_asked(self) -> None:
        """The handler has raised already, but code that swallows errors (a finalizer, say) may have swallowed it."""
        if self.signal is not None:
            raise Interrupted(128 + self.signal)

    def at_end(self, complete: bool) -> None:
        """
        Called after the last iteration.

        :param complete: whether training stands at a boundary, and not in a rollout that a callback has ended
        """
        if complete:
            self._take_snapshot()
        self.write_last_snapshot()


# ------------------------------------------------------- signals and errors


@contextlib.contextmanager
def guarded_training(model: ScratchPPO, callback: BaseCallback, resumed: bool) -> Iterator[list[ResumableCheckpoint]]:
    """
    Around the training loop: failing environments are explained, and no error or signal loses what has been trained.

    :param model: the one in training
    :param callback: what ``learn`` was given, initialized
    :param resumed: whether training continues a checkpoint
    :return: the checkpoint callbacks in ``callback``
    """
    checkpoints = [each for each in _flat(callback) if isinstance(each, ResumableCheckpoint)]
    for checkpoint in checkpoints:
        checkpoint.begin(callback, resumed)
    env = model.env
    assert env is not None  # learn() sees to it
    try:
        watch_workers(env)
        with _signals_raise(checkpoints):
            yield checkpoints
    except BaseException as error:
        files = [checkpoint.write_last_snapshot() for checkpoint in checkpoints]
        if isinstance(error, (EnvFailedError, Interrupted)):
            end_workers(env)
        if isinstance(error, Interrupted):
            print(f"Interrupted; the run continues from {', '.join(map(str, filter(None, files)))}", file=sys.stderr)
        raise


@contextlib.contextmanager
def _signals_raise(checkpoints: list[ResumableCheckpoint]) -> Iterator[None]:
    """While there are checkpoints to write, SIGTERM and Ctrl-C raise :class:`Interrupted`, once."""
    if not checkpoints or threading.current_thread() is not threading.main_thread():
        yield  # without checkpoints signals are none of our business, and other threads get none
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        give_back()
        for checkpoint in checkpoints:
            checkpoint.signal = number
        raise Interrupted(128 + number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        give_back()
