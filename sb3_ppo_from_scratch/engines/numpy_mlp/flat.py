"""A policy's parameters, their gradients and Adam's moments, each as one vector that they share their memory with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

__all__ = ["FlatAdam", "FlatParameters", "adam_step"]


class FlatParameters:
    """
    Moves parameters into one vector, until :meth:`release`.

    They stay the same objects: whoever reads or changes one sees or changes the vector.

    :param parameters: of one floating dtype, on CPU, in the order that they take in the vector
    """

    def __init__(self, parameters: Sequence[th.Tensor]):
        self.parameters = list(parameters)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self._vector = th.empty(self.size, dtype=self.parameters[0].dtype)
        self._gradient = th.zeros_like(self._vector)
        self._homes = [parameter.data for parameter in self.parameters]
        for parameter, view in zip(self.parameters, self.split(self._vector), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
        self.vector = self._vector.numpy()
        self.gradient = self._gradient.numpy()
        self._gradients = self.split(self._gradient)
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]

    def split(self, vector: th.Tensor) -> list[th.Tensor]:
        """Views of ``vector``, ``[size]``: one in the shape of each parameter."""
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def is_current(self) -> bool:
        """Whether the parameters still lie in the vector; ``policy.to`` or an assignment to ``data`` takes them out."""
        return [parameter.data_ptr() for parameter in self.parameters] == self._addresses

    def release(self) -> None:
        """
        Put the parameters that lie here back where they were, with the values and gradients that they have now.

        If the user has let one of them share another's memory, they all stay, and go on sharing it.
        """
        here = self._vector.untyped_storage().data_ptr()
        for parameter, address in zip(self.parameters, self._addresses, strict=True):
            if parameter.data_ptr() != address and parameter.untyped_storage().data_ptr() == here:
                return
        for parameter, home, address in zip(self.parameters, self._homes, self._addresses, strict=True):
            if parameter.data_ptr() != address:
                continue
            home.copy_(parameter.data)
            parameter.data = home
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def holds(self, vector: np.ndarray) -> bool:
        """Whether the parameters are those of ``vector``, ``[size]``, to the last bit."""
        bits = f"i{vector.itemsize}"  # NaN is equal to itself
        return bool((vector.view(bits) == self.vector.view(bits)).all())

    @contextmanager
    def holding(self, vector: np.ndarray) -> Iterator[None]:
        """
        A context in which the parameters are those of ``vector``, ``[size]``, whatever they are outside of it.

        :param vector: a copy of :attr:`vector` that was made before
        """
        now = None if self.holds(vector) else self.vector.copy()
        if now is not None:
            self.vector[:] = vector
        try:
            yield
        finally:
            if now is not None:
                self.vector[:] = now

    def publish_gradient(self) -> None:
        """Let every parameter's ``grad`` be its part of :attr:`gradient`."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def start_of(self, parameter: th.Tensor) -> int:
        """Where a parameter begins in the vector."""
        first = next(i for i, each in enumerate(self.parameters) if each is parameter)
        return sum(each.numel() for each in self.parameters[:first])

    def arrays(self, *parameters: th.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """
        :param parameters: some that follow each other in the vector, of one shape
        :return: their values and their gradients, ``[len(parameters), *shape]`` each, in the vectors' memory
        """
        start, shape = self.start_of(parameters[0]), (len(parameters), *parameters[0].shape)
        stop = start + math.prod(shape)
        return self.vector[start:stop].reshape(shape), self.gradient[start:stop].reshape(shape)


class FlatAdam:
    """
    Adam or AdamW on :class:`FlatParameters`. Its state is the optimizer's own: that, too, shares its memory.

    :param optimizer: one parameter group, of just these parameters
    :param flat: the parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, flat: FlatParameters):
        self.optimizer = optimizer
        self.flat = flat
        self.moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * optimizer.param_groups[0]["amsgrad"]
        vectors = {key: th.zeros_like(flat._vector) for key in self.moments}
        steps = th.zeros(len(flat.parameters))
        self._views = [
            dict(zip([*self.moments, "step"], views, strict=True))
            for views in zip(*map(flat.split, vectors.values()), steps, strict=True)
        ]
        self._vectors = list(vectors.values())
        self.vectors = {key: vector.numpy() for key, vector in vectors.items()}
        """of the moments, ``[size]`` each, by torch's names"""
        self._steps, self._step = steps.numpy(), steps[0]
        self._adopt_state()

    @property
    def n_steps(self) -> int:
        """How many steps have been taken."""
        return int(self._steps[0])

    @n_steps.setter
    def n_steps(self, n_steps: int) -> None:
        self._steps[:] = n_steps

    def is_current(self) -> bool:
        """Whether the optimizer's state is still this one; ``load_state_dict`` replaces it."""
        group = self.optimizer.param_groups[0]
        return ("max_exp_avg_sq" in self.moments) == group["amsgrad"] and all(
            state.get(key) is view for state, views in self._states() for key, view in views.items()
        )

    def _states(self) -> list[tuple[dict[str, Any], dict[str, th.Tensor]]]:
        """What the optimizer remembers of each parameter, and what it was given; to look it up would make it remember."""
        state: Any = self.optimizer.state
        states = [state.get(parameter, {}) for parameter in self.flat.parameters]
        return list(zip(states, self._views, strict=True))

    def release(self) -> None:
        """Leave the optimizer a state of its own."""
        for state, views in self._states():
            state.update({key: view.clone() for key, view in views.items() if state.get(key) is view})

    def _adopt_state(self) -> None:
        """Copy what the optimizer remembers, and give it our views in return; before its first step that is nothing."""
        for parameter, views in zip(self.flat.parameters, self._views, strict=True):
            state = self.optimizer.state[parameter]
            for key, view in views.items():
                if key in state:
                    view.copy_(state[key])
                state[key] = view

    def step(self) -> None:
        """One step along :attr:`FlatParameters.gradient`."""
        group = self.optimizer.param_groups[0]
        self._steps += 1
        adam_step(
            self.flat._vector,
            self.flat._gradient,
            *self._vectors,
            step=self._step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group.get("decoupled_weight_decay", False),
            maximize=group["maximize"],
        )


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
