"""PPO's loss on NumPy arrays, and its gradient by what the network and the action distribution yield."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import UpdateConfig

__all__ = ["Batch", "Features", "Observations", "OutputGradients", "arrays_of", "normalized", "ppo_gradient"]


Observations = np.ndarray | dict[str, np.ndarray]
"""``[B, *obs_shape]``, or a dict of such"""


Features = Callable[[Observations], np.ndarray]
"""From observations to what the network takes, ``[B, n_features]``"""


def arrays_of(observations: Any) -> Observations:
    """Of tensors on the CPU, or of a dict of them, in their memory."""
    if isinstance(observations, dict):
        return {key: each.numpy() for key, each in observations.items()}
    return observations.numpy()


class Batch(NamedTuple):
    """:class:`~sb3_ppo_from_scratch.buffer.RolloutData` as arrays, with the same fields: a rollout, or a minibatch of B."""

    observations: np.ndarray
    actions: np.ndarray
    old_values: np.ndarray
    old_log_prob: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    dist_params: np.ndarray | None = None
    action_masks: np.ndarray | None = None
    """``[B, n_choices]``, bool, which actions were allowed; ``None`` for all"""

    @classmethod
    def of(cls, data: RolloutData, features: Features) -> Batch:
        """
        :param data: or SB3's samples; on CPU, and the memory is shared
        :param features: of observations that cannot stay as they are
        """
        masks = data.extras.get("action_masks") if isinstance(data, RolloutData) else None
        arrays = [None if field is None else field.numpy() for field in data[1 : len(cls._fields) - 1]]  # type: ignore[union-attr]
        observations = arrays_of(data.observations)
        if isinstance(observations, dict):
            observations = features(observations)
        return cls(observations, *arrays, action_masks=None if masks is None else masks.numpy())  # type: ignore[arg-type, misc]

    @property
    def size(self) -> int:
        """Number of transitions, B."""
        return len(self.advantages)

    def like(self) -> Batch:
        """Arrays of the same shapes, with nothing in them yet."""
        return Batch(*(None if field is None else np.empty(field.shape, field.dtype) for field in self))  # type: ignore[arg-type]

    def gather(self, order: np.ndarray, out: Batch) -> None:
        """
        Copy the transitions.

        :param order: ``[B]``, their numbers
        :param out: receives them, in that order
        """
        for field, target in zip(self, out, strict=True):
            if field is not None:
                field.take(order, axis=0, out=target, mode="clip")  # other modes would gather twice

    def cut(self, batch_size: int) -> Iterator[Batch]:
        """Minibatches in their order, as views; the last one may be smaller."""
        for start in range(0, self.size, batch_size):
            part = slice(start, start + batch_size)
            yield Batch(*(None if field is None else field[part] for field in self))  # type: ignore[arg-type]


class OutputGradients(NamedTuple):
    """The gradient of the loss by what a forward pass yields."""

    log_prob: np.ndarray
    """``[B]``"""
    entropy: float
    """the same for every transition"""
    values: np.ndarray
    """``[B]``"""


def normalized(advantages: np.ndarray, epsilon: float = 1e-8) -> np.ndarray:
    """
    As :func:`sb3_ppo_from_scratch.advantages.normalize_advantages`.

    :param advantages: ``[B]``
    :param epsilon: keeps the division finite when all advantages are equal
    """
    size = len(advantages)
    if size <= 1:
        return advantages
    centred = advantages - np.add.reduce(advantages) / size
    return centred / (math.sqrt(np.dot(centred, centred) / (size - 1)) + epsilon)


def ppo_gradient(
    log_prob: np.ndarray,
    values: np.ndarray,
    entropy: np.ndarray | float,
    batch: Batch,
    config: UpdateConfig,
) -> tuple[PPOLoss, OutputGradients]:
    r"""
    :func:`sb3_ppo_from_scratch.losses.ppo_loss` and its gradient, with the sums over the batch taken in one pass.

    With ratio :math:`\rho = e^{\log\pi_{new} - \log\pi_{old}}`, hence
    :math:`\partial \rho / \partial \log\pi_{new} = \rho`, and batch size B:

    .. math::
        \frac{\partial L}{\partial \log\pi_{new}} &= -\tfrac1B A \rho
            \;\text{ where } A\rho \le A\,\mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon) \text{, else } 0 \\
        \frac{\partial L}{\partial S} &= -\tfrac1B c_{ent} \\
        \frac{\partial L}{\partial V} &= \tfrac2B c_{vf} (V' - R)
            \;\text{ where } V' = V \text{, else } 0, \qquad V' = V_{old} + \mathrm{clip}(V - V_{old}, -c, c)

    :param log_prob: ``[B]``, now
    :param values: ``[B]``, now
    :param entropy: ``[B]`` or one number, now
    :param batch: what the rollout knows, advantages normalised if they are to be
    :param config: coefficients
    :return: the loss and its parts as floats, and the gradient
    """
    size = len(values)
    policy, value, entropies, kl, outside = terms = np.empty((5, size), values.dtype)
    log_ratio = log_prob - batch.old_log_prob
    ratio = np.exp(log_ratio)
    np.subtract(ratio, 1, out=kl)
    np.greater(np.abs(kl), config.clip_range, out=outside)
    kl -= log_ratio

    unclipped = batch.advantages * ratio
    clipped = np.minimum(np.maximum(ratio, 1 - config.clip_range), 1 + config.clip_range)
    clipped *= batch.advantages
    np.minimum(unclipped, clipped, out=policy)
    grad_log_prob = unclipped * (unclipped <= clipped)
    grad_log_prob *= -1 / size

    error, learns = _value_error(values, batch, config.clip_range_vf)
    np.multiply(error, error, out=value)
    grad_values = error * (2 * config.vf_coef / size)
    if learns is not None:
        grad_values *= learns
    entropies[:] = entropy

    sums = (np.add.reduce(terms, axis=1) / size).tolist()
    policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction = -sums[0], sums[1], -sums[2], sums[3], sums[4]
    total = policy_loss + config.ent_coef * entropy_loss + config.vf_coef * value_loss
    loss = PPOLoss(total, policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction)
    return loss, OutputGradients(grad_log_prob, -config.ent_coef / size, grad_values)


def _value_error(values: np.ndarray, batch: Batch, clip_range_vf: float | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The critic's error, and where it depends on the value; ``None`` for everywhere."""
    if clip_range_vf is None:
        return values - batch.returns, None
    change = values - batch.old_values
    clipped = np.minimum(np.maximum(change, -clip_range_vf), clip_range_vf)
    learns = (change >= -clip_range_vf) & (change <= clip_range_vf)
    return batch.old_values + clipped - batch.returns, learns
