"""Whose model a file is, by the names of its fields: who loads a file of another algorithm is told so."""

from __future__ import annotations

import contextlib
import json
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

from sb3_ppo_from_scratch.safe_files.archive import read_archive

__all__ = ["errors_name_the_algorithm", "warn_of_defaults"]

_NAMES = {"td3": "TD3 or DDPG", "dqn": "DQN", "crossq": "CrossQ"}
"""By the part of SB3's or sb3-contrib's names of modules that the policy stands in; others are in capitals."""
_OURS = ("maskable", "recurrent")
"""Parts of such names whose policies are for PPO alone."""
_FIELDS = {"cg_max_steps": "TRPO", "replay_buffer_class": "an off-policy algorithm"}
"""A field that no PPO has, and whose it is."""


@contextlib.contextmanager
def errors_name_the_algorithm(path: str | pathlib.Path | BinaryIO | Any) -> Iterator[None]:
    """
    Around the loading of a model: whatever fails is put down to the file's algorithm, if that is not PPO.

    :param path: the file, as ``load`` takes it
    :raises ValueError: naming the algorithm, in place of another error
    """
    try:
        yield
    except Exception as error:
        other = _other_algorithm(path)
        if other is None:
            raise
        raise ValueError(f"{path} is not a model of PPO but of {other}: load it with that algorithm's own class") from error


def _other_algorithm(path: Any) -> str | None:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        fields = json.loads(read_archive(path)["data"])
        package, *parts = str(fields["policy_class"]["__module__"]).split(".")
        part = next((part for part in parts if part not in ("common", "policies", *_OURS)), None)
        if package in ("stable_baselines3", "sb3_contrib") and part is not None:
            return _NAMES.get(part, part.upper())
        return next((name for field, name in _FIELDS.items() if field in fields), None)
    return None


def warn_of_defaults(fields: dict[str, Any]) -> None:
    """A2C has PPO's policies, so that its files open; what they lack gets its default."""
    if "clip_range" not in fields:
        warnings.warn("the file is no model of PPO (of A2C?): clip_range and what else it lacks get defaults", stacklevel=3)
