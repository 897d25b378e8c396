"""
Environments that dominate: ways to step HalfCheetah beside each other, in steps per second of the clock.

The environments alone, with random actions, and the same environments under training by ScratchPPO, in turns. SB3's
``DummyVecEnv`` and ``SubprocVecEnv``, Gymnasium's ``AsyncVectorEnv`` with shared memory, and EnvPool's MuJoCo; the last two by
:class:`~sb3_ppo_from_scratch.vec_env.NativeVecEnv`. It needs mujoco, and for EnvPool's that package::

    python -m benchmarks.vector_envs --out benchmarks/results/vector_envs.json
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from benchmarks.markdown import markdown_table
from benchmarks.options import command_line, number
from benchmarks.record import provenance, write_json
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.vec_env import NativeVecEnv

__all__ = ["KINDS", "measure", "table"]

ENV_ID = "HalfCheetah-v5"
Seconds = dict[str, list[float]]


def _async(n_envs: int) -> VecEnv:
    return NativeVecEnv(gym.make_vec(ENV_ID, n_envs, vectorization_mode="async", vector_kwargs={"shared_memory": True}))


def _envpool(n_envs: int) -> VecEnv:
    return NativeVecEnv(import_module("envpool").make_gymnasium(ENV_ID, num_envs=n_envs))


KINDS: dict[str, Callable[[int], VecEnv]] = {
    "DummyVecEnv": lambda n_envs: make_vec_env(ENV_ID, n_envs, vec_env_cls=DummyVecEnv),
    "SubprocVecEnv": lambda n_envs: make_vec_env(ENV_ID, n_envs, vec_env_cls=SubprocVecEnv),
    "AsyncVectorEnv, shared memory": _async,
    "EnvPool": _envpool,
}
"""From a number of environments to them"""


def alone(env: VecEnv, n_steps: int) -> float:
    """
    :param env: reset
    :param n_steps: calls of ``step``
    :return: seconds that they take, with random actions
    """
    actions = np.random.default_rng(0).uniform(-1, 1, (n_steps, env.num_envs, *env.action_space.shape))  # type: ignore[misc]
    start = time.perf_counter()
    for action in actions.astype(np.float32):
        env.step(action)
    return time.perf_counter() - start


def model_on(env: VecEnv, n_steps: int) -> ScratchPPO:
    """
    :param env: of HalfCheetah
    :param n_steps: per rollout
    :return: a model with SB3's sizes for MuJoCo, after a first iteration
    """
    model = ScratchPPO("MlpPolicy", VecNormalize(env), n_steps=n_steps, batch_size=64, n_epochs=10, seed=0, device="cpu")
    return model.learn(n_steps * env.num_envs)


def measure(n_envs: int, n_steps: int, rounds: int) -> dict[str, Any]:
    """
    :param n_envs: number of environments
    :param n_steps: steps of each of them per round
    :param rounds: in each of which every kind has a turn
    :return: by kind, steps per second alone and in training: median, smallest and largest
    """
    kinds = {kind: make for kind, make in KINDS.items() if kind != "EnvPool" or importlib.util.find_spec("envpool")}
    models = {kind: model_on(make(n_envs), n_steps) for kind, make in kinds.items()}
    seconds: dict[str, Seconds] = {kind: {"alone": [], "training": []} for kind in kinds}
    for _ in range(rounds):
        for kind, model in models.items():
            seconds[kind]["alone"].append(alone(model.env.unwrapped, n_steps))  # type: ignore[union-attr]  # it has one
            start = time.perf_counter()
            model.learn(n_steps * n_envs)
            seconds[kind]["training"].append(time.perf_counter() - start)
    for model in models.values():
        model.env.close()  # type: ignore[union-attr]  # likewise
    return {kind: {what: _speeds(n_envs * n_steps, each) for what, each in of.items()} for kind, of in seconds.items()}


def _speeds(steps: int, seconds: list[float]) -> dict[str, float]:
    return {
        name: round(steps / value)
        for name, value in (("median", statistics.median(seconds)), ("min", max(seconds)), ("max", min(seconds)))
    }


def table(speeds: dict[str, Any]) -> str:
    """
    As a table in Markdown.

    :param speeds: from :func:`measure`
    """
    rows = [
        (
            kind,
            *(f"{each[what]['median']:,} ({each[what]['min']:,} to {each[what]['max']:,})" for what in ("alone", "training")),
        )
        for kind, each in speeds.items()
    ]
    return markdown_table(("environments", "steps/s alone", "steps/s in training"), rows)


def main() -> None:
    """Measure what the command line asks for, print it, and save it if asked to."""
    shared: dict[str, Any] = {"rounds": 5, "threads": 1, "out": None}
    parser = command_line("benchmarks.vector_envs", "ways to step HalfCheetah", **shared)
    parser.add_argument("--n-envs", type=number(int, 1), default=8, help="environments (%(default)s)")
    parser.add_argument("--n-steps", type=number(int, 8), default=256, help="steps of each per round (%(default)s)")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    speeds = measure(options.n_envs, options.n_steps, options.rounds)
    record = {**provenance("benchmarks.vector_envs"), "env_id": ENV_ID, "rounds": options.rounds, "n_envs": options.n_envs}
    record |= {"n_steps": options.n_steps, "steps_per_second": speeds}
    record["versions"] |= {name: version(name) for name in ("mujoco", "envpool") if importlib.util.find_spec(name)}
    print(table(speeds))
    if options.out is not None:
        write_json(Path(options.out), record)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
