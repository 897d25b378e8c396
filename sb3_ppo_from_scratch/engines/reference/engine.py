"""
SB3's operations in SB3's order on the policy's own modules: autograd through the loss, torch's clipping, the optimizer's step.

This is the engine to read, and the one that every other is tested against.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import RolloutData, minibatch_source
from sb3_ppo_from_scratch.distributions import UncheckedDistributions, apply_masks, choices, drop_graph, mean_kl
from sb3_ppo_from_scratch.engines.base import NAN_MESSAGE, Engine, PolicyStep
from sb3_ppo_from_scratch.engines.reference import recurrent
from sb3_ppo_from_scratch.errors import NonFiniteError
from sb3_ppo_from_scratch.policies import mask_argument, takes_masks
from sb3_ppo_from_scratch.recurrent import Memory, is_recurrent, sequence_minibatches
from sb3_ppo_from_scratch.update import Gradient, Learner, PolicyOutputs, UpdateConfig, check_loss, minibatch_loss

__all__ = ["HeadsEngine", "TorchEngine", "TorchLearner"]

Minibatches = Callable[[int], Iterator[RolloutData]]
"""From a batch size to one epoch's minibatches."""


class TorchEngine(Engine):
    """Any SB3 policy, optimizer and loss, on any device."""

    name = "torch"
    batched_bootstrap = False
    shares_minibatches = True

    @classmethod
    @override
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        return None

    @override
    @th.no_grad()
    def act(self, obs: PyTorchObs, action_masks: np.ndarray | None = None, memory: Memory | None = None) -> PolicyStep:
        try:
            with UncheckedDistributions():
                if memory is None:
                    actions, values, log_probs = self.sample(obs, action_masks)
                else:
                    actions, values, log_probs, memory = self.sample_with_memory(obs, memory, action_masks)
        except RuntimeError as error:  # torch.multinomial says it with the most general class
            if "probability tensor" not in str(error):
                raise
            raise NonFiniteError("probabilities", NAN_MESSAGE) from error
        if th.isnan(log_probs).any():
            raise NonFiniteError("probabilities", NAN_MESSAGE)
        outputs = PolicyOutputs(values, log_probs, None, self.distribution)
        return PolicyStep(actions.cpu().numpy(), values, log_probs, outputs.dist_params, memory)

    @property
    def distribution(self) -> Distribution | None:
        """What the policy has acted with, or evaluated actions with, last; ``None`` if it keeps none."""
        return getattr(self.policy, "action_dist", None)

    def sample(self, obs: PyTorchObs, action_masks: np.ndarray | None = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """From ``[n_envs, *obs_shape]`` to actions, values ``[n_envs, 1]`` and log-probabilities ``[n_envs]``."""
        return self.policy(obs, **mask_argument(action_masks))

    def sample_with_memory(
        self, obs: PyTorchObs, memory: Memory, action_masks: np.ndarray | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, Memory]:
        """Likewise of a recurrent policy, and what it remembers after the step."""
        return recurrent.sample(self.policy, obs, memory, action_masks)

    def evaluate(self, obs: PyTorchObs, actions: th.Tensor, action_masks: th.Tensor | None = None) -> PolicyOutputs:
        """What the policy makes of a minibatch, with gradient."""
        values, log_prob, entropy = self.policy.evaluate_actions(obs, actions, **mask_argument(action_masks))
        return PolicyOutputs(values.flatten(), log_prob, entropy, self.distribution)

    def evaluate_sequences(
        self, batch: RolloutData, actions: th.Tensor, action_masks: th.Tensor | None = None
    ) -> PolicyOutputs:
        """What a recurrent policy makes of a minibatch of sequences, with gradient."""
        return recurrent.evaluate(self.policy, batch, actions, action_masks)

    @override
    @th.no_grad()
    def predict_values(self, obs: PyTorchObs, memory: Memory | None = None) -> th.Tensor:
        return self.policy.predict_values(obs) if memory is None else recurrent.predict_values(self.policy, obs, memory)

    @override
    @contextmanager
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[RolloutData]]:
        try:
            with UncheckedDistributions():
                yield TorchLearner(self, self.minibatches_of(buffer), config)
        finally:
            if self.distribution is not None:
                drop_graph(self.distribution)

    def minibatches_of(self, buffer: RolloutBuffer) -> Minibatches:
        """How to draw an epoch's minibatches from ``buffer``."""
        return (sequence_minibatches if is_recurrent(self.policy) else minibatch_source)(buffer)


