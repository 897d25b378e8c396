"""A recurrent policy's minibatches: transitions in the order of time, and which of them begin a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_from_scratch.buffer import RolloutData, ScratchRolloutBuffer, is_ours

__all__ = ["EPISODE_STARTS", "SEQUENCE_STARTS", "Sequences", "rotated", "sequence_data", "sequence_minibatches"]

SEQUENCE_STARTS = "sequence_starts"
"""Under this name a minibatch's extras say ``[B]`` where a sequence begins: at an episode's start, or an environment's."""
EPISODE_STARTS = "episode_starts"
"""Likewise where an episode does, so that the LSTM's state is zero there."""


class Sequences(NamedTuple):
    """How a minibatch's B rows, in the order of time, fall into sequences."""

    first: th.Tensor
    """``[n_seq]``, int64, each one's first row"""
    number: th.Tensor
    """``[B]``, int64, which sequence each row belongs to"""
    position: th.Tensor
    """``[B]``, int64, and which row of it that is"""

    @classmethod
    def beginning_at(cls, starts: th.Tensor) -> Sequences:
        """
        :param starts: ``[B]``, bool; the first row begins one in any case
        """
        starts = starts.clone()
        starts[0] = True
        first = starts.nonzero().flatten()
        number = starts.cumsum(0) - 1
        return cls(first, number, th.arange(len(starts), device=starts.device) - first[number])

    @property
    def lengths(self) -> th.Tensor:
        """``[n_seq]``, int64"""
        return self.number.bincount(minlength=len(self.first))

    @property
    def places(self) -> th.Tensor:
        """``[B]``, int64: where each row stands once all sequences are padded to the longest, one after the other."""
        return self.number * (self.position.max() + 1) + self.position

    def padded(self, rows: th.Tensor) -> th.Tensor:
        """``[B, ...]`` to ``[n_seq * longest, ...]``, zeros behind the end of each sequence."""
        size = len(self.first) * (int(self.position.max()) + 1)
        return rows.new_zeros((size, *rows.shape[1:])).index_copy_(0, self.places, rows)


def sequence_data(buffer: ScratchRolloutBuffer) -> RolloutData:
    """A full buffer's data set, environment by environment in the order of time, with the starts among its extras."""
    episode_starts = buffer.episode_starts
    starts = episode_starts != 0
    starts[0] = True
    data = buffer.dataset()
    extras = {SEQUENCE_STARTS: _flat(buffer, starts), EPISODE_STARTS: _flat(buffer, episode_starts)}
    return data._replace(extras={**data.extras, **extras})


def _flat(buffer: ScratchRolloutBuffer, array: np.ndarray) -> th.Tensor:
    """As the buffer's data set is; what follows a row that is no transition begins an episode, so that no sequence is torn."""
    flat = array.T.ravel() if buffer.valid is None else array.T[buffer.valid.T]
    return th.from_numpy(flat).to(buffer.device)


def rotated(data: RolloutData, batch_size: int) -> Iterator[RolloutData]:
    """
    One pass in the order of time, from a random row on and round to it: neighbours stay neighbours.

    :param data: of :func:`sequence_data`
    :param batch_size: transitions per minibatch; the last one may be smaller
    """
    begin = np.random.randint(data.size)  # sb3-contrib's draw
    order = th.arange(data.size, device=data.advantages.device).roll(-begin)
    for indices in order.split(batch_size):
        yield data.take(indices)


def sequence_minibatches(buffer: RolloutBuffer) -> Callable[[int], Iterator[RolloutData]]:
    """
    How to draw one epoch's minibatches of a given size for a recurrent policy.

    :param buffer: full, with the LSTM's states among its extras
    :raises ValueError: for a buffer that keeps none
    """
    if not is_ours(buffer):
        raise ValueError(f"a recurrent policy learns from a ScratchRolloutBuffer, not from a {type(buffer).__name__}")
    return partial(rotated, sequence_data(buffer))
