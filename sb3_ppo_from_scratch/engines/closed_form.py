"""
The gradient of PPO's loss written out for ``MlpPolicy`` with Discrete actions: autograd's kernels in autograd's order.

Small networks spend most of an update in the bookkeeping of autograd, not in arithmetic. Here the same torch kernels are
called on the same numbers in the same order, so every bit is the same as autograd's (``tests/test_equality.py``), without a
graph. Whatever is not exactly this kind of network goes through autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn import functional as F

from sb3_ppo_from_scratch.engines.inspection import modified_reason
from sb3_ppo_from_scratch.losses import PPOLoss, approx_kl, clip_fraction, entropy_loss, value_loss

__all__ = ["CategoricalHead", "ClosedFormMlp", "head_gradient"]

_MEAN = 1  # torch's code for a loss averaged over the batch
_BUILT_INS = (FlattenExtractor, MlpExtractor, nn.Flatten, nn.Sequential, nn.Linear, nn.Tanh, nn.ReLU)


class CategoricalHead(NamedTuple):
    """A categorical distribution over ``n`` actions: normalised logits, and what follows from them."""

    logits: th.Tensor
    """``[batch_size, n]``, log-probabilities"""

    @classmethod
    def of(cls, raw_logits: th.Tensor) -> CategoricalHead:
        """From the network's outputs, ``[batch_size, n]``."""
        return cls(raw_logits - raw_logits.logsumexp(dim=-1, keepdim=True))

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """``[batch_size, 1]`` int64 to ``[batch_size]``."""
        return self.logits.gather(-1, actions).squeeze(-1)

    def probs(self) -> th.Tensor:
        """``[batch_size, n]``"""
        return F.softmax(self.logits, dim=-1)


def head_gradient(
    raw_logits: th.Tensor,
    values: th.Tensor,
    actions: th.Tensor,
    *,
    advantages: th.Tensor,
    returns: th.Tensor,
    old_values: th.Tensor,
    old_log_prob: th.Tensor,
    clip_range: float,
    clip_range_vf: float | None,
    ent_coef: float,
    vf_coef: float,
) -> tuple[PPOLoss, th.Tensor, th.Tensor, th.Tensor]:
    r"""
    :func:`sb3_ppo_from_scratch.losses.ppo_loss` of a categorical policy, and its gradient at the network's two outputs.

    With logits :math:`z`, :math:`\ell = z - \mathrm{logsumexp}(z)`, :math:`p = e^{\ell}`, ratio :math:`\rho`, batch size n:

    .. math::
        \frac{\partial L}{\partial \log\pi(a)} &= -\tfrac{1}{n} A \rho \;\text{ if } A\rho \le A\,\mathrm{clip}(\rho)
            \text{, else } 0 \\
        \frac{\partial L}{\partial \ell_j} &= [j = a] \frac{\partial L}{\partial \log\pi(a)}
            + \tfrac{c_{ent}}{n} \left( p_j + p_j (\ell_j - \textstyle\sum_i p_i \ell_i) \right) \\
        \frac{\partial L}{\partial z_j} &= \frac{\partial L}{\partial \ell_j}
            - p_j \sum_i \frac{\partial L}{\partial \ell_i} \\
        \frac{\partial L}{\partial V} &= \tfrac{2 c_{vf}}{n} (V - R) \quad (0 \text{ where the value is clipped})

    :param raw_logits: z, ``[batch_size, n_actions]``
    :param values: ``[batch_size]``
    :param actions: ``[batch_size, 1]``, int64
    :return: the loss and its parts; its gradient by ``raw_logits``; that by ``values``; the normalised logits
    """
    head = CategoricalHead.of(raw_logits)
    logits = head.logits
    log_ratio = head.log_prob(actions) - old_log_prob
    ratio = th.exp(log_ratio)
    probs = head.probs()
    bounded = th.clamp(logits, min=th.finfo(logits.dtype).min)  # -inf * 0 would be NaN in the entropy
    low, high = 1 - clip_range, 1 + clip_range
    unclipped, clipped = advantages * ratio, advantages * th.clamp(ratio, low, high)
    policy = -th.min(unclipped, clipped).mean()
    value = value_loss(values, returns, old_values, clip_range_vf)
    entropy = entropy_loss(-(bounded * probs).sum(-1), log_ratio)
    total = policy + ent_coef * entropy + vf_coef * value
    loss = PPOLoss(total, policy, value, entropy, approx_kl(log_ratio), clip_fraction(ratio, clip_range))

    scale = -th.ones_like(total) / len(values)
    by_ratio = th.where(unclipped <= clipped, scale * advantages, 0.0)
    # outside the clip range rounding can make the two equal; autograd then sends each a half, and the clip drops its own
    tied = (unclipped == clipped) & ((ratio < low) | (ratio > high))
    by_ratio = th.where(tied, by_ratio / 2, by_ratio)
    by_log_prob = by_ratio * ratio
    by_logits = th.zeros_like(logits).scatter_(-1, actions, by_log_prob.unsqueeze(-1))
    if ent_coef != 0:
        weight = th.full_like(total, ent_coef) / len(values)
        by_probs = th.ops.aten._softmax_backward_data(weight * bounded, probs, -1, logits.dtype)
        by_logits = (by_probs + weight * probs) + by_logits
    by_raw_logits = by_logits + (-by_logits).sum(-1, keepdim=True) * logits.exp()
    by_values = _value_gradient(values, returns, old_values, clip_range_vf, th.full_like(total, vf_coef))
    return loss, by_raw_logits, by_values, logits


