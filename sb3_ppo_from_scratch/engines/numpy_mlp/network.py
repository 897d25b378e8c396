"""The layers of an MLP actor-critic on NumPy arrays: forwards, and backwards into the flat gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch as th
from torch import nn

from sb3_ppo_from_scratch.engines.numpy_mlp.activations import Activation, activation_of
from sb3_ppo_from_scratch.engines.numpy_mlp.flat import FlatParameters

__all__ = ["ActorCriticNetwork", "Layers", "Stack", "parameter_order"]


class Layers(NamedTuple):
    """An actor-critic's fully connected layers, each with the activation that follows it. One trunk, or two towers."""

    trunk: list[tuple[nn.Linear, nn.Module]]
    actor: list[tuple[nn.Linear, nn.Module]]
    critic: list[tuple[nn.Linear, nn.Module]]
    action_net: nn.Linear
    value_net: nn.Linear

    def stacks(self) -> list[list[list[tuple[nn.Linear, nn.Module]]]]:
        """
        Groups of towers that can be computed together, layer by layer: two towers of one shape, else each by itself.

        :return: stacks of layers; each layer has one member per tower
        """
        if self.trunk or not (self.actor or self.critic):
            return [[[layer] for layer in self.trunk]]
        if list(map(_shape, self.actor)) == list(map(_shape, self.critic)):
            return [[list(pair) for pair in zip(self.actor, self.critic, strict=True)]]
        return [[[layer] for layer in tower] for tower in (self.actor, self.critic)]


def _shape(layer: tuple[nn.Linear, nn.Module]) -> tuple[int, int, str]:
    linear, activation = layer
    return linear.in_features, linear.out_features, repr(activation)


def parameter_order(layers: Layers) -> list[th.Tensor]:
    """Weights, and biases, that are computed with together lie side by side."""
    order: list[th.Tensor] = []
    for stack in layers.stacks():
        for members in stack:
            order += [linear.weight for linear, _ in members]
            order += [linear.bias for linear, _ in members]
    for head in (layers.action_net, layers.value_net):
        order += [head.weight, head.bias]
    return order


