"""Engines that run ahead of the loop of an update: they do some of it at once, and let the loop read what they measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import Gradient, Learner

__all__ = ["MEASURED", "ReplayedLearner", "ReplayedMinibatch"]

MEASURED = (*PPOLoss._fields, "grad_norm", "kl", "stepped")
"""Columns of a log, one row per minibatch."""


class ReplayedMinibatch(NamedTuple):
    """What was measured on one minibatch."""

    loss: PPOLoss
    grad_norm: float
    kl: float
    """exact, in nats; NaN if the old distribution is not known"""
    stepped: float

    @classmethod
    def of(cls, row: Sequence[float]) -> ReplayedMinibatch:
        """From a row of a log, ``[len(MEASURED)]``."""
        return cls(PPOLoss(*row[:6]), *row[6:])  # type: ignore[arg-type]  # floats where the loop may have tensors


def _nothing() -> None:
    """It has been done."""


class ReplayedLearner(Learner[ReplayedMinibatch]):
    """
    Of minibatches that have been stepped on already: the loop reads them one by one, notes, stops and raises where it would
    have, had it been there. Whoever ran ahead has made the same decisions.
    """

    _norm = math.nan

    @override
    def gradient(self, batch: ReplayedMinibatch) -> Gradient:
        self._norm = batch.grad_norm
        return Gradient(batch.loss, _nothing, None if math.isnan(batch.kl) else batch.kl)

    @override
    def clip_gradient(self) -> float:
        return self._norm

    @override
    def step(self) -> None:
        """It has been taken."""

    @override
    def mean_kl(self, kl_terms: Sequence[float]) -> float | None:
        return float(np.mean(kl_terms)) if kl_terms else None
