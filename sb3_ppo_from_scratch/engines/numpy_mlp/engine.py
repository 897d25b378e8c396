"""
The loop: policy step, gradient and Adam in NumPy, for plain MLP policies on a CPU.

Small networks spend their time not in arithmetic but in getting to it. Here a minibatch is some eighty calls of NumPy on
arrays that share their memory with the policy's own parameters: no graph, no copies, no loop over parameters. Random numbers
are drawn as the reference engine draws them, so the two differ by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ppo_from_scratch.buffer import is_ours
from sb3_ppo_from_scratch.engines.base import NAN_MESSAGE, Engine, PolicyStep
from sb3_ppo_from_scratch.engines.inspection import modified_reason
from sb3_ppo_from_scratch.engines.numpy_mlp.flat import FlatAdam, FlatParameters
from sb3_ppo_from_scratch.engines.numpy_mlp.heads import BernoulliHead, CategoricalHead, GaussianHead, Head
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch, OutputGradients, normalized, ppo_gradient
from sb3_ppo_from_scratch.engines.numpy_mlp.network import ActorCriticNetwork, Layers, parameter_order
from sb3_ppo_from_scratch.engines.numpy_mlp.threads import single_threaded
from sb3_ppo_from_scratch.errors import NonFiniteError
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.policies import SharedMlpExtractor, SharedMlpPolicy
from sb3_ppo_from_scratch.update import UpdateConfig, UpdateStats, accept

__all__ = ["NumpyEngine"]

_ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU)
_BUILT_INS = (FlattenExtractor, MlpExtractor, SharedMlpExtractor, nn.Flatten, nn.Sequential, nn.Linear, *_ACTIVATIONS)
_DISTRIBUTIONS = (CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution, DiagGaussianDistribution)


class NumpyEngine(Engine):
    """Closed-form PPO for plain MLP policies with Adam, on one CPU thread."""

    name = "numpy"

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32"):
        super().__init__(policy, precision)
        self._attach()

    @classmethod
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        """See :meth:`Engine.unsupported_reason`."""
        if type(policy) not in (ActorCriticPolicy, SharedMlpPolicy):
            return f"it computes MlpPolicy and SharedMlpPolicy, and the policy is of type {type(policy).__name__}"
        if type(policy.action_dist) not in _DISTRIBUTIONS:
            return f"it does not compute a {type(policy.action_dist).__name__}" + " (use_sde=True)" * policy.use_sde
        return modified_reason(policy, _BUILT_INS) or _structure_reason(policy) or _optimizer_reason(policy)

    # ----------------------------------------------------------------- memory

    def begin_rollout(self) -> None:
        """See :meth:`Engine.begin_rollout`."""
        layers = layers_of(self.policy)
        known = self._layers == layers and self._optimizer is self.policy.optimizer
        if not (known and self._flat.is_current() and self._adam.is_current()):
            self._attach()

    def _attach(self) -> None:
        """Lay the parameters and the optimizer's state side by side, and build the network on them."""
        policy = self.policy
        self._layers, self._optimizer = layers_of(policy), policy.optimizer
        order = parameter_order(self._layers)
        if isinstance(policy.action_dist, DiagGaussianDistribution):
            order.append(policy.log_std)
        self._flat = FlatParameters(order)
        self._adam = FlatAdam(policy.optimizer, self._flat)
        self._network = ActorCriticNetwork(self._layers, self._flat)
        self._head = self._make_head()
        self._action_shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]  # known for such a space

    def _make_head(self) -> Head:
        distribution = self.policy.action_dist
        if isinstance(distribution, CategoricalDistribution):
            return CategoricalHead([distribution.action_dim])
        if isinstance(distribution, MultiCategoricalDistribution):
            return CategoricalHead([int(size) for size in distribution.action_dims])
        if isinstance(distribution, BernoulliDistribution):
            return BernoulliHead()
        log_std, by_log_std = self._flat.arrays(self.policy.log_std)
        return GaussianHead(log_std[0], by_log_std[0])

    # ---------------------------------------------------------------- rollout

    @np.errstate(all="ignore")  # numbers underflow in silence, as in torch
    def act(self, obs: PyTorchObs) -> PolicyStep:
        """See :meth:`Engine.act`."""
        head = self._head
        features = self._features(obs.numpy())  # type: ignore[union-attr]  # no Dict gets here
        with single_threaded(len(features) * self._network.largest_layer):
            outputs, values = self._network.forward(features)
        given = head.forward(outputs)
        actions = head.sample(given)
        log_prob = head.log_prob(given, head.encode(actions))
        if not math.isfinite(np.add.reduce(log_prob)):
            raise NonFiniteError("probabilities", NAN_MESSAGE)
        return PolicyStep(
            actions.reshape(-1, *self._action_shape),
            th.from_numpy(values[:, None]),
            th.from_numpy(log_prob),
            th.from_numpy(head.parameters(given)),
        )

    @np.errstate(all="ignore")
    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """See :meth:`Engine.predict_values`."""
        return th.from_numpy(self._network.forward(self._features(obs.numpy()))[1])[:, None]  # type: ignore[union-attr]  # likewise

    def _features(self, obs: np.ndarray) -> np.ndarray:
        """``[B, n_features]``, as SB3's ``FlattenExtractor`` makes them; a view where the observations are float32."""
        if obs.dtype != np.float32:  # float32 is a Box of reals, which SB3 takes as it is
            policy = self.policy
            tensor = preprocess_obs(th.from_numpy(obs), policy.observation_space, normalize_images=policy.normalize_images)
            obs = tensor.numpy()  # type: ignore[union-attr]  # only Dict observations yield a dict
        return obs.reshape(len(obs), -1)

    # ----------------------------------------------------------------- update

    def update(self, buffer: RolloutBuffer, config: UpdateConfig) -> UpdateStats:
        """See :meth:`Engine.update`; the loop is :meth:`TorchEngine.update`'s."""
        self.begin_rollout()
        self._flat.publish_gradient()
        stats = UpdateStats()
        # numbers overflow in silence, as in torch
        with np.errstate(all="ignore"), single_threaded(config.batch_size * self._network.largest_layer):
            for minibatches in self._epochs(buffer, config):
                old_and_new = self._train_epoch(minibatches, config, stats)
                if stats.stopped_early or stats.epochs == config.n_epochs:
                    break
            if old_and_new:
                stats.kl = sum(self._head.mean_kl(old, new) for old, new in old_and_new) / len(old_and_new)
        return stats

    def _train_epoch(
        self, minibatches: Iterable[Batch], config: UpdateConfig, stats: UpdateStats
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """One pass over the data: the distributions' parameters, old and new, of each minibatch."""
        old_and_new = []
        stats.begin_epoch()
        for batch in minibatches:
            loss, by, given = self._forward(batch, config)
            if not accept("loss", float(loss.total), config.nan_policy, stats):
                continue
            if batch.dist_params is not None:
                old_and_new.append((batch.dist_params, self._head.parameters(given)))
            if config.target_kl is not None and loss.approx_kl > 1.5 * config.target_kl:
                stats.stopped_early = True
                stats.add(loss)
                break
            self._network.backward(self._head.gradient(given, batch.actions, by.log_prob, by.entropy), by.values)
            norm = self._clip_gradient(config.max_grad_norm)
            if accept("gradient", norm, config.nan_policy, stats):
                stats.add(loss, norm)
                self._adam.step()
        return old_and_new

    def _epochs(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Iterable[Batch]]:
        """Epochs without end, each of prepared minibatches. Ours is gathered once per epoch; others hand out their own."""
        if not is_ours(buffer):
            while True:
                samples = map(Batch.of, buffer.get(config.batch_size))  # type: ignore[arg-type]  # the same first six fields
                yield (self._prepared(batch, config) for batch in samples)
        data = Batch.of(buffer.dataset())
        size = len(data.advantages)
        whole = self._prepared(data, config) if size <= config.batch_size else None
        while True:
            order = np.random.permutation(size)
            if whole is not None:  # its order would change nothing but rounding
                yield [whole]
            else:
                yield (self._prepared(batch, config) for batch in data.take(order).cut(config.batch_size))

    def _prepared(self, batch: Batch, config: UpdateConfig) -> Batch:
        """A minibatch as :meth:`_forward` takes it: all that can be done about it without the network."""
        return batch._replace(
            observations=self._features(batch.observations),
            actions=self._head.encode(batch.actions),
            advantages=normalized(batch.advantages) if config.normalize_advantage else batch.advantages,
        )

    def _forward(self, batch: Batch, config: UpdateConfig) -> tuple[PPOLoss, OutputGradients, Any]:
        """The loss of a minibatch, its gradient, and the distribution that that is the gradient by."""
        outputs, values = self._network.forward(batch.observations)
        given = self._head.forward(outputs)
        log_prob, entropy = self._head.log_prob(given, batch.actions), self._head.entropy(given)
        loss, gradients = ppo_gradient(log_prob, values, entropy, batch, config)
        return loss, gradients, given

    def _clip_gradient(self, max_grad_norm: float) -> float:
        """Scale the gradient down to that norm, as torch does; returns the norm before."""
        gradient = self._flat.gradient
        norm = math.sqrt(np.dot(gradient, gradient))
        scale = max_grad_norm / (norm + 1e-6)
        if scale < 1:
            gradient *= scale
        return norm


def layers_of(policy: ActorCriticPolicy) -> Layers:
    """The layers of an ``MlpPolicy`` or a ``SharedMlpPolicy``."""
    extractor = policy.mlp_extractor
    if isinstance(extractor, SharedMlpExtractor):
        return Layers(_pairs(extractor.trunk), [], [], policy.action_net, policy.value_net)  # type: ignore[arg-type]
    actor, critic = _pairs(extractor.policy_net), _pairs(extractor.value_net)
    return Layers([], actor, critic, policy.action_net, policy.value_net)  # type: ignore[arg-type]  # nn.Linear, as checked


def _pairs(tower: nn.Sequential) -> list[tuple[nn.Linear, nn.Module]]:
    modules = list(tower)
    return list(zip(modules[::2], modules[1::2], strict=True))  # type: ignore[arg-type]  # as SB3 alternates them


def _structure_reason(policy: ActorCriticPolicy) -> str | None:
    """Built-in modules may still stand where SB3 would not have put them."""
    extractor = policy.mlp_extractor
    if not isinstance(policy.features_extractor, FlattenExtractor):
        return f"the features extractor is of type {type(policy.features_extractor).__name__}"
    if not isinstance(policy.action_net, nn.Linear) or not isinstance(policy.value_net, nn.Linear):
        return "a head is not a single linear layer"
    towers = [extractor.trunk] if isinstance(extractor, SharedMlpExtractor) else [extractor.policy_net, extractor.value_net]
    for tower in towers:
        modules = list(tower)
        if len(modules) % 2 or not all(
            isinstance(linear, nn.Linear) and isinstance(activation, _ACTIVATIONS)
            for linear, activation in zip(modules[::2], modules[1::2], strict=True)
        ):
            return "its layers are not linear ones with an activation after each"
    return None


def _optimizer_reason(policy: ActorCriticPolicy) -> str | None:
    optimizer = policy.optimizer
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return f"it computes Adam and AdamW, and the optimizer is of type {type(optimizer).__name__}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        return "there are hooks on the optimizer, or its step was replaced"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} parameter groups"
    group = optimizer.param_groups[0]
    if group.get("capturable") or group.get("differentiable") or isinstance(group["lr"], th.Tensor):
        return "the optimizer is capturable or differentiable, or its learning rate is a tensor"
    steps = {optimizer.state[p]["step"].item() if p in optimizer.state else 0.0 for p in group["params"]}
    return None if len(steps) == 1 else "some parameters have taken more optimizer steps than others"
