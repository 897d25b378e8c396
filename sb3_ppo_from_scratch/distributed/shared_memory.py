"""
Sums of the processes of one machine through memory that they share.

A connection takes longer over a small network's gradient than the gradient itself does. Here each rank writes its vector
where the others can read it, and counts; when all have counted as far, each adds up what all have written.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch as th

__all__ = ["Room", "make_memory", "open_memory"]

_LINE = 64
"""Bytes between two ranks' counts: what the caches of two processors hand to each other at a time."""
_LOOKS = 2000
"""How often to look for another rank before leaving it the processor between two looks: some 0.2 milliseconds."""


class Room:
    """
    Two places per rank, used in turn: nobody writes where another one may still read.

    :param memory: of all ranks
    :param rank: this process's number
    :param size: how many there are
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int):
        self.rank, self.size = rank, size
        self.capacity = (len(memory) - _LINE * size) // (2 * size)
        """bytes of the longest vector"""
        self._counts = memoryview(memory)[: _LINE * size].cast("q")
        self._places = th.frombuffer(memory, dtype=th.uint8, offset=_LINE * size).view(2, size, self.capacity)
        self._n = 0

    @staticmethod
    def bytes_for(size: int, capacity: int) -> int:
        """How much memory it takes."""
        return _LINE * size + 2 * size * capacity

    def sum(self, vector: th.Tensor, check: Callable[[], Any]) -> None:
        """
        Replace a vector by the sum of all ranks' vectors, in the order of their numbers.

        :param vector: on the CPU, of one size and dtype on all ranks, at most ``capacity`` bytes
        :param check: called in each second of waiting; raises what ends it
        """
        self._n += 1
        n_bytes = vector.numel() * vector.element_size()
        vectors = self._places[self._n % 2, :, :n_bytes].view(vector.dtype).view(self.size, *vector.shape)
        vectors[self.rank].copy_(vector)
        self._counts[self.rank * _LINE // 8] = self._n
        for other in range(self.size):
            self._wait_for(other, check)
        vector.copy_(vectors[0])
        for theirs in vectors[1:]:
            vector += theirs

    def _wait_for(self, other: int, check: Callable[[], Any]) -> None:
        place, looks, checked = other * _LINE // 8, 0, time.monotonic()
        while self._counts[place] < self._n:
            looks += 1
            if looks > _LOOKS:
                time.sleep(5e-5)
                if time.monotonic() - checked > 1.0:
                    check()
                    checked = time.monotonic()


def make_memory(n_bytes: int) -> tuple[str, int] | None:
    """
    :return: where processes of this machine find as much memory, and the descriptor that keeps it; ``None`` where there is
        none, or where one process may see another's writes in another order (processors that are not x86)
    """
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("scratch_ppo")
    try:
        # now, where it is an error, and not at a later write, where it ends the process
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError:
        os.close(descriptor)
        return None
    return f"/proc/{os.getpid()}/fd/{descriptor}", descriptor


def open_memory(path: str) -> mmap.mmap | None:
    """:param path: of :func:`make_memory`, perhaps another process's; ``None`` if it may not be read from here"""
    try:
        with open(path, "r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError:
        return None
