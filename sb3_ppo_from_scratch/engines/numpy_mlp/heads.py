"""
Action distributions on NumPy arrays: sampling, log-probabilities, entropies, and their gradients by the network's outputs.

Outputs lie as ``[n_outputs, B]``: sums over the few outputs of one sample are then sums of long rows, which NumPy does fast.
Random numbers are those that torch's distributions would draw, from the same generator and in the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from typing_extensions import override

from sb3_ppo_from_scratch.engines.base import NAN_MESSAGE
from sb3_ppo_from_scratch.engines.numpy_mlp.activations import sigmoid
from sb3_ppo_from_scratch.errors import NonFiniteError

__all__ = ["BernoulliHead", "CategoricalHead", "GaussianHead", "Head", "StateDependentNoiseHead", "forbidden", "mask_out"]

_MASKED = -1e8
"""The output of a choice that is not allowed, as in sb3-contrib: its probability and all that depends on it are exactly 0, and
no difference of two such logits is NaN, as it would be with minus infinity."""

_arange = lru_cache(maxsize=8)(np.arange)
_LOWEST = {np.dtype(kind): np.finfo(kind).min for kind in (np.float32, np.float64)}


def _memory(shape: tuple[int, ...], dtype: np.dtype) -> tuple[th.Tensor, np.ndarray]:
    """A tensor, and an array on its memory."""
    array = np.empty(shape, dtype)
    return th.from_numpy(array), array


def _surely_finite(array: np.ndarray) -> bool:
    """Whether the sum of squares is; if not, some number may be infinite, or NaN."""
    return math.isfinite(np.vdot(array, array))


def _check(numbers: Any) -> None:
    if not np.isfinite(numbers).all():
        raise NonFiniteError("probabilities", NAN_MESSAGE)


def forbidden(masks: np.ndarray) -> np.ndarray:
    """Which choices masks ``[B, n_outputs]`` do not allow, ``[n_outputs, B]``."""
    return np.ascontiguousarray(~masks.T)


def mask_out(outputs: np.ndarray, where: np.ndarray) -> None:
    """
    Let choices that are not allowed have no probability, in place.

    :param outputs: ``[n_outputs, B]``, or the other way round
    :param where: bool, likewise
    """
    np.copyto(outputs, _MASKED, where=where)


class Head(ABC):
    """
    A distribution over actions, given the network's outputs z.

    :meth:`forward` returns what :meth:`log_prob`, :meth:`entropy` and :meth:`gradient` then start from.
    """

    def __init__(self) -> None:
        self._noise = lru_cache(maxsize=8)(_memory)

    @abstractmethod
    def forward(self, outputs: np.ndarray, latent: np.ndarray) -> Any:
        """
        :param outputs: z, ``[n_outputs, B]``; may be overwritten
        :param latent: what z was made of, ``[B, latent_dim]``
        :return: the distribution in whatever form the other methods want it
        """

    @abstractmethod
    def sample(self, outputs: np.ndarray, latent: np.ndarray) -> np.ndarray:
        """
        Draw actions, by torch's global generator.

        :param outputs: z, ``[B, n_outputs]``, of the same B as often as possible
        :param latent: what z was made of, ``[B, latent_dim]``
        :return: ``[B]`` int64 for a Discrete space, else ``[B, action_dim]``; new memory
        :raises NonFiniteError: if there is no distribution with such z
        """

    @abstractmethod
    def encode(self, actions: np.ndarray) -> np.ndarray:
        """
        Actions in the form that :meth:`log_prob` and :meth:`gradient` take.

        :param actions: ``[B, action_dim]``, or ``[B]`` as :meth:`sample` has them
        """

    @abstractmethod
    def log_prob(self, dist: Any, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: from :meth:`encode`
        :return: ``[B]``
        """

    @abstractmethod
    def entropy(self, dist: Any) -> np.ndarray | float:
        """In nats, ``[B]``, or one number where it is the same for all."""

    @abstractmethod
    def gradient(self, dist: Any, actions: np.ndarray, grad_log_prob: np.ndarray, grad_entropy: float) -> np.ndarray:
        r"""
        Chain rule: :math:`\partial L / \partial z`, and into the head's own parameters' gradients theirs.

        :param actions: from :meth:`encode`
        :param grad_log_prob: :math:`\partial L / \partial \log\pi(a|s)`, ``[B]``
        :param grad_entropy: :math:`\partial L / \partial S[\pi](s)`, the same for all samples
        :return: ``[n_outputs, B]``
        """

    @abstractmethod
    def parameters(self, dist: Any) -> np.ndarray:
        """``[B, n_params]``, as :func:`sb3_ppo_from_scratch.distributions.distribution_parameters` has them."""

    @abstractmethod
    def mean_kl(self, old: np.ndarray, new: np.ndarray) -> float:
        r"""
        Mean over the batch of :math:`KL(\pi_{old} \| \pi_{new})` in nats, from two sets of :meth:`parameters`.

        It is :func:`sb3_ppo_from_scratch.distributions.exact_kl` on arrays.

        :param old: ``[B, n_params]``
        :param new: ``[B, n_params]``
        """


