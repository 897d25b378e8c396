"""
Whether the other processes are alive and get on.

A rank that waits for others cannot tell a dead one from one that evaluates for an hour. So each says once a second, from a
thread, where it is, in the store by which ``torch.distributed`` has brought them together; whoever waits for longer than a
second reads it. What a rank raises, it says there too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from stable_baselines3.common import callbacks
from torch.distributed import distributed_c10d

from sb3_ppo_from_scratch.errors import RankFailedError

__all__ = ["PATIENCE", "Health"]

PATIENCE = float(os.environ.get("SCRATCH_PPO_PATIENCE", "60"))
"""Seconds that a rank may train without any progress, that is, within one step of its environments or one minibatch."""
_BEAT = 1.0
"""Seconds between two signs of life."""
_SILENCE = 8.0
"""Seconds without any, after which a process is taken for stopped."""
_UNHURRIED = (callbacks.__file__, str(Path(__file__).parent.parent / "checkpoint"))
"""Files whose functions may take as long as they like: evaluations happen in callbacks."""


def _machine() -> list[str]:
    """Two processes that agree in this can ask for each other by number."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return found


_MACHINE = _machine()


class Health:
    """
    What this process says of itself, and knows of the others.

    :param rank: of this one
    :param size: how many there are
    """

    def __init__(self, rank: int, size: int):
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # all kinds of stores have it
        self.store = distributed_c10d.PrefixStore("scratch_ppo", store)
        self.rank, self.size = rank, size
        self.machine = _MACHINE
        """Processes for which it is equal may ask for each other by number, and share memory."""
        self.round = 0
        """Counts trainings, so that an old one's words are not taken for a new one's."""
        self.n_waits = 0
        self._is_waiting = False
        self._progress: Callable[[], int] | None = None
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._say(f"beat/{rank}", self._state())
        threading.Thread(target=self._beat, daemon=True, name="scratch-ppo-health").start()

    def end(self) -> None:
        """The program ends, and the store may do so before it."""
        self._ended.set()

    def _say(self, key: str, value: dict[str, Any]) -> None:
        try:
            self.store.set(key, json.dumps(value))
        except RuntimeError:  # whoever kept the store is gone, as this rank will see when it waits for another
            self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            self._say(f"beat/{self.rank}", self._state())

    def _state(self) -> dict[str, Any]:
        frames = [each for each in _frames(sys._current_frames().get(self._main or 0)) if each.f_code.co_filename != __file__]
        progress = self._progress
        return {
            "time": time.monotonic(),
            "pid": os.getpid(),
            "machine": _MACHINE,
            "progress": None if progress is None else [progress(), self.n_waits],
            "unhurried": self._is_waiting or any(frame.f_code.co_filename.startswith(_UNHURRIED) for frame in frames),
            "where": _place(frames[0]) if frames else "an unknown place",
        }

    @contextmanager
    def waiting(self) -> Iterator[Check]:
        """Around a wait for the others."""
        self.n_waits += 1
        self._is_waiting = True
        try:
            yield Check(self)
        finally:
            self._is_waiting = False

    @contextmanager
    def watched(self, progress: Callable[[], int]) -> Iterator[None]:
        """See :meth:`Group.watched`."""
        self.round += 1
        self._progress = progress
        try:
            yield
        except RankFailedError as error:
            self._say(self._words(self.rank), {"rank": error.rank, "cause": error.cause})
            raise
        except BaseException as error:
            said = "".join(traceback.format_exception_only(error)).strip()
            at = _place(traceback.extract_tb(error.__traceback__)[-1])
            self._say(self._words(self.rank), {"rank": self.rank, "cause": f"ended with {said} (at {at})"})
            raise
        finally:
            self._progress = None

    def _words(self, rank: int) -> str:
        return f"words/{self.round}/{rank}"

    def read(self, key: str) -> dict[str, Any] | None:
        """:raises RuntimeError: if the store is gone"""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def last_words(self, rank: int) -> dict[str, Any] | None:
        """Why a rank has ended this training, if it has said so."""
        return self.read(self._words(rank))


class Check:
    """
    Looks after the other ranks during one wait.

    :param health: this process's
    """

    def __init__(self, health: Health):
        self._health = health
        self._heard: dict[int, tuple[Any, float]] = {}
        self._got_on: dict[int, tuple[Any, float]] = {}

    def __call__(self) -> None:
        """:raises RankFailedError: if another rank has failed, has ended, is stopped, or does not get on"""
        for rank in range(self._health.size):
            if rank != self._health.rank:
                try:
                    self._look_after(rank)
                except (RuntimeError, ValueError) as error:
                    if isinstance(error, RankFailedError):
                        raise
                    raise RankFailedError(0, "has ended, and with it the store of all ranks") from error

    def _look_after(self, rank: int) -> None:
        words = self._health.last_words(rank)
        if words is not None:
            raise RankFailedError(words["rank"], words["cause"])
        state = self._health.read(f"beat/{rank}")
        if state is None:  # it has joined, and is about to say so
            return
        is_here = state["machine"] == _MACHINE
        if is_here and _has_ended(state["pid"]):
            raise RankFailedError(rank, f"has ended: there is no process {state['pid']} any more. It was at {state['where']}")
        now = time.monotonic()
        heard = self._heard.setdefault(rank, (state["time"], now))
        if heard[0] == state["time"]:  # the same as the last time
            if now - heard[1] > _SILENCE:
                cause = f"has given no sign of life for {_SILENCE:.0f} seconds, since {state['where']}"
                self._give_up(rank, state, is_here, cause)
            return
        self._heard[rank] = (state["time"], now)
        got_on = self._got_on.setdefault(rank, (state["progress"], now))
        if state["progress"] is None or state["unhurried"] or got_on[0] != state["progress"]:
            self._got_on[rank] = (state["progress"], now)
        elif now - got_on[1] > PATIENCE:
            self._give_up(rank, state, is_here, f"has not got on for {PATIENCE:.0f} seconds, at {state['where']}")

    def _give_up(self, rank: int, state: dict[str, Any], is_here: bool, cause: str) -> NoReturn:
        """A process that hangs is ended, if it can be: nobody else may, and its connections keep the others' threads."""
        if is_here:
            with contextlib.suppress(OSError):
                os.kill(state["pid"], signal.SIGKILL)
        raise RankFailedError(rank, f"{cause}, and was ended" if is_here else cause)

    def explain(self, error: RuntimeError) -> NoReturn:
        """
        A connection has broken: say whose, and why.

        :raises RankFailedError: from ``error``
        """
        end = time.monotonic() + _SILENCE + 2 * _BEAT
        while time.monotonic() < end:
            try:
                self()
            except RankFailedError as found:
                raise found from error
            time.sleep(0.05)
        raise RankFailedError(None, f"has broken its connection ({str(error)[:200]})") from error


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType | traceback.FrameSummary) -> str:
    if isinstance(frame, FrameType):
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine has; one that its parent has not yet asked after (a zombie) has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False
