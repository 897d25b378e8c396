"""
The behaviour policy's distribution as one flat row of numbers per step, so that the exact KL can be taken later.

Sampling, log-probabilities and entropies are SB3's own; this module only reads a distribution's parameters and compares two
sets of them.
"""

from __future__ import annotations

import copy
import threading
from types import TracebackType
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

__all__ = [
    "UncheckedDistributions",
    "apply_masks",
    "choices",
    "distribution_parameters",
    "drop_graph",
    "exact_kl",
    "give_parameters",
    "mean_kl",
    "select_rows",
]


def choices(space: spaces.Space) -> list[int]:
    """
    Of how many logits each part of an action is chosen where actions can be masked: two for a bit.

    :param space: Discrete, MultiDiscrete or MultiBinary
    :raises ValueError: for any other
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return [int(size) for size in space.nvec]
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return [2] * space.shape[0]
    raise ValueError(
        f"actions can be masked in a Discrete, MultiDiscrete or MultiBinary space of one dimension, not in {space}"
    )


def apply_masks(distribution: Distribution, action_masks: Any) -> None:
    """
    :param distribution: a maskable policy's
    :param action_masks: ``[batch_size, n_choices]``; ``None`` for no mask, with any policy
    """
    if action_masks is not None:
        distribution.apply_masking(action_masks)  # type: ignore[attr-defined]  # a maskable policy's has it


def distribution_parameters(distribution: Distribution | None) -> th.Tensor | None:
    """
    The parameters that ``distribution`` was last given, one row per observation.

    ``Discrete(n)``: n normalised logits. ``MultiDiscrete(nvec)``: the sum(nvec) logits, each factor normalised.
    ``MultiBinary(n)``: n logits. ``Box`` of d dimensions, gSDE included: d means, then d log standard deviations (before any
    squashing, which leaves the KL unchanged). Where actions can be masked: a normalised logit per choice, two for a bit; a
    masked one's is about -1e8, so that its probability is 0 and no difference of two is NaN.

    :param distribution: a policy's ``action_dist``
    :return: ``[batch_size, n_params]``, with its gradient; ``None`` for a distribution this function does not know, or that
        has not been given any
    """
    if (parts := _masked_parts(distribution)) is not None:
        return th.cat([part.logits for part in parts], dim=1) if parts else None
    if getattr(distribution, "distribution", None) is None:  # a policy of the user's may do without it
        return None
    if isinstance(distribution, CategoricalDistribution | BernoulliDistribution):
        return distribution.distribution.logits
    if isinstance(distribution, MultiCategoricalDistribution):
        return th.cat([factor.logits for factor in distribution.distribution], dim=1)
    if isinstance(distribution, DiagGaussianDistribution | StateDependentNoiseDistribution):
        normal = distribution.distribution
        return th.cat([normal.loc, th.log(normal.scale)], dim=1)
    return None


def give_parameters(distribution: Any, params: th.Tensor) -> Distribution:
    """
    The inverse of :func:`distribution_parameters`, without squashing, gSDE or masks.

    :param distribution: one of SB3's own, which is given them
    :param params: ``[batch_size, n_params]``
    :return: ``distribution``
    """
    if isinstance(distribution, DiagGaussianDistribution):
        means, log_stds = params.chunk(2, dim=1)
        return distribution.proba_distribution(means, log_stds)
    return distribution.proba_distribution(params)


def _masked_parts(distribution: Any) -> list[th.distributions.Categorical] | None:
    """The parts of one of sb3-contrib's maskable distributions, none before it has been used; ``None`` for any other."""
    if not hasattr(distribution, "apply_masking"):
        return None
    parts = getattr(distribution, "distributions", None) or [getattr(distribution, "distribution", None)]
    return [part for part in parts if isinstance(part, th.distributions.Categorical)]


def select_rows(distribution: Distribution, rows: th.Tensor) -> Distribution:
    """
    The distribution of some observations among those that ``distribution`` was given, with its gradient.

    :param distribution: a policy's ``action_dist``
    :param rows: ``[n]``, int64
    :return: a copy; of a distribution without :func:`distribution_parameters`, the same as it is
    """

    def select(part: Any) -> Any:
        if isinstance(part, Normal):
            return Normal(part.loc[rows], part.scale[rows])
        return type(part)(logits=part.logits[rows]) if isinstance(part, Categorical | Bernoulli) else part

    chosen = copy.copy(distribution)
    for name in ("distribution", "distributions"):  # the second is that of maskable ones of several parts
        inner = getattr(distribution, name, None)
        if inner is not None:
            setattr(chosen, name, [select(part) for part in inner] if isinstance(inner, list) else select(inner))
    return chosen