class CategoricalHead(Head):
    r"""
    Independent categorical distributions: one for a Discrete space, several for a MultiDiscrete one.

    With :math:`\ell = z - \mathrm{logsumexp}(z)` and :math:`p = e^\ell` for each factor:

    .. math::
        \log\pi(a) &= \sum_{factors} \ell_a, & \frac{\partial \log\pi(a)}{\partial z_j} &= [j = a] - p_j \\
        S &= -\sum_j p_j \ell_j, & \frac{\partial S}{\partial z_j} &= -p_j (\ell_j + S_{factor})

    :param sizes: number of choices of each factor
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = sizes
        self.starts = np.cumsum([0, *sizes[:-1]])[:, None]
        self._slices = [slice(start, start + size) for start, size in zip(self.starts[:, 0], sizes, strict=True)]

    def forward(self, outputs: np.ndarray, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The normalised logits and the probabilities, ``[n_outputs, B]`` each."""
        outputs -= self._per_factor(np.maximum, outputs)
        probs = np.exp(outputs)
        total = self._per_factor(np.add, probs)
        probs /= total
        outputs -= np.log(total)
        return outputs, probs

    def _per_factor(self, operation: np.ufunc, rows: np.ndarray) -> np.ndarray:
        """Reduce each factor's rows; the result broadcasts against them."""
        if len(self.sizes) == 1:
            return operation.reduce(rows)
        return np.repeat(operation.reduceat(rows, self.starts[:, 0], axis=0), self.sizes, axis=0)

    @override
    def sample(self, outputs: np.ndarray, latent: np.ndarray) -> np.ndarray:
        r"""
        The fastest of several exponential clocks with rates p is a draw from p:
        :math:`\arg\max_j p_j / t_j = \arg\max_j z_j - \log t_j`, for each factor.
        """
        if not _surely_finite(outputs):  # a choice that is never made has a logit of minus infinity
            _check([outputs[:, cut].max(1) for cut in self._slices])
        if len(self._slices) == 1:
            return self._fastest(outputs)
        return np.stack([self._fastest(outputs[:, cut]) for cut in self._slices], axis=1)

    def _fastest(self, logits: np.ndarray) -> np.ndarray:
        tensor, times = self._noise(logits.shape, logits.dtype)
        tensor.exponential_()
        np.log(times, out=times)
        np.subtract(logits, times, out=times)
        return times.argmax(1)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Where the chosen outputs lie in a flattened ``[n_outputs, B]``: ``[n_factors, B]``, int64."""
        batch_size = len(actions)
        rows = actions.reshape(batch_size, -1).T
        if len(self.sizes) > 1:
            rows = rows + self.starts
        positions = np.multiply(rows, batch_size, dtype=np.int64, casting="unsafe")
        positions += _arange(batch_size)
        return positions

    @override
    def log_prob(self, dist: tuple[np.ndarray, np.ndarray], actions: np.ndarray) -> np.ndarray:
        logits = dist[0]
        chosen = logits.take(actions)
        return chosen[0] if len(chosen) == 1 else np.add.reduce(chosen, axis=0)

    @override
    def entropy(self, dist: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """A logit of minus infinity counts as the smallest number, as in torch."""
        logits, probs = dist
        return -np.add.reduce(probs * self._bounded(logits), axis=0)

    @override
    def gradient(
        self, dist: tuple[np.ndarray, np.ndarray], actions: np.ndarray, grad_log_prob: np.ndarray, grad_entropy: float
    ) -> np.ndarray:
        logits, probs = dist
        gradient = probs * -grad_log_prob
        gradient.reshape(-1)[actions] += grad_log_prob
        if grad_entropy != 0:
            weighted = probs * self._bounded(logits)
            weighted -= probs * self._per_factor(np.add, weighted)
            gradient -= grad_entropy * weighted
        return gradient

    def parameters(self, dist: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The normalised logits."""
        return dist[0].T

    def mean_kl(self, old: np.ndarray, new: np.ndarray) -> float:
        r""":math:`\sum_j p_j (\ell_j - \ell'_j)`."""
        kl = np.exp(old)
        kl *= self._bounded(old) - self._bounded(new)
        return float(np.add.reduce(kl, axis=None)) / len(old)

    @staticmethod
    def _bounded(logits: np.ndarray) -> np.ndarray:
        return np.maximum(logits, _LOWEST[logits.dtype])


