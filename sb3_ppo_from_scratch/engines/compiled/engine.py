"""The engine: the NumPy engine with updates by the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from typing_extensions import override

from sb3_ppo_from_scratch.engines.compiled.learning import CompiledLearner
from sb3_ppo_from_scratch.engines.compiled.library import MAX_LAYERS, Layer, Update, kernel_reason, load_kernel
from sb3_ppo_from_scratch.engines.inspection import adam_reason
from sb3_ppo_from_scratch.engines.numpy_mlp.engine import NumpyEngine
from sb3_ppo_from_scratch.engines.numpy_mlp.flat import FlatParameters
from sb3_ppo_from_scratch.engines.numpy_mlp.heads import BernoulliHead, CategoricalHead, Head
from sb3_ppo_from_scratch.engines.numpy_mlp.support import layers_of
from sb3_ppo_from_scratch.update import Learner, UpdateConfig

__all__ = ["CompiledEngine"]

_ACTIVATIONS = (type(None), nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU)
"""In the order of kernel.h."""


class CompiledEngine(NumpyEngine):
    """Plain MLP policies with Adam on one CPU thread, like its base, with updates by a small library in C."""

    name = "compiled"
    shares_minibatches = False

    @classmethod
    @override
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        if reason := super().unsupported_reason(policy) or adam_reason(policy.optimizer) or kernel_reason():
            return reason
        if isinstance(policy.action_dist, StateDependentNoiseDistribution):
            return "it computes no gSDE (use_sde=True)"
        return f"it takes at most {MAX_LAYERS} layers" if len(_layers(policy)) > MAX_LAYERS else None

    @override
    def objection(self) -> str | None:
        return super().objection() or adam_reason(self.policy.optimizer)

    @override
    def _attach(self) -> None:
        super()._attach()
        self._kernel = load_kernel()
        self._update = Update(n_parameters=self.flat.size)
        self._describe_network(self._update)
        self._update.parameters, self._update.gradient = self.flat.vector.ctypes.data, self.flat.gradient.ctypes.data
        for name, vector in self.optimizer.vectors.items():
            setattr(self._update, name, vector.ctypes.data)

    def _describe_network(self, update: Update) -> None:
        layers = [_layer(*each, self.flat) for each in _layers(self.policy)]
        self._layers = (Layer * len(layers))(*layers)  # the kernel reads its memory
        update.layers, update.n_layers = ctypes.addressof(self._layers), len(layers)
        update.n_features = self.policy.features_dim
        update.distribution, sizes = _distribution(self.head, layers[-2].outputs)
        self._sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        update.sizes, update.n_actions = ctypes.addressof(self._sizes), len(sizes)
        is_gaussian = hasattr(self.policy, "log_std")
        update.log_std = self.flat.start_of(self.policy.log_std) if is_gaussian else 0
        update.n_dist_params = layers[-2].outputs * (1 + is_gaussian)

    @override
    @contextmanager
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[Any]]:
        self.begin_rollout()
        self.flat.publish_gradient()
        yield CompiledLearner(buffer, config, self._kernel, self._update, self.optimizer, self.features)


def _layers(policy: ActorCriticPolicy) -> list[tuple[int, nn.Linear, nn.Module | None]]:
    """All layers in the order of computation, each with the one that it comes after (-1 for the observations); heads last."""
    layers = layers_of(policy)
    found: list[tuple[int, nn.Linear, nn.Module | None]] = []

    def build(tower: list[tuple[nn.Linear, nn.Module]], source: int) -> int:
        for linear, activation in tower:
            found.append((source, linear, activation))
            source = len(found) - 1
        return source

    trunk = build(layers.trunk, -1)
    actor, critic = build(layers.actor, trunk), build(layers.critic, trunk)
    return [*found, (actor, layers.action_net, None), (critic, layers.value_net, None)]


def _layer(source: int, linear: nn.Linear, activation: nn.Module | None, flat: FlatParameters) -> Layer:
    coefficient: Any = getattr(activation, "negative_slope", getattr(activation, "alpha", 0.0))
    return Layer(
        source,
        linear.in_features,
        linear.out_features,
        _ACTIVATIONS.index(type(activation)),
        coefficient,
        flat.start_of(linear.weight),
        flat.start_of(linear.bias),
    )


def _distribution(head: Head, n_outputs: int) -> tuple[int, list[int]]:
    """Its number in kernel.h, and for each number of an action how many choices there are, where that means anything."""
    if isinstance(head, CategoricalHead):
        return 0, head.sizes
    return (1 if isinstance(head, BernoulliHead) else 2), [0] * n_outputs
