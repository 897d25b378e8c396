"""What changes in an SB3 algorithm when several processes train it; with one process, nothing."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_ppo_from_scratch.buffer import is_ours
from sb3_ppo_from_scratch.distributed.group import Group, group_of, n_processes
from sb3_ppo_from_scratch.distributed.sharing import Sharing

__all__ = ["DataParallelAlgorithm"]

_RANK_ZEROS = (EvalCallback, CheckpointCallback, ProgressBarCallback)
"""Callbacks that write, print or evaluate: for one process of all."""


class DataParallelAlgorithm(OnPolicyAlgorithm):
    """
    Several processes, each with environments of its own and the same policy. Rank 0 alone writes, prints and evaluates.

    Steps are counted over all ranks' environments. Environment i of rank r has the seed ``seed + r * n_envs + i``, where
    ``n_envs`` are each rank's, and rank r's own generators have ``seed + r * n_envs``.
    """

    data_parallel: bool
    batch_size: int

    @property
    def group(self) -> Group:
        """The processes that train this model; the first to ask joins them, and all must ask."""
        return group_of(self.data_parallel)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes, prints and evaluates; a single one is."""
        return self.group.rank == 0

    @cached_property
    def _sharing(self) -> Sharing:
        return Sharing(self, self.group)

    def _be_quiet(self) -> None:
        """Ranks but the first print nothing, and have no log."""
        if not self.is_rank_zero:
            self.verbose, self.tensorboard_log = 0, None

    def _check_processes(self) -> None:
        """:raises ValueError: for what several processes cannot share, or must not do side by side"""
        size = n_processes()
        if size > 1 and not self.data_parallel:
            raise ValueError(
                f"data_parallel must be True where several processes are started together (here {size}, by torchrun's "
                "WORLD_SIZE or a process group), or they would overwrite each other's files"
            )
        if self.batch_size % self.group.size != 0:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {size}, which share it, not {self.batch_size}"
            )

    def _begin_together(self) -> None:
        """
        The first thing that all ranks do in a training.

        :raises ValueError: if they have not been given the same
        """
        if self.group.size == 1:
            return
        if not is_ours(self.rollout_buffer):
            raise ValueError(
                "rollout_buffer_class must be a subclass of ScratchRolloutBuffer without a get() of its own, for its rows are "
                f"shared (data_parallel=True), not {type(self.rollout_buffer).__name__}"
            )
        names = ("n_envs", "n_steps", "batch_size", "n_epochs", "target_kl", "seed", "num_timesteps", "observation_space")
        ours = {name: repr(getattr(self, name)) for name in names}
        for rank, theirs in enumerate(self.group.gather(ours)):
            for name in names:
                if theirs[name] != ours[name]:
                    raise ValueError(
                        f"{name} must be the same on all ranks, not {ours[name]} here and {theirs[name]} on rank {rank}"
                    )
        self._sharing.take_rank_zeros()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Around training: what is raised in it ends the training of all ranks."""
        with self.group.watched(lambda: self.num_timesteps):
            yield

    def _begin_iterations(self) -> None:
        """Before the first rollout."""
        if self.group.size > 1:
            self._sharing.begin()

    def _all_complete(self, complete: bool) -> bool:
        """After a rollout: whether it is complete on all ranks. What they have seen in it is now known to all of them."""
        return complete if self.group.size == 1 else self._sharing.after_rollout(complete)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed all generators and the environments; each rank's others than those of the other ranks.

        :param seed: of rank 0
        """
        super().set_random_seed(None if seed is None else seed + self.group.rank * self.n_envs)

    def set_logger(self, logger: Logger) -> None:
        """
        Log there.

        :param logger: on ranks but the first it is closed, and nothing is logged
        """
        if not self.is_rank_zero:
            logger.close()
            logger = Logger(folder=None, output_formats=[])
        super().set_logger(logger)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model; ranks but the first write no file of that name.

        :param path: a file's name, or an open binary file, which any rank writes to
        :param exclude: names of attributes to leave out
        :param include: names of attributes to save though they would be left out
        """
        if self.is_rank_zero or not isinstance(path, str | pathlib.Path):
            super().save(path, exclude, include)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not self.is_rank_zero:
            callback, progress_bar = _without_rank_zeros(callback), False
        return super()._init_callback(callback, progress_bar)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if self.group.size > 1:
            self._sharing.note(infos, dones)


def _without_rank_zeros(callback: Any) -> Any:
    """The same callbacks but for those of rank 0, in lists and in others that call them."""
    if isinstance(callback, CallbackList):
        callback.callbacks = _without_rank_zeros(callback.callbacks)
    elif isinstance(callback, list):
        return [kept for each in callback if (kept := _without_rank_zeros(each)) is not None]
    elif isinstance(callback, _RANK_ZEROS):
        return None
    elif isinstance(callback, EventCallback):
        callback.callback = _without_rank_zeros(callback.callback)
    return callback
