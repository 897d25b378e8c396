"""Environments that fail: an error that names the environment and carries its traceback, and no process left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.subproc_vec_env import _worker

from sb3_ppo_from_scratch.vec_env.halves import TwoHalves, halves_of
from sb3_ppo_from_scratch.vec_env.memory import keep_finals_of_class
from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv

__all__ = [
    "EnvFailedError",
    "WatchedSubprocVecEnv",
    "end_workers",
    "explain_failure",
    "explained_failures",
    "watch_workers",
]

_LOST = (EOFError, ConnectionError)
"""What a pipe to a worker raises when the worker has ended."""
_CALLS = ("reset", "step", "step_async", "step_wait")
"""What of a ``VecEnv`` runs its environments' own code."""
_IN_PROCESSES = (SubprocVecEnv, AsyncVectorEnv)
_PATIENCE = 3.0
"""Seconds that workers have to end when they are asked to; then they are killed."""
_MAX_WORDS = 2**16
"""Characters kept of a traceback and what a worker says after it."""


class EnvFailedError(RuntimeError):
    """
    An environment raised an error in ``step`` or ``reset``, or its process ended.

    :param message: says which and why
    :param env_index: the environment's index in the ``VecEnv``, where it is known
    """

    def __init__(self, message: str, env_index: int | None = None):
        super().__init__(message)
        self.env_index = env_index


@contextlib.contextmanager
def explained_failures() -> Iterator[None]:
    """
    An error that comes out of a ``VecEnv``'s ``reset`` or ``step`` becomes an :class:`EnvFailedError`, and the processes of
    that ``VecEnv`` are ended. Ctrl-C, and what a signal's handler raises, pass as they are.

    :raises EnvFailedError: from the environment's own error, ``SystemExit`` included
    """
    try:
        yield
    except EnvFailedError:
        raise
    except BaseException as error:
        frames = list(_frames_of(error.__traceback__))
        env = next((frame.f_locals["self"] for frame in frames if _runs_environments(frame, error)), None)
        if env is None:
            raise
        explained = explain_failure(env, error) if isinstance(error, Exception) or _is_exit(error, frames) else None
        end_workers(env)  # whatever they were about to say would be taken for the answer to the next question
        if explained is None:
            raise
        raise explained from error


