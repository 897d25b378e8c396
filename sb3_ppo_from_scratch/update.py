"""
Phase two of PPO, for every engine: several epochs over the one rollout, in random minibatches, each minibatch one step.

:func:`update` is the loop. What differs from engine to engine (how minibatches are drawn, how the gradient is found, how the
step is taken) is a :class:`Learner`; what PPO is stands here, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_ppo_from_scratch import advantages as advantage_functions
from sb3_ppo_from_scratch import losses
from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.checks.finite import check_minibatch
from sb3_ppo_from_scratch.distributions import distribution_parameters
from sb3_ppo_from_scratch.losses import PPOLoss

__all__ = [
    "Gradient",
    "Learner",
    "Loss",
    "PolicyOutputs",
    "UpdateConfig",
    "UpdateStats",
    "check_loss",
    "minibatch_loss",
    "update",
]

Batch = TypeVar("Batch")


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

    @property
    def kl_limit(self) -> float:
        """The approximate KL, in nats, above which an update ends: 1.5 times the target, as in SB3."""
        return math.inf if self.target_kl is None else 1.5 * self.target_kl

    def stops(self, approx_kl: th.Tensor | float) -> bool:
        """Whether this KL ends the update; compared in float32, as SB3 does."""
        if self.target_kl is None:
            return False
        kl = approx_kl.numpy(force=True) if isinstance(approx_kl, th.Tensor) else np.float32(approx_kl)
        return bool(kl > self.kl_limit)


# ---------------------------------------------------------------- the loss of a minibatch


class PolicyOutputs(NamedTuple):
    """What the policy makes now of a minibatch's observations and actions."""

    values: th.Tensor
    """``[B]``, the critic's"""
    log_prob: th.Tensor
    """``[B]``, of the actions taken"""
    entropy: th.Tensor | None
    """``[B]``; ``None`` if the distribution has no closed form"""
    distribution: Distribution | None
    """of the actions; ``None`` for a policy that keeps none"""

    @property
    def dist_params(self) -> th.Tensor | None:
        """``[B, n_params]`` with gradient, to compare with ``batch.dist_params``; ``None`` if not known."""
        params = distribution_parameters(self.distribution)
        return params if params is not None and len(params) == len(self.log_prob) else None


Loss = Callable[[PolicyOutputs, RolloutData, UpdateConfig], PPOLoss]
"""A minibatch's loss, whose ``total`` is differentiated; :func:`minibatch_loss`, or one of the user's own."""


def minibatch_loss(
    outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig, weights: th.Tensor | None = None
) -> PPOLoss:
    """
    :func:`~sb3_ppo_from_scratch.losses.ppo_loss` of a minibatch, advantages normalised if they are to be.

    A loss of one's own calls it and adds to its ``total``; see ``ScratchPPO.loss``.

    :param outputs: of the policy now
    :param batch: what the rollout knows
    :param config: coefficients
    :param weights: ``[B]``, how often each row counts (no shares, if advantages are normalised); ``None`` for once each
    :raises ValueError: for weights of another shape
    """
    advantages = batch.advantages
    if weights is not None and weights.shape != advantages.shape:  # they would be multiplied all the same
        raise ValueError(f"weights must have shape {tuple(advantages.shape)}, one per row, not {tuple(weights.shape)}")
    if config.normalize_advantage:  # asked of its module, as the loss is: whoever replaces a function there is heard
        advantages = advantage_functions.normalize_advantages(advantages, weights)
    return losses.ppo_loss(
        outputs.values,
        outputs.log_prob,
        outputs.entropy,
        advantages=advantages,
        returns=batch.returns,
        old_values=batch.old_values,
        old_log_prob=batch.old_log_prob,
        clip_range=config.clip_range,
        clip_range_vf=config.clip_range_vf,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        weights=weights,
    )


def check_loss(loss: Any) -> None:
    """
    :param loss: what a loss of the user's has returned
    :raises TypeError: if it is no :class:`PPOLoss`, or has no total to differentiate
    """
    total = getattr(loss, "total", None)
    if not isinstance(loss, PPOLoss) or not isinstance(total, th.Tensor) or total.numel() != 1 or not total.requires_grad:
        what = f"a total {total!r}" if isinstance(loss, PPOLoss) else f"a {type(loss).__name__}"
        raise TypeError(f"loss must return a PPOLoss whose total is a scalar tensor with a gradient, not {what}")


# ---------------------------------------------------------------- the loop


class Gradient(NamedTuple):
    """A minibatch's loss, and what it takes to go down along it."""

    loss: PPOLoss
    """scalar tensors or floats"""
    backward: Callable[[], None]
    """fills the parameters' gradients"""
    kl_term: Any = None
    """what :meth:`Learner.mean_kl` takes the exact KL from; ``None`` if the old distribution is not known"""


