"""
The reference engine: any SB3 policy on any device, and on CPU the same bits as SB3's PPO.

The gradient comes from autograd, or for a plain ``MlpPolicy`` from the same kernels called one by one
(:mod:`sb3_ppo_from_scratch.engines.closed_form`). Neither the loop nor the bits can tell which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_from_scratch.advantages import normalize_advantages
from sb3_ppo_from_scratch.buffer import RolloutData, minibatch_source
from sb3_ppo_from_scratch.distributions import UncheckedDistributions, distribution_parameters, mean_kl
from sb3_ppo_from_scratch.engines.base import NAN_MESSAGE, Engine, PolicyStep
from sb3_ppo_from_scratch.engines.closed_form import ClosedFormMlp, head_gradient
from sb3_ppo_from_scratch.engines.reference.optimizer import ClippedStep
from sb3_ppo_from_scratch.errors import NonFiniteError
from sb3_ppo_from_scratch.losses import PPOLoss, ppo_loss
from sb3_ppo_from_scratch.update import UpdateConfig, UpdateStats, accept, reading_waits

__all__ = ["TorchEngine"]

Gradient = tuple[PPOLoss, th.Tensor | None, Callable[[], None]]
"""A minibatch's loss, the parameters of the distribution that it came from, and what fills the parameters' ``grad``."""


class TorchEngine(Engine):
    """SB3's operations in SB3's order on the policy's own modules."""

    name = "torch"
    batched_bootstrap = False

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32"):
        super().__init__(policy, precision)
        self._network = ClosedFormMlp.of(policy)

    @classmethod
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        """It serves every policy."""
        return None

    @th.no_grad()
    def act(self, obs: PyTorchObs) -> PolicyStep:
        """See :meth:`Engine.act`."""
        try:
            step = self._sample(obs)
        except RuntimeError as error:  # torch.multinomial says it with the most general class
            if "probability tensor" not in str(error):
                raise
            raise NonFiniteError("probabilities", NAN_MESSAGE) from error
        if th.isnan(step.log_probs).any():
            raise NonFiniteError("probabilities", NAN_MESSAGE)
        return step

    def _sample(self, obs: PyTorchObs) -> PolicyStep:
        dist_params: th.Tensor | None
        if self._network is not None:
            actions, values, log_probs, dist_params = self._network.act(obs)  # type: ignore[arg-type]  # a Box's are tensors
        else:
            with UncheckedDistributions():
                actions, values, log_probs = self._forward(obs)
            dist_params = self._dist_params(len(log_probs))
        return PolicyStep(actions.cpu().numpy(), values, log_probs, dist_params)

    def _forward(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Actions, values and log-probabilities, in any policy's own words; a faster network has its own."""
        return self.policy(obs)

    def _evaluate(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Values, log-probabilities and entropy of a minibatch, likewise."""
        return self.policy.evaluate_actions(obs, actions)

    def _minibatches(self, buffer: RolloutBuffer) -> Callable[[int], Iterator[RolloutData]]:
        """How to draw one epoch's minibatches."""
        return minibatch_source(buffer)

    def _optimizer_step(self, max_grad_norm: float) -> ClippedStep:
        return ClippedStep(self.policy, max_grad_norm)

    @th.no_grad()
    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """See :meth:`Engine.predict_values`."""
        return self.policy.predict_values(obs)

    def begin_rollout(self) -> None:
        """See :meth:`Engine.begin_rollout`."""
        self._network = ClosedFormMlp.of(self.policy)

    def update(self, buffer: RolloutBuffer, config: UpdateConfig) -> UpdateStats:
        """The training loop: several epochs over the one data set, each in random minibatches, each minibatch one step."""
        minibatches = self._minibatches(buffer)
        self._network = ClosedFormMlp.of(self.policy)
        gradient = self._autograd if self._network is None else partial(self._closed_form, self._network)
        stats = UpdateStats()
        with UncheckedDistributions(), self._optimizer_step(config.max_grad_norm) as optimizer:
            while stats.epochs < config.n_epochs and not stats.stopped_early:
                stats.begin_epoch()
                old_and_new: list[tuple[th.Tensor, th.Tensor]] = []
                for batch in minibatches(config.batch_size):
                    loss, dist_params, backward = gradient(batch, config)
                    if not self._sound("loss", loss.total, config, stats):
                        continue
                    old_dist_params = getattr(batch, "dist_params", None)
                    if old_dist_params is not None and dist_params is not None:
                        old_and_new.append((old_dist_params, dist_params.detach()))
                    # a float32 against a float, as SB3 compares them
                    if config.target_kl is not None and loss.approx_kl.cpu().numpy() > 1.5 * config.target_kl:
                        stats.stopped_early = True
                        stats.add(loss)
                        break
                    optimizer.zero_grad()
                    backward()
                    norm = optimizer.step(loss.total)
                    if self._sound("gradient", norm, config, stats):
                        stats.add(loss, norm)
            stats.kl = mean_kl(self.policy.action_dist, old_and_new)
        return stats

    def _sound(self, name: str, value: th.Tensor, config: UpdateConfig, stats: UpdateStats) -> bool:
        """Whether a loss or gradient norm is finite. Where asking means waiting, the step is undone, and the metrics tell."""
        return reading_waits(value) or accept(name, value.item(), config.nan_policy, stats)

    def _autograd(self, batch: RolloutData, config: UpdateConfig) -> Gradient:
        """Of any policy."""
        actions = batch.actions
        if isinstance(self.policy.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        values, log_prob, entropy = self._evaluate(batch.observations, actions)
        dist_params = self._dist_params(len(log_prob))
        loss = ppo_loss(values.flatten(), log_prob, entropy, **_loss_arguments(batch, config))
        return loss, dist_params, loss.total.backward

    @th.no_grad()
    def _closed_form(self, network: ClosedFormMlp, batch: RolloutData, config: UpdateConfig) -> Gradient:
        """Of a plain ``MlpPolicy`` with Discrete actions."""
        activations = network.forward(batch.observations)  # type: ignore[arg-type]  # of a Box space: a tensor
        raw_logits, values = (outputs[-1] for outputs in activations)
        loss, by_raw_logits, by_values, logits = head_gradient(
            raw_logits, values.flatten(), batch.actions.long(), **_loss_arguments(batch, config)
        )
        return loss, logits, lambda: network.backward(activations, by_raw_logits, by_values.unsqueeze(-1))

    @th.no_grad()
    def _dist_params(self, batch_size: int) -> th.Tensor | None:
        """Parameters of the distribution that the policy has just made; ``None`` if it keeps none, or an older one."""
        params = distribution_parameters(getattr(self.policy, "action_dist", None))
        return params if params is not None and len(params) == batch_size else None


def _loss_arguments(batch: RolloutData, config: UpdateConfig) -> dict[str, Any]:
    advantages = normalize_advantages(batch.advantages) if config.normalize_advantage else batch.advantages
    return {
        "advantages": advantages,
        "returns": batch.returns,
        "old_values": batch.old_values,
        "old_log_prob": batch.old_log_prob,
        "clip_range": config.clip_range,
        "clip_range_vf": config.clip_range_vf,
        "ent_coef": config.ent_coef,
        "vf_coef": config.vf_coef,
    }
