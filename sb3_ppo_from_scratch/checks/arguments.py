"""Checks of what the user passes in: each raises an error that names the parameter, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

__all__ = [
    "check_action_space",
    "check_device",
    "check_flag",
    "check_integer",
    "check_nan_observations",
    "check_number",
    "check_observation_space",
    "check_readable",
    "check_scheduled",
    "check_trainable_actions",
    "errors_for_assertions",
    "resolve_schedule",
]


def check_integer(name: str, value: Any, minimum: int, maximum: float = math.inf, why: str = "") -> None:
    """
    :raises TypeError: unless ``value`` is an integer (NumPy's count, booleans do not)
    :raises ValueError: unless ``minimum <= value <= maximum``
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r} of type {type(value).__name__}")
    if not minimum <= int(value) <= maximum:
        upper = "" if maximum == math.inf else f" and at most {int(maximum)}"
        raise ValueError(f"{name} must be at least {minimum}{upper}{why}, not {value}")


def check_flag(name: str, value: Any) -> None:
    """:raises TypeError: unless ``value`` is a boolean (NumPy's counts)."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, not {value!r} of type {type(value).__name__}")


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False, finite: bool = True
) -> None:
    """
    :param above: whether ``low`` itself is excluded
    :param finite: whether infinity is excluded
    :raises TypeError: unless ``value`` is a real number
    :raises ValueError: unless it lies within the bounds; NaN never does
    """
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a number, not {value!r} of type {type(value).__name__}")
    number = float(value)
    within = (number > low if above else number >= low) and number <= high
    if not within or (finite and math.isinf(number)):
        if low == -math.inf and high == math.inf:
            allowed = "finite"
        elif high == math.inf:
            allowed = ("finite and " if finite else "") + (f"greater than {low:g}" if above else f"at least {low:g}")
        else:
            allowed = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {allowed}, not {value}")


def check_scheduled(name: str, value: float | Schedule, low: float = -math.inf, *, above: bool = False) -> None:
    """
    A number, or a schedule (a callable of the progress remaining, from 1 to 0) judged by its value at the start.

    A schedule may be 0 where a number may not: rl-zoo3 passes such a one to models that only predict.

    :raises TypeError: if it is neither
    :raises ValueError: if it is out of bounds
    """
    if not callable(value):
        if not isinstance(value, Real):
            raise TypeError(
                f"{name} must be a number or a schedule (a function of the progress remaining, from 1 to 0), "
                f"not {value!r} of type {type(value).__name__}"
            )
        return check_number(name, value, low, above=above)
    return check_number(f"{name} (its schedule at progress_remaining=1)", value(1.0), low)


def resolve_schedule(name: str, schedule: float | Schedule, progress_remaining: float, low: float = 0.0) -> float:
    """
    The value of a schedule now.

    The last rollout may overshoot ``total_timesteps``. The progress remaining is then below 0, and a schedule that crosses
    zero there is SB3's behaviour, not an error.

    :param progress_remaining: 1 at the start of training, 0 at its end
    :raises ValueError: if it is not finite, or below ``low`` before the end
    """
    value = float(schedule(progress_remaining)) if callable(schedule) else float(schedule)
    if not math.isfinite(value) or (value < low and progress_remaining >= 0):
        bound = "finite" if low == -math.inf else f"finite and at least {low:g}"
        raise ValueError(f"{name} must be {bound}, not {value} (at progress_remaining={progress_remaining:g})")
    return value


_LEAF_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_SHIFT = "let the environment add the rest, or gymnasium's TransformAction and TransformObservation"
_NAMES = "Box, Discrete, MultiDiscrete, MultiBinary"


def check_observation_space(space: spaces.Space) -> None:
    """:raises ValueError: for a space that SB3's policies cannot read."""
    leaves = space.spaces.items() if isinstance(space, spaces.Dict) else [("", space)]
    if isinstance(space, spaces.Dict) and not space.spaces:
        raise ValueError("the observation space must not be an empty Dict")
    for key, leaf in leaves:
        where = f" under key {key!r}" if key else ""
        if not isinstance(leaf, _LEAF_SPACES):
            raise ValueError(f"the observation space must be {_NAMES} or a flat Dict of these, not {leaf}{where}")
        if np.any(getattr(leaf, "start", 0)):
            raise ValueError(f"the observation space must start at 0, not {leaf}{where}: it is one-hot encoded; {_SHIFT}")
        if isinstance(leaf, spaces.MultiDiscrete) and leaf.nvec.ndim != 1:
            raise ValueError(f"a MultiDiscrete observation space must have one dimension, not {leaf}{where}; flatten it")


