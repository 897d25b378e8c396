"""
A function that is recorded once as a CUDA graph and replayed ever after; on any other device the plain function.

A graph is a list of kernels with the addresses of their arguments. Replaying it takes one call of the host instead of one per
kernel, and nothing of the function's Python. So the function must

- read and write *static* tensors: allocated before, at the same address for as long as the graph lives;
- do the same work each time: whatever changes from call to call comes out of a static tensor, the count of calls included;
- never make the host wait for the device (``item``, ``nonzero``, ``if tensor``): that cannot be recorded.

Random numbers are drawn anew in each replay: torch registers its default generator with the graph, and a replay moves it on.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs; NVIDIA's blog post "Accelerating PyTorch with CUDA
Graphs" (2021).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch as th

__all__ = ["Captured", "unchanged_generator"]

_REHEARSALS = 3
"""Runs before the recording, as many as torch's documentation asks for: libraries choose algorithms and allocate memory."""


@contextlib.contextmanager
def unchanged_generator(device: th.device) -> Iterator[None]:
    """
    Put the default random generators of the CPU and of ``device`` back to where they were, in the end.

    A run that records its graphs in the middle, since it was resumed there, then draws what the uninterrupted run draws.
    """
    with th.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        yield


class Captured:
    """
    ``function``, recorded when :meth:`prepare` is called.

    :param function: reads and writes static tensors only (see above)
    :param device: where they are
    """

    def __init__(self, function: Callable[[], None], device: th.device):
        self.function = function
        self.device = device
        self.reason: str | None = None
        """Why there is no graph, and the function is called as it is; ``None`` if there is one, or none yet."""
        self._graph: th.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """
        Rehearse and record. A rehearsal is a call of the function: static tensors that it changes are the caller's to put
        back, or to protect; random generators are put back here. Off CUDA there are rehearsals all the same.

        If the function cannot be recorded it is called as it is from now on, with a warning that says why.
        """
        with unchanged_generator(self.device):
            if self.device.type != "cuda":
                self.function()
                return
            with th.cuda.device(self.device):
                try:
                    self._record()
                except RuntimeError as error:
                    self._graph, self.reason = None, str(error).partition("\n")[0]
                    warnings.warn(f"no CUDA graph, so this run is slower: {self.reason}", RuntimeWarning, stacklevel=3)

    def _record(self) -> None:
        """On a stream of its own, as a recording must be; so are the rehearsals, for autograd remembers streams."""
        stream, current = th.cuda.Stream(), th.cuda.current_stream()
        stream.wait_stream(current)
        with th.cuda.stream(stream):
            for _ in range(_REHEARSALS - 1):
                self.function()
            with _no_waiting():  # a wait is an error here that leaves everything sound; in a recording it would not
                self.function()
        current.wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        # each graph has a pool of memory of its own: they are recorded anew one by one, and what they keep is small
        with th.cuda.graph(graph, stream=stream):
            self.function()
        self._graph = graph

    def __call__(self) -> None:
        """Do what the function does, on the current stream, without waiting for it."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.function()


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises a ``RuntimeError``."""
    before = th.cuda.get_sync_debug_mode()
    th.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        th.cuda.set_sync_debug_mode(before)
