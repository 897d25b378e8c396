"""The processes that train one agent, and what they can say to each other: sums, and objects from each to all."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from torch import distributed as dist

from sb3_ppo_from_scratch.distributed.health import Health
from sb3_ppo_from_scratch.distributed.shared_memory import Room, make_memory, open_memory

__all__ = ["ALONE", "Group", "group_of", "n_processes", "rank", "rank_folder"]

_SLICE = timedelta(seconds=1)
"""How long to wait for the others before asking whether they are well."""
_FOR_EVER = timedelta(days=365)
"""What torch's own time-out is set to: whoever evaluates for an hour is well all the same, and :class:`Health` knows."""
_BLOCK = 4096
"""Bytes per rank in the first attempt to exchange objects; most need no second."""


def n_processes() -> int:
    """How many processes have been started to work together: those of the process group, or else torchrun's."""
    return dist.get_world_size() if _is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number that this process has among them, from 0."""
    return dist.get_rank() if _is_initialized() else int(os.environ.get("RANK", "0"))


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_folder(path: Path) -> Path:
    """Where this process keeps what each process keeps for itself: rank 0 in the folder, rank 1 in ``<folder>-rank1``."""
    return path if rank() == 0 else path.with_name(f"{path.name}-rank{rank()}")


class Group:
    """One process alone, which has nobody to talk to; several are a :class:`_ProcessGroup`."""

    rank = 0
    """this process's number"""
    size = 1
    """number of processes"""

    def sum(self, vector: th.Tensor) -> None:
        """
        Replace a vector by the sum of all ranks' vectors; the same bits on all ranks.

        :param vector: ``[n]``, of one size and dtype on all ranks
        :raises RankFailedError: if another rank is not there any more
        """

    def gather(self, value: Any) -> list[Any]:
        """
        :param value: anything that can be pickled
        :return: all ranks' values, by rank
        :raises RankFailedError: see :meth:`sum`
        """
        return [value]

    def gather_numbers(self, row: list[float]) -> np.ndarray:
        """
        :param row: ``[k]``
        :return: ``[size, k]``, float64, all ranks' rows
        :raises RankFailedError: see :meth:`sum`
        """
        rows = th.zeros(self.size, len(row), dtype=th.float64)
        rows[self.rank] = th.tensor(row, dtype=th.float64)
        self.sum(rows)
        return rows.numpy()

    @contextmanager
    def watched(self, progress: Callable[[], int]) -> Iterator[None]:
        """
        Around training: an error here is told to the other ranks, and they are told how this one gets on.

        :param progress: a number that changes while training goes on
        """
        yield


ALONE = Group()
"""A single process."""


class _ProcessGroup(Group):
    """All processes of ``torch.distributed``'s default group; made in all of them at once."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._by_device = {"cpu": dist.new_group(backend="gloo", timeout=_FOR_EVER)}
        self._health = Health(self.rank, self.size)
        machines = self.gather(self._health.machine)  # from now on everybody's health can be asked for
        self._shares_memory = all(machine == self._health.machine for machine in machines)
        self._room: Room | None = None

    def sum(self, vector: th.Tensor) -> None:
        device = vector.device.type
        if device == "cpu" and (room := self._room_for(vector.numel() * vector.element_size())):
            with self._health.waiting() as check:
                room.sum(vector, check)
            return
        if device not in self._by_device:  # all ranks get here at the same time
            self._by_device[device] = dist.new_group(backend=dist.get_default_backend_for_device(device))
        self._wait(dist.all_reduce(vector, group=self._by_device[device], async_op=True), device)

    def _room_for(self, n_bytes: int) -> Room | None:
        """Shared memory for a vector, or ``None``: the same on all ranks, which ask at the same time."""
        if self._shares_memory and (self._room is None or self._room.capacity < n_bytes):
            capacity = max(_BLOCK, 1 << (n_bytes - 1).bit_length())
            made = make_memory(Room.bytes_for(self.size, capacity)) if self.rank == 0 else None
            path = self.gather(made and made[0])[0]
            memory = open_memory(path) if path else None
            self._shares_memory = all(self.gather(memory is not None))
            self._room = Room(memory, self.rank, self.size) if self._shares_memory and memory else None
            if made:
                os.close(made[1])
        return self._room

    def gather(self, value: Any) -> list[Any]:
        data = pickle.dumps(value)
        blocks = self._gather_bytes(len(data).to_bytes(8, "little") + data[: _BLOCK - 8], _BLOCK)
        lengths = [int.from_bytes(block[:8], "little") for block in blocks]
        if max(lengths) <= _BLOCK - 8:
            return [pickle.loads(block[8 : 8 + n]) for block, n in zip(blocks, lengths, strict=True)]
        blocks = self._gather_bytes(data, max(lengths))
        return [pickle.loads(block[:n]) for block, n in zip(blocks, lengths, strict=True)]

    def _gather_bytes(self, data: bytes, size: int) -> list[bytes]:
        """All ranks' bytes, filled up to one size."""
        ours = th.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=th.uint8)
        all_of_them = [th.empty_like(ours) for _ in range(self.size)]
        self._wait(dist.all_gather(all_of_them, ours, group=self._by_device["cpu"], async_op=True), "cpu")
        return [each.numpy().tobytes() for each in all_of_them]

    def _wait(self, work: Any, device: str) -> None:
        """Until the others have come too, or one of them cannot come any more."""
        with self._health.waiting() as check:
            while True:
                try:
                    if device == "cpu":
                        work.wait(_SLICE)
                        return
                    if _is_done(work):  # its own wait() would give up at the end of the time
                        work.wait()
                        return
                except RuntimeError as error:
                    if "timed out" not in str(error).lower():
                        check.explain(error)
                check()

    @contextmanager
    def watched(self, progress: Callable[[], int]) -> Iterator[None]:
        with self._health.watched(progress):
            yield

    def close(self, ours: bool) -> None:
        """
        The program ends.

        :param ours: whether torch's process group has been made for us
        """
        self._health.end()
        if ours:
            with contextlib.suppress(Exception):  # the others may be gone by now
                dist.destroy_process_group()


def _is_done(work: Any) -> bool:
    end = time.monotonic() + _SLICE.total_seconds()
    while not work.is_completed():
        if time.monotonic() > end:
            return False
        time.sleep(2e-5)
    return True


_joined: list[Group] = []


def group_of(data_parallel: bool) -> Group:
    """
    The processes that a model is trained by. The first call joins them: all must make it.

    A process group is made if there is none, and closed when the program ends. It is gloo's, whatever the device; sums of what
    lies on a GPU go over a second one, of that device's own kind (NCCL).

    :param data_parallel: whether there is more than one process to a model, if more than one was started
    """
    if not data_parallel or n_processes() == 1:
        return ALONE
    if not _joined:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < th.cuda.device_count():
            th.cuda.set_device(local)  # "cuda" is then each process's own
        ours = not dist.is_initialized()
        if ours:
            dist.init_process_group("gloo")
        group = _ProcessGroup()
        _joined.append(group)
        atexit.register(group.close, ours)
    return _joined[0]
