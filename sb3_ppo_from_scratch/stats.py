"""What an update measured, gathered without waiting for the device between minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch as th

from sb3_ppo_from_scratch.losses import PPOLoss

__all__ = ["UpdateStats"]


@dataclass
class UpdateStats:
    """
    Metrics of one update. Rows stay on the device until :meth:`metrics` fetches all of them at once.

    An update that stops early has measured one minibatch more than it stepped on: that row has no gradient norm.
    """

    epochs: int = 0
    """Epochs begun; an early stop's own epoch counts, as in SB3."""
    stopped_early: bool = False
    kl: th.Tensor | float | None = None
    """Exact KL between old and new policy in nats, the mean over the last epoch's minibatches; ``None`` if not known."""
    _rows: list[tuple[th.Tensor | float, ...]] = field(default_factory=list)
    _last_epoch: int = 0

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
        the last minibatch. ``kl`` and ``grad_norm`` where there are any.
        """
        total, policy, value, entropy, approx_kl, clip_fraction, grad_norm = np.ascontiguousarray(_fetch(self._rows).T)
        metrics = {
            # SB3 averages these as Python floats, in double precision, and approx_kl as it comes from torch
            "entropy_loss": np.mean(entropy, dtype=np.float64),
            "policy_gradient_loss": np.mean(policy, dtype=np.float64),
            "value_loss": np.mean(value, dtype=np.float64),
            "approx_kl": np.mean(approx_kl[self._last_epoch :]),
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