class TorchLearner(Learner[RolloutData]):
    """
    One update by autograd.

    :param engine: computes the policy's outputs and has the loss
    :param minibatches: draws them
    :param config: the update's coefficients
    """

    def __init__(self, engine: TorchEngine, minibatches: Minibatches, config: UpdateConfig):
        self.engine, self.policy, self.config = engine, engine.policy, config
        self._minibatches = minibatches
        self._is_discrete = isinstance(self.policy.action_space, spaces.Discrete)
        self._takes_masks = takes_masks(type(self.policy))

    @override
    def minibatches(self) -> Iterable[RolloutData]:
        return self._minibatches(self.config.batch_size)

    @override
    def gradient(self, batch: RolloutData) -> Gradient:
        actions = batch.actions.long().flatten() if self._is_discrete else batch.actions
        masks = self._masks(batch) if self._takes_masks else None
        if is_recurrent(self.policy):
            outputs = self.engine.evaluate_sequences(batch, actions, masks)
        else:
            outputs = self.engine.evaluate(batch.observations, actions, masks)
        loss = self.engine.loss(outputs, batch, self.config)
        if self.engine.loss is not minibatch_loss:
            check_loss(loss)
        return Gradient(loss, partial(self._backward, loss.total), self._kl_term(batch, outputs))

    def _masks(self, batch: RolloutData) -> th.Tensor:
        """``[B, n_choices]``; where there were none in the rollout, all ones, as sb3-contrib has them then."""
        masks = batch.extras.get("action_masks")
        return batch.advantages.new_ones(batch.size, sum(choices(self.policy.action_space))) if masks is None else masks

    @th.no_grad()
    def _kl_term(self, batch: RolloutData, outputs: PolicyOutputs) -> tuple[th.Tensor, th.Tensor] | None:
        """The distribution's parameters, old and new. SB3's own samples know no old ones."""
        old, new = getattr(batch, "dist_params", None), outputs.dist_params
        return None if old is None or new is None else (old, new.detach())

    def _backward(self, loss: th.Tensor) -> None:
        self.policy.optimizer.zero_grad()
        loss.backward()

    @override
    def clip_gradient(self) -> th.Tensor:
        return th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)

    @override
    def step(self) -> None:
        self.policy.optimizer.step()

    @override
    def mean_kl(self, kl_terms: Sequence[tuple[th.Tensor, th.Tensor]]) -> th.Tensor | None:
        return mean_kl(self.policy.action_dist, list(kl_terms)) if kl_terms else None


class HeadsEngine(TorchEngine):
    """Base of engines that compute values and distribution in a way of their own, and leave the rest to the reference."""

    batched_bootstrap = True

    @abstractmethod
    def heads(self, obs: PyTorchObs) -> tuple[th.Tensor, Distribution]:
        """Values ``[batch_size, 1]`` and the distribution of the actions, in float32."""

    @override
    def sample(self, obs: PyTorchObs, action_masks: np.ndarray | None = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        values, distribution = self._masked_heads(obs, action_masks)
        actions = distribution.get_actions()
        log_probs = distribution.log_prob(actions)
        return actions.reshape(-1, *self.policy.action_space.shape), values, log_probs  # type: ignore[misc]  # no Dict

    @override
    def evaluate(self, obs: PyTorchObs, actions: th.Tensor, action_masks: th.Tensor | None = None) -> PolicyOutputs:
        values, distribution = self._masked_heads(obs, action_masks)
        return PolicyOutputs(values.flatten(), distribution.log_prob(actions), distribution.entropy(), distribution)

    def _masked_heads(self, obs: PyTorchObs, action_masks: Any) -> tuple[th.Tensor, Distribution]:
        values, distribution = self.heads(obs)
        apply_masks(distribution, action_masks)
        return values, distribution

    @override
    @th.no_grad()
    def predict_values(self, obs: PyTorchObs, memory: Memory | None = None) -> th.Tensor:
        return self.heads(obs)[0]