def exact_kl(distribution: Distribution, old: th.Tensor, new: th.Tensor) -> th.Tensor:
    r"""
    :math:`KL(\pi_{old} \| \pi_{new})` in nats, per observation, from two sets of :func:`distribution_parameters`.

    :param distribution: says of which kind the parameters are
    :param old: ``[batch_size, n_params]``
    :param new: ``[batch_size, n_params]``
    :return: ``[batch_size]``
    :raises TypeError: for a distribution without :func:`distribution_parameters`
    """
    is_masked = _masked_parts(distribution) is not None
    if is_masked or isinstance(distribution, CategoricalDistribution | MultiCategoricalDistribution):
        # logits are log-probabilities, and the factors of a MultiDiscrete space are independent
        return F.kl_div(new, old, reduction="none", log_target=True).sum(dim=1)
    if isinstance(distribution, BernoulliDistribution):
        # torch's kl_divergence looks for certain outcomes with a mask, which could make a GPU's host wait
        return (th.sigmoid(old) * (old - new) + F.softplus(new) - F.softplus(old)).sum(dim=1)
    if isinstance(distribution, DiagGaussianDistribution | StateDependentNoiseDistribution):
        (old_mean, old_log_std), (new_mean, new_log_std) = old.chunk(2, dim=1), new.chunk(2, dim=1)
        # term by term as torch's kl_divergence, whose search for the right function cannot be compiled
        old_std, new_std = old_log_std.exp(), new_log_std.exp()
        ratio, shift = (old_std / new_std).pow(2), ((old_mean - new_mean) / new_std).pow(2)
        return (0.5 * (ratio + shift - 1 - ratio.log())).sum(dim=1)
    raise TypeError(f"distribution must be one of SB3's built-in ones, not {type(distribution).__name__}")


@th.no_grad()
def mean_kl(distribution: Distribution, old_and_new: list[tuple[th.Tensor, th.Tensor]]) -> th.Tensor | None:
    """
    Mean over minibatches of each one's mean :func:`exact_kl`, in one call for all of them.

    :param distribution: says of which kind the parameters are
    :param old_and_new: per minibatch the two sets of :func:`distribution_parameters`, ``[batch_size, n_params]``
    :return: scalar, in nats; ``None`` without minibatches
    """
    if not old_and_new:
        return None
    old, new = (th.cat(params) for params in zip(*old_and_new, strict=True))
    kl = exact_kl(distribution, old, new)
    return th.stack([part.mean() for part in kl.split([len(params) for params, _ in old_and_new])]).mean()


def drop_graph(distribution: Any) -> None:
    """
    Let go of the graph that a distribution's tensors hang on, and with it of a whole minibatch.

    Their values stay. A policy whose ``action_dist`` has no graph can be copied and pickled.

    :param distribution: a policy's ``action_dist``, or a part of one
    """
    for name, value in vars(distribution).items():
        if isinstance(value, th.Tensor) and value.grad_fn is not None:
            setattr(distribution, name, value.detach())
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, th.distributions.Distribution):
                drop_graph(part)


class UncheckedDistributions:
    """
    Context manager: torch's distributions do not validate their arguments, which is a quarter of what SB3's policy step costs.

    Torch keeps this switch for the whole process, so it is set only while at least one thread is inside, and put back after.
    The engine looks for NaN itself.
    """

    _lock = threading.Lock()
    _depth = 0
    _before = True

    def __enter__(self) -> None:
        cls = UncheckedDistributions
        with cls._lock:
            if cls._depth == 0:
                cls._before = th.distributions.Distribution._validate_args
                th.distributions.Distribution.set_default_validate_args(False)
            cls._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        cls = UncheckedDistributions
        with cls._lock:
            cls._depth -= 1
            if cls._depth == 0:
                th.distributions.Distribution.set_default_validate_args(cls._before)
