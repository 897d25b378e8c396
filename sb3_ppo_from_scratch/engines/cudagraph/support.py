"""Which policies can be recorded as CUDA graphs: those made of parts that do the same work each time and never wait."""

from __future__ import annotations

import torch as th
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn

from sb3_ppo_from_scratch.engines.inspection import adam_reason, has_hooks, replaced_method
from sb3_ppo_from_scratch.policies import SharedMlpExtractor, SharedMlpPolicy

__all__ = ["device_reason", "unsupported_reason"]

_POLICIES = (ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy, SharedMlpPolicy)
_EXTRACTORS = (FlattenExtractor, NatureCNN, CombinedExtractor, MlpExtractor, SharedMlpExtractor)
_LAYERS = (nn.Flatten, nn.Sequential, nn.ModuleDict, nn.Linear, nn.Conv2d)


def device_reason(policy: ActorCriticPolicy) -> str | None:
    """Why the device of ``policy`` has no CUDA graphs; ``None`` if it has."""
    kinds = {parameter.device.type for parameter in policy.parameters()}
    return None if kinds == {"cuda"} else f"it needs a CUDA device, not {' and '.join(sorted(kinds))}"


def unsupported_reason(policy: ActorCriticPolicy) -> str | None:
    """
    What about ``policy`` or its optimizer a CUDA graph could not repeat, the device apart; ``None`` if nothing.

    Code of the user's could do different work each time, or wait for the device; a recording would not show it.
    """
    if type(policy) not in _POLICIES:
        return f"the policy must be one of SB3's or SharedMlpPolicy, not {type(policy).__name__}"
    if policy.use_sde:
        return "gSDE makes new noise matrices now and then, which a graph would not see"
    for module in policy.modules():
        if has_hooks(module) or replaced_method(module):
            return "there are hooks on the policy, or replaced methods"
        if module is not policy and not _is_known(module):
            return f"it does not know modules of type {type(module).__name__}"
    parameters = list(policy.parameters())
    if any(not p.requires_grad or p.dtype != th.float32 or not p.is_contiguous() for p in parameters):
        return "it takes trainable, contiguous float32 parameters only"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        return "there are hooks on parameters"
    return adam_reason(policy.optimizer, parameters)


def _is_known(module: nn.Module) -> bool:
    return type(module) in (*_EXTRACTORS, *_LAYERS) or type(module).__module__ == "torch.nn.modules.activation"
