"""Whether a policy and its optimizer are still what SB3 built, so that an engine may compute by hand what they would."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from types import ModuleType
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import nn

from sb3_ppo_from_scratch import advantages, losses, update

__all__ = [
    "ADAM",
    "RMSPROP",
    "Fingerprint",
    "adam_reason",
    "has_hooks",
    "modified_reason",
    "parts_of_the_loss",
    "replaced_method",
    "step_reason",
]


_PARTS_OF_THE_LOSS: dict[ModuleType, tuple[str, ...]] = {
    update: ("minibatch_loss",),
    advantages: ("normalize_advantages",),
    losses: (
        "ppo_loss",
        "clipped_surrogate_loss",
        "value_loss",
        "entropy_loss",
        "weighted_mean",
        "approx_kl",
        "clip_fraction",
    ),
}
_METHODS = ("forward", "forward_actor", "forward_critic")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    # asked before every rollout and every update, hence one pass, and without nn.Module's slow attributes
    optimized = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    seen: set[int] = set()
    for name, module in policy.named_modules(remove_duplicate=False):
        if module is not policy and (reason := _module_reason(module, built_ins)):
            return f"{name} {reason}"
        for key, parameter in module._parameters.items():
            if parameter is not None and (reason := _parameter_reason(parameter, optimized, seen)):
                return f"{reason} {f'{name}.{key}'.lstrip('.')}"
    if len({parameter.data_ptr() for parameter in policy.parameters()}) < len(seen):
        return "some parameters share their memory"
    return "the optimizer has other parameters than the policy's" if len(optimized) > len(seen) else None


def _module_reason(module: nn.Module, built_ins: tuple[type[nn.Module], ...]) -> str | None:
    if type(module) not in built_ins:
        return f"is of type {type(module).__name__}"
    if "bias" in module._parameters and module._parameters["bias"] is None:
        return "has no bias"
    if any(name in vars(module) for name in _METHODS):
        return "has had a method replaced"
    return "has hooks" if _has_own_hooks(module) else None


def _parameter_reason(parameter: th.Tensor, optimized: set[int], seen: set[int]) -> str | None:
    """
    :param optimized: identities of the parameters that the optimizer has
    :param seen: those of the parameters before this one, to which it is added
    """
    if id(parameter) in seen:
        return "modules share"
    seen.add(id(parameter))
    if id(parameter) not in optimized:  # SB3 lets such gradients add up, and count in the norm
        return "the optimizer leaves out"
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "there are hooks on"
    if parameter.is_shared():
        return "other processes share the memory of"
    if not parameter.requires_grad or parameter.dtype is not th.float32 or not parameter.is_cpu:
        return "it takes trainable float32 parameters on the CPU, unlike"
    return None


def parts_of_the_loss() -> tuple[Any, ...]:
    """The functions that the loss of a minibatch is made of, as they are now: another tuple once one has been replaced."""
    functions = [getattr(module, name) for module, names in _PARTS_OF_THE_LOSS.items() for name in names]
    return tuple((function, getattr(function, "__code__", None)) for function in functions)


def replaced_method(module: object) -> str | None:
    """A method of this very object that is not its class's."""
    return next((name for name in vars(module) if callable(getattr(type(module), name, None))), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called besides the module's own ``forward``; such calls would be missed."""
    return _has_own_hooks(module) or bool(nn.modules.module._has_any_global_hook())


def _has_own_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


ADAM = (th.optim.Adam, th.optim.AdamW)
RMSPROP = (th.optim.RMSprop, RMSpropTFLike)


def adam_reason(optimizer: th.optim.Optimizer, parameters: Iterable[th.Tensor] | None = None) -> str | None:
    """:func:`step_reason` where only Adam and AdamW are known."""
    return step_reason(optimizer, ADAM, parameters)


def step_reason(
    optimizer: th.optim.Optimizer, kinds: tuple[type, ...], parameters: Iterable[th.Tensor] | None = None
) -> str | None:
    """
    Why a step of ``optimizer`` is not just one of these kinds; ``None`` if it is.

    :param optimizer: a policy's
    :param kinds: classes
    :param parameters: what it must step on; ``None`` if that has been checked already
    """
    if type(optimizer) not in kinds:
        *names, last = (kind.__name__ for kind in kinds)
        return f"the optimizer must be {', '.join(names)} or {last}, not {type(optimizer).__name__}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        return "there are hooks on the optimizer, or its step was replaced"
    if len(optimizer.param_groups) != 1:
        return f"the optimizer has {len(optimizer.param_groups)} parameter groups"
    group = optimizer.param_groups[0]
    if group.get("capturable") or group.get("differentiable") or isinstance(group["lr"], th.Tensor):
        return "the optimizer is capturable or differentiable, or its learning rate is a tensor"
    if parameters is not None and {*map(id, group["params"])} != {*map(id, parameters)}:
        return "the optimizer has other parameters than the policy's"
    return None


class Fingerprint:
    """
    Notices cheaply (in about 3 microseconds for an ``MlpPolicy``) that something about a policy *may* have changed.

    It compares identities and counts: which modules and parameters there are, and of which classes; where the parameters lie;
    how many hooks and attributes there are; and the attributes that are floats, as a slope is. What is changed within the
    parameters' memory needs no notice: whoever computes there sees it.

    :param policy: to watch
    """

    def __init__(self, policy: nn.Module):
        self._modules = modules = list(policy.modules())  # kept, so that no other module gets the identity of one of them
        self._parameters = list(policy.parameters())
        self._registered: list[dict[str, Any]] = [d for module in modules for d in (module._modules, module._parameters) if d]
        self._counted: list[dict[Any, Any]] = [vars(module) for module in modules]
        for module in modules:
            self._counted += [vars(module)[name] for name in _HOOKS]
        self._floats = [(vars(module), name) for module in modules for name, x in vars(module).items() if type(x) is float]
        self._before = self._take()

    def _take(self) -> tuple[Any, ...]:
        return (
            [*map(id, chain.from_iterable(registered.values() for registered in self._registered))],
            [*map(th.Tensor.data_ptr, self._parameters)],
            [*map(type, self._modules)],
            [attributes.get(name) for attributes, name in self._floats],
            sum(map(len, self._counted)),
            nn.modules.module._has_any_global_hook(),
        )

    def is_same(self) -> bool:
        """Whether nothing has changed since this was made."""
        return self._take() == self._before
