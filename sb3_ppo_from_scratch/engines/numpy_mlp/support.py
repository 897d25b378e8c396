"""Which policies, optimizers and losses the NumPy engine computes by hand: those that it has recognised part by part."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor
from torch import nn

from sb3_ppo_from_scratch import losses
from sb3_ppo_from_scratch.advantages import normalize_advantages
from sb3_ppo_from_scratch.engines.inspection import (
    ADAM,
    RMSPROP,
    modified_reason,
    parts_of_the_loss,
    replaced_method,
    step_reason,
)
from sb3_ppo_from_scratch.engines.numpy_mlp.network import Layers
from sb3_ppo_from_scratch.policies import MASKABLE, SharedMlpExtractor, SharedMlpPolicy, imported
from sb3_ppo_from_scratch.update import Loss, minibatch_loss

__all__ = ["layers_of", "loss_reason", "optimizer_reason", "source_digest", "unsupported_reason"]

_ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU)
_EXTRACTORS = (FlattenExtractor, CombinedExtractor, MlpExtractor, SharedMlpExtractor)
_BUILT_INS = (*_EXTRACTORS, nn.Flatten, nn.Sequential, nn.ModuleDict, nn.Linear, *_ACTIVATIONS)
_DISTRIBUTIONS = (
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
    DiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
_POLICIES = (ActorCriticPolicy, MultiInputActorCriticPolicy, SharedMlpPolicy)
_MASKABLE_POLICIES = [MASKABLE[name] for name in ("MaskableMlpPolicy", "MaskableMultiInputPolicy")]
_MASKED_DISTRIBUTIONS = [
    f"sb3_contrib.common.maskable.distributions:Maskable{kind}Distribution"
    for kind in ("Categorical", "MultiCategorical", "Bernoulli")
]


# ---------------------------------------------------------------- the policy


def unsupported_reason(policy: ActorCriticPolicy) -> str | None:
    """What about ``policy`` or its optimizer is not computed by hand; ``None`` if nothing."""
    if type(policy) not in (*_POLICIES, *map(imported, _MASKABLE_POLICIES)):
        return f"it computes policies of fully connected layers, and this one is of type {type(policy).__name__}"
    if type(policy.action_dist) not in (*_DISTRIBUTIONS, *map(imported, _MASKED_DISTRIBUTIONS)):
        return f"it does not compute a {type(policy.action_dist).__name__}"
    if getattr(policy.action_dist, "bijector", None) is not None or getattr(policy.action_dist, "learn_features", False):
        return "it computes gSDE without squash_output and learn_features"
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
    if reason := step_reason(optimizer, (*ADAM, *RMSPROP), parameters):
        return reason
    if not all(p.requires_grad and not p._backward_hooks and not p._post_accumulate_grad_hooks for p in parameters):
        return "some parameters are frozen, or have hooks"
    steps = {float(optimizer.state.get(p, {}).get("step", 0.0)) for p in parameters}
    return None if len(steps) == 1 else "some parameters have taken more optimizer steps than others"


def _structure_reason(policy: ActorCriticPolicy) -> str | None:
    """Built-in modules may stand where SB3 would not have put them; every one must be one that is computed, in its place."""
    extractor = policy.features_extractor
    if type(extractor) not in (FlattenExtractor, CombinedExtractor) or not policy.share_features_extractor:
        return f"the features extractor must be one that flattens, for both towers, not {type(extractor).__name__}"
    for name, module in extractor.named_modules():
        if module is not extractor and type(module) not in (nn.Flatten, nn.ModuleDict):
            return f"features_extractor.{name} is of type {type(module).__name__}"
    if type(policy.mlp_extractor) not in (MlpExtractor, SharedMlpExtractor):
        return f"mlp_extractor is of type {type(policy.mlp_extractor).__name__}"
    computed: list[Any] = [*extractor.modules(), policy.mlp_extractor]
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
    if hasattr(distribution, "apply_masking"):
        return sum(getattr(distribution, "action_dims", [])) or distribution.action_dim
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
_WRITTEN_FOR = "5e412f64eed449a0c70e3ca585b74b4845fb5c4034ec43a86bb40e289b028124"
"""Of the sources that the gradient by hand was derived from, see :func:`source_digest`"""


def loss_reason(loss: Loss) -> str | None:
    """
    Why the gradient by hand is not that of ``loss``; ``None`` if it is.

    The functions of :mod:`sb3_ppo_from_scratch.losses` are there to be changed, in a running program or in the file. No trial
    could show that a changed one still computes the same for all coefficients, so any change counts.
    """
    if loss is not minibatch_loss:
        return f"it computes PPO's own loss by hand, not {getattr(loss, '__name__', loss)}"
    if parts_of_the_loss() != _AS_IMPORTED or source_digest() not in (_WRITTEN_FOR, None):
        return "it computes PPO's own loss by hand, and a function of losses.py or advantages.py was changed"
    return None


@cache
def source_digest() -> str | None:
    """SHA-256 of the loss's sources as they were imported; ``None`` where there are none, and so nobody has changed them."""
    try:
        sources = [inspect.getsource(part) for part in (losses, normalize_advantages, minibatch_loss)]
    except OSError:
        return None
    return hashlib.sha256("".join(sources).encode()).hexdigest()