class Learner(ABC, Generic[Batch]):
    """An engine's side of one update."""

    @abstractmethod
    def minibatches(self) -> Iterable[Batch]:
        """One pass over the rollout in random order, in minibatches of whatever form."""

    @abstractmethod
    def gradient(self, batch: Batch) -> Gradient:
        """The loss of a minibatch; its gradient when that is asked for."""

    @abstractmethod
    def clip_gradient(self) -> th.Tensor | float:
        """Scale the gradient down to ``max_grad_norm``. Returns its 2-norm before."""

    @abstractmethod
    def step(self) -> None:
        """One step of the optimizer along the gradient."""

    @abstractmethod
    def mean_kl(self, kl_terms: Sequence[Any]) -> th.Tensor | float | None:
        """Mean over minibatches of the exact KL between old and new policy, in nats; ``None`` without any."""


def update(learner: Learner[Any], config: UpdateConfig) -> UpdateStats:
    """
    Improve the policy on one rollout.

    :param learner: an engine's, of a full buffer with advantages and returns
    :param config: this update's coefficients
    :return: what was measured
    :raises NonFiniteError: before a step along a gradient that is not finite (``nan_policy="raise"``)
    """
    stats = UpdateStats()
    while stats.epochs < config.n_epochs and not stats.stopped_early:
        stats.begin_epoch()
        for batch in learner.minibatches():
            gradient = learner.gradient(batch)
            if not _accept("loss", gradient.loss.total, config, stats):
                continue
            stats.add_kl(gradient.kl_term)
            if config.stops(gradient.loss.approx_kl):
                stats.stop(gradient.loss)
                break
            gradient.backward()
            norm = learner.clip_gradient()
            if _accept("gradient", norm, config, stats):
                learner.step()
                stats.add(gradient.loss, norm)
    stats.kl = learner.mean_kl(stats.kl_terms)
    return stats


def _accept(name: str, value: th.Tensor | float, config: UpdateConfig, stats: UpdateStats) -> bool:
    """Whether a loss or a gradient's norm is finite. If not, the minibatch is left out and counted, or the update ends."""
    number = value.item() if isinstance(value, th.Tensor) else value
    if math.isfinite(number):
        return True
    if config.nan_policy == "raise":
        check_minibatch(name, number)
    stats.skipped += 1
    return False


# ---------------------------------------------------------------- what was measured


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
    """Minibatches left out since their loss or gradient was not finite."""
    kl: th.Tensor | float | None = None
    """Exact KL between old and new policy in nats, the mean over the last epoch's minibatches; ``None`` if not known."""
    explained_variance: float | None = None
    """Of the returns by the old values, where several processes know parts of them; ``None`` where one knows them all."""
    kl_terms: list[Any] = field(default_factory=list)
    """The last epoch's, see :attr:`Gradient.kl_term`."""
    _rows: list[tuple[th.Tensor | float, ...]] = field(default_factory=list)
    _last_epoch: int = 0

    def begin_epoch(self) -> None:
        """The rows that follow belong to a new epoch."""
        self.epochs += 1
        self.kl_terms = []
        self._last_epoch = len(self._rows)

    def add_kl(self, term: Any) -> None:
        """Note what a minibatch's exact KL can be taken from, if anything."""
        if term is not None:
            self.kl_terms.append(term)

    def add(self, loss: PPOLoss, grad_norm: th.Tensor | float) -> None:
        """
        Note one minibatch.

        :param loss: its losses and diagnostics, scalar tensors or floats
        :param grad_norm: the gradient's norm before clipping
        """
        self._rows.append((*loss, grad_norm))

    def stop(self, loss: PPOLoss) -> None:
        """Note the minibatch that ended the update, on which no step was taken."""
        self.stopped_early = True
        self.add(loss, math.nan)

    def metrics(self) -> dict[str, float]:
        """
        Under SB3's names with SB3's values: means over all minibatches; ``approx_kl`` over the last epoch's only; ``loss`` of
        the last minibatch. ``kl`` and ``grad_norm`` where there are any; nothing at all if every minibatch was left out.
        """
        if not self._rows:
            return {}
        rows = _fetch(self._rows)
        total, policy, value, entropy, approx_kl, clip_fraction, grad_norm = np.ascontiguousarray(rows.T)
        metrics = {
            # SB3 averages these as Python floats, in double precision, and approx_kl as it comes from torch
            "entropy_loss": np.mean(entropy, dtype=np.float64),
            "policy_gradient_loss": np.mean(policy, dtype=np.float64),
            "value_loss": np.mean(value, dtype=np.float64),
            "approx_kl": np.mean(approx_kl[min(self._last_epoch, len(rows) - 1) :]),
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
    like = rows[0][0].detach().reshape(())
    scalars = [[x.detach().reshape(()) if isinstance(x, th.Tensor) else th.full_like(like, x) for x in row] for row in rows]
    return th.stack([th.stack(row) for row in scalars]).cpu().numpy()
