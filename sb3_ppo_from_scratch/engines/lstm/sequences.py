"""A whole minibatch of sequences through ``nn.LSTM``, in as few calls as pay."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th
from torch import nn

from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.recurrent import EPISODE_STARTS, LSTM_STATES, SEQUENCE_STARTS, Sequences

__all__ = ["SequenceRunner", "alike"]

_CALL = 2**20
"""
What a call of an LSTM costs besides its rows, in rows of a single unit, which cost the square of the units: 0.4 milliseconds
against 1.6 microseconds for a row of 64 units, backward pass included, on one core of an AMD EPYC
"""


def alike(lengths: np.ndarray, hidden_size: int) -> list[slice]:
    """
    Split sequences into groups that are each padded to their longest, where the padding saved is worth another call.

    :param lengths: ``[n_seq]``, longest first
    :param hidden_size: units of the LSTM
    :return: slices of them, in order
    """
    saved = (lengths[0] - lengths) * np.arange(len(lengths), 0, -1)  # rows of padding, by a split before each
    split = int(saved.argmax())
    if saved[split] * hidden_size**2 <= _CALL:
        return [slice(0, len(lengths))]
    after = alike(lengths[split:], hidden_size)
    return [
        *alike(lengths[:split], hidden_size),
        *(slice(split + part.start, split + part.stop) for part in after),
    ]


class _Group(NamedTuple):
    sequences: th.Tensor
    """``[n]``, int64, which"""
    rows: th.Tensor
    """``[longest * n]``, int64: the minibatch's row for each step of each sequence, a last row again for padding"""


class SequenceRunner:
    """
    Runs LSTMs over the sequences of one minibatch.

    sb3-contrib steps through time in Python if any episode begins within the minibatch. But sequences are cut there, so that
    only a first row can begin one: its state is zeroed, and torch goes through time itself.

    :param batch: B transitions in the order of time
    """

    def __init__(self, batch: RolloutData):
        sequences = Sequences.beginning_at(batch.extras[SEQUENCE_STARTS])
        first = sequences.first
        within = 1.0 - batch.extras[EPISODE_STARTS][first]
        states = batch.extras[LSTM_STATES][first] * within[:, None, None, None]
        self.states = states.movedim(0, 2)
        """``[n_states, n_layers, n_seq, hidden_size]``, before each one's first row"""
        lengths = sequences.lengths.numpy()
        order = np.argsort(-lengths, kind="stable")
        starts = first.numpy()
        places = np.empty(batch.size, np.int64)
        done = 0
        self._groups: list[_Group] = []
        for part in alike(lengths[order], states.shape[-1]):
            members = order[part]
            steps = np.arange(lengths[members[0]])[:, None]
            rows = starts[members] + np.minimum(steps, lengths[members] - 1)  # [longest, n]
            self._groups.append(_Group(th.from_numpy(members), th.from_numpy(rows.ravel())))
            real = (steps < lengths[members]).ravel()
            places[rows.ravel()[real]] = done + real.nonzero()[0]
            done += rows.size
        self._places = th.from_numpy(places)

    def __call__(self, lstm: nn.LSTM, features: th.Tensor, states: th.Tensor) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
        """
        :param features: ``[B, n_features]``
        :param states: hidden and cell state, ``[2, n_layers, n_seq, hidden_size]``
        :return: ``[B, hidden_size]``; and no states, for nobody goes on from there
        """
        outputs = []
        for group in self._groups:
            steps = features.index_select(0, group.rows).view(-1, len(group.sequences), features.shape[1])
            hidden, cell = states.index_select(2, group.sequences)
            outputs.append(lstm(steps, (hidden, cell))[0].flatten(0, 1))
        return th.cat(outputs).index_select(0, self._places), ()
