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
import gc
import warnings
from collections.abc import Callable, Iterator

import torch as th

__all__ = ["Captured", "sync_debug_mode", "unchanged_generator"]

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

        A function that fails in a rehearsal is called as it is from now on, with a warning that says why.

        :raises RuntimeError: if only the recording fails, after which torch draws no more random numbers on the device
        """
        if self.device.type != "cuda":
            with unchanged_generator(self.device):
                self.function()
            return
        with th.cuda.device(self.device), _best_convolutions():
            stream = (
                th.cuda.Stream()
            )  # of its own, as a recording's must be; autograd remembers streams, so rehearse there too
            try:
                with unchanged_generator(self.device):
                    self._rehearse(stream)
            except RuntimeError as error:
                self.reason = str(error).partition("\n")[0]
                warnings.warn(f"no CUDA graph, so this run is slower: {self.reason}", RuntimeWarning, stacklevel=3)
                return
            try:
                self._record(stream)
            except RuntimeError as error:
                raise RuntimeError(
                    "a CUDA graph could not be recorded, though the same function has run before; CUDA's random generator is "
                    f"lost with it, so begin a new process, with engine='torch' perhaps: {error}"
                ) from error

    def _rehearse(self, stream: th.cuda.Stream) -> None:
        current = th.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with th.cuda.stream(stream):
                for _ in range(_REHEARSALS - 1):
                    self.function()
                with sync_debug_mode("error"):  # a wait is an error here that leaves all sound; in a recording it would not
                    self.function()
        finally:
            current.wait_stream(stream)

    def _record(self, stream: th.cuda.Stream) -> None:
        graph = th.cuda.CUDAGraph()
        gc.collect()  # what is freed in the middle of a recording could end it
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            # Each graph has a pool of memory of its own: they are recorded anew one by one, and what they keep is small. What
            # other threads do meanwhile, such as those of environments, is none of its business.
            with th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.function()
        finally:
            if was_enabled:
                gc.enable()
        self._graph = graph

    def __call__(self) -> None:
        """Do what the function does, on the current stream, without waiting for it."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.function()


@contextlib.contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """
    Torch's own watch over calls that make the host wait for the device.

    :param mode: ``"error"`` raises a ``RuntimeError`` for each; ``"warn"`` warns
    """
    before = th.cuda.get_sync_debug_mode()
    _set_sync_debug_mode(mode)
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode is a prototype")
        th.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _best_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms and take the fastest, unless it is to be deterministic, as SB3 has it with a seed."""
    cudnn = th.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, cudnn.benchmark or not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before
