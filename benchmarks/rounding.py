"""
How far a fast engine's updates are from the reference's, beside how far these are from themselves after a last bit.

The engines round differently, and PPO magnifies that: late in training, steps of Adam over ten epochs turn a last bit into a
visible share of an update. So runs of two engines part, and their returns would need many seeds to show that they learn alike.
Here each update starts from the same weights, optimizer, rollout and random numbers, at several moments of a run by the fast
engine: once by that engine, once by the reference, and once by the reference from weights of which each has been changed by
about half a unit in its last place. An engine that computes the same is no further from the reference than that. The figures
in the handbook come from::

    python -m benchmarks.rounding --save-result rounding
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from benchmarks.cases import build, scaled
from benchmarks.comparison.protocol import PROTOCOL
from benchmarks.markdown import markdown_table
from benchmarks.options import command_line
from benchmarks.record import keep, provenance
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.distributions import drop_graph
from sb3_ppo_from_scratch.engines import choose_engine

__all__ = ["TASKS", "main", "measure", "table"]

TASKS = ("CartPole-v1", "Pendulum-v1-no-gSDE", "Pendulum-v1", "MountainCarContinuous-v0", "CartPoleNoVel-v1", "Taxi-v4")
"""Entries of the comparison."""
_MOMENTS = 10
_LAST_BIT = 2.0**-24


def measure(name: str, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """
    :param name: one of :data:`TASKS`
    :param seed: of the run
    :param scale: share of the entry's steps
    :return: at :data:`_MOMENTS` moments, the length of the difference from the reference's update, divided by its length
    """
    entry = PROTOCOL[name]
    case, who = scaled(entry.case(), scale), entry.sides["fast"]
    model = build(case, who, seed)
    assert isinstance(model, ScratchPPO)
    train, updates = model.train, case.timesteps // (model.n_steps * model.n_envs)
    moments = {max(1, round(updates * (i + 0.5) / _MOMENTS)) for i in range(_MOMENTS)}  # at the very end some rates are 0
    found: dict[str, Any] = {"engine": who.engine, "timesteps": [], "fast": [], "last_bit": []}

    def compare_and_train() -> None:
        done = model.num_timesteps // (model.n_steps * model.n_envs)
        if done in moments:
            reference = change(model, "torch")
            found["timesteps"].append(model.num_timesteps)
            for what, other in (("fast", change(model, who.engine)), ("last_bit", change(model, "torch", _LAST_BIT))):
                found[what].append(float((other - reference).norm() / reference.norm()))
        train()

    model.train = compare_and_train  # type: ignore[method-assign]  # the algorithm calls it by this name
    model.learn(case.timesteps)
    return found


def change(model: ScratchPPO, engine: str, noise: float = 0.0) -> th.Tensor:
    """
    What an update would change about a model's parameters, which stay as they are, as do all random generators.

    :param model: with a full rollout buffer
    :param engine: that computes the update
    :param noise: standard deviation of the factors by which each weight is changed first
    :return: ``[n_parameters]``
    """
    drop_graph(model.policy.action_dist)
    policy, states = copy.deepcopy(model.policy), (np.random.get_state(), th.get_rng_state())
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + noise * th.randn(parameter.shape, generator=generator))
    policy.set_training_mode(True)
    for group in policy.optimizer.param_groups:
        group["lr"] = model.lr_schedule(model._current_progress_remaining)
    start = _vector(policy)
    choose_engine(engine, policy).engine(policy).update(model.rollout_buffer, model._update_config())
    np.random.set_state(states[0])
    th.set_rng_state(states[1])
    return _vector(policy) - start


def _vector(policy: ActorCriticPolicy) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(policy.parameters()).detach().double().clone()


def table(record: dict[str, Any]) -> str:
    """In Markdown: medians over the moments, with the smallest and the largest."""
    rows = [
        (name, f"`{found['engine']}`", str(len(found["fast"])), _spread(found["fast"]), _spread(found["last_bit"]))
        for name, found in record["tasks"].items()
    ]
    return markdown_table(("task", "engine", "updates", "engine's distance", "a last bit's distance"), rows)


def _spread(distances: list[float]) -> str:
    return f"{statistics.median(distances):.1e} ({min(distances):.1e} to {max(distances):.1e})"


def main(argv: list[str] | None = None) -> None:
    """
    Measure, print the table, write the record.

    :param argv: the command line's if ``None``
    """
    shared: dict[str, Any] = {"out": Path("runs/rounding"), "scale": 1.0, "seed": 0, "threads": 1, "save_result": None}
    options: argparse.Namespace = command_line("benchmarks.rounding", str(__doc__), **shared).parse_args(argv)
    th.set_num_threads(options.threads)
    tasks = {name: measure(name, options.seed, options.scale) for name in TASKS}
    record = provenance("benchmarks.rounding") | {"tasks": tasks}
    keep("rounding", record, table(record), options.out, options.save_result)


if __name__ == "__main__":
    main()
