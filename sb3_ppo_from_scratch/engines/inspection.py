"""Whether a policy is still what SB3 built, so that an engine may compute by hand what its modules would."""

from __future__ import annotations

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

__all__ = ["has_hooks", "modified_reason", "replaced_method"]


def modified_reason(policy: ActorCriticPolicy, built_ins: tuple[type[nn.Module], ...]) -> str | None:
    """
    What the user changed about ``policy`` that would be lost on whoever does not call its modules.

    :param policy: whose class is known already
    :param built_ins: the modules that it may consist of, no subclasses
    :return: the reason not to work by hand; ``None`` if there is none
    """
    if name := replaced_method(policy):
        return f"the policy's {name} was replaced"
    if has_hooks(policy):
        return "there are hooks on the policy or on all modules"
    for name, module in policy.named_modules():
        if module is not policy and (reason := _module_reason(module, built_ins)):
            return f"{name} {reason}"
    named = list(policy.named_parameters(remove_duplicate=False))
    if len(named) != len({id(parameter) for _, parameter in named}):
        return "modules share parameters"
    optimized = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named:
        if id(parameter) not in optimized:  # SB3 lets such gradients add up, and count in the norm
            return f"the optimizer leaves out {name}"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"there are hooks on {name}"
        if not parameter.requires_grad or parameter.dtype != th.float32 or parameter.device.type != "cpu":
            return f"{name} is not a trainable float32 parameter on the CPU"
    return None


def _module_reason(module: nn.Module, built_ins: tuple[type[nn.Module], ...]) -> str | None:
    if type(module) not in built_ins:
        return f"is of type {type(module).__name__}"
    if getattr(module, "bias", module) is None:
        return "has no bias"
    if "forward" in vars(module):
        return "has had its forward method replaced"
    return "has hooks" if has_hooks(module) else None


def replaced_method(policy: ActorCriticPolicy) -> str | None:
    """A method of this very object that is not its class's."""
    return next((name for name in vars(policy) if callable(getattr(type(policy), name, None))), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called besides the module's own ``forward``; such calls would be missed."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or nn.modules.module._has_any_global_hook())
