"""A policy's parameters and their gradients, each as one vector that they share their memory with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch as th

__all__ = ["FlatParameters"]


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
