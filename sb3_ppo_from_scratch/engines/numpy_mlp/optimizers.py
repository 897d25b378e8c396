"""Adam and RMSprop on all parameters as one vector; what they remember shares its memory with the optimizer's own state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch as th
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from typing_extensions import override

from sb3_ppo_from_scratch.engines.inspection import RMSPROP
from sb3_ppo_from_scratch.engines.numpy_mlp.flat import FlatParameters

__all__ = ["FlatAdam", "FlatOptimizer", "FlatRMSprop", "adam_step", "flat_optimizer", "rmsprop_step"]


class FlatOptimizer(ABC):
    """
    Steps on :class:`FlatParameters`.

    :param optimizer: one parameter group, of just these parameters
    :param flat: the parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, flat: FlatParameters):
        self.optimizer = optimizer
        self.flat = flat
        self._tensors = {name: th.full_like(flat._vector, value) for name, value in self.beginnings().items()}
        self.vectors = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        """What it remembers, ``[size]`` each, by torch's names"""
        steps = th.zeros(len(flat.parameters))
        self._steps, self._step = steps.numpy(), steps[0]
        views = {name: flat.split(tensor) for name, tensor in self._tensors.items()}
        if self.counts_in_tensors:
            views["step"] = list(steps)
        self._views = [dict(zip(views, each, strict=True)) for each in zip(*views.values(), strict=True)]
        self._adopt_state()

    @abstractmethod
    def beginnings(self) -> dict[str, float]:
        """What it remembers by the optimizer's settings now, and what all of it is before the first step."""

    @abstractmethod
    def step(self) -> None:
        """One step along :attr:`FlatParameters.gradient`."""

    @property
    def counts_in_tensors(self) -> bool:
        """Whether the optimizer's count of steps is a tensor per parameter, and no number."""
        return True

    @property
    def n_steps(self) -> int:
        """How many steps have been taken."""
        return int(self._steps[0])

    @n_steps.setter
    def n_steps(self, n_steps: int) -> None:
        self._steps[:] = n_steps
        if not self.counts_in_tensors:
            for parameter in self.flat.parameters:
                self.optimizer.state[parameter]["step"] = n_steps

    def is_current(self) -> bool:
        """Whether the optimizer's state is still this one; ``load_state_dict`` replaces it."""
        return self.beginnings().keys() == self.vectors.keys() and all(
            state.get(key) is view for state, views in self._states() for key, view in views.items()
        )

    def _states(self) -> list[tuple[dict[str, Any], dict[str, th.Tensor]]]:
        """What the optimizer remembers of each parameter, and what it was given; to look it up would make it remember."""
        state: Any = self.optimizer.state
        states = [state.get(parameter, {}) for parameter in self.flat.parameters]
        return list(zip(states, self._views, strict=True))

    def release(self) -> None:
        """Leave the optimizer a state of its own, and none before the first step, when it has none by itself."""
        for parameter, (state, views) in zip(self.flat.parameters, self._states(), strict=True):
            ours = [key for key, view in views.items() if state.get(key) is view]
            if self.n_steps == 0 and len(ours) == len(views):
                del self.optimizer.state[parameter]
            else:
                state.update({key: views[key].clone() for key in ours})

    def _adopt_state(self) -> None:
        """Copy what the optimizer remembers, and give it our views in return; before its first step that is nothing."""
        n_steps = 0
        for parameter, views in zip(self.flat.parameters, self._views, strict=True):
            state = self.optimizer.state[parameter]
            n_steps = int(state.get("step", 0))
            for key, view in views.items():
                if key in state:
                    view.copy_(state[key])
                state[key] = view
        self.n_steps = n_steps


class FlatAdam(FlatOptimizer):
    """Adam or AdamW."""

    @override
    def beginnings(self) -> dict[str, float]:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.optimizer.param_groups[0]["amsgrad"]
        return dict.fromkeys(names, 0.0)

    @override
    def step(self) -> None:
        group = self.optimizer.param_groups[0]
        self._steps += 1
        adam_step(
            self.flat._vector,
            self.flat._gradient,
            *self._tensors.values(),
            step=self._step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group.get("decoupled_weight_decay", False),
            maximize=group["maximize"],
        )