def _value_gradient(
    values: th.Tensor, returns: th.Tensor, old_values: th.Tensor, clip_range_vf: float | None, weight: th.Tensor
) -> th.Tensor:
    """Gradient of ``weight * value_loss`` by the values, ``[batch_size]``."""
    if clip_range_vf is None:
        return th.ops.aten.mse_loss_backward(weight, values, returns, _MEAN)
    change = values - old_values
    clipped = old_values + th.clamp(change, -clip_range_vf, clip_range_vf)
    gradient = th.ops.aten.mse_loss_backward(weight, clipped, returns, _MEAN)
    return th.where((change >= -clip_range_vf) & (change <= clip_range_vf), gradient, 0.0)


class ClosedFormMlp:
    """
    The two towers of an ``MlpPolicy``, forwards and backwards, on the policy's own parameters.

    :param policy: one that :meth:`of` accepts
    """

    def __init__(self, policy: ActorCriticPolicy):
        self.actor = [*policy.mlp_extractor.policy_net, policy.action_net]
        self.critic = [*policy.mlp_extractor.value_net, policy.value_net]

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> ClosedFormMlp | None:
        """
        For an ``MlpPolicy`` as SB3 builds it, with Discrete actions, vectors as observations, Tanh or ReLU, on CPU, without
        hooks or shared weights; ``None`` for any other policy.
        """
        space = policy.observation_space
        plain = (
            type(policy) is ActorCriticPolicy
            and type(policy.action_dist) is CategoricalDistribution
            and isinstance(space, spaces.Box)
            and not is_image_space(space)
            and policy.share_features_extractor
            and modified_reason(policy, _BUILT_INS) is None
            # autograd multiplies [1, 1] matrices the other way round
            and not any(isinstance(module, nn.Linear) and module.in_features == 1 for module in policy.modules())
        )
        return cls(policy) if plain else None

    def act(self, obs: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: ``[n_envs, *obs_shape]``
        :return: sampled actions ``[n_envs]``, values ``[n_envs, 1]``, log-probabilities ``[n_envs]``, logits ``[n_envs, n]``
        """
        features = obs.float().flatten(1)
        head = CategoricalHead.of(_forward(self.actor, features)[-1])
        values = _forward(self.critic, features)[-1]
        actions = th.multinomial(head.probs(), 1, True)
        return actions.squeeze(-1), values, head.log_prob(actions), head.logits

    def forward(self, obs: th.Tensor) -> tuple[list[th.Tensor], list[th.Tensor]]:
        """
        :param obs: ``[batch_size, *obs_shape]``
        :return: for each tower its input and every layer's output; the last are raw logits and values
        """
        features = obs.float().flatten(1)
        return _forward(self.actor, features), _forward(self.critic, features)

    @th.no_grad()
    def backward(
        self, activations: tuple[list[th.Tensor], list[th.Tensor]], by_raw_logits: th.Tensor, by_values: th.Tensor
    ) -> None:
        """Put the gradient into every parameter's ``grad``, from that at the outputs and what :meth:`forward` returned."""
        _backward(self.actor, activations[0], by_raw_logits)
        _backward(self.critic, activations[1], by_values)


def _forward(layers: list[nn.Module], features: th.Tensor) -> list[th.Tensor]:
    outputs = [features]
    for layer in layers:
        x = outputs[-1]
        if isinstance(layer, nn.Linear):
            outputs.append(F.linear(x, layer.weight, layer.bias))
        else:
            outputs.append(th.tanh(x) if isinstance(layer, nn.Tanh) else th.relu(x))
    return outputs


def _backward(layers: list[nn.Module], outputs: list[th.Tensor], gradient: th.Tensor) -> None:
    r"""
    From the gradient :math:`g` at a layer's output to that at its input, last layer first.

    ``y = x W^T + b``: :math:`\partial W = g^T x,\; \partial b = \sum g,\; \partial x = g W`.
    ``y = tanh(x)``: :math:`g (1 - y^2)`. ``y = relu(x)``: :math:`g` where :math:`y > 0`.
    """
    for index in reversed(range(len(layers))):
        layer = layers[index]
        if isinstance(layer, nn.Linear):
            layer.weight.grad = gradient.t().mm(outputs[index])
            layer.bias.grad = gradient.sum(0)
            if index > 0:
                gradient = gradient.mm(layer.weight)
        elif isinstance(layer, nn.Tanh):
            gradient = th.ops.aten.tanh_backward(gradient, outputs[index + 1])
        else:
            gradient = th.ops.aten.threshold_backward(gradient, outputs[index + 1], 0)
