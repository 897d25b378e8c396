"""
What a handful of seeds say about an algorithm: interval estimates, and no more certainty than there is.

Interquartile mean, bootstrap intervals and probability of improvement are those that Agarwal et al. recommend in "Deep
Reinforcement Learning at the Edge of the Statistical Precipice" (https://arxiv.org/abs/2108.13264). All intervals are at 95%.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

__all__ = [
    "Estimate",
    "difference",
    "difference_of_means",
    "interquartile_mean",
    "mean",
    "probability_of_improvement",
    "verdict",
]

CONFIDENCE = 0.95
_RESAMPLES = 9_999


class Estimate(NamedTuple):
    """A number with its interval; ``nan`` for bounds that one seed cannot give."""

    value: float
    low: float
    high: float


def mean(scores: np.ndarray) -> Estimate:
    """
    :param scores: one per seed, ``[n_seeds]``
    :return: their mean, with a percentile bootstrap interval
    """
    return _bootstrapped(lambda x, axis: np.mean(x, axis=axis), scores)


def interquartile_mean(scores: np.ndarray) -> Estimate:
    """
    Mean of the middle half: less moved by an unlucky seed than the mean, and by more of the data than the median.

    :param scores: one per seed, ``[n_seeds]``; a quarter of them, rounded down, is left out at each end
    :return: with a percentile bootstrap interval
    """
    return _bootstrapped(lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), scores)


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    r"""
    :math:`P(X > Y) + P(X = Y) / 2` for an agent of ours and one of theirs: Mann and Whitney's U over the number of pairs.

    :param ours: one score per seed, ``[n]``
    :param theirs: likewise, ``[m]``
    :return: with a percentile bootstrap interval, each side resampled by itself
    """

    def statistic(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
        return (1 + np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-2, -1))) / 2

    return _bootstrapped(statistic, ours, theirs)


def difference(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """
    Mean difference of agents of the same seed, who begin with the same weights in the same states.

    :param ours: one score per seed, ``[n_seeds]``
    :param theirs: of the same seeds, ``[n_seeds]``
    :return: with Student's interval for paired samples; without one where all differ by the same, as at a ceiling: there is no
        variance to estimate
    """
    differences = ours - theirs
    value = float(np.mean(differences))
    if len(differences) < 2 or np.ptp(differences) == 0:
        return Estimate(value, np.nan, np.nan)
    return Estimate(value, *map(float, stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)))


def difference_of_means(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """
    Of two independent samples.

    :param ours: ``[n]``
    :param theirs: ``[m]``
    :return: with Welch's interval
    """
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)
    return Estimate(float(np.mean(ours) - np.mean(theirs)), float(interval.low), float(interval.high))


def verdict(estimate: Estimate, margin: float | None) -> str:
    """
    What the interval of a difference says, as the protocol reads it.

    :param estimate: from :func:`difference`
    :param margin: that does not matter
    """
    if margin is None or np.isnan(estimate.low):
        return "too few seeds for a test"
    if -margin < estimate.low and estimate.high < margin:
        return f"equivalent within ±{margin:g}"
    if estimate.low > 0 or estimate.high < 0:
        return "**better**" if estimate.low > 0 else "**worse**"
    return f"**not shown** to be equivalent within ±{margin:g}"


def _bootstrapped(statistic: Callable[..., Any], *samples: np.ndarray) -> Estimate:
    value = float(statistic(*samples, axis=-1))
    if min(map(len, samples)) < 2:
        return Estimate(value, np.nan, np.nan)
    low, high = stats.bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",  # BCa has no answer where all seeds agree
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(low), float(high))
