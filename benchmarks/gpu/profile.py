"""What a GPU was doing: the share of the time that it was busy, the gaps, and where one minibatch step's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.checks import count_waits
from sb3_ppo_from_scratch.engines.cudagraph.learning import GraphLearner

__all__ = ["Busy", "busy_time", "minibatch_profile", "profiled"]

_STEPS = 50


class Busy(NamedTuple):
    """Of the time from the first kernel's begin to the last one's end, in seconds."""

    busy: float
    """at least one kernel or copy ran"""
    total: float
    n_kernels: int
    largest_gap: float

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.busy / self.total if self.total > 0 else 0.0


def busy_time(intervals: list[tuple[float, float]]) -> Busy:
    """
    The length of the union of intervals, which may overlap.

    :param intervals: begin and end of each kernel, in seconds, in any order
    """
    if not intervals:
        return Busy(0.0, 0.0, 0, 0.0)
    ordered = sorted(intervals)
    busy, largest_gap, reached = 0.0, 0.0, ordered[0][0]
    for begin, end in ordered:
        largest_gap = max(largest_gap, begin - reached)
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return Busy(busy, reached - ordered[0][0], len(ordered), largest_gap)


def profiled(function: Callable[[], object]) -> Busy:
    """Run ``function`` once under torch's profiler, which slows down the host a little and the device not at all."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        th.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return busy_time([(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events])


def minibatch_profile(learner: GraphLearner) -> dict[str, Any]:
    """
    Where the time of one minibatch step goes; the learner has done an update already.

    :param learner: its policy goes on learning meanwhile
    :return: microseconds on the host and in all, of kernels, of gaps between them; how often the host waits
    """

    def steps() -> None:
        for _ in range(_STEPS):
            learner._minibatch()

    waits = count_waits(learner._minibatch)
    host = []
    th.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_STEPS):
        before = time.perf_counter()
        learner._minibatch()
        host.append(time.perf_counter() - before)
    th.cuda.synchronize()
    total = (time.perf_counter() - start) / _STEPS
    busy = profiled(steps)
    return {
        "microseconds": total * 1e6,
        "host_microseconds": statistics.median(host) * 1e6,
        "kernel_microseconds": busy.busy / _STEPS * 1e6,
        "gap_microseconds": (busy.total - busy.busy) / _STEPS * 1e6,
        "largest_gap_microseconds": busy.largest_gap * 1e6,
        "kernels": busy.n_kernels / _STEPS,
        "waits": waits,
    }
