"""The policy step, stripped of all that the next action does not depend on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sb3_ppo_from_scratch.engines.numpy_mlp.activations import Activation
from sb3_ppo_from_scratch.engines.numpy_mlp.network import ActorCriticNetwork

__all__ = ["Actor"]


class Actor:
    r"""
    The actor's layers and the policy head, for a few observations at a time, with the weights as they are now.

    Such small products cost less than the calls that they take, so the bias is a row more of the weights, under a feature that
    is always 1: :math:`y = f([x, 1] [W, b]^T)`.

    :param network: holds the weights, of which this is a copy
    :param n_envs: number of observations
    """

    def __init__(self, network: ActorCriticNetwork, n_envs: int):
        self.n_envs = n_envs
        dtype = network.action_weight.dtype
        layers = [(layer.weight[0], layer.bias[0, 0], layer.activation) for layer in network.stacks[0].layers]
        self._hidden = []
        self._features = x = _with_ones(n_envs, network.action_weight.shape[1] if not layers else layers[0][0].shape[1], dtype)
        for weight, bias, activation in layers:
            y = _with_ones(n_envs, len(weight), dtype)
            self._hidden.append(
                _Hidden(x, _augmented(weight, bias), np.empty((n_envs, len(weight)), dtype), activation, y[:, :-1])
            )
            x = y
        self._latent, self._head = x, _augmented(network.action_weight, network.action_bias[:, 0])
        self._inputs = self._features[:, :-1]
        self._outputs = np.empty((n_envs, len(network.action_weight)), dtype)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """
        :param features: ``[n_envs, n_features]``
        :return: the policy head's outputs, ``[n_envs, n_outputs]``; overwritten by the next call
        """
        self._inputs[...] = features
        for x, weight, product, activation, y in self._hidden:
            np.dot(x, weight, out=product)
            activation.forward(product, y)
        return np.dot(self._latent, self._head, out=self._outputs)

    @property
    def latent(self) -> np.ndarray:
        """What the last outputs were made of, ``[n_envs, latent_dim]``."""
        return self._latent[:, :-1]


class _Hidden(NamedTuple):
    x: np.ndarray
    """``[B, n_in + 1]``"""
    weight: np.ndarray
    """``[n_in + 1, n_out]``"""
    product: np.ndarray
    """``[B, n_out]``"""
    activation: Activation
    y: np.ndarray
    """``[B, n_out]``, a part of the next layer's x"""


def _with_ones(n_rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    array = np.empty((n_rows, width + 1), dtype)
    array[:, -1] = 1
    return array


def _augmented(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """From ``[n_out, n_in]`` and ``[n_out]`` to ``[n_in + 1, n_out]``."""
    return np.concatenate([weight.T, bias[None]])
