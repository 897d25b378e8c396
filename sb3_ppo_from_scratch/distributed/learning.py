"""An update by several processes: each finds the gradient of its share of a minibatch, and all step along their mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from typing_extensions import override

from sb3_ppo_from_scratch.distributed.group import Group
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import Gradient, Learner, UpdateConfig, UpdateStats, update

if TYPE_CHECKING:
    from stable_baselines3.common.policies import ActorCriticPolicy

__all__ = ["Moments", "ReducedLearner", "Shares", "update_together"]

_N_LOSSES = len(PPOLoss._fields)


@dataclasses.dataclass(frozen=True)
class Moments:
    """What the mean and the variance of numbers are made of; parts of them can be put together."""

    n: float
    mean: float
    squares: float
    """sum of squared distances from the mean"""

    @classmethod
    def of(cls, numbers: th.Tensor) -> Moments:
        """:param numbers: ``[n]``, perhaps none"""
        if len(numbers) == 0:
            return cls(0, 0.0, 0.0)
        exact = numbers.double()
        mean = exact.mean()
        return cls(len(numbers), mean.item(), (exact - mean).square().sum().item())

    @classmethod
    def together(cls, parts: np.ndarray) -> Moments:
        """
        Chan et al. 1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf, equation 2.1 for any number.

        :param parts: ``[size, 3]``, in the order that rounding depends on
        """
        n, mean, squares = parts.T
        total = n.sum()
        if total == 0:
            return cls(0, 0.0, 0.0)
        overall = (n * mean).sum() / total
        return cls(total, overall, squares.sum() + (n * np.square(mean - overall)).sum())

    def normalized(self, numbers: th.Tensor, epsilon: float = 1e-8) -> th.Tensor:
        """As :func:`sb3_ppo_from_scratch.advantages.normalize_advantages`, by these moments instead of the numbers' own."""
        if self.n <= 1:
            return numbers
        return (numbers.double() - self.mean) / (math.sqrt(self.squares / (self.n - 1)) + epsilon)


