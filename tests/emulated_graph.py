"""
CUDA graphs on a CPU: what a recorded function did, kernel by kernel, done again on the same memory without its Python.

It shows what would go wrong on a GPU and not on a CPU: a number that Python decides anew in each call, a tensor that is
allocated anew, a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured, unchanged_generator

# on CUDA each of these waits for the device, or copies from memory that a graph cannot hold
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "multinomial", "normal.Tensor")


class Recorder(TorchDispatchMode):
    """Notes every kernel with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(WAITS), f"{name} makes the host wait"
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results


class EmulatedGraph:
    """Records ``function`` when it is made, and replays it when called."""

    def __init__(self, function: Callable[[], None]):
        with Recorder() as recorder:
            function()
        self.calls = recorder.calls

    @th.no_grad()
    def __call__(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, th.Tensor) and old.data_ptr() != new.data_ptr():  # a view is where it was
                    old.copy_(new)


class EmulatedCapture(Captured):
    """:class:`Captured` with such a graph; to be put in its place."""

    made: int = 0
    graph: EmulatedGraph | None = None

    def prepare(self) -> None:
        EmulatedCapture.made += 1
        with unchanged_generator(self.device):
            for _ in range(3):
                self.function()
            self.graph = EmulatedGraph(self.function)

    def __call__(self) -> None:
        assert self.graph is not None, "prepare it first"
        self.graph()
