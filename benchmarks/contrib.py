"""
The speed of policies with an LSTM or with masks beside sb3-contrib's ``RecurrentPPO`` and ``MaskablePPO``.

The tasks are the zoo's without velocities, and Taxi. All train in one process and take turns; a figure is the median over the
rounds of sb3-contrib's processor time per step divided by the other's in the same round. The handbook's figures come from::

    python -m benchmarks.contrib --rounds 5 --save-result contrib
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3.import_envs  # noqa: F401  # registers the environments
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.markdown import markdown_table
from benchmarks.options import command_line
from benchmarks.record import keep, provenance
from benchmarks.tasks import load_task
from sb3_ppo_from_scratch import ScratchPPO

__all__ = ["TASKS", "main", "measure", "parse_options", "table"]

TASKS: dict[str, tuple[type[Any], str]] = {
    "CartPoleNoVel-v1": (RecurrentPPO, "lstm"),
    "PendulumNoVel-v1": (RecurrentPPO, "lstm"),
    "Taxi-v4": (MaskablePPO, "compiled"),
}
"""With sb3-contrib's algorithm and our fast engine."""


def make_env(env_id: str) -> gym.Env:
    """With Taxi's masks as ``MaskablePPO`` asks for them, too."""
    env = gym.make(env_id)
    return ActionMasker(env, _allowed_in_taxi) if env_id == "Taxi-v4" else env


def _allowed_in_taxi(env: gym.Env) -> Any:
    taxi: Any = env.unwrapped
    return taxi.action_mask(taxi.s)


def measure(env_id: str, rounds: int, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """
    :param env_id: one of :data:`TASKS`
    :param rounds: in each of which everybody has a turn of some 4,000 steps
    :param scale: share of them
    :param seed: of models and environments
    :return: per contestant, steps per second of processor time, round by round, and how many times as fast as the first
    """
    task, (theirs, engine) = load_task(env_id), TASKS[env_id]
    contestants: list[tuple[str, type[Any], dict[str, str]]] = [(theirs.__name__, theirs, {})]
    contestants += [(name, ScratchPPO, {"engine": name}) for name in ("torch", engine)]
    rollout = task.n_envs * task.arguments["n_steps"]
    steps = max(1, round(scale * 4096 / rollout)) * rollout
    models: dict[str, Any] = {}
    for name, algorithm, options in contestants:
        env = make_vec_env(partial(make_env, env_id), task.n_envs, seed=seed)
        if task.normalize is not None:
            env = VecNormalize(env, **task.normalize)
        policy = task.policy.removeprefix("Maskable") if algorithm is MaskablePPO else task.policy
        models[name] = algorithm(policy, env, seed=seed, device="cpu", **task.arguments, **options)
        models[name].learn(rollout, log_interval=None)  # the first calls of everything
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            before = time.process_time()
            model.learn(steps, log_interval=None, reset_num_timesteps=False)
            speeds[name].append(steps / (time.process_time() - before))
    first = speeds[theirs.__name__]
    ratios = {name: [ours / other for ours, other in zip(own, first, strict=True)] for name, own in speeds.items()}
    return {"steps": steps, "speeds": speeds, "ratios": ratios}


def table(record: dict[str, Any]) -> str:
    """In Markdown: medians, with the smallest and the largest."""
    rows = [
        (env_id, name, f"{statistics.median(result['speeds'][name]):.0f}", _spread(ratios))
        for env_id, result in record["tasks"].items()
        for name, ratios in result["ratios"].items()
    ]
    return markdown_table(("task", "by", "steps per second", "times as fast as sb3-contrib"), rows)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """:param argv: the command line's if ``None``"""
    parser = command_line(
        "benchmarks.contrib", str(__doc__), out=Path("runs/contrib"), rounds=5, scale=1.0, seed=0, threads=1, save_result=None
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the record."""
    options = parse_options(argv)
    th.set_num_threads(options.threads)
    record = provenance("benchmarks.contrib") | {
        "tasks": {env_id: measure(env_id, options.rounds, options.scale, options.seed) for env_id in TASKS}
    }
    keep("contrib", record, table(record), options.out, options.save_result)


if __name__ == "__main__":
    main()
