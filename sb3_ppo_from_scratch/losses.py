"""PPO's losses and diagnostics as pure functions of tensors. Losses are to be minimised; means are over the minibatch."""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from torch.nn import functional as F

__all__ = [
    "PPOLoss",
    "approx_kl",
    "clip_fraction",
    "clipped_surrogate_loss",
    "entropy_loss",
    "ppo_loss",
    "value_loss",
    "weighted_mean",
]


class PPOLoss(NamedTuple):
    """What one minibatch yields: ``total`` carries the gradient, all are scalars (shape ``[]``)."""

    total: th.Tensor
    policy: th.Tensor
    value: th.Tensor
    entropy: th.Tensor
    approx_kl: th.Tensor
    clip_fraction: th.Tensor


def weighted_mean(terms: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
    r"""
    The mean over a minibatch in which some rows may count more than others, or not at all:
    :math:`\sum_i w_i x_i / \sum_i w_i`.

    Padding, steps that are no transitions, and sequences of unequal length are all weights.

    :param terms: x, ``[batch_size]``
    :param weights: w, ``[batch_size]``, at least 0 and not all 0; ``None`` for all alike
    :return: scalar
    """
    return terms.mean() if weights is None else (weights * terms).sum() / weights.sum()


def clipped_surrogate_loss(
    advantages: th.Tensor, ratio: th.Tensor, clip_range: float, weights: th.Tensor | None = None
) -> th.Tensor:
    r"""
    The clipped, pessimistic policy loss: no gain for moving the ratio further than ``clip_range`` from 1.

    .. math::
        L^{\mathrm{CLIP}} = -\mathrm{mean}[\min(A \rho,\; A\,\mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon))],
        \qquad \rho = \frac{\pi_{new}(a|s)}{\pi_{old}(a|s)}

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7.

    :param advantages: ``[batch_size]``
    :param ratio: ``[batch_size]``, new over old probability of the action taken
    :param clip_range: epsilon, how far the ratio may move from 1
    :param weights: ``[batch_size]``, see :func:`weighted_mean`
    :return: scalar
    """
    unclipped = advantages * ratio
    clipped = advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -weighted_mean(th.min(unclipped, clipped), weights)


def value_loss(
    values: th.Tensor,
    returns: th.Tensor,
    old_values: th.Tensor | None = None,
    clip_range_vf: float | None = None,
    weights: th.Tensor | None = None,
) -> th.Tensor:
    r"""
    Mean squared error between the critic's values and the returns.

    .. math::
        L^{VF} = \mathrm{mean}[(R - V)^2] \quad\text{or, with clipping,}\quad
        \mathrm{mean}[(R - V_{old} - \mathrm{clip}(V - V_{old}, -c, c))^2]

    As in SB3 there is no factor 1/2 and no maximum of the clipped and unclipped error, so ``vf_coef`` values from
    implementations that have them (CleanRL, Baselines) do not carry over. The clip depends on the scale of the rewards.

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, section 5; the clip is from Baselines' ppo2.

    :param values: ``[batch_size]``, the critic's values now
    :param returns: ``[batch_size]``, the TD(lambda) targets
    :param old_values: ``[batch_size]``, the critic's values during the rollout; needed with ``clip_range_vf``
    :param clip_range_vf: c, how far a value may move from the old one; ``None`` for no clipping
    :param weights: ``[batch_size]``, see :func:`weighted_mean`
    :return: scalar
    :raises ValueError: if ``clip_range_vf`` comes without ``old_values``
    """
    if clip_range_vf is not None:
        if old_values is None:
            raise ValueError(f"clip_range_vf={clip_range_vf} needs old_values, which is None")
        values = old_values + th.clamp(values - old_values, -clip_range_vf, clip_range_vf)
    if weights is None:
        return F.mse_loss(returns, values)  # SB3's call, for its bits
    return weighted_mean((returns - values).square(), weights)


def entropy_loss(entropy: th.Tensor | None, log_prob: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
    r"""
    Minus the mean entropy of the policy, in nats; it rewards exploration.

    .. math:: L^{S} = -\mathrm{mean}[S[\pi](s)], \qquad S \approx -\log \pi(a|s) \text{ where there is no closed form}

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 9 (:math:`S`).

    :param entropy: ``[batch_size]``, or ``None`` if the distribution has no closed form (squashed Gaussians)
    :param log_prob: ``[batch_size]``, log-probability of the action taken
    :param weights: ``[batch_size]``, see :func:`weighted_mean`
    :return: scalar
    """
    return -weighted_mean(-log_prob if entropy is None else entropy, weights)


def approx_kl(log_ratio: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
    r"""
    The k3 estimate of :math:`KL(\pi_{old} \| \pi_{new})` in nats: unbiased, never negative, of low variance.

    .. math:: \mathrm{mean}[(\rho - 1) - \log \rho]

    Source: Schulman, http://joschu.net/blog/kl-approx.html; SB3 pull request 419.

    :param log_ratio: ``[batch_size]``, :math:`\log\rho = \log\pi_{new}(a|s) - \log\pi_{old}(a|s)`
    :param weights: ``[batch_size]``, see :func:`weighted_mean`
    :return: scalar
    """
    return weighted_mean((th.exp(log_ratio) - 1) - log_ratio, weights)


def clip_fraction(ratio: th.Tensor, clip_range: float, weights: th.Tensor | None = None) -> th.Tensor:
    r"""
    Share of the minibatch whose ratio lies outside the clip range: :math:`\mathrm{mean}[\,|\rho - 1| > \epsilon\,]`.

    :param ratio: ``[batch_size]``
    :param clip_range: epsilon of :func:`clipped_surrogate_loss`
    :param weights: ``[batch_size]``, see :func:`weighted_mean`
    :return: scalar, in [0, 1]
    """
    return weighted_mean((th.abs(ratio - 1) > clip_range).float(), weights)


def ppo_loss(
    values: th.Tensor,
    log_prob: th.Tensor,
    entropy: th.Tensor | None,
    *,
    advantages: th.Tensor,
    returns: th.Tensor,
    old_values: th.Tensor,
    old_log_prob: th.Tensor,
    clip_range: float,
    clip_range_vf: float | None = None,
    ent_coef: float = 0.0,
    vf_coef: float = 0.5,
    weights: th.Tensor | None = None,
) -> PPOLoss:
    r"""
    PPO's whole objective on one minibatch, with the diagnostics that go with it.

    .. math:: L = L^{\mathrm{CLIP}} + c_{ent} L^{S} + c_{vf} L^{VF}

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 9 (with the signs of a loss).

    :param values: ``[batch_size]``, the critic's values now
    :param log_prob: ``[batch_size]``, log-probability now of the actions taken
    :param entropy: ``[batch_size]`` or ``None``, see :func:`entropy_loss`
    :param advantages: ``[batch_size]``, already normalised if they are to be
    :param returns: ``[batch_size]``
    :param old_values: ``[batch_size]``
    :param old_log_prob: ``[batch_size]``, log-probability of the actions when they were taken
    :param clip_range: see :func:`clipped_surrogate_loss`
    :param clip_range_vf: see :func:`value_loss`
    :param ent_coef: weight of the entropy loss
    :param vf_coef: weight of the value loss
    :param weights: ``[batch_size]``, how much each row counts, see :func:`weighted_mean`; ``None`` for all alike
    :return: the total and its parts
    """
    log_ratio = log_prob - old_log_prob
    ratio = th.exp(log_ratio)
    policy = clipped_surrogate_loss(advantages, ratio, clip_range, weights)
    value = value_loss(values, returns, old_values, clip_range_vf, weights)
    entropy_term = entropy_loss(entropy, log_prob, weights)
    total = policy + ent_coef * entropy_term + vf_coef * value
    with th.no_grad():
        kl, outside = approx_kl(log_ratio, weights), clip_fraction(ratio, clip_range, weights)
    return PPOLoss(total, policy, value, entropy_term, kl, outside)