class Shares:
    """
    How the ranks share a rollout's rows: each takes minibatches from its own, and all take as many minibatches.

    Ranks have unequal numbers of rows where some are no transitions (reset rows). gloo aborts on an unequal number of sums.

    :param n_rows: ``[size]``, rows of each rank
    :param batch_size: rows of a minibatch, over all ranks; a multiple of their number
    """

    def __init__(self, n_rows: Sequence[int], batch_size: int):
        self.n_minibatches = -(-sum(n_rows) // batch_size)
        """per epoch, for each rank; one with few rows ends with empty ones"""
        self.widths = [max(batch_size // len(n_rows), -(-n // self.n_minibatches)) for n in n_rows]
        """by rank, rows of its part of a minibatch"""


class ReducedLearner(Learner[Any]):
    """
    An engine's learner that knows only this rank's rows, made one that knows those of all ranks.

    Per minibatch there is one sum over the ranks: gradient, losses, KL and count in one vector, each times the count. Whatever
    is decided comes after it, and so alike on all ranks: early stops, NaN, clipping. Normalising advantages takes one more,
    of three numbers per rank, before it: a minibatch's rows are not known until it is drawn. Where a minibatch is the whole
    rollout there is none, since that one's mean and deviation are known from the start.

    :param learner: the engine's, which leaves advantages as they are
    :param policy: whose parameters' ``grad`` it fills, clips and steps along
    :param group: the ranks
    :param n_minibatches: of all ranks, per epoch
    :param normalize: whether advantages are to be normalised
    :param whole: the moments of the advantages of all ranks' rollouts
    """

    def __init__(
        self,
        learner: Learner[Any],
        policy: ActorCriticPolicy,
        group: Group,
        n_minibatches: int,
        normalize: bool,
        whole: Moments,
    ):
        self.learner, self.group, self.n_minibatches = learner, group, n_minibatches
        self._normalize, self._whole = normalize, whole
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self._parameters]
        self._vector = th.zeros(sum(sizes) + _N_LOSSES + 1, dtype=self._parameters[0].dtype, device=policy.device)
        parts = self._vector[: sum(sizes)].split(sizes)
        self._parts = [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    @override
    def minibatches(self) -> Iterable[Any]:
        n = 0
        for batch in self.learner.minibatches():
            n += 1
            yield batch._replace(advantages=self._normalized(batch.advantages))
        for _ in range(self.n_minibatches - n):
            self._normalized(th.empty(0))
            yield None

    def _normalized(self, advantages: Any) -> Any:
        """:param advantages: ``[b]``, this rank's part, in whatever the engine takes"""
        if not self._normalize:
            return advantages
        ours = th.as_tensor(advantages)
        moments = self._whole
        if self.n_minibatches > 1:
            moments = Moments.together(self.group.gather_numbers(list(dataclasses.astuple(Moments.of(ours)))))
        normalized = moments.normalized(ours).to(self._vector.dtype)
        return normalized.numpy() if isinstance(advantages, np.ndarray) else normalized

    @override
    def gradient(self, batch: Any) -> Gradient:
        """The loss of the whole minibatch. Its gradient is here by then, and is put in place when it is asked for."""
        n, kl_term = 0, None
        if batch is None:
            self._vector.zero_()
        else:
            n = len(batch.advantages)
            found = self.learner.gradient(batch)
            found.backward()
            kl_term = found.kl_term
            self._pack(found.loss, n)
        self.group.sum(self._vector)
        losses_and_n = self._vector[-_N_LOSSES - 1 :].tolist()
        self._vector /= losses_and_n[-1]
        loss = PPOLoss(*(number / losses_and_n[-1] for number in losses_and_n[:-1]))
        return Gradient(loss, self._put_in_place, (kl_term, n))

    def _pack(self, loss: PPOLoss, n: int) -> None:
        for part, parameter in zip(self._parts, self._parameters, strict=True):
            if parameter.grad is None:  # the loss does not depend on it
                part.zero_()
            else:
                part.copy_(parameter.grad)
        numbers = (*loss, 1.0)
        is_on_device = isinstance(loss.total, th.Tensor) and loss.total.device.type != "cpu"
        if is_on_device:  # where to ask for a number is to wait for it
            device = self._vector.device
            scalars = [th.as_tensor(each, device=device).detach().reshape(()) for each in numbers]
            self._vector[-len(numbers) :] = th.stack(scalars)
        else:
            self._vector[-len(numbers) :] = th.tensor([_number(each) for each in numbers], dtype=self._vector.dtype)
        self._vector *= n

    def _put_in_place(self) -> None:
        if all(parameter.grad is None for parameter in self._parameters):  # this rank had no rows yet
            for parameter in self._parameters:
                parameter.grad = th.zeros_like(parameter)
        for part, parameter in zip(self._parts, self._parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part)

    @override
    def clip_gradient(self) -> float:
        return float(self.learner.clip_gradient())

    @override
    def step(self) -> None:
        self.learner.step()

    @override
    def mean_kl(self, kl_terms: Sequence[Any]) -> float | None:
        """One sum for all of the last epoch's minibatches."""
        rows = th.tensor([[self._kl(term) if n > 0 else 0.0, n] for term, n in kl_terms], dtype=th.float64).reshape(-1, 2)
        rows[:, 0] *= rows[:, 1]
        self.group.sum(rows)
        kl = (rows[:, 0] / rows[:, 1]).mean().item()
        return None if math.isnan(kl) else kl

    def _kl(self, term: Any) -> float:
        """NaN where it is not known."""
        kl = None if term is None else self.learner.mean_kl([term])
        return math.nan if kl is None else float(kl)


def _number(value: th.Tensor | float) -> float:
    return value.item() if isinstance(value, th.Tensor) else value


def update_together(engine: Any, buffer: Any, config: UpdateConfig, group: Group) -> UpdateStats:
    """
    :meth:`Engine.update` by all ranks, each with the rollout of its own environments.

    :param engine: of this rank
    :param buffer: of this rank, a full ``ScratchRolloutBuffer`` with advantages and returns
    :param config: the update's coefficients; ``batch_size`` is that of all ranks together
    :param group: the ranks
    :return: what was measured, of all ranks' rows; the same on all of them
    :raises NonFiniteError: see there; on all ranks, if on one
    :raises RankFailedError: if another rank is not there any more
    """
    rows = [buffer.advantages, buffer.returns, buffer.returns - buffer.values]
    valid = slice(None) if buffer.valid is None else buffer.valid
    ours = [dataclasses.astuple(Moments.of(th.from_numpy(np.ascontiguousarray(each[valid]).ravel()))) for each in rows]
    theirs = group.gather_numbers([number for moments in ours for number in moments])
    advantages, returns, errors = (Moments.together(theirs[:, i : i + 3]) for i in (0, 3, 6))
    shares = Shares([int(n) for n in theirs[:, 0]], config.batch_size)
    local = dataclasses.replace(config, batch_size=shares.widths[group.rank], normalize_advantage=False)
    with engine.learning(buffer, local) as learner:
        reduced = ReducedLearner(learner, engine.policy, group, shares.n_minibatches, config.normalize_advantage, advantages)
        stats = update(reduced, config)
    stats.explained_variance = math.nan if returns.squares == 0 else 1 - errors.squares / returns.squares
    return stats
