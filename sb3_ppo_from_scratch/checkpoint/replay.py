"""
Whether restored environments go on as they did, whatever their state is made of.

State may lie where no capture looks: in a closure, a class, a module, ``__slots__``, an array or a generator that two objects
share, a generator of the whole process. So this is tried out rather than known: environments are stepped, put back and stepped
again, in a fork of their process, which shares nothing with it but the past. What they do then is a *trace*: one checksum of
observation, reward and end per step and environment. A checkpoint keeps one, and a resumed run compares its own.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import random
import select
import signal
import stat
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.safe_files.values import numpy_state, python_state

__all__ = ["CANNOT_FORK", "difference", "generators", "in_a_fork", "set_generators", "trace"]

CANNOT_FORK = not sys.platform.startswith("linux")
"""Elsewhere a fork of a process with threads is not to be relied on; nothing is tried out there."""
STEPS = 256
"""The longest trace."""


class ForkError(RuntimeError):
    """The fork ended without an answer."""


# ------------------------------------------------------- the generators of a process


def generators() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as plain data; torch's if it has been imported."""
    torch = sys.modules.get("torch")
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": None if torch is None else torch.get_rng_state().numpy(),
    }


def set_generators(states: dict[str, Any]) -> None:
    """Put what :func:`generators` returned in place."""
    random.setstate(python_state(states["python"]))
    np.random.set_state(numpy_state(states["numpy"]))
    if states["torch"] is not None:
        import torch

        torch.set_rng_state(torch.from_numpy(states["torch"].copy()))


# ------------------------------------------------------- traces


def trace(env: VecEnv, seconds: float, steps: int = STEPS, reset_at: int = 3) -> np.ndarray:
    """
    Step environments with actions that depend on nothing, with one reset of them all.

    :param seconds: after which it ends, though not before the reset
    :param steps: the most that are made
    :param reset_at: steps before the reset: many environments draw random numbers only there
    :return: checksums ``[n, n_envs]``, uint32
    """
    end = time.perf_counter() + seconds
    space = copy.deepcopy(env.action_space)
    space.seed(0)
    sums = []
    for step in range(steps):
        if step == reset_at:
            sums.append(_checksums(env.num_envs, env.reset()))
        elif step > reset_at and time.perf_counter() > end:
            break
        else:
            actions = np.stack([space.sample() for _ in range(env.num_envs)])
            sums.append(_checksums(env.num_envs, *env.step(actions)[:3]))
    return np.array(sums, np.uint32)


def _checksums(n_envs: int, *values: Any) -> list[int]:
    sums = [0] * n_envs
    for array in _arrays(values):
        sums = [zlib.crc32(np.ascontiguousarray(array[index]).tobytes(), each) for index, each in enumerate(sums)]
    return sums


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _arrays(part)
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _arrays(value[key])
    else:
        yield np.asarray(value)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[int, int] | None:
    """Where two traces of the same environments part: the step, from 1, and the environment's index; ``None`` if nowhere."""
    n = min(len(first), len(second))
    if first.shape[1:] != second.shape[1:]:
        return 1, 0
    parted = np.argwhere(first[:n] != second[:n])
    return None if len(parted) == 0 else (int(parted[0][0]) + 1, int(parted[0][1]))


# ------------------------------------------------------- forks


def in_a_fork(function: Callable[[], Any], seconds: float) -> Any:
    """
    What a function returns in a fork of this process, which can neither change this one nor speak to anything outside.

    :param seconds: to wait
    :raises ForkError: if nothing comes back
    """
    own = generators()
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks are why the wait has an end
        pid = os.fork()
    if pid == 0:
        _answer(function, write, own)
    os.close(write)
    try:
        answer = _read_all(read, time.monotonic() + seconds)
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if answer is None:
        raise ForkError(f"no answer within {seconds:.0f} s")
    sound, result = pickle.loads(answer) if answer else (False, "its process ended")
    if not sound:
        raise ForkError(result)
    return result


def _answer(function: Callable[[], Any], write: int, own: dict[str, Any]) -> NoReturn:
    """In the fork: nothing that it inherits may be written to, read on, or finished."""
    try:
        gc.disable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _cut_off({int(name) for name in os.listdir("/proc/self/fd")} - {write})
        set_generators(own)  # Python has given its own another seed
        try:
            answer = (True, function())
        except BaseException as error:  # noqa: BLE001  # a fork must never go on as its parent would
            answer = (False, f"{type(error).__name__}: {error}"[:500])
        data = pickle.dumps(answer)
        while data:
            data = data[os.write(write, data) :]
    finally:
        os._exit(0)


def _cut_off(descriptors: set[int]) -> None:
    """Files become empty ones in memory, and everything else leads nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # one of them listed the others
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            os.dup2(os.memfd_create("fork") if is_file else nowhere, descriptor)


def _read_all(read: int, deadline: float) -> bytes | None:
    answer = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([read], [], [], left)[0]:
            data = os.read(read, 1 << 16)
            if not data:
                return answer
            answer += data
    return None