class Stack:
    r"""
    Fully connected layers of G towers side by side, as ``[G, ...]`` arrays.

    Forwards :math:`y = f(x W^T + b)`. Backwards, with the gradient g by y:
    :math:`h = g f'(x W^T + b),\; \partial W = h^T x,\; \partial b = \sum h,\; \partial x = h W`.

    :param members: for each layer, its G linear modules with their activations
    :param flat: holds their parameters
    :param latent_dim: width of the last layer, or without layers of the features
    """

    def __init__(self, members: list[list[tuple[nn.Linear, nn.Module]]], flat: FlatParameters, latent_dim: int):
        self.groups = len(members[0]) if members else 1
        self.latent_dim = latent_dim
        self.layers = [_Layer.of(layer, flat) for layer in members]
        self._memory = np.empty(0, flat.vector.dtype)
        self._workspace = lru_cache(maxsize=32)(self._lay_out)

    def _lay_out(self, batch_size: int) -> _Workspace:
        """Batch sizes vary where reset rows are left out, and fresh memory costs more than what is written into it."""
        shapes = [(self.groups, batch_size, layer.weight.shape[1]) for layer in self.layers]
        latent = (self.groups, batch_size, self.latent_dim)
        new = self._cutter(3 * sum(map(math.prod, shapes)) + math.prod(latent))
        inputs = [new(shape) for shape in shapes]
        outputs = [x if layer.activation.in_place else new(x.shape) for x, layer in zip(inputs, self.layers, strict=True)]
        gradients = [new(latent)]
        for index in reversed(range(1, len(shapes))):  # a layer's output has done its duty when the gradient below it comes up
            fits = shapes[index] == shapes[index - 1]
            gradients.insert(0, outputs[index] if fits else new(shapes[index - 1]))
        return _Workspace(inputs, outputs, gradients, np.ones((1, batch_size), self._memory.dtype))

    def _cutter(self, size: int) -> Callable[[tuple[int, ...]], np.ndarray]:
        """
        What cuts arrays of given shapes, of up to ``size`` numbers in all, from the one memory, which grows if need be.

        Each begins a cache line, and none a whole number of pages after another: caches would keep them in the same places.
        """
        line, gap = 64 // self._memory.itemsize, 1088 // self._memory.itemsize
        size += line + 3 * (len(self.layers) + 1) * (line + gap)
        if size > len(self._memory):
            self._workspace.cache_clear()
            self._memory = np.empty(size, self._memory.dtype)
        aligned = self._memory[-self._memory.ctypes.data % 64 // self._memory.itemsize :]
        start = 0

        def new(shape: tuple[int, ...]) -> np.ndarray:
            nonlocal start
            first, stop = start, start + math.prod(shape)
            start = -(-stop // line) * line + gap
            return aligned[first:stop].reshape(shape)

        return new

    def forward(self, features: np.ndarray) -> np.ndarray:
        """
        :param features: ``[B, n_features]``
        :return: ``[G, B, width]``, or without layers ``[1, B, n_features]``; overwritten by the next call
        """
        inputs, outputs, _, _ = self._workspace(len(features))
        latent = features[None]
        for layer, x, y in zip(self.layers, inputs, outputs, strict=True):
            np.matmul(latent, layer.transposed, out=x)
            x += layer.bias
            layer.activation.forward(x, y)
            latent = y
        return latent

    def grad_latent(self, batch_size: int) -> np.ndarray:
        """Where the gradient by what :meth:`forward` returned goes, of its shape."""
        return self._workspace(batch_size).gradients[-1]

    def backward(self, features: np.ndarray) -> None:
        """
        Fill the layers' gradients, from that in :meth:`grad_latent`. The activations are used up.

        :param features: what :meth:`forward` was given last
        """
        inputs, outputs, gradients, ones = self._workspace(len(features))
        for index in reversed(range(len(self.layers))):
            layer, gradient = self.layers[index], gradients[index]
            layer.activation.backward(inputs[index], outputs[index], gradient)
            below = outputs[index - 1] if index > 0 else features[None]
            np.matmul(gradient.transpose(0, 2, 1), below, out=layer.grad_weight)
            np.matmul(ones, gradient, out=layer.grad_bias)
            if index > 0:
                np.matmul(gradient, layer.weight, out=gradients[index - 1])


class _Layer(NamedTuple):
    """One layer of G towers."""

    weight: np.ndarray
    """``[G, n_out, n_in]``"""
    transposed: np.ndarray
    """the same memory as ``[G, n_in, n_out]``"""
    bias: np.ndarray
    """``[G, 1, n_out]``"""
    grad_weight: np.ndarray
    grad_bias: np.ndarray
    activation: Activation

    @classmethod
    def of(cls, members: list[tuple[nn.Linear, nn.Module]], flat: FlatParameters) -> _Layer:
        weight, grad_weight = flat.arrays(*(linear.weight for linear, _ in members))
        bias, grad_bias = flat.arrays(*(linear.bias for linear, _ in members))
        activation = activation_of(members[0][1])
        assert activation is not None  # or the engine would not have taken this policy
        return cls(weight, weight.transpose(0, 2, 1), bias[:, None], grad_weight, grad_bias[:, None], activation)


class _Workspace(NamedTuple):
    """Arrays for one batch size, ``[G, B, width]`` for each layer."""

    inputs: list[np.ndarray]
    """of the activations"""
    outputs: list[np.ndarray]
    """of the activations; the inputs themselves where these work in place"""
    gradients: list[np.ndarray]
    """by the outputs"""
    ones: np.ndarray
    """``[1, B]``: a product with it sums over the batch"""


class ActorCriticNetwork:
    """
    The whole network: stacks of layers with a policy head and a value head on top.

    :param layers: of the policy
    :param flat: holds their parameters, in :func:`parameter_order`
    """

    def __init__(self, layers: Layers, flat: FlatParameters):
        latent_dims = (layers.action_net.in_features, layers.value_net.in_features)
        self._features = np.empty((0, 0))
        self._latents: list[np.ndarray] = []
        self.largest_layer = max(parameter.numel() for parameter in flat.parameters)
        # a stack of two towers has one width, that of either head
        self.stacks = [Stack(stack, flat, width) for stack, width in zip(layers.stacks(), latent_dims, strict=False)]
        (weight, grad_weight), (bias, grad_bias) = flat.arrays(layers.action_net.weight), flat.arrays(layers.action_net.bias)
        self.action_weight, self.grad_action_weight = weight[0], grad_weight[0]
        self.action_bias, self.grad_action_bias = bias[0][:, None], grad_bias[0]
        (weight, grad_weight), (bias, grad_bias) = flat.arrays(layers.value_net.weight), flat.arrays(layers.value_net.bias)
        self.value_weight, self.grad_value_weight = weight[0, 0], grad_weight[0, 0]
        self.value_bias, self.grad_value_bias = bias[0], grad_bias[0]

    def forget(self) -> None:
        """Let go of what :meth:`forward` was given: it may be a view of a whole rollout."""
        self._features, self._latents = self._features[:0].copy(), []

    def forward(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param features: ``[B, n_features]``
        :return: the policy head's outputs ``[n_outputs, B]`` and the values ``[B]``
        """
        self._features = features
        self._latents = [latent for stack in self.stacks for latent in stack.forward(features)]
        outputs = self.action_weight @ self._latents[0].T
        outputs += self.action_bias
        values = self._latents[-1] @ self.value_weight
        values += self.value_bias
        return outputs, values

    @property
    def latent(self) -> np.ndarray:
        """What the last :meth:`forward` made the policy head's outputs of, ``[B, latent_dim]``."""
        return self._latents[0]

    def backward(self, grad_outputs: np.ndarray, grad_values: np.ndarray) -> None:
        """
        Fill the gradient of every layer, of the last :meth:`forward`, whose activations are used up.

        :param grad_outputs: ``[n_outputs, B]``
        :param grad_values: ``[B]``
        """
        np.matmul(grad_outputs, self._latents[0], out=self.grad_action_weight)
        np.add.reduce(grad_outputs, axis=1, out=self.grad_action_bias)
        np.matmul(grad_values, self._latents[-1], out=self.grad_value_weight)
        np.add.reduce(grad_values, keepdims=True, out=self.grad_value_bias)
        grad_latents = [latent for stack in self.stacks for latent in stack.grad_latent(len(grad_values))]
        np.matmul(grad_outputs.T, self.action_weight, out=grad_latents[0])
        if len(grad_latents) == 1:  # both heads on one trunk
            grad_latents[0] += grad_values[:, None] * self.value_weight
        else:
            np.multiply(grad_values[:, None], self.value_weight, out=grad_latents[1])
        for stack in self.stacks:
            stack.backward(self._features)