class FlatRMSprop(FlatOptimizer):
    """Torch's RMSprop, or SB3's ``RMSpropTFLike``."""

    @property
    @override
    def counts_in_tensors(self) -> bool:
        return not isinstance(self.optimizer, RMSpropTFLike)

    @override
    def beginnings(self) -> dict[str, float]:
        group = self.optimizer.param_groups[0]
        names = ["square_avg"] + ["momentum_buffer"] * (group["momentum"] > 0) + ["grad_avg"] * bool(group["centered"])
        return {name: float(name == "square_avg" and isinstance(self.optimizer, RMSpropTFLike)) for name in names}

    @override
    def step(self) -> None:
        group = self.optimizer.param_groups[0]
        self.n_steps += 1
        rmsprop_step(
            self.flat._vector,
            -self.flat._gradient if group.get("maximize") else self.flat._gradient,
            **self._tensors,
            lr=float(group["lr"]),
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            eps_inside=isinstance(self.optimizer, RMSpropTFLike),
        )


def flat_optimizer(optimizer: th.optim.Optimizer, flat: FlatParameters) -> FlatOptimizer:
    """The one that does what ``optimizer`` does."""
    return (FlatRMSprop if isinstance(optimizer, RMSPROP) else FlatAdam)(optimizer, flat)


def adam_step(
    vector: th.Tensor,
    gradient: th.Tensor,
    exp_avg: th.Tensor,
    exp_avg_sq: th.Tensor,
    max_exp_avg_sq: th.Tensor | None = None,
    *,
    step: th.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    r"""
    One step of Adam, in place, on vectors of one size: torch's own, in one pass where NumPy would take a dozen.

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \alpha \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}, \qquad c_i = 1 - \beta_i^t

    Weight decay adds :math:`\lambda \theta` to g; decoupled (AdamW), it scales :math:`\theta` by :math:`1 - \alpha \lambda`.
    AMSGrad takes the largest v so far in the last line.

    Sources: Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1; Loshchilov and Hutter 2019,
    https://arxiv.org/abs/1711.05101; Reddi et al. 2018, https://arxiv.org/abs/1904.09237.

    :param vector: theta
    :param gradient: g
    :param exp_avg: m
    :param exp_avg_sq: v
    :param max_exp_avg_sq: the largest v so far; ``None`` for no AMSGrad
    :param step: t, a scalar, 1 at the first step
    """
    fused = th._fused_adamw_ if decoupled else th._fused_adam_
    fused(
        [vector],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [] if max_exp_avg_sq is None else [max_exp_avg_sq],
        [step],
        amsgrad=max_exp_avg_sq is not None,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )


@th.no_grad()
def rmsprop_step(
    vector: th.Tensor,
    gradient: th.Tensor,
    square_avg: th.Tensor,
    grad_avg: th.Tensor | None = None,
    momentum_buffer: th.Tensor | None = None,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    eps_inside: bool = False,
) -> None:
    r"""
    One step of RMSprop, in place, on vectors of one size.

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        b &\leftarrow \mu b + \frac{g}{\sqrt{v} + \epsilon}, \qquad \theta \leftarrow \theta - \eta b

    Weight decay adds :math:`\lambda \theta` to g; centred, v less the square of a running mean of g stands under the root; as
    TensorFlow has it, :math:`\epsilon` stands there, too.

    Sources: Hinton 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; Graves 2013,
    https://arxiv.org/abs/1308.0850 (centred).

    :param vector: theta
    :param gradient: g
    :param square_avg: v
    :param grad_avg: the running mean of g; ``None`` for not centred
    :param momentum_buffer: b; ``None`` for no momentum
    :param eps_inside: whether epsilon is added before the root is taken
    """
    if weight_decay != 0:
        gradient = gradient.add(vector, alpha=weight_decay)
    square_avg.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    variance = square_avg
    if grad_avg is not None:
        grad_avg.lerp_(gradient, 1 - alpha)
        variance = square_avg.addcmul(grad_avg, grad_avg, value=-1)
    scale = variance.add(eps).sqrt_() if eps_inside else variance.sqrt().add_(eps)
    if momentum_buffer is None:
        vector.addcdiv_(gradient, scale, value=-lr)
    else:
        momentum_buffer.mul_(momentum).addcdiv_(gradient, scale)
        vector.add_(momentum_buffer, alpha=-lr)
