"""How a function becomes a graph: in which order, on which stream; with a stand-in for CUDA that only notes what is asked."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ppo_from_scratch.engines.cudagraph import cuda_graph, transfer
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured, unchanged_generator
from sb3_ppo_from_scratch.engines.cudagraph.transfer import Upload
from tests.emulated_graph import EmulatedGraph


class FakeCuda:
    """Notes in :attr:`log`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[str] = []
        self.mode = 0

        class Stream:
            def __init__(stream, name: str = "side"):
                stream.name = name

            def wait_stream(stream, other: Any) -> None:
                self.log.append(f"{stream.name} waits for {other.name}")

            def synchronize(stream) -> None:
                self.log.append(f"the host waits for {stream.name}")

        class Event:
            def synchronize(event) -> None:
                self.log.append("the host waits for the event")

            def record(event, stream: Any) -> None:
                self.log.append(f"event on {stream.name}")

        class CUDAGraph:
            def replay(graph) -> None:
                self.log.append("replay")

        @contextlib.contextmanager
        def within(what: str) -> Iterator[None]:
            self.log.append(f"begin {what}")
            try:
                yield
            finally:
                self.log.append(f"end {what}")

        fakes = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "current_stream": lambda device=None: Stream("current"),
            "stream": lambda stream: within(stream.name),
            "device": lambda device: contextlib.nullcontext(),
            "graph": lambda graph, stream, capture_error_mode: within(f"recording, {capture_error_mode}"),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(th.cuda, name, fake)
        monkeypatch.setattr(cuda_graph, "unchanged_generator", lambda device: within("unchanged"))

    def set_mode(self, mode: Any) -> None:
        self.mode = mode
        self.log.append(f"waits: {mode}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_rehearses_on_a_stream_of_its_own_then_records(cuda: FakeCuda) -> None:
    captured = Captured(lambda: cuda.log.append("work"), th.device("cuda"))
    captured.prepare()
    captured()
    captured()
    assert cuda.log == [
        "begin unchanged",
        "side waits for current",
        "begin side",
        "work",
        "work",
        "waits: error",
        "work",
        "waits: 0",
        "end side",
        "current waits for side",
        "end unchanged",
        "begin recording, thread_local",
        "work",
        "end recording, thread_local",
        "replay",
        "replay",
    ]
    assert captured.reason is None


def test_a_function_that_waits_is_called_as_it_is(cuda: FakeCuda) -> None:
    def work() -> None:
        cuda.log.append("work")
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore lines")

    captured = Captured(work, th.device("cuda"))
    with pytest.warns(RuntimeWarning, match="no CUDA graph, .*: called a synchronizing CUDA operation$"):
        captured.prepare()
    assert cuda.mode == 0
    assert not any("recording" in line for line in cuda.log), "one that fails would leave CUDA's random generator unusable"
    assert cuda.log[-4:] == ["waits: 0", "end side", "current waits for side", "end unchanged"], (
        "the other stream is waited for"
    )
    captured()
    assert cuda.log[-1] == "work"
    assert captured.reason == "called a synchronizing CUDA operation"


def test_a_recording_that_fails_is_no_reason_to_go_on(cuda: FakeCuda) -> None:
    """Torch draws no random number any more after it, so that the function called as it is would die of something else."""

    def work() -> None:
        if cuda.log[-1].startswith("begin recording"):
            raise RuntimeError("operation not permitted when stream is capturing")

    captured = Captured(work, th.device("cuda"))
    with pytest.raises(RuntimeError, match=r"could not be recorded, .*engine='torch'.*: operation not permitted"):
        captured.prepare()
    assert captured.reason is None
    assert gc.isenabled()


def test_no_garbage_is_collected_in_a_recording(cuda: FakeCuda) -> None:
    enabled = []
    Captured(lambda: enabled.append(gc.isenabled()), th.device("cuda")).prepare()
    assert enabled == [True] * 3 + [False]
    assert gc.isenabled()


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_tried_out_where_they_may_be(deterministic: bool, cuda: FakeCuda, monkeypatch: Any) -> None:
    monkeypatch.setattr(th.backends.cudnn, "deterministic", deterministic)
    tried = []
    Captured(lambda: tried.append(th.backends.cudnn.benchmark), th.device("cuda")).prepare()
    assert tried == [not deterministic] * 4
    assert not th.backends.cudnn.benchmark


def test_torchs_watch_over_waits_does_not_tell_every_user_that_it_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_mode(mode: Any) -> None:
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all", UserWarning, stacklevel=2
        )

    monkeypatch.setattr(th.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(th.cuda, "get_sync_debug_mode", lambda: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cuda_graph.sync_debug_mode("error"):
            pass
        with pytest.raises(UserWarning, match="something else"), cuda_graph.sync_debug_mode("error"):
            warnings.warn("something else", UserWarning, stacklevel=1)


def test_another_error_is_not_hidden(cuda: FakeCuda) -> None:
    def work() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        Captured(work, th.device("cuda")).prepare()


def test_off_cuda_it_is_the_function() -> None:
    counter = th.zeros(())
    captured = Captured(lambda: counter.add_(th.rand(())), th.device("cpu"))
    th.manual_seed(0)
    captured.prepare()
    rehearsed = counter.item()
    assert rehearsed > 0, "so that tests see what a rehearsal leaves behind"
    captured()
    assert counter.item() == 2 * rehearsed, "the same random number"


def test_random_generators_are_put_back() -> None:
    before = th.get_rng_state()
    with unchanged_generator(th.device("cpu")):
        th.rand(3)
    assert th.equal(th.get_rng_state(), before)


def test_an_upload_waits_for_the_last_one_before_it_writes(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "page_locked", lambda tensor, device: th.empty_like(tensor))
    empty_like = th.empty_like
    monkeypatch.setattr(transfer.th, "empty_like", lambda tensor, **options: empty_like(tensor))
    upload = Upload(np.zeros(3), th.device("cuda"))
    for value in (1.0, 2.0):
        array = np.full(3, value)
        tensor = upload(array)
        array[:] = -1.0
        assert tensor.tolist() == [value] * 3
    assert cuda.log == ["the host waits for the event", "event on current"] * 2


def test_the_emulation_tells_a_graph_from_a_function() -> None:
    """It repeats kernels on the same memory; Python's part of the work is done once and for all."""
    counter, total, scale, draws = th.zeros(()), th.zeros(()), [1.0], th.zeros(4)

    def work() -> None:
        counter.add_(1)
        total.add_(counter * scale[0])
        draws.copy_(th.rand(4))

    graph = EmulatedGraph(work)
    first = draws.clone()
    scale[0] = 100.0
    graph()
    assert (counter.item(), total.item()) == (2, 1 + 2)
    assert not th.equal(draws, first)
    with pytest.raises(AssertionError, match="makes the host wait"):
        EmulatedGraph(lambda: total.item())


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Captured(lambda: None, th.device("cpu")).prepare()
