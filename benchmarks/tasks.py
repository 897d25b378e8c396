"""
What is trained, and how: entries of the hyperparameter file as arguments of an algorithm.

It needs neither the zoo nor PyYAML, which a machine with a GPU may lack.
"""

from __future__ import annotations

import ast
from itertools import takewhile
from typing import Any, NamedTuple

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule
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
        return {name: _described(value) for name, value in named.items()}


def _described(value: Any) -> Any:
    """A value as the hyperparameter file writes it, in JSON's terms."""
    if isinstance(value, dict):
        return {name: _described(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_described(held) for held in value]
    if isinstance(value, type):
        return f"nn.{value.__name__}"
    return f"lin_{value(1.0):g}" if callable(value) else value


def schedule(text: str) -> Schedule:
    """
    What rl-zoo3 makes of ``lin_x``, from x to zero; where it is not installed, SB3's, which rounds a little differently.

    :param text: such as ``"lin_2.5e-4"``
    """
    initial = float(text.removeprefix("lin_"))
    try:
        from rl_zoo3.utils import SimpleLinearSchedule
    except ModuleNotFoundError:
        return LinearSchedule(initial, 0.0, 1.0)
    return SimpleLinearSchedule(initial)


def load_entry(name: str) -> dict[str, Any]:
    """
    An entry of the hyperparameter file as it stands there: plain values by name; what a list holds, as texts.

    :param name: the entry's
    :raises KeyError: if there is none
    """
    lines = [line for line in HYPERPARAMETERS.read_text(encoding="utf-8").splitlines() if line.lstrip()[:1] not in ("", "#")]
    if f"{name}:" not in lines:
        raise KeyError(name)
    entry: dict[str, Any] = {}
    for line in takewhile(lambda line: line.startswith(" "), lines[lines.index(f"{name}:") + 1 :]):
        key, _, value = line.strip().partition(":")
        if key.startswith("- "):
            entry[next(reversed(entry))].append(line.strip().removeprefix("- "))
        else:
            entry[key] = _plain(value.strip()) if value else []
    return entry


def _plain(text: str) -> Any:
    """A YAML scalar: a number, ``true``, ``false`` or ``null``, a text in quotes or without."""
    words = {"true": True, "false": False, "null": None}
    try:
        return words[text] if text in words else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


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