def check_readable(policy: str, reads_dicts: bool, space: spaces.Space) -> None:
    """
    :param policy: name of one of SB3's or our policies, without a features extractor of the user's
    :param reads_dicts: whether it is for Dict spaces
    :raises ValueError: for a space that its features extractor cannot read
    """
    if isinstance(space, spaces.Dict) != reads_dicts:
        raise ValueError(f"policy must be {_fitting(policy, reads_dicts)} for the observation space {space}, not {policy!r}")
    for leaf in space.spaces.values() if isinstance(space, spaces.Dict) else [space]:
        if isinstance(leaf, spaces.Box) and leaf.shape == ():
            raise ValueError(f"a Box observation space must have a dimension, not {leaf} of shape (); reshape it to (1,)")


def _fitting(policy: str, reads_dicts: bool) -> str:
    """The policies of the same family for the other kind of space."""
    if policy == "MultiInputPolicy":
        return "'MlpPolicy', 'SharedMlpPolicy' or 'CnnPolicy'"
    if reads_dicts:
        return " or ".join(repr(policy.replace("MultiInput", kind)) for kind in ("Mlp", "Cnn"))
    return repr(re.sub("SharedMlp|Mlp|Cnn", "MultiInput", policy))


def check_nan_observations(value: Any, space: spaces.Space) -> None:
    """
    :raises TypeError: if it is neither a boolean, ``None``, nor several keys
    :raises ValueError: if ``space`` has no such key
    """
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(f"nan_observations must be True, False, None or a list of keys, not {value!r}")
    keys = list(space.spaces) if isinstance(space, spaces.Dict) else []
    if unknown := [key for key in value if key not in keys]:
        raise ValueError(f"nan_observations must be True, False, None or a list of the keys {keys}, not of {unknown}")


def check_action_space(space: spaces.Space) -> None:
    """:raises ValueError: for a space that no distribution of SB3's covers."""
    if not isinstance(space, _LEAF_SPACES):
        raise ValueError(f"the action space must be {_NAMES}, not {space}")
    if isinstance(space, spaces.Box) and not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(f"a Box action space must have finite bounds, not {space}; gymnasium's RescaleAction can give some")
    if isinstance(space, spaces.MultiBinary | spaces.MultiDiscrete) and len(space.shape) != 1:
        raise ValueError(f"a Multi-dimensional {type(space).__name__} action space is not supported ({space}); flatten it")


def check_trainable_actions(space: spaces.Space) -> None:
    """:raises ValueError: for an action space whose actions SB3's distributions sample wrongly, or its buffer cannot hold."""
    if np.any(getattr(space, "start", 0)):
        raise ValueError(f"the action space must start at 0, not {space}: policies sample 0, 1, 2, ...; {_SHIFT}")
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"a Box action space must be of floats, not {space}: policies sample real numbers. Give it dtype=np.float32 and "
            "round in the environment, or make it a MultiDiscrete"
        )


def check_device(device: th.device | str) -> None:
    """:raises ValueError: for a name that torch does not know; SB3 falls back to the CPU where there is no CUDA."""
    if device == "auto":
        return
    try:
        th.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or a torch.device, not {device!r}") from error


@contextmanager
def errors_for_assertions(subject: str, space: spaces.Space | None = None) -> Iterator[None]:
    """
    SB3 asserts what users may get wrong; an assertion vanishes under ``python -O``, and nobody thinks of catching one.

    :param subject: what is being checked, to begin the message with
    :param space: the observation space, to be named too; a Box that has been printed is saved in other bytes
    :raises ValueError: in place of an ``AssertionError``, a ``NotImplementedError``, or torch's errors about shapes
    """
    try:
        yield
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError):
            raise  # EnvFailedError, or of a device
        where = "" if space is None else f" with the observation space {space}"
        raise ValueError(f"{subject}{where}: {' '.join(map(str, error.args))}") from error
