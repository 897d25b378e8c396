"""Exact resume: when checkpoints are taken and written, in quiet times and when a signal or an error ends a run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_from_scratch.checkpoint.callback_state import all_callbacks
from sb3_ppo_from_scratch.checkpoint.files import checkpoint_files, remove_after, write_checkpoint
from sb3_ppo_from_scratch.checkpoint.ownership import FolderLock
from sb3_ppo_from_scratch.checkpoint.run_state import Known, capture_run, dumps
from sb3_ppo_from_scratch.checks.arguments import check_integer
from sb3_ppo_from_scratch.distributed import ALONE, Group, rank, rank_folder
from sb3_ppo_from_scratch.vec_env.failures import EnvFailedError, end_workers, explain_failure, watch_workers

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

    While training goes on, SIGTERM and Ctrl-C let it finish its iteration, write one last checkpoint and end the program; a
    second one stops at once. What is in memory by then is written first: a snapshot as recent as 0.5% of the training time
    allows, so that little is lost where iterations are long. So does any error write one.

    Where several processes train one agent, each writes its own part, at boundaries that rank 0 chooses: rank 1's are in
    ``<path>-rank1``. A signal to one of them ends all.

    :param save_freq: timesteps (over all environments) between checkpoints, at the next boundary; ``None`` for as often as
        0.5% of the training time allows
    :param path: folder for the checkpoints, and for nothing else
    :param keep: checkpoints to keep, at least 1; with 2 there is another one if the last is damaged, or if not all of several
        processes have written theirs, so that these always keep 2
    :param verbose: 1 for a line per checkpoint
    :param try_out: whether to step environments in a fork of their process, where there can be one, to see if they go on from
        a checkpoint as they would have. The fork can use none of their open files and connections; for environments that
        open new ones in ``step`` or ``reset``, ``False``.
    """

    def __init__(
        self,
        save_freq: int | None = None,
        path: str | Path = "checkpoints",
        keep: int = 2,
        verbose: int = 0,
        try_out: bool = True,
    ):
        super().__init__(verbose)
        if save_freq is not None:
            check_integer("save_freq", save_freq, 1)
        check_integer("keep", keep, 1)
        self.save_freq = save_freq
        self.path = rank_folder(Path(path))
        self.keep = keep
        self.try_out = try_out
        self._written: Path | None = None
        self._owner: weakref.ref[OnPolicyAlgorithm] | None = None
        self._lock = FolderLock()
        self._root: BaseCallback = self
        self._snapshot: tuple[int, dict[str, Any]] | None = None
        self._saved_at = -1
        self._next_time = 0.0
        self._known: Known | None = None
        self.signal: int | None = None

    def state_dict(self) -> None:
        """Nothing of this callback belongs into its own checkpoints."""

    def load_state_dict(self, state: None) -> None:
        """Nothing, in turn."""

    def begin(self, model: OnPolicyAlgorithm, root: BaseCallback, resumed_from: Path | None) -> None:
        """
        Called when training begins.

        :param model: the one in training
        :param root: the callback that training was given, of which this one is a part
        :param resumed_from: the folder of the checkpoint that training continues, if it continues one
        :raises ValueError: if another run's checkpoints are in the folder, or another run writes there now
        """
        where = f"path={str(self.path)!r}"
        if not self._lock.acquire(self.path):
            raise ValueError(f"{where} is being written to by another run, or another ResumableCheckpoint of this one")
        ours = self._written is not None and self._owner is not None and self._owner() is model
        ours = ours or (resumed_from is not None and self.path.resolve() == resumed_from)
        if not ours and has_checkpoint(self.path):
            self._lock.release()
            raise ValueError(
                f"{where} holds another run's checkpoints: continue that run with ScratchPPO.resume, or give an empty folder"
            )
        if ours and self._group.size > 1:  # of those that not all have
            remove_after(self.path, model.num_timesteps)
        self._owner, self._root = weakref.ref(model), root
        self._snapshot = self._known = self.signal = None
        self._saved_at = -1
        self._next_time = 0.0

    def end(self) -> None:
        """Called when training is over, however it ended."""
        self._lock.release()

    def at_boundary(self) -> None:
        """
        Called between two iterations: take a snapshot, write a file, or neither.

        :raises Interrupted: if a signal has come, with all that was trained in a file
        """
        start = time.perf_counter()
        cheap = start >= self._next_time
        due = self._saved_at < 0
        due = due or (cheap if self.save_freq is None else self.model.num_timesteps - self._saved_at >= self.save_freq)
        cheap, due = self._agree(cheap, due)
        if due or cheap:
            self._take_snapshot()
            if due:
                self.write_last_snapshot()
            end = time.perf_counter()
            self._next_time = end + (end - start) / _COST
        self._stop_if_asked()

    @property
    def _group(self) -> Group:
        return getattr(self.model, "group", ALONE)

    def _agree(self, cheap: bool, due: bool) -> tuple[bool, bool]:
        """What rank 0 finds; and a signal to one rank is one to all."""
        said = self._group.gather_numbers([cheap, due, self.signal or 0])
        self.signal = int(said[:, 2].max()) or None
        return bool(said[0, 0]), bool(said[0, 1]) or self.signal is not None

    def _take_snapshot(self) -> None:
        try:
            model: Any = self.model  # a rollout algorithm, which trains with this callback
            state = capture_run(model, self._root, self.path, self._known, self.try_out)
        except (EOFError, ConnectionError) as error:  # from an environment's process
            raise explain_failure(self.training_env, error) from error
        except OSError as error:  # of a log file that is part of the run
            self._warn(error)
            return
        self._snapshot = (self.model.num_timesteps, state)
        if self._known is None:
            self._known = Known(state["doubts"], state["env"]["problems"])
            _tell(state["problems"], state["doubts"])

    def write_last_snapshot(self) -> Path | None:
        """Write the snapshot in memory, if it is newer than the last file. Returns the last file written, if any."""
        if self._snapshot is None or self._snapshot[0] <= self._saved_at:
            return self._written
        steps, state = self._snapshot
        try:
            keep = self.keep if self._group.size == 1 else max(self.keep, 2)
            self._written = write_checkpoint(self.path, dumps(state), steps, keep)
        except OSError as error:
            self._warn(error)
        else:
            if self.verbose >= 1 and rank() == 0:
                print(f"Wrote {self._written}")
        self._saved_at = steps
        return self._written

    def _warn(self, error: OSError) -> None:
        last = f"the last one is {self._written}" if self._written else "there is none yet"
        steps = self.model.num_timesteps
        warnings.warn(f"no checkpoint at {steps} timesteps in {self.path}: {error}; {last}", RuntimeWarning, stacklevel=3)

    def _on_step(self) -> bool:
        if self.signal is not None:  # whoever sent it may not wait for the end of the iteration
            self.write_last_snapshot()
        return True

    def _stop_if_asked(self) -> None:
        if self.signal is not None:
            raise Interrupted(128 + self.signal)

    def at_end(self, complete: bool) -> None:
        """
        Called after the last iteration.

        :param complete: whether training stands at a boundary, and not in a rollout that a callback has ended
        :raises Interrupted: if a signal has come
        """
        if complete:
            self._take_snapshot()
        self.write_last_snapshot()
        self._stop_if_asked()

    @property
    def steps_in_file(self) -> int:
        """Timesteps that a resumed run would not do again; 0 if there is no file."""
        return max(self._saved_at, 0) if self._written is not None else 0


