"""What the ranks tell each other between two iterations, besides what an update does: statistics, episodes, and ends."""

from __future__ import annotations

import io
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ppo_from_scratch.distributed.group import Group

__all__ = ["Sharing", "added_since", "put_together", "running_statistics"]


@dataclass(frozen=True)
class Statistics:
    """A running mean, its variance and how many numbers they are of, as SB3 and Gymnasium keep them."""

    mean: np.ndarray
    var: np.ndarray
    count: float

    @classmethod
    def of(cls, running: Any) -> Statistics:
        """A copy."""
        return cls(np.array(running.mean), np.array(running.var), float(running.count))


def running_statistics(env: Any) -> Iterator[Any]:
    """
    What normalizes observations and rewards of all environments together: ``VecNormalize``, Gymnasium's wrappers of vector
    environments, and others that keep ``mean``, ``var`` and ``count`` in an attribute.

    :param env: a ``VecEnv``
    """
    while env is not None:
        for value in list(vars(env).values()):
            for each in value.values() if isinstance(value, dict) else [value]:
                if all(hasattr(each, name) for name in ("mean", "var", "count")):
                    yield each
        env = vars(env).get("venv", vars(env).get("env"))


def added_since(base: Statistics, now: Statistics) -> Statistics:
    """The statistics of what has come since: ``base`` and this, put together, are ``now``."""
    count = now.count - base.count
    if count <= 0:
        return Statistics(np.zeros_like(now.mean), np.zeros_like(now.var), 0.0)
    mean = now.mean + (now.mean - base.mean) * (base.count / count)
    squares = now.var * now.count - base.var * base.count - np.square(mean - base.mean) * (base.count * count / now.count)
    return Statistics(mean, np.maximum(squares / count, 0.0), count)


def put_together(base: Statistics, parts: list[Statistics]) -> Statistics:
    """One after the other, as SB3's ``RunningMeanStd.combine`` does."""
    for part in parts:
        if part.count > 0:
            count, delta = base.count + part.count, part.mean - base.mean
            squares = base.var * base.count + part.var * part.count + np.square(delta) * (base.count * part.count / count)
            base = Statistics(base.mean + delta * (part.count / count), squares / count, count)
    return base


class Sharing:
    """
    Keeps what a model has learned outside of its gradient alike on all ranks, iteration by iteration.

    :param model: in training
    :param group: the ranks
    """

    def __init__(self, model: OnPolicyAlgorithm, group: Group):
        self._model, self._group = model, group
        self._episodes: list[tuple[int, Any]] = []
        self._successes: list[tuple[int, Any]] = []
        self._base: list[Statistics] = []
        self._windows: tuple[list[Any], list[Any]] = ([], [])
        self._steps = 0

    # ------------------------------------------------------- the beginning

    def take_rank_zeros(self) -> None:
        """The policy, the optimizer's state and the normalizers' statistics become those of rank 0."""
        model = self._model
        weights = io.BytesIO()
        if self._group.rank == 0:
            th.save([model.policy.state_dict(), model.policy.optimizer.state_dict()], weights)
        ours = (weights.getvalue(), [Statistics.of(each) for each in running_statistics(model.env)])
        theirs, statistics = self._group.gather(ours)[0]
        if self._group.rank > 0:
            policy, optimizer = th.load(io.BytesIO(theirs), map_location="cpu", weights_only=True)
            model.policy.load_state_dict(policy)
            model.policy.optimizer.load_state_dict(optimizer)
        self._put(statistics)

    def begin(self) -> None:
        """Episode windows are alike by now: empty, or read from a file."""
        model = self._model
        self._windows = (list(model.ep_info_buffer or ()), list(model.ep_success_buffer or ()))
        self._episodes, self._successes = [], []
        self._steps = model.num_timesteps

    def _put(self, statistics: list[Statistics]) -> None:
        for running, value in zip(running_statistics(self._model.env), statistics, strict=True):
            running.mean = np.array(value.mean, dtype=np.asarray(running.mean).dtype)
            running.var = np.array(value.var, dtype=np.asarray(running.var).dtype)
            running.count = value.count
        self._base = statistics

    # ------------------------------------------------------- an iteration

    def note(self, infos: list[dict[str, Any]], dones: np.ndarray | None) -> None:
        """
        Of one step: which episodes have ended.

        :param infos: one per environment
        :param dones: ``[n_envs]``
        """
        now = self._model.num_timesteps
        for index, info in enumerate(infos):
            if "episode" in info:
                self._episodes.append((now, info["episode"]))
            if info.get("is_success") is not None and dones is not None and dones[index]:
                self._successes.append((now, info["is_success"]))

    def after_rollout(self, complete: bool) -> bool:
        """
        :param complete: whether this rank's rollout is, and no callback has ended training
        :return: whether all ranks' are
        """
        model = self._model
        now = [Statistics.of(each) for each in running_statistics(model.env)]
        added = [added_since(*pair) for pair in zip(self._base, now, strict=True)]
        said = (complete, model.num_timesteps, self._episodes, self._successes, added, _digest(model))
        all_complete, steps, episodes, successes, parts, digests = zip(*self._group.gather(said), strict=True)
        self._put([put_together(base, list(each)) for base, each in zip(self._base, zip(*parts, strict=True), strict=True)])
        if len(set(digests)) > 1:
            warnings.warn("the ranks' parameters have come apart; all go on with those of rank 0", stacklevel=2)
            self.take_rank_zeros()
        self._extend(model.ep_info_buffer, 0, episodes)
        self._extend(model.ep_success_buffer, 1, successes)
        if not all(all_complete):  # each has counted for all, as far as it got itself
            model.num_timesteps = self._steps + sum(n - self._steps for n in steps) // self._group.size
        self.begin()
        return all(all_complete)

    def _extend(self, window: deque[Any] | None, index: int, new: tuple[list[tuple[int, Any]], ...]) -> None:
        """In the order in which one process would have seen them end: by time, then by environment."""
        assert window is not None  # learn() makes them
        window.clear()
        window.extend(self._windows[index])
        window.extend(value for _, value in sorted((each for of_rank in new for each in of_rank), key=lambda each: each[0]))


def _digest(model: OnPolicyAlgorithm) -> int:
    """Of the parameters' bits."""
    digest = 0
    with th.no_grad():
        for parameter in model.policy.parameters():
            digest = zlib.crc32(parameter.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().data, digest)
    return digest
