"""Clip the gradient's norm and take one optimizer step; for Adam on one flat vector, with the same bits."""

from __future__ import annotations

import math
from types import TracebackType

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.optim.adam import adam

from sb3_ppo_from_scratch.update import reading_waits

__all__ = ["ClippedStep", "FusedStep"]


class ClippedStep:
    """
    Context manager around an update's optimizer steps.

    Adam's arithmetic is elementwise, so one step on the concatenation of all parameters yields the bits of a step on each, at
    a fraction of the calls. Inside the ``with``, moments live in flat vectors; on leaving it, however that comes
    about, they are back in ``policy.optimizer.state`` per parameter as torch keeps them. The parameters themselves are up to
    date after every step. Any other optimizer steps as it always does.

    :param policy: its ``parameters()`` are clipped, its ``optimizer`` steps
    :param max_grad_norm: gradients with a larger 2-norm are scaled down to it
    """

    def __init__(self, policy: ActorCriticPolicy, max_grad_norm: float):
        self.parameters = list(policy.parameters())
        self.optimizer = policy.optimizer
        self.max_grad_norm = max_grad_norm
        self.flat: _FlatAdam | None = None
        self._may_flatten = _is_plain_adam(self.optimizer, self.parameters)

    def __enter__(self) -> ClippedStep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._write_back()

    def zero_grad(self) -> None:
        """Forget the gradients of what the optimizer steps on."""
        if self._may_flatten:  # all of them, and cheaper than to ask the optimizer
            for parameter in self.parameters:
                parameter.grad = None
        else:
            self.optimizer.zero_grad()

    def step(self, loss: th.Tensor) -> th.Tensor:
        """
        One step along the gradients that stand in the parameters, unless the loss or the gradient's norm is not finite.

        :param loss: scalar, what the gradients are of
        :return: scalar, the norm of the gradient before clipping
        """
        with_gradient = [parameter for parameter in self.parameters if parameter.grad is not None]
        if self.flat is None or not _same(self.flat.parameters, with_gradient):
            self._write_back()
            if self._may_flatten and _FlatAdam.can_take(self.optimizer, with_gradient):
                self.flat = _FlatAdam(self.optimizer, with_gradient)
        if self.flat is not None:
            return self.flat.step(loss, self.max_grad_norm)
        norm = th.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if th.isfinite(loss.detach() + norm):
            self.optimizer.step()
        return norm

    def _write_back(self) -> None:
        if self.flat is not None:
            self.flat.write_back()
            self.flat = None


class FusedStep(ClippedStep):
    """
    :class:`ClippedStep` by torch's fused Adam: one pass over parameters, gradients and moments instead of a dozen.

    Its rounding differs from the default's. For large networks only: the flat vector takes fewer calls for small ones.

    :param policy: its ``parameters()`` are clipped, its ``optimizer`` steps
    :param max_grad_norm: gradients with a larger 2-norm are scaled down to it
    """

    def __init__(self, policy: ActorCriticPolicy, max_grad_norm: float):
        super().__init__(policy, max_grad_norm)
        self._may_flatten = False

    @staticmethod
    def unsupported_reason(optimizer: th.optim.Optimizer) -> str | None:
        """Why ``optimizer`` has no fused form; ``None`` if it has."""
        if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
            return f"the optimizer must be torch's Adam or AdamW, not {type(optimizer).__name__}"
        if any(group["foreach"] or group["capturable"] or group["differentiable"] for group in optimizer.param_groups):
            return "Adam's foreach, capturable and differentiable must not be set"
        return None

    def __enter__(self) -> ClippedStep:
        groups = self.optimizer.param_groups
        self._before = [(group, group["fused"]) for group in groups]
        for group in groups:
            group["fused"] = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for group, fused in self._before:
            group["fused"] = fused


