"""Exact resume: when checkpoints are taken and written, in quiet times and when a signal or an error ends a run."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_from_scratch.checkpoint.files import checkpoint_files, write_checkpoint
from sb3_ppo_from_scratch.checkpoint.run_state import all_callbacks, capture_run
from sb3_ppo_from_scratch.checks.arguments import check_integer
from sb3_ppo_from_scratch.vec_env.failures import EnvFailedError, end_workers, explain_failure, watch_workers

if TYPE_CHECKING:
    from sb3_ppo_from_scratch.ppo import ScratchPPO

__all__ = ["Interrupted", "ResumableCheckpoint", "guarded_training", "has_checkpoint"]

_COST = 0.005
"""Share of the training time that snapshots may take; at the default frequency with their files, else without."""


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

    def state_dict(self) -> None:
        """Nothing of this callback belongs into its own checkpoints."""

    def load_state_dict(self, state: None) -> None:
        """Nothing, in turn."""

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
        except (EOFError, ConnectionError) as error:  # from an environment's process
            raise explain_failure(self.training_env, error) from error
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
    checkpoints = [each for each in all_callbacks(callback) if isinstance(each, ResumableCheckpoint)]
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