def _tell(problems: list[str], doubts: list[str]) -> None:
    """Say once, as early as it is known, how a resumed run will differ."""
    if problems:
        warnings.warn(
            f"the state of environments cannot be saved ({'; '.join(problems)}): a resumed run will start new episodes "
            "in them, and will not be bit-exact",
            stacklevel=6,
        )
    if doubts:
        warnings.warn(f"a resumed run will not be bit-exact ({'; '.join(doubts)})", stacklevel=6)


# ------------------------------------------------------- signals and errors


@contextlib.contextmanager
def guarded_training(
    model: OnPolicyAlgorithm, callback: BaseCallback, resumed_from: Path | None
) -> Iterator[list[ResumableCheckpoint]]:
    """
    Around the training loop: failing environments are explained, and no error or signal loses what has been trained.

    :param model: the one in training
    :param callback: what ``learn`` was given, initialized
    :param resumed_from: the folder of the checkpoint that training continues, if it continues one
    :return: the checkpoint callbacks in ``callback``
    """
    checkpoints = [each for each in all_callbacks(callback) if isinstance(each, ResumableCheckpoint)]
    env = model.env
    assert env is not None  # learn() sees to it
    try:
        for checkpoint in checkpoints:
            checkpoint.begin(model, callback, resumed_from)
        watch_workers(env)
        with _signals_wait(checkpoints):
            yield checkpoints
    except BaseException as error:
        files = [(each.write_last_snapshot(), each.steps_in_file) for each in checkpoints]
        if isinstance(error, (EnvFailedError, Interrupted)):
            end_workers(env)
        elif getattr(env.unwrapped, "waiting", False):  # for processes whose answers nobody knows how much of has been read
            end_workers(env)
            print("Ended in the middle of a step; make the environments anew to go on with this model", file=sys.stderr)
        for file, steps in files:
            _say_where(error, file, steps, model.num_timesteps)
        raise
    finally:
        for checkpoint in checkpoints:
            checkpoint.end()


def _say_where(error: BaseException, file: Path | None, steps: int, num_timesteps: int) -> None:
    if file is None or rank() > 0:
        return
    lost = num_timesteps - steps
    what = f"{lost} timesteps are lost" if lost > 0 else "nothing is lost"
    how = "Interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else f"Ended by {type(error).__name__}"
    print(f"{how}; the run continues from {file} at {steps} timesteps: {what}", file=sys.stderr)


@contextlib.contextmanager
def _signals_wait(checkpoints: list[ResumableCheckpoint]) -> Iterator[None]:
    """While there are checkpoints to write, the first SIGTERM or Ctrl-C ends training after its iteration."""
    if not checkpoints or threading.current_thread() is not threading.main_thread():
        yield  # without checkpoints signals are none of our business, and other threads get none
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def stop(number: int, frame: FrameType | None) -> None:
        give_back()  # a second one stops at once
        for checkpoint in checkpoints:
            checkpoint.signal = number
        os.write(2, b"\nThis iteration is finished and a checkpoint written, then the program ends; again to stop at once\n")

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        give_back()
