"""One update in NumPy: minibatches prepared as far as can be without the network, and their gradient by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer, is_ours
from sb3_ppo_from_scratch.engines.numpy_mlp.heads import Head, forbidden, mask_out
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch, Features, normalized, ppo_gradient
from sb3_ppo_from_scratch.engines.numpy_mlp.network import ActorCriticNetwork
from sb3_ppo_from_scratch.engines.numpy_mlp.optimizers import FlatOptimizer
from sb3_ppo_from_scratch.update import Gradient, Learner, UpdateConfig

__all__ = ["NumpyLearner"]


class NumpyLearner(Learner[Batch]):
    """
    The gradient into one flat vector, and the optimizer's step along it.

    :param buffer: full
    :param config: the update's coefficients
    :param network: of the policy
    :param head: its action distribution
    :param optimizer: its own, on the vector that the network's parameters lie in
    :param features: from observations ``[B, *obs_shape]`` to what the network takes, ``[B, n_features]``
    """

    def __init__(
        self,
        buffer: RolloutBuffer,
        config: UpdateConfig,
        network: ActorCriticNetwork,
        head: Head,
        optimizer: FlatOptimizer,
        features: Features,
    ):
        self.buffer, self.config = buffer, config
        self.network, self.head, self.optimizer, self.features = network, head, optimizer, features
        self._epochs = _Epochs(features, buffer) if is_ours(buffer) else None
        is_one = self._epochs is not None and self._epochs.data.size <= config.batch_size
        self._whole = self.prepared(self._epochs.data) if self._epochs is not None and is_one else None

    @override
    def minibatches(self) -> Iterable[Batch]:
        """Ours is gathered once per epoch; other buffers hand out their own."""
        if self._epochs is None:
            samples = self.buffer.get(self.config.batch_size)
            return (self.prepared(Batch.of(sample, self.features)) for sample in samples)  # type: ignore[arg-type]  # six fields alike
        order = np.random.permutation(self._epochs.data.size)
        if self._whole is not None:  # one minibatch: its order would change nothing but rounding
            return [self._whole]
        return map(self.prepared, self._epochs.gather(order).cut(self.config.batch_size))

    def prepared(self, batch: Batch) -> Batch:
        """A minibatch as :meth:`gradient` takes it: all that can be done about it without the network."""
        return batch._replace(
            observations=self.features(batch.observations),
            actions=self.head.encode(batch.actions),
            advantages=normalized(batch.advantages) if self.config.normalize_advantage else batch.advantages,
            action_masks=None if batch.action_masks is None else forbidden(batch.action_masks),
        )

    @override
    def gradient(self, batch: Batch) -> Gradient:
        head, network = self.head, self.network
        outputs, values = network.forward(batch.observations)
        if batch.action_masks is not None:
            mask_out(outputs, batch.action_masks)
        dist = head.forward(outputs, network.latent)
        log_prob, entropy = head.log_prob(dist, batch.actions), head.entropy(dist)
        loss, grad = ppo_gradient(log_prob, values, entropy, batch, self.config)

        def backward() -> None:
            network.backward(head.gradient(dist, batch.actions, grad.log_prob, grad.entropy), grad.values)

        kl_term = None if batch.dist_params is None else (batch.dist_params, head.parameters(dist))
        return Gradient(loss, backward, kl_term)

    @override
    def clip_gradient(self) -> float:
        """As torch does."""
        gradient = self.optimizer.flat.gradient
        norm = math.sqrt(np.dot(gradient, gradient))
        scale = self.config.max_grad_norm / (norm + 1e-6)
        if scale < 1:
            gradient *= scale
        return norm

    @override
    def step(self) -> None:
        self.optimizer.step()

    @override
    def mean_kl(self, kl_terms: Sequence[Any]) -> float | None:
        kls = [self.head.mean_kl(old, new) for old, new in kl_terms]
        return sum(kls) / len(kls) if kls else None


class _Epochs:
    """
    A rollout in one random order after another, in the same memory.

    :param features: as :class:`NumpyLearner` takes them
    :param buffer: full, of ours
    """

    def __init__(self, features: Features, buffer: ScratchRolloutBuffer):
        data = Batch.of(buffer.dataset(), features)
        if data.observations.dtype == np.float64:  # once, and not once per minibatch
            data = data._replace(observations=features(data.observations))
        self.data = data
        self._gathered: Batch | None = None

    def gather(self, order: np.ndarray) -> Batch:
        """The transitions in that order, valid until the next call."""
        if self._gathered is None:
            self._gathered = self.data.like()
        self.data.gather(order, self._gathered)
        return self._gathered
