"""Which policies, optimizers and losses the NumPy engine computes by hand: those that it has recognised part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.engines.inspection import adam_reason, modified_reason, parts_of_the_loss, replaced_method
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch, normalized, ppo_gradient
from sb3_ppo_from_scratch.engines.numpy_mlp.network import Layers
from sb3_ppo_from_scratch.policies import SharedMlpExtractor, SharedMlpPolicy
from sb3_ppo_from_scratch.update import Loss, PolicyOutputs, UpdateConfig, minibatch_loss

__all__ = ["layers_of", "loss_reason", "optimizer_reason", "unsupported_reason"]

_ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU)
_BUILT_INS = (FlattenExtractor, MlpExtractor, SharedMlpExtractor, nn.Flatten, nn.Sequential, nn.Linear, *_ACTIVATIONS)
_DISTRIBUTIONS = (CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution, DiagGaussianDistribution)


# ---------------------------------------------------------------- the policy


def unsupported_reason(policy: ActorCriticPolicy) -> str | None:
    """What about ``policy`` or its optimizer is not computed by hand; ``None`` if nothing."""
    if type(policy) not in (ActorCriticPolicy, SharedMlpPolicy):
        return f"it computes MlpPolicy and SharedMlpPolicy, and the policy is of type {type(policy).__name__}"
    if type(policy.action_dist) not in _DISTRIBUTIONS:
        return f"it does not compute a {type(policy.action_dist).__name__}" + " (use_sde=True)" * policy.use_sde
    if name := replaced_method(policy.action_dist):
        return f"the action distribution's {name} was replaced"
    if reason := modified_reason(policy, _BUILT_INS) or _structure_reason(policy):
        return reason
    return optimizer_reason(policy.optimizer, list(policy.parameters()))


def optimizer_reason(optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> str | None:
    """
    What is not computed by hand about an optimizer, or about the parameters it has; asked often.

    :param optimizer: a policy's
    :param parameters: all of the policy's
    """
    if reason := adam_reason(optimizer, parameters):
        return reason
    if not all(p.requires_grad and not p._backward_hooks and not p._post_accumulate_grad_hooks for p in parameters):
        return "some parameters are frozen, or have hooks"
    steps = {float(optimizer.state.get(p, {}).get("step", 0.0)) for p in parameters}
    return None if len(steps) == 1 else "some parameters have taken more optimizer steps than others"


def _structure_reason(policy: ActorCriticPolicy) -> str | None:
    """Built-in modules may stand where SB3 would not have put them; every one must be one that is computed, in its place."""
    extractor = policy.features_extractor
    if type(extractor) is not FlattenExtractor or not policy.share_features_extractor:
        return f"the features extractor must be one FlattenExtractor for both towers, not {type(extractor).__name__}"
    if type(policy.mlp_extractor) not in (MlpExtractor, SharedMlpExtractor):
        return f"mlp_extractor is of type {type(policy.mlp_extractor).__name__}"
    computed: list[Any] = [extractor, extractor.flatten, policy.mlp_extractor]
    widths = []
    for name, tower in _towers(policy):
        reason = _tower_reason(tower, policy.features_dim)
        if reason is not None:
            return f"{name} {reason}"
        computed += [tower, *tower]
        widths.append(tower[-2].out_features if len(tower) else policy.features_dim)
    for name, head, width in (("action_net", policy.action_net, widths[0]), ("value_net", policy.value_net, widths[-1])):
        if type(head) is not nn.Linear or head.in_features != width:
            return f"{name} is not a single linear layer on its tower"
        computed.append(head)
    outputs = [_n_outputs(policy.action_dist), 1]
    if [head.out_features for head in computed[-2:]] != outputs:
        return f"its heads must have {outputs} outputs"
    others = {*policy.modules()} - {policy, *computed}
    return f"it does not know {sorted(type(module).__name__ for module in others)}" if others else None


def _towers(policy: ActorCriticPolicy) -> Iterator[tuple[str, Any]]:
    extractor = policy.mlp_extractor
    names = ["trunk"] if isinstance(extractor, SharedMlpExtractor) else ["policy_net", "value_net"]
    return ((f"mlp_extractor.{name}", getattr(extractor, name)) for name in names)


def _tower_reason(tower: nn.Module, width: int) -> str | None:
    """:param width: of what comes in."""
    if type(tower) is not nn.Sequential:
        return f"is of type {type(tower).__name__}"
    modules = list(tower)
    for linear, activation in zip(modules[::2], [*modules[1::2], None], strict=False):
        if type(linear) is not nn.Linear or type(activation) not in _ACTIVATIONS or linear.in_features != width:
            return "is not made of linear layers with an activation after each"
        width = linear.out_features
    return None


def _n_outputs(distribution: Any) -> int:
    """How many numbers of the policy head a distribution is made from."""
    if isinstance(distribution, MultiCategoricalDistribution):
        return int(sum(distribution.action_dims))
    return distribution.action_dims if isinstance(distribution, BernoulliDistribution) else distribution.action_dim


def layers_of(policy: ActorCriticPolicy) -> Layers:
    """The layers of a policy that :func:`unsupported_reason` has nothing against."""
    towers = [list(zip(tower[::2], tower[1::2], strict=True)) for _, tower in _towers(policy)]
    trunk, actor, critic = (towers[0], [], []) if len(towers) == 1 else ([], *towers)
    return Layers(trunk, actor, critic, policy.action_net, policy.value_net)  # type: ignore[arg-type]  # nn.Linear, as checked


# ---------------------------------------------------------------- the loss

_AS_IMPORTED = parts_of_the_loss()


def loss_reason(loss: Loss) -> str | None:
    """
    Why the gradient by hand is not that of ``loss``; ``None`` if it is.

    The functions of :mod:`sb3_ppo_from_scratch.losses` are there to be changed. Whether they still say what is computed
    here is not believed but tried, on a few rows: once, or each time if one of them has been replaced, for what that one
    computes may depend on anything.
    """
    if loss is not minibatch_loss:
        return f"it computes PPO's own loss by hand, not {getattr(loss, '__name__', loss)}"
    if not (_agrees_as_imported() if parts_of_the_loss() == _AS_IMPORTED else _agrees()):
        return "it computes PPO's own loss by hand, and a function of losses.py or advantages.py was changed"
    return None


@cache
def _agrees_as_imported() -> bool:
    return _agrees()


def _agrees() -> bool:
    """Whether the loss and its gradient by hand are those of autograd; a function that fails on the rows does not agree."""
    config = UpdateConfig(8, 1, 0.2, None, True, 0.01, 0.5, 0.5, None)
    clipped = UpdateConfig(8, 1, 0.1, 0.3, False, 0.0, 0.7, 0.5, None)
    try:
        return all(_agrees_on(each, spread) for each in (config, clipped) for spread in (1.0, 10.0))
    except Exception:  # noqa: BLE001  # whatever a function of the user's raises
        return False


def _agrees_on(config: UpdateConfig, spread: float) -> bool:
    """:param spread: how far the rows lie apart: some functions are others far out only, as a Huber loss is"""
    rows = np.random.default_rng(0).normal(size=(7, 32))
    log_prob, entropy = rows[:2]
    values, old_values, noise, advantages, returns = spread * rows[2:]
    old_log_prob, none = log_prob + 0.3 * noise, noise[:, None]  # neither observations nor actions matter
    batch = Batch(none, none, old_values, old_log_prob, advantages, returns)
    prepared = batch._replace(advantages=normalized(advantages) if config.normalize_advantage else advantages)
    loss, grad = ppo_gradient(log_prob, values, entropy, prepared, config)
    by_hand = [*loss, *grad.values, *grad.log_prob, *[grad.entropy] * len(values)]
    inputs = [th.tensor(each, requires_grad=True) for each in (values, log_prob, entropy)]
    fields: Any = map(th.from_numpy, (none, none, old_values, old_log_prob, advantages, returns))
    with th.enable_grad():
        theirs = minibatch_loss(PolicyOutputs(inputs[0], inputs[1], inputs[2], None), RolloutData(*fields), config)
        gradients = th.autograd.grad(theirs.total, inputs, allow_unused=True)
    by_autograd = [part.item() for part in theirs]
    by_autograd += [
        x for grad, like in zip(gradients, inputs, strict=True) for x in (0 * like if grad is None else grad).tolist()
    ]
    return bool(np.allclose(by_hand, by_autograd, rtol=1e-6, atol=1e-9))
