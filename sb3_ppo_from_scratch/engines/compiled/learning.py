"""One update by the kernel: an epoch's minibatches in one call, which the loop then reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import is_ours, minibatch_source
from sb3_ppo_from_scratch.engines.compiled.library import Kernel, Update
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch, Features
from sb3_ppo_from_scratch.engines.numpy_mlp.optimizers import FlatOptimizer
from sb3_ppo_from_scratch.engines.replayed import ReplayedLearner, ReplayedMinibatch
from sb3_ppo_from_scratch.update import UpdateConfig

__all__ = ["CompiledLearner"]

_READ = ("observations", "actions", "old_values", "old_log_prob", "advantages", "returns", "dist_params", "action_masks")
"""Fields that the kernel reads"""
_FEW_BYTES = 2**24
"""Observations that are no reals are turned into features all at once if these take no more than that."""


class CompiledLearner(ReplayedLearner):
    """
    Hands the kernel an epoch of a rollout at a time; minibatches of a buffer of the user's, or of large images, one by one.

    :param buffer: full
    :param config: the update's coefficients
    :param kernel: the library
    :param update: its network and its memory are filled in
    :param adam: the policy's optimizer, on that memory
    :param features: from observations ``[B, *obs_shape]`` to what the network takes, ``[B, n_features]``
    """

    def __init__(
        self,
        buffer: RolloutBuffer,
        config: UpdateConfig,
        kernel: Kernel,
        update: Update,
        adam: FlatOptimizer,
        features: Features,
    ):
        self.buffer, self.config = buffer, config
        self.kernel, self.adam, self.features = kernel, adam, features
        self._update = update
        self._epochs_begun = 0
        self._scratch = np.empty(0, np.float32)
        _set_coefficients(update, config, adam)
        self._size = 0 if self._takes_samples() else self._hold(Batch.of(buffer.dataset(), features), config.batch_size)  # type: ignore[attr-defined]

    def _takes_samples(self) -> bool:
        """Whether the rollout is not to be had, or not to be prepared, all at once."""
        if not is_ours(self.buffer):
            return True
        n_bytes = 4 * self._update.n_features * self.buffer.buffer_size * self.buffer.n_envs
        seen = self.buffer.observations
        parts = seen.values() if isinstance(seen, dict) else [seen]
        return n_bytes > _FEW_BYTES and any(part.dtype.kind != "f" for part in parts)

    def _hold(self, batch: Batch, batch_size: int) -> int:
        """
        Let the kernel read these transitions.

        :param batch: they stay alive as long as they are read
        :param batch_size: at most so many of them are a minibatch
        :return: how many there are
        """
        update = self._update
        self._batch = _prepared(batch, update, self.features)
        for name in _READ:
            array = getattr(self._batch, name)
            setattr(update, name, None if array is None else array.ctypes.data)
        update.batch_size = max(min(batch_size, batch.size), 1)
        scratch = self.kernel.scratch(update)
        if len(scratch) > len(self._scratch):
            self._scratch = scratch
        update.scratch = self._scratch.ctypes.data
        return batch.size

    @override
    def minibatches(self) -> Iterable[ReplayedMinibatch]:
        self._epochs_begun += 1
        if self._size == 0:
            return self._samples()
        return self._run(np.random.permutation(self._size))

    def _samples(self) -> Iterator[ReplayedMinibatch]:
        """The loop may ask for no more of them."""
        for sample in minibatch_source(self.buffer)(self.config.batch_size):
            batch = Batch.of(sample, self.features)
            yield from self._run(np.arange(self._hold(batch, batch.size)))

    def _run(self, order: np.ndarray) -> list[ReplayedMinibatch]:
        may_be_last = self.config.target_kl is not None or self._epochs_begun == self.config.n_epochs
        rows = self.kernel.epoch(self._update, order, self._batch.dist_params is not None and may_be_last)
        self.adam.n_steps = self._update.step
        return list(map(ReplayedMinibatch.of, rows))


def _set_coefficients(update: Update, config: UpdateConfig, adam: FlatOptimizer) -> None:
    update.normalize_advantage, update.raises = config.normalize_advantage, config.nan_policy == "raise"
    update.clips_values, update.clip_range_vf = config.clip_range_vf is not None, config.clip_range_vf or 0.0
    update.clip_range, update.kl_limit = config.clip_range, config.kl_limit
    update.ent_coef, update.vf_coef, update.max_grad_norm = config.ent_coef, config.vf_coef, config.max_grad_norm
    group = adam.optimizer.param_groups[0]
    update.step, update.learning_rate, (update.beta1, update.beta2) = adam.n_steps, group["lr"], group["betas"]
    update.epsilon, update.weight_decay, update.maximize = group["eps"], group["weight_decay"], group["maximize"]
    update.decoupled = group.get("decoupled_weight_decay", False)


def _prepared(batch: Batch, update: Update, features: Features) -> Batch:
    """
    The transitions as float32, one after the other.

    :raises ValueError: for an array of another shape than the kernel would read
    """
    rows = (batch.size,)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("old_values", "old_log_prob", "advantages", "returns"), rows)
    shapes.update(observations=(*rows, update.n_features), actions=(*rows, update.n_actions))
    shapes.update(dict.fromkeys(("dist_params", "action_masks"), (*rows, update.n_dist_params)))
    batch = batch._replace(observations=features(batch.observations), actions=batch.actions.reshape(*rows, -1))
    prepared: dict[str, Any] = {}
    for name, array in batch._asdict().items():
        if array is not None and array.shape != shapes[name]:
            raise ValueError(f"{name} of the rollout must have shape {shapes[name]}, not {array.shape}")
        prepared[name] = None if array is None else np.ascontiguousarray(array, np.float32)
    return Batch(**prepared)
