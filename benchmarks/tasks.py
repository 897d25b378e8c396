"""What is trained, and how: entries of the hyperparameter file as arguments of an algorithm."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml
from rl_zoo3.utils import SimpleLinearSchedule

from benchmarks.record import ROOT

__all__ = ["HYPERPARAMETERS", "Task", "load_task"]

HYPERPARAMETERS = ROOT / "hyperparams" / "scratch_ppo.yml"
_OF_THE_ENVIRONMENT = ("env_wrapper", "frame_stack", "normalize")


class Task(NamedTuple):
    """An environment's entry in the hyperparameter file."""

    n_timesteps: float
    policy: str
    n_envs: int
    arguments: dict[str, Any]
    """The algorithm's own arguments, schedules included."""


def load_task(name: str) -> Task:
    """
    Read an entry of the hyperparameter file; ``lin_x`` becomes the schedule that rl-zoo3 makes of it.

    :param name: the entry's
    """
    entry = yaml.safe_load(HYPERPARAMETERS.read_text(encoding="utf-8"))[name]
    n_timesteps, policy, n_envs = (entry.pop(key) for key in ("n_timesteps", "policy", "n_envs"))
    for key, value in entry.items():
        if isinstance(value, str) and value.startswith("lin_"):
            entry[key] = SimpleLinearSchedule(value.removeprefix("lin_"))
    return Task(n_timesteps, policy, n_envs, {key: value for key, value in entry.items() if key not in _OF_THE_ENVIRONMENT})
