"""
How fast is the engine of CUDA graphs on Breakout, beside SB3's PPO and the environments alone?

Every row comes from a process of its own; first all rates, then, with what time is left, the profiles.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.cases import Case, Contestant, build, make_env
from benchmarks.gpu.checks import Check
from benchmarks.gpu.child import answer_of, start
from benchmarks.gpu.profile import minibatch_profile, profiled
from benchmarks.markdown import markdown_table
from benchmarks.tasks import Task, load_task
from benchmarks.timed_run import peak_memory
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine

__all__ = ["Stopwatch", "contestants", "described", "environment_rate", "measure", "measure_one", "table"]

Record = dict[str, Any]

ENV_ID = "BreakoutNoFrameskip-v4"
_SHARE_OF_RATES = 0.5
"""Of the budget; the rest is for starting and for the profiles."""


def contestants(n_envs: int, backend: str, cores: int) -> list[Contestant]:
    """
    In the order in which they are timed; the two of SB3's are its candidates for the best kind of environments.

    :param n_envs: parallel environments
    :param backend: of the native ones
    :param cores: a process per environment is only tried up to eight times as many
    """
    in_halves = ("fp32", "bf16") if n_envs % 2 == 0 else ()
    subproc = [Contestant("sb3", "subproc")] if n_envs <= 8 * cores else []
    return [
        Contestant("none", backend),
        *(Contestant("cudagraph", backend, precision=precision) for precision in CudaGraphEngine.precisions),
        Contestant("cudagraph", backend, compiled_loss=True),
        *(Contestant("cudagraph", backend, precision=precision, halves=True) for precision in in_halves),
        *subproc,
        Contestant("sb3", "dummy"),
        Contestant("torch", backend),
    ]


# -------------------------------------------------------------------- measuring


class Stopwatch(BaseCallback):
    """
    Ends a run after so many seconds, and times its iterations but the first, which allocates and records.

    :param seconds: from the first step on; at least two iterations are completed
    """

    is_bystander = True

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        self.begun = time.perf_counter()
        self.boundaries: list[tuple[float, int]] = []

    def _on_rollout_start(self) -> None:
        self.boundaries.append((time.perf_counter(), self.model.num_timesteps))

    def _on_step(self) -> bool:
        return len(self.boundaries) < 3 or time.perf_counter() - self.begun < self.seconds

    @property
    def fps(self) -> float:
        """Steps per second, over all environments, from the second rollout's begin to the last one's."""
        (start, first), (end, last) = self.boundaries[1], self.boundaries[-1]
        return (last - first) / (end - start)


def environment_rate(env: VecEnv, seconds: float) -> float:
    """Steps per second of the environments alone, with random actions."""
    env.action_space.seed(0)
    actions = np.array([[env.action_space.sample() for _ in range(env.num_envs)] for _ in range(256)])
    env.reset()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(actions[steps % len(actions)])
        steps += 1
    return steps * env.num_envs / (time.perf_counter() - start)


def described(contestant: Contestant, n_envs: int) -> Record:
    """The columns that say whose figures a row holds. Torch has its own number of threads here."""
    names = ("engine", "envs", "precision", "title")
    return {**{name: getattr(contestant, name) for name in names}, "n_envs": n_envs}


def measure_one(contestant: Contestant, n_envs: int, seconds: float, task: Task, device: str, seed: int = 0) -> Record:
    """
    Time one of them.

    :param contestant: who
    :param n_envs: parallel environments
    :param seconds: to train for
    :param task: hyperparameters
    :param device: of the networks
    :param seed: of the model and the environments
    """
    case = Case("Breakout", ENV_ID, 0, lambda: task._replace(n_envs=n_envs))
    if contestant.engine == "none":
        with contextlib.closing(make_env(case, contestant, seed)) as env:
            return {"fps": environment_rate(env, min(seconds, 10.0))}
    model, watch = build(case, contestant, seed, device), Stopwatch(seconds)
    with _environments_of(model):
        model.learn(10**9, callback=watch)
        record = {"fps": watch.fps, "iterations": len(watch.boundaries) - 2, "host_memory_mib": peak_memory()}
        if device.startswith("cuda"):
            record["gpu_memory_mib"] = th.cuda.max_memory_allocated() / 2**20
        return record


def profile_one(contestant: Contestant, n_envs: int, task: Task, device: str, seed: int = 0) -> Record:
    """
    Two iterations under the profiler, after two without, and one minibatch step where the engine has graphs.

    The parameters are those of :func:`measure_one`.
    """
    model = build(Case("Breakout", ENV_ID, 0, lambda: task._replace(n_envs=n_envs)), contestant, seed, device)
    with _environments_of(model):
        steps = 2 * model.n_steps * model.n_envs
        model.learn(steps)
        busy = profiled(lambda: model.learn(steps, reset_num_timesteps=False))
        learner = getattr(getattr(model, "_engine", None), "_learner", None)
        record: Record = {"gpu_busy_share": busy.share}
        return record if learner is None else {**record, "minibatch_step": minibatch_profile(learner)}


@contextlib.contextmanager
def _environments_of(model: OnPolicyAlgorithm) -> Iterator[None]:
    try:
        yield
    finally:
        model.get_env().close()  # type: ignore[union-attr]  # it has one


def measure(options: argparse.Namespace, deadline: float, failed: Sequence[Check] = ()) -> Iterator[Record]:
    """
    Everybody, one number of environments after the other, for as long as there is time; then the profiles.

    :param options: see :func:`parse_options`
    :param deadline: ``time.monotonic()`` by which to have ended
    :param failed: checks; whom one concerns is not timed
    :return: each row when it has its rate, and again when it has its profile
    """
    cores = os.cpu_count() or 1
    orders = [(who, n_envs) for n_envs in options.n_envs for who in contestants(n_envs, options.backend, cores)]
    rows: list[Record] = []
    for index, (who, n_envs) in enumerate(orders):
        rows.append(described(who, n_envs))
        seconds = _SHARE_OF_RATES * (deadline - time.monotonic()) / (len(orders) - index)
        reason = next(
            (check.name for check in failed if who.engine == "cudagraph" and check.concerns("CnnPolicy", who.precision)), None
        )
        if reason is not None:
            rows[-1]["skipped"] = f"a check has failed: {reason}"
        elif seconds < 2.0:
            rows[-1]["skipped"] = "the budget was spent"
        else:
            _ask(rows[-1], "skipped", {"seconds": seconds, "seed": options.seed}, who, deadline)
        yield rows[-1]
    for row, (who, _) in zip(rows, orders, strict=True):
        if "fps" in row and who.engine != "none" and deadline - time.monotonic() > 10.0:
            _ask(row, "no_profile", {"seconds": None, "seed": options.seed}, who, deadline)
            yield row


def _ask(row: Record, excuse: str, order: Record, who: Contestant, deadline: float) -> None:
    """Let a process of its own fill a row; if there is no answer, the excuse is why."""
    order = {**order, "contestant": dataclasses.asdict(who), "n_envs": row["n_envs"]}
    answer = answer_of(start("benchmarks.gpu.measure", order), deadline - time.monotonic())
    row |= {excuse: answer} if isinstance(answer, str) else answer


# -------------------------------------------------------------------- reporting


def table(rows: list[Record]) -> str:
    """
    As Markdown: steps per second beside SB3's best and beside the environments alone of the same number.

    :param rows: from :func:`measure_one`
    """
    columns, lines = ("environments", "", "steps/s", "times SB3", "of environments alone", "GPU busy", "GPU MiB"), []
    for row in rows:
        if "skipped" in row:
            lines.append([f"{row['n_envs']} {row['envs']}", row["title"], f"left out: {row['skipped']}", *[""] * 4])
            continue
        sb3, alone = _best(rows, row, "sb3"), _best(rows, row, "none", row["envs"])
        cells = [
            f"{row['n_envs']} {row['envs']}",
            row["title"],
            f"{row['fps']:,.0f}",
            "" if sb3 is None or row["engine"] == "none" else f"{row['fps'] / sb3:.2f}",
            "" if alone is None or row["engine"] == "none" else f"{row['fps'] / alone:.0%}",
            f"{row['gpu_busy_share']:.0%}" if "gpu_busy_share" in row else "",
            f"{row['gpu_memory_mib']:,.0f}" if "gpu_memory_mib" in row else "",
        ]
        lines.append(cells)
    return markdown_table(columns, lines)


def _best(rows: list[Record], like: Record, engine: str, envs: str | None = None) -> float | None:
    """The highest rate of that engine with as many environments as ``like``."""
    rates = [
        row["fps"]
        for row in rows
        if "fps" in row and (row["engine"], row["n_envs"]) == (engine, like["n_envs"]) and envs in (None, row["envs"])
    ]
    return max(rates, default=None)


def main() -> None:
    """Measure what the first argument asks for, and print it as JSON."""
    order = json.loads(sys.argv[1])
    who, task = Contestant(**order["contestant"]), load_task("atari")
    if order["seconds"] is None:
        print(json.dumps(profile_one(who, order["n_envs"], task, order.get("device", "cuda"), order["seed"])))
    else:
        print(
            json.dumps(measure_one(who, order["n_envs"], order["seconds"], task, order.get("device", "cuda"), order["seed"]))
        )


if __name__ == "__main__":
    main()