def _frames_of(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _runs_environments(frame: FrameType, error: BaseException) -> bool:
    is_call = frame.f_code.co_name in _CALLS or isinstance(error, _LOST)
    return is_call and isinstance(frame.f_locals.get("self"), VecEnv)


def _is_exit(error: BaseException, frames: list[FrameType]) -> bool:
    """Whether an environment has called ``sys.exit``; not a handler of a signal that came while it was stepping."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    return type(error) is SystemExit and not any(frame.f_code in codes for frame in frames)


def explain_failure(env: VecEnv, error: BaseException) -> EnvFailedError:
    """The error to raise for one that came from ``env``: it says which environment failed, and what its process last said."""
    frames = list(_frames_of(error.__traceback__))
    half, first = _failed_half(frames)
    env = half or env
    inner = _inner(env)
    if isinstance(inner, _IN_PROCESSES) and inner.closed:
        return EnvFailedError(f"the {type(inner).__name__} is closed: make it anew, and give it to set_env(env)")
    if isinstance(inner, _IN_PROCESSES) and isinstance(error, _LOST):
        return _explain_end(inner, first)
    calls = [frame.f_code.co_name.partition("_")[0] for frame in frames if _runs_environments(frame, error)]
    call = calls[-1] if calls and calls[-1] in _CALLS else "step"
    index, said = _failed_index(frames)
    which = f"the {type(env).__name__}"
    if index is not None:
        which = f"environment {first + index}{_described(inner, index)}"
    reason = f", after it raised\n{said.rstrip()}" if said else ""
    return EnvFailedError(
        f"{which} failed in {call} with {type(error).__name__}: {error}{reason}", None if index is None else first + index
    )


def _failed_index(frames: list[FrameType]) -> tuple[int | None, str]:
    """Which environment an error came from, and its own traceback; the loops' variables are the only trace of it."""
    for frame in frames:
        local = frame.f_locals
        if frame.f_code is AsyncVectorEnv._raise_if_errors.__code__:
            return local.get("index"), local.get("trace") or ""
        index = local.get("env_idx", local.get("i"))
        if index is not None and isinstance(local.get("self"), (DummyVecEnv, SyncVectorEnv)):
            return index, ""
    return None, ""


def _failed_half(frames: list[FrameType]) -> tuple[VecEnv | None, int]:
    """The half of a :class:`TwoHalves` that failed, if it was one, and which of all environments is its first."""
    for frame in frames:
        whole, index = frame.f_locals.get("self"), frame.f_locals.get("index")
        if (
            isinstance(whole, TwoHalves)
            and isinstance(index, int)
            and frame.f_code.co_name in ("send", "receive", "_reset_half")
        ):
            return whole.halves[index], whole.rows[index].start
    return None, 0


def _inner(env: VecEnv) -> Any:
    """What all wrappers and adapters are around: SB3's ``VecEnv`` or Gymnasium's ``VectorEnv``."""
    base = env.unwrapped
    return base.env.unwrapped if isinstance(base, NativeVecEnv) else base


def _described(env: Any, index: int) -> str:
    names = _workers[env].names if env in _workers else [_name_of(each) for each in getattr(env, "envs", [])]
    return f" ({names[index]})" if index < len(names) else ""


def _name_of(env: gym.Env) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _explain_end(env: SubprocVecEnv | AsyncVectorEnv, first: int = 0) -> EnvFailedError:
    """The error for a worker that has ended; ``first`` is the number of the first one's environment."""
    ended = wait([process.sentinel for process in env.processes], timeout=1)
    index = next((i for i, process in enumerate(env.processes) if process.sentinel in ended), None)
    if index is None:
        return EnvFailedError("the connection to an environment's process was lost")
    process = env.processes[index]
    process.join(1)  # the sentinel is a little ahead of the exit code
    code = process.exitcode or 0
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    said = _workers[env].last_words(index) if env in _workers else ""
    reason = f", after it raised\n{said}" if said else ""
    number = first + index
    return EnvFailedError(f"environment {number}{_described(env, index)} failed: its process ended {how}{reason}", number)


# ------------------------------------------------------- in a worker


class _Preparation:
    """
    Prepares a worker as it arrives there, and then is the name of an attribute that every environment has got: its name.

    SB3's and Gymnasium's workers read attributes of their environment and call its methods, and do nothing else for us.
    """

    def __init__(self, traceback_file: str):
        self.traceback_file = traceback_file

    def __reduce__(self) -> Any:
        return _prepare_worker, (self.traceback_file,)


class _LastWords:
    """A standard error of which a worker's last traceback also goes to a file: it has no other way to send it."""

    def __init__(self, stream: TextIO, path: str):
        self._stream = stream
        self._path = Path(path)
        self._left = 0

    def write(self, text: str) -> int:
        if "Traceback (most recent call last)" in text:
            self._left = _MAX_WORDS
            self._path.unlink(missing_ok=True)
        if self._left > 0:
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                self._left -= file.write(text[: self._left])
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_prepared: set[int] = set()


def _prepare_process(traceback_file: str) -> None:
    """What can be done before there is an environment; once per process."""
    if os.getpid() in _prepared:
        return
    _prepared.add(os.getpid())
    sys.stderr = _LastWords(sys.stderr, traceback_file)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _close_siblings_pipes()


def _prepare_worker(traceback_file: str) -> str:
    _prepare_process(traceback_file)
    env = next((frame.f_locals.get("env") for frame in _callers() if frame.f_code in _LOOPS), None)
    if isinstance(env, gym.Env) and not hasattr(gym.Env, "scratch_ppo_name"):
        keep_finals_of_class(type(env))
    gym.Env.scratch_ppo_name = "" if env is None else _name_of(env)  # type: ignore[attr-defined]
    return "scratch_ppo_name"


_LOOPS = (_worker.__code__, _async_worker.__code__)
"""The functions that a worker is in all its life; their variable ``env`` is its environment."""


def _callers() -> Iterator[FrameType]:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame


def _close_siblings_pipes() -> None:
    """A forked worker has copies of its siblings' pipes: as long as it holds them, the end of a sibling closes none."""
    frames = {frame.f_code: frame.f_locals for frame in _callers()}
    env = frames.get(SubprocVecEnv.__init__.__code__, {}).get("self")  # where it was forked
    if env is not None:
        own = frames[_worker.__code__]["remote"]
        for connection in (*env.remotes, *env.work_remotes):
            if connection is not own:
                connection.close()


def _end_with_parent() -> None:
    """A worker that hangs, or whose siblings hold its pipe open, would not see the end of the process that it works for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ------------------------------------------------------- in the training process


class _Workers:
    """What is known of a vector environment's processes before one of them fails."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="scratch_ppo_")
        self.names: list[str] = []

    def file(self, index: int) -> str:
        """Where a worker's last words go."""
        return str(Path(self._folder.name) / f"{index}.txt")

    def last_words(self, index: int) -> str:
        """The last traceback that a worker has written, and what came after it; empty if there is none."""
        with contextlib.suppress(OSError):
            return Path(self.file(index)).read_text(encoding="utf-8").rstrip()
        return ""


_workers: weakref.WeakKeyDictionary[Any, _Workers] = weakref.WeakKeyDictionary()


def watch_workers(env: VecEnv) -> None:
    """
    Prepare the processes of a ``SubprocVecEnv`` or an ``AsyncVectorEnv``, once, so that the end of one gets noticed and
    explained wherever it happens, and orphans none.

    :raises EnvFailedError: if one has ended already
    """
    for half in halves_of(env):
        watch_workers(half)
    inner = _inner(env)
    if isinstance(inner, _IN_PROCESSES) and inner not in _workers and not inner.closed:
        _watch(inner, _Workers())


def _watch(env: SubprocVecEnv | AsyncVectorEnv, workers: _Workers) -> None:
    _workers[env] = workers
    weakref.finalize(env, _end, env.processes, os.getpid())
    try:
        if isinstance(env, SubprocVecEnv):
            for index, remote in enumerate(env.remotes):
                remote.send(("get_attr", _Preparation(workers.file(index))))
            workers.names = [_answer(remote, process) for remote, process in zip(env.remotes, env.processes, strict=True)]
        elif env.worker is None:
            workers.names = list(env.call(_Preparation(workers.file(0))))  # type: ignore[arg-type]  # it arrives as a name
    except _LOST as error:
        explained = _explain_end(env)
        _end_all(env)
        raise explained from error


def _answer(remote: Any, process: Any) -> str:
    """A worker's; until it is prepared, its pipe need not say that it has ended."""
    if remote not in wait([remote, process.sentinel]):
        raise EOFError("the process has ended")
    return remote.recv()


def end_workers(env: VecEnv) -> None:
    """End the processes of an environment that can no longer be spoken to; ``env.close()`` then has nothing to do."""
    for half in halves_of(env):
        end_workers(half)
    inner = _inner(env)
    if isinstance(inner, _IN_PROCESSES) and not inner.closed:
        _end_all(inner)


def _end_all(env: SubprocVecEnv | AsyncVectorEnv) -> None:
    _end(env.processes, os.getpid())
    for pipe in env.remotes if isinstance(env, SubprocVecEnv) else env.parent_pipes:
        if pipe is not None:
            pipe.close()
    env.closed = True


def _end(processes: Sequence[Any], owner: int) -> None:
    """Also when ``owner``, the process that began them, ends or forgets them; one that does not end when asked is killed."""
    if os.getpid() != owner:  # a fork, to which they do not belong
        return
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


class _Prepared:
    """What makes an environment in a worker, once the worker has been prepared."""

    def __init__(self, env_fn: Callable[[], gym.Env], traceback_file: str):
        self.env_fn = env_fn
        self.traceback_file = traceback_file

    def __call__(self) -> gym.Env:
        _prepare_process(self.traceback_file)
        return self.env_fn()


class WatchedSubprocVecEnv(SubprocVecEnv):
    """
    SB3's ``SubprocVecEnv`` whose processes are watched from their first moment on.

    SB3's own is watched from when a ``ScratchPPO`` gets to know it. Until then a worker that fails in its environment's
    constructor lets SB3's wait for ever, and one that is left behind by a killed program lives on.

    :param env_fns: functions that make the environments, one per process
    :param start_method: of the processes, as SB3 takes it
    :raises EnvFailedError: if an environment's constructor fails; it carries the traceback
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]], start_method: str | None = None):
        workers = _workers[self] = _Workers()
        try:
            super().__init__([_Prepared(fn, workers.file(index)) for index, fn in enumerate(env_fns)], start_method)
        except _LOST as error:
            explained = _explain_end(self)
            _end_all(self)
            raise explained from error
        _watch(self, workers)
