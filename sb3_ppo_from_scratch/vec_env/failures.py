"""Environments that fail: an error that names the environment and carries its traceback, and no process left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from weakref import WeakKeyDictionary

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

__all__ = ["EnvFailedError", "end_workers", "explain_failure", "step_environments", "watch_workers"]

_LOST = (EOFError, ConnectionError)
"""What a pipe to a worker raises when the worker has ended."""


class EnvFailedError(RuntimeError):
    """
    An environment raised an error in ``step`` (or in the ``reset`` that follows an episode's end), or its process ended.

    :param message: says which and why
    :param env_index: the environment's index in the ``VecEnv``, where it is known
    """

    def __init__(self, message: str, env_index: int | None = None):
        super().__init__(message)
        self.env_index = env_index


def step_environments(env: VecEnv, actions: np.ndarray) -> VecEnvStepReturn:
    """
    ``env.step(actions)``.

    :raises EnvFailedError: from the environment's own error
    """
    try:
        return env.step(actions)
    except Exception as error:
        raise explain_failure(env, error) from error


def explain_failure(env: VecEnv, error: Exception) -> EnvFailedError:
    """The error to raise for one that came from ``env``: it says which environment failed, and what its process last said."""
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv) and base in _workers and isinstance(error, _LOST):
        return _workers[base].explain()
    index = _stepped_index(error.__traceback__)
    which = f"the {type(env).__name__}"
    if isinstance(base, DummyVecEnv) and index is not None:
        which = f"environment {index} ({_name_of(base.envs[index])})"
    return EnvFailedError(f"{which} failed in step with {type(error).__name__}: {error}", index)


def _stepped_index(trace: TracebackType | None) -> int | None:
    """``DummyVecEnv`` steps its environments in a loop; the loop's variable is the only trace of where it was."""
    while trace is not None:
        if trace.tb_frame.f_code is DummyVecEnv.step_wait.__code__:
            return trace.tb_frame.f_locals.get("env_idx")
        trace = trace.tb_next
    return None


def _name_of(env: gym.Env) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


# ------------------------------------------------------- in a worker of SubprocVecEnv


class _Preparation:
    """
    Prepares a worker as it arrives there, and then is the name of a method that ``gymnasium.Env`` has got.

    SB3's worker calls methods of its environment and nothing else, and it has been made by the time we meet it.
    """

    def __init__(self, traceback_file: Path):
        self.traceback_file = traceback_file

    def __reduce__(self) -> Any:
        return _prepare_worker, (str(self.traceback_file),)


class _CopyingStream:
    """A standard error that also goes to a file: a worker's last words, which it has no other way to send."""

    def __init__(self, stream: TextIO, path: str):
        self._stream = stream
        self._path = path

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError), Path(self._path).open("a", encoding="utf-8") as file:
            file.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _prepare_worker(traceback_file: str) -> str:
    sys.stderr = _CopyingStream(sys.stderr, traceback_file)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gym.Env.scratch_ppo_name = _name_of  # type: ignore[attr-defined]
    return "scratch_ppo_name"


def _end_with_parent() -> None:
    """A worker that is forked holds its siblings' pipes open: none would see the end of the process that they work for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ------------------------------------------------------- in the training process


class _Workers:
    """What is known of a ``SubprocVecEnv``'s processes before one of them fails."""

    def __init__(self, env: SubprocVecEnv):
        self._processes = env.processes
        self._remotes = env.remotes
        self._folder = tempfile.TemporaryDirectory(prefix="scratch_ppo_")
        self._files = [Path(self._folder.name) / f"{index}.txt" for index in range(env.num_envs)]
        self._names: list[str] = []
        for file, remote in zip(self._files, self._remotes, strict=True):
            remote.send(("has_attr", _Preparation(file)))
            remote.recv()
            remote.send(("env_method", ("scratch_ppo_name", (), {})))
            self._names.append(remote.recv())

    def explain(self) -> EnvFailedError:
        """The error for a worker that has ended."""
        ended = wait([process.sentinel for process in self._processes], timeout=1)
        index = next((i for i, process in enumerate(self._processes) if process.sentinel in ended), None)
        if index is None:
            return EnvFailedError("the connection to an environment's process was lost")
        self._processes[index].join(1)  # the sentinel is a little ahead of the exit code
        file = self._files[index]
        words = file.read_text(encoding="utf-8") if file.is_file() else ""
        _, found, traceback = words.rpartition("Traceback (most recent call last):\n")
        code = self._processes[index].exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        reason = f", after it raised\n{found}{traceback.rstrip()}" if found else ""
        return EnvFailedError(f"environment {index} ({self._names[index]}) failed: its process ended {how}{reason}", index)

    def unblock(self) -> None:
        """
        Wait for a worker's end, then end the wait for its reply.

        Forked workers hold copies of each other's pipes, so that the death of one does not close its own.
        """
        remotes = {process.sentinel: remote for process, remote in zip(self._processes, self._remotes, strict=True)}
        for sentinel in wait(list(remotes)):
            with contextlib.suppress(OSError):  # it has been closed: training was over
                pipe = socket.socket(fileno=os.dup(remotes[sentinel].fileno()))
                with pipe:
                    pipe.shutdown(socket.SHUT_RDWR)


_workers: WeakKeyDictionary[SubprocVecEnv, _Workers] = WeakKeyDictionary()


def watch_workers(env: VecEnv) -> None:
    """
    Prepare the processes of a ``SubprocVecEnv``, once, so that the end of one gets noticed and explained, and orphans none.

    :raises EnvFailedError: if one has ended already
    """
    base = env.unwrapped
    if not isinstance(base, SubprocVecEnv) or base in _workers:
        return
    try:
        workers = _workers[base] = _Workers(base)
    except _LOST as error:
        raise EnvFailedError("a process of the SubprocVecEnv has ended before training") from error
    if any(getattr(process, "_start_method", None) == "fork" for process in base.processes):
        threading.Thread(target=workers.unblock, daemon=True).start()


def end_workers(env: VecEnv) -> None:
    """End the processes of a ``SubprocVecEnv`` that can no longer be spoken to; ``env.close()`` then has nothing to do."""
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv) and not base.closed:
        for process in base.processes:
            process.terminate()
        for process in base.processes:
            process.join()
        for remote in base.remotes:
            remote.close()
        base.closed = True
