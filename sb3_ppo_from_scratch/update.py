"""What an update measured, gathered without waiting for the device between minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch as th

from sb3_ppo_from_scratch.checks.finite import check_finite
from sb3_ppo_from_scratch.losses import PPOLoss

__all__ = ["NAN_POLICIES", "UpdateConfig", "UpdateStats", "accept", "reading_waits"]

NAN_POLICIES = ("raise", "skip")
"""What may happen to a minibatch whose loss or gradient is not finite."""


@dataclass(frozen=True)
class UpdateConfig:
    """One update's coefficients, schedules already resolved. The learning rate stands in ``policy.optimizer``."""

    batch_size: int
    n_epochs: int
    clip_range: float
    clip_range_vf: float | None
    normalize_advantage: bool
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    target_kl: float | None
    nan_policy: str = "raise"
    """``"raise"`` or ``"skip"``, for a minibatch whose loss or gradient is not finite"""


@dataclass
class UpdateStats:
    """
    Metrics of one update. Rows stay on the device until :meth:`metrics` fetches all of them at once.

    An update that stops early has measured one minibatch more than it stepped on: that row has no gradient norm.
    """

    epochs: int = 0
    """Epochs begun; an early stop's own epoch counts, as in SB3."""
    stopped_early: bool = False
    skipped: int = 0
    """Minibatches left out since their loss or gradient was not finite; complete once :meth:`metrics` has been asked."""
    kl: th.Tensor | float | None = None
    """Exact KL between old and new policy in nats, the mean over the last epoch's minibatches; ``None`` if not known."""
    _rows: list[tuple[th.Tensor | float, ...]] = field(default_factory=list)
    _last_epoch: int = 0

    @property
    def _unstepped(self) -> int:
        """Index of the row without a gradient norm; -1 if there is none."""
        return len(self._rows) - 1 if self.stopped_early else -1

    def begin_epoch(self) -> None:
        """The rows that follow belong to a new epoch."""
        self.epochs += 1
        self._last_epoch = len(self._rows)

    def add(self, loss: PPOLoss, grad_norm: th.Tensor | float | None = None) -> None:
        """
        Note one minibatch.

        :param loss: its losses and diagnostics, scalar tensors or floats
        :param grad_norm: the gradient's norm before clipping; ``None`` if no step was taken
        """
        self._rows.append((*loss, math.nan if grad_norm is None else grad_norm))

    def metrics(self) -> dict[str, float]:
        """
        Under SB3's names with SB3's values: means over all minibatches; ``approx_kl`` over the last epoch's only; ``loss`` of
        the last minibatch. ``kl`` and ``grad_norm`` where there are any; nothing at all if every minibatch was left out.
        """
        if not self._rows:
            return {}
        rows = _fetch(self._rows)
        # a device's host learns only now which steps were undone
        finite = np.isfinite(rows[:, 0]) & (np.isfinite(rows[:, -1]) | (np.arange(len(rows)) == self._unstepped))
        self.skipped += int((~finite).sum())
        if not finite.any():
            return {}
        before_last_epoch = min(finite[: self._last_epoch].sum(), finite.sum() - 1)
        rows = rows[finite]
        total, policy, value, entropy, approx_kl, clip_fraction, grad_norm = np.ascontiguousarray(rows.T)
        metrics = {
            # SB3 averages these as Python floats, in double precision, and approx_kl as it comes from torch
            "entropy_loss": np.mean(entropy, dtype=np.float64),
            "policy_gradient_loss": np.mean(policy, dtype=np.float64),
            "value_loss": np.mean(value, dtype=np.float64),
            "approx_kl": np.mean(approx_kl[before_last_epoch:]),
            "clip_fraction": np.mean(clip_fraction, dtype=np.float64),
            "loss": float(total[-1]),
        }
        stepped = grad_norm[:-1] if self.stopped_early else grad_norm
        if len(stepped) > 0:
            metrics["grad_norm"] = np.mean(stepped, dtype=np.float64)
        if self.kl is not None:
            metrics["kl"] = float(self.kl)
        return metrics


def _fetch(rows: list[tuple[th.Tensor | float, ...]]) -> np.ndarray:
    """``[n_minibatches, 7]``, float32, from tensors with one copy from their device."""
    if not isinstance(rows[0][0], th.Tensor):
        return np.array(rows, np.float32)
    like = rows[0][0].detach()
    scalars = [[x.detach() if isinstance(x, th.Tensor) else th.full_like(like, x) for x in row] for row in rows]
    return th.stack([th.stack(row) for row in scalars]).cpu().numpy()


def accept(name: str, value: float, nan_policy: str, stats: UpdateStats) -> bool:
    """
    For engines: called with a minibatch's loss and with its gradient's norm, before a step is taken.

    :param name: ``"loss"`` or ``"gradient"``
    :param value: the number
    :param nan_policy: one of :data:`NAN_POLICIES`
    :param stats: where a minibatch that is to be left out is counted
    :return: whether to go on with the minibatch
    :raises NonFiniteError: with ``"raise"``, if the number is NaN or infinite
    """
    if math.isfinite(value):
        return True
    if nan_policy == "raise":
        check_finite(name, value)
    stats.skipped += 1
    return False


def reading_waits(tensor: th.Tensor) -> bool:
    """Whether reading a number from ``tensor`` makes the host wait for a device. Then what is checked, is checked there."""
    return tensor.device.type != "cpu"
