"""What is trained, and how: entries of the hyperparameter file as arguments of an algorithm."""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

import yaml
from rl_zoo3.utils import SimpleLinearSchedule
from torch import nn

from benchmarks.record import ROOT

__all__ = ["HYPERPARAMETERS", "Task", "load_entry", "load_task", "schedule"]

HYPERPARAMETERS = ROOT / "hyperparams" / "scratch_ppo.yml"
_OF_THE_ENVIRONMENT = ("env_wrapper", "frame_stack")


class Task(NamedTuple):
    """An environment's entry in the hyperparameter file."""

    n_timesteps: float
    policy: str
    n_envs: int
    arguments: dict[str, Any]
    """The algorithm's own arguments, schedules included."""
    normalize: dict[str, Any] | None = None
    """Arguments of the ``VecNormalize`` around the environments; ``None`` for no such wrapper."""

    def described(self) -> dict[str, Any]:
        """All that learning depends on, as JSON has it; schedules as the hyperparameter file writes them."""
        named = {"policy": self.policy, "n_envs": self.n_envs, "normalize": self.normalize, **self.arguments}
        return {
            name: f"lin_{value.initial_value:g}" if isinstance(value, SimpleLinearSchedule) else value
            for name, value in named.items()
        }


def schedule(text: str) -> SimpleLinearSchedule:
    """
    What rl-zoo3 makes of ``lin_x``: from x to zero.

    :param text: such as ``"lin_2.5e-4"``
    """
    return SimpleLinearSchedule(text.removeprefix("lin_"))


def load_entry(name: str) -> dict[str, Any]:
    """An entry of the hyperparameter file as it stands there."""
    return yaml.safe_load(HYPERPARAMETERS.read_text(encoding="utf-8"))[name]


def load_task(name: str) -> Task:
    """
    Read an entry of the hyperparameter file; ``lin_x`` becomes the schedule that rl-zoo3 makes of it.

    :param name: the entry's
    """
    entry = load_entry(name)
    n_timesteps, policy, n_envs = entry.pop("n_timesteps"), entry.pop("policy"), entry.pop("n_envs", 1)
    normalize = _plain_dict(entry.pop("normalize", False))
    if normalize is not None and "gamma" in entry:
        normalize["gamma"] = entry["gamma"]
    for key, value in entry.items():
        if isinstance(value, str) and value.startswith("lin_"):
            entry[key] = schedule(value)
    if "policy_kwargs" in entry:
        entry["policy_kwargs"] = _plain_dict(entry["policy_kwargs"])
    arguments = {key: value for key, value in entry.items() if key not in _OF_THE_ENVIRONMENT}
    return Task(n_timesteps, policy, n_envs, arguments, normalize)


def _plain_dict(value: str | bool) -> dict[str, Any] | None:
    """``True``, or what the zoo would evaluate: ``"dict(a=1)"`` or ``"{'a': 1}"``, of plain values and torch's modules."""
    if isinstance(value, bool):
        return {} if value else None
    return _literal(ast.parse(value.strip(), mode="eval").body)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nn":
        return getattr(nn, node.attr)
    return ast.literal_eval(node)