class BernoulliHead(Head):
    r"""
    Independent coins, for a MultiBinary space: :math:`p = \sigma(z)`.

    .. math::
        \log\pi(a) &= \sum_j a_j z_j - \mathrm{softplus}(z_j), & \frac{\partial \log\pi(a)}{\partial z_j} &= a_j - p_j \\
        S &= \sum_j \mathrm{softplus}(z_j) - p_j z_j, & \frac{\partial S}{\partial z_j} &= -z_j p_j (1 - p_j)
    """

    def forward(self, outputs: np.ndarray, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, the probabilities and softplus(z), ``[n_outputs, B]`` each."""
        return outputs, sigmoid(outputs), np.logaddexp(0, outputs)

    @override
    def sample(self, outputs: np.ndarray, latent: np.ndarray) -> np.ndarray:
        if not _surely_finite(outputs):
            _check(outputs)
        return th.bernoulli(th.from_numpy(sigmoid(np.ascontiguousarray(outputs)))).numpy()

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """``[n_outputs, B]``, 0 or 1."""
        return np.ascontiguousarray(actions.T)

    @override
    def log_prob(self, dist: tuple[np.ndarray, np.ndarray, np.ndarray], actions: np.ndarray) -> np.ndarray:
        outputs, _, softplus = dist
        return np.add.reduce(actions * outputs - softplus, axis=0)

    @override
    def entropy(self, dist: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        outputs, probs, softplus = dist
        return np.add.reduce(softplus - probs * outputs, axis=0)

    @override
    def gradient(
        self,
        dist: tuple[np.ndarray, np.ndarray, np.ndarray],
        actions: np.ndarray,
        grad_log_prob: np.ndarray,
        grad_entropy: float,
    ) -> np.ndarray:
        outputs, probs, _ = dist
        gradient = (actions - probs) * grad_log_prob
        if grad_entropy != 0:
            gradient -= grad_entropy * outputs * probs * (1 - probs)
        return gradient

    def parameters(self, dist: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """The logits z."""
        return dist[0].T

    def mean_kl(self, old: np.ndarray, new: np.ndarray) -> float:
        r""":math:`\sum_j p_j (z_j - z'_j) + \mathrm{softplus}(z'_j) - \mathrm{softplus}(z_j)`."""
        kl = sigmoid(old) * (old - new) + np.logaddexp(0, new) - np.logaddexp(0, old)
        return float(np.add.reduce(kl, axis=None)) / len(old)


class _GaussianHead(Head):
    """Independent Gaussians, for a Box space; their parameters are the means, then the log standard deviations."""

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """``[d, B]``"""
        return np.ascontiguousarray(actions.T)

    def mean_kl(self, old: np.ndarray, new: np.ndarray) -> float:
        r""":math:`\sum_j \tfrac12 (r_j + ((\mu_j - \mu'_j) / \sigma'_j)^2 - 1 - \log r_j),\; r = (\sigma / \sigma')^2`."""
        (mean, log_std), (new_mean, new_log_std) = np.split(old, 2, axis=1), np.split(new, 2, axis=1)
        log_ratio = 2 * (log_std - new_log_std)
        distance = ((mean - new_mean) / np.exp(new_log_std)) ** 2
        return float(np.add.reduce(np.exp(log_ratio) + distance - 1 - log_ratio, axis=None)) / (2 * len(old))


class GaussianHead(_GaussianHead):
    r"""
    Independent Gaussians with mean z and a standard deviation :math:`\sigma` of their own, for a Box space.

    With :math:`u = (a - z) / \sigma` and d dimensions:

    .. math::
        \log\pi(a) &= -\sum_j \tfrac12 u_j^2 + \log\sigma_j + \tfrac12 \log 2\pi, &
        \frac{\partial \log\pi(a)}{\partial z_j} &= \frac{u_j}{\sigma_j}, &
        \frac{\partial \log\pi(a)}{\partial \log\sigma_j} &= u_j^2 - 1 \\
        S &= \sum_j \log\sigma_j + \tfrac12 (1 + \log 2\pi), & & & \frac{\partial S}{\partial \log\sigma_j} &= 1

    :param log_std: :math:`\log\sigma`, ``[d]``
    :param grad_log_std: where the gradient by it goes, ``[d]``
    """

    def __init__(self, log_std: np.ndarray, grad_log_std: np.ndarray):
        super().__init__()
        self.log_std = log_std
        self.grad_log_std = grad_log_std

    def forward(self, outputs: np.ndarray, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The means ``[d, B]`` and the standard deviations ``[d, 1]``."""
        return outputs, np.exp(self.log_std)[:, None]

    @override
    def sample(self, outputs: np.ndarray, latent: np.ndarray) -> np.ndarray:
        tensor, noise = self._noise(outputs.shape, outputs.dtype)
        tensor.normal_()
        actions = noise * np.exp(self.log_std)
        actions += outputs
        if not _surely_finite(actions):
            _check(actions)
        return actions

    @override
    def log_prob(self, dist: tuple[np.ndarray, np.ndarray], actions: np.ndarray) -> np.ndarray:
        mean, std = dist
        squares = ((actions - mean) / std) ** 2
        constant = float(self.log_std.sum()) + len(std) * 0.5 * math.log(2 * math.pi)
        return -0.5 * np.add.reduce(squares, axis=0) - constant

    @override
    def entropy(self, dist: tuple[np.ndarray, np.ndarray]) -> float:
        return float(self.log_std.sum()) + len(self.log_std) * 0.5 * (1 + math.log(2 * math.pi))

    @override
    def gradient(
        self, dist: tuple[np.ndarray, np.ndarray], actions: np.ndarray, grad_log_prob: np.ndarray, grad_entropy: float
    ) -> np.ndarray:
        mean, std = dist
        deviation = (actions - mean) / std
        weighted = deviation * grad_log_prob
        self.grad_log_std[:] = np.add.reduce(weighted * deviation, axis=1)
        self.grad_log_std += grad_entropy * len(grad_log_prob) - grad_log_prob.sum()
        weighted /= std
        return weighted

    def parameters(self, dist: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The means, then the log standard deviations."""
        mean, _ = dist
        parameters = np.empty((2, *mean.shape), mean.dtype)
        parameters[0], parameters[1] = mean, self.log_std[:, None]
        return parameters.reshape(-1, mean.shape[1]).T


class _Noise(NamedTuple):
    """Independent Gaussians whose variances come from states."""

    mean: np.ndarray
    """``[d, B]``"""
    variance: np.ndarray
    """``[d, B]``"""
    log_variance: np.ndarray
    squares: np.ndarray
    """of the latent, ``[B, latent_dim]``"""
    std: np.ndarray
    """of the matrix's entries, in the shape of s"""


class StateDependentNoiseHead(_GaussianHead):
    r"""
    gSDE, for a Box space: noise that depends on the state, by a matrix that is drawn now and then.

    With the latent x, which gets no gradient through the variance, and standard deviations
    :math:`\Sigma_{ij} = e^{s_{ij}}` of the matrix's entries, or with ``use_expln``, where :math:`s_{ij} > 0`,
    :math:`\log(1 + s_{ij}) + 1`:

    .. math::
        v_j &= \sum_i x_i^2 \Sigma_{ij}^2 + \epsilon, & u_j &= (a_j - z_j) / \sqrt{v_j} \\
        \log\pi(a) &= -\tfrac12 \sum_j u_j^2 + \log v_j + \log 2\pi, &
        \frac{\partial \log\pi(a)}{\partial z_j} &= \frac{u_j}{\sqrt{v_j}}, &
        \frac{\partial \log\pi(a)}{\partial v_j} &= \frac{u_j^2 - 1}{2 v_j} \\
        S &= \tfrac12 \sum_j \log v_j + 1 + \log 2\pi, & & & \frac{\partial S}{\partial v_j} &= \frac{1}{2 v_j}

    Source: Raffin et al. 2021, https://arxiv.org/abs/2005.05719.

    :param log_std: s, ``[latent_dim, d]``, or ``[latent_dim, 1]`` where all dimensions share it
    :param grad_log_std: where the gradient by it goes
    :param distribution: the policy's; it draws the matrices
    """

    def __init__(self, log_std: np.ndarray, grad_log_std: np.ndarray, distribution: StateDependentNoiseDistribution):
        super().__init__()
        self.log_std, self.grad_log_std, self.distribution = log_std, grad_log_std, distribution

    def forward(self, outputs: np.ndarray, latent: np.ndarray) -> _Noise:
        """The means and the variances."""
        squares, std = np.square(latent, dtype=self.log_std.dtype), self._std()
        variance = np.broadcast_to((squares @ std**2).T + self.distribution.epsilon, outputs.shape)
        return _Noise(outputs, variance, np.log(variance), squares, std)

    def _std(self) -> np.ndarray:
        if not self.distribution.use_expln:
            return np.exp(self.log_std)
        return np.where(self.log_std > 0, np.log1p(self._positive()) + 1, np.exp(self.log_std))

    def _positive(self) -> np.ndarray:
        """Where s is positive, s, and a little that keeps it from -1, as SB3 has it."""
        return np.maximum(self.log_std, 0) + self.distribution.epsilon

    @override
    def sample(self, outputs: np.ndarray, latent: np.ndarray) -> np.ndarray:
        one, several = self.distribution.exploration_mat, self.distribution.exploration_matrices
        if len(latent) == 1 or len(latent) != len(several):
            noise = latent @ one.numpy(force=True)
        else:
            noise = np.matmul(latent[:, None], several.numpy(force=True))[:, 0]
        noise += outputs
        if not _surely_finite(noise):
            _check(noise)
        return noise

    @override
    def log_prob(self, dist: _Noise, actions: np.ndarray) -> np.ndarray:
        terms = (actions - dist.mean) ** 2 / dist.variance + dist.log_variance
        return -0.5 * (np.add.reduce(terms, axis=0) + len(terms) * math.log(2 * math.pi))

    @override
    def entropy(self, dist: _Noise) -> np.ndarray:
        return 0.5 * (np.add.reduce(dist.log_variance, axis=0) + len(dist.variance) * (1 + math.log(2 * math.pi)))

    @override
    def gradient(self, dist: _Noise, actions: np.ndarray, grad_log_prob: np.ndarray, grad_entropy: float) -> np.ndarray:
        deviation = (actions - dist.mean) / dist.variance
        by_mean = deviation * grad_log_prob
        by_variance = by_mean * deviation + (grad_entropy - grad_log_prob) / dist.variance
        std = dist.std
        by_std = dist.squares.T @ by_variance.T * std  # the halves above and the square's factor of 2 are one
        by_std *= np.where(self.log_std > 0, 1 / (1 + self._positive()), std) if self.distribution.use_expln else std
        self.grad_log_std[:] = by_std if by_std.shape == self.log_std.shape else by_std.sum(1, keepdims=True)
        return by_mean

    def parameters(self, dist: _Noise) -> np.ndarray:
        """The means, then the log standard deviations."""
        return np.concatenate([dist.mean, 0.5 * dist.log_variance]).T
