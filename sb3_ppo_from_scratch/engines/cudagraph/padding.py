"""
The loss of a minibatch of fixed size of which only the first rows count, with the functions that know nothing of this.

A CUDA graph has tensors of one size, but an epoch's last minibatch may be smaller. It is filled up with *padding*: rows whose
every term of the loss is zero, and its gradient too. Means over all rows then come out too small by the factor
``n_rows / batch_size``, which is put right at the end. A minibatch without padding has the factor 1, and the same bits.
"""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_ppo_from_scratch.losses import PPOLoss, ppo_loss

__all__ = ["mean_of_rows", "normalize_rows", "padded_ppo_loss"]


def mean_of_rows(values: th.Tensor, is_row: th.Tensor, n_rows: th.Tensor) -> th.Tensor:
    """
    :param values: ``[batch_size]``
    :param is_row: ``[batch_size]``, bool: False for padding
    :param n_rows: scalar, how many are True
    :return: scalar, the mean over the rows that count
    """
    return values.masked_fill(~is_row, 0.0).sum() / n_rows


def normalize_rows(advantages: th.Tensor, is_row: th.Tensor, n_rows: th.Tensor, epsilon: float = 1e-8) -> th.Tensor:
    """
    :func:`sb3_ppo_from_scratch.advantages.normalize_advantages` over the rows that count.

    :param advantages: ``[batch_size]``
    :param is_row: see :func:`mean_of_rows`
    :param n_rows: see there; one row alone is left as it is
    :param epsilon: keeps the division finite when all advantages are equal
    :return: ``[batch_size]``
    """
    centred = advantages - mean_of_rows(advantages, is_row, n_rows)
    variance = centred.square().masked_fill(~is_row, 0.0).sum() / (n_rows - 1)
    return th.where(n_rows > 1, centred / (variance.sqrt() + epsilon), advantages)


def padded_ppo_loss(
    values: th.Tensor,
    log_prob: th.Tensor,
    entropy: th.Tensor | None,
    is_row: th.Tensor,
    n_rows: th.Tensor,
    *,
    advantages: th.Tensor,
    returns: th.Tensor,
    old_values: th.Tensor,
    old_log_prob: th.Tensor,
    **coefficients: Any,
) -> PPOLoss:
    """
    :func:`sb3_ppo_from_scratch.losses.ppo_loss` over the rows that count.

    :param values: ``[batch_size]``, as all that follow; see :func:`ppo_loss`
    :param log_prob: see there
    :param entropy: see there; not ``None``, for a policy whose entropy has no closed form needs gSDE
    :param is_row: see :func:`mean_of_rows`
    :param n_rows: see there
    :param advantages: see :func:`ppo_loss`
    :param returns: see there
    :param old_values: see there
    :param old_log_prob: see there
    :param coefficients: ``clip_range`` and so on, as floats or as scalar tensors
    :return: the total and its parts
    """

    def or_zero(terms: th.Tensor) -> th.Tensor:
        return terms.masked_fill(~is_row, 0.0)

    loss = ppo_loss(
        values,
        log_prob,
        None if entropy is None else or_zero(entropy),
        advantages=or_zero(advantages),
        # a critic that was right, and a policy that has not moved
        returns=th.where(is_row, returns, values.detach()),
        old_values=th.where(is_row, old_values, values.detach()),
        old_log_prob=th.where(is_row, old_log_prob, log_prob.detach()),
        **coefficients,
    )
    scale = len(values) / n_rows
    return PPOLoss(*(part * scale for part in loss))