class _FlatAdam:
    """Adam (or AdamW) of ``optimizer`` over the concatenation of ``parameters``, which all have a gradient."""

    def __init__(self, optimizer: th.optim.Optimizer, parameters: list[th.nn.Parameter]):
        self.optimizer = optimizer
        self.parameters = parameters
        self.sizes = [parameter.numel() for parameter in parameters]
        self.vector = self._flatten([parameter.detach() for parameter in parameters])
        self.gradient = th.zeros_like(self.vector)
        self.undone = th.zeros((), device=self.vector.device)  # steps
        self.views = self._unflatten(self.vector)
        self._read_state()

    @staticmethod
    def can_take(optimizer: th.optim.Optimizer, parameters: list[th.nn.Parameter]) -> bool:
        """Whether all parameters have come equally far; those that at times have no gradient fall behind."""
        steps = {float(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0.0 for p in parameters}
        return len(steps) == 1

    @th.no_grad()
    def step(self, loss: th.Tensor, max_grad_norm: float) -> th.Tensor:
        gradients: list[th.Tensor] = [parameter.grad for parameter in self.parameters]  # type: ignore[misc]  # none is None
        norm = th.linalg.vector_norm(th.stack(th._foreach_norm(gradients)))  # as torch's clip_grad_norm_ takes it
        undoes = reading_waits(norm)  # then the step is taken, and undone without anybody asking
        if not undoes and not math.isfinite(loss.item() + norm.item()):
            return norm
        before = [value.clone() for value in self._vectors()] if undoes else []
        th.cat([gradient.reshape(-1) for gradient in gradients], out=self.gradient)
        self.gradient.mul_(th.clamp(max_grad_norm / (norm + 1e-6), max=1.0))
        self._adam()
        if undoes:
            finite = th.isfinite(loss + norm)
            self.undone += ~finite
            for value, old in zip(self._vectors(), before, strict=True):
                value.copy_(th.where(finite, value, old))
        th._foreach_copy_(tuple(self.parameters), self.views)
        return norm

    def _vectors(self) -> list[th.Tensor]:
        """What a step changes, the count of steps excepted."""
        return [self.vector, *(value for value in self.state.values() if value.dim() > 0)]

    def _adam(self) -> None:
        group, state = self.optimizer.param_groups[0], self.state
        beta1, beta2 = group["betas"]
        adam(
            [self.vector],
            [self.gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            foreach=False,
            fused=False,
            decoupled_weight_decay=group.get("decoupled_weight_decay", False),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def write_back(self) -> None:
        """Put the moments, and the gradients as they were clipped, where torch has them; an interrupted step is completed."""
        with th.no_grad():
            th._foreach_copy_(tuple(self.parameters), self.views)
        self.state["step"] -= self.undone.to(self.state["step"])
        if self.state["step"] == 0:  # as torch has it before the first step
            return
        for key, value in self.state.items():
            per_parameter = self._unflatten(value) if value.dim() > 0 else [value] * len(self.parameters)
            for parameter, part in zip(self.parameters, per_parameter, strict=True):
                self.optimizer.state[parameter][key] = part.clone()
        for parameter, part in zip(self.parameters, self._unflatten(self.gradient), strict=True):
            parameter.grad = part.clone()

    def _read_state(self) -> None:
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.optimizer.param_groups[0]["amsgrad"]
        states: list[dict[str, th.Tensor]] = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        if not all(states):  # before the first step
            self.state = {"step": th.tensor(0.0), **{key: th.zeros_like(self.vector) for key in moments}}
        else:
            self.state = {"step": states[0]["step"].clone(), **{k: self._flatten([s[k] for s in states]) for k in moments}}

    @staticmethod
    def _flatten(tensors: list[th.Tensor]) -> th.Tensor:
        return th.cat([tensor.reshape(-1) for tensor in tensors])

    def _unflatten(self, vector: th.Tensor) -> list[th.Tensor]:
        parts = zip(vector.split(self.sizes), self.parameters, strict=True)
        return [part.view_as(parameter) for part, parameter in parts]


def _is_plain_adam(optimizer: th.optim.Optimizer, parameters: list[th.nn.Parameter]) -> bool:
    """Whether nothing but elementwise arithmetic on these very parameters happens in ``optimizer.step()``."""
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        return False
    if group.get("fused") or group.get("capturable") or group.get("differentiable"):
        return False
    alike = len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
    return alike and _same(group["params"], parameters)


def _same(left: list[th.nn.Parameter], right: list[th.nn.Parameter]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
