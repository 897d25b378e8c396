"""Spaces, schedules and statistics from files: given their attributes without running anything, and checked to be whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_from_scratch.safe_files.old_schedules import UnreadSchedule, to_schedule
from sb3_ppo_from_scratch.safe_files.refusal import Refused, name_of, shown

__all__ = ["as_schedule", "check_attribute", "check_schedule", "check_space", "set_attributes"]


def check_attribute(kind: type, name: Any) -> None:
    """:raises Refused: unless ``name`` is one that an object of this class may get from a file"""
    if type(name) is not str or name.startswith("__") or callable(getattr(kind, name, None)):
        raise Refused(f"{name_of(kind)}.{shown(name)}", "an object's methods are not for a file to set")


def set_attributes(target: Any, state: dict[Any, Any]) -> None:
    """
    Give an empty object its attributes. What its ``__setstate__`` would add for older files is added here, where no size comes
    from the file alone.
    """
    kind = type(target)
    for name in state:
        check_attribute(kind, name)
    attributes = {name: as_schedule(value) for name, value in state.items()}
    if isinstance(target, spaces.Space):
        attributes = _of_today(target, attributes)
    elif isinstance(target, VecNormalize):
        if "venv" in attributes:
            raise Refused("VecNormalize.venv", "no save writes it")
        space = attributes.get("observation_space")
        if "norm_obs_keys" not in attributes and isinstance(space, spaces.Dict):
            attributes["norm_obs_keys"] = list(space.spaces)
        attributes["venv"] = None
    vars(target).update(attributes)


def as_schedule(value: Any) -> Any:
    """A function of an old file as the schedule that it was; anything else as it is. :raises Refused: for other functions"""
    try:
        return to_schedule(value)
    except LookupError as error:
        raise Refused(str(error), "it is not one of SB3's schedules") from None


def _of_today(space: spaces.Space, attributes: dict[str, Any]) -> dict[str, Any]:
    """A space's attributes as its class calls them now; older versions of gym wrote fewer, under other names."""
    renamed = {"shape": "_shape", "np_random": "_np_random"}
    attributes = {renamed.get(name, name): value for name, value in attributes.items()}
    if isinstance(space, spaces.Discrete):
        attributes.setdefault("start", np.int64(0))
    elif isinstance(space, spaces.MultiDiscrete) and type(attributes.get("nvec")) is np.ndarray:
        attributes.setdefault("start", np.zeros_like(attributes["nvec"]))
    elif isinstance(space, spaces.Box):
        for bound, side in (("low", "below"), ("high", "above")):
            limits = attributes.get(bound)
            if type(limits) is np.ndarray and limits.dtype.kind in "biuf":
                attributes.setdefault(f"bounded_{side}", np.isfinite(limits))
                attributes.setdefault(f"{bound}_repr", _short(limits))
    return attributes


def _short(limits: np.ndarray) -> str:
    """As gymnasium shows them: one number, if all are the same."""
    return str(limits.min()) if limits.size and limits.min() == limits.max() else str(limits)


# ------------------------------------------------------------------ whole or not


def check_space(space: Any) -> None:
    """
    :raises ValueError: unless it is a space with all that makes up one, each part of its kind
    """
    if isinstance(space, spaces.Dict):
        inner = vars(space).get("spaces")
        if not isinstance(inner, dict) or not inner or not all(type(key) is str for key in inner):
            raise ValueError("a Dict space must have spaces by their names")
        for part in inner.values():
            check_space(part)
        return
    check = next((check for kind, check in _SPACES.items() if isinstance(space, kind)), None)
    if check is None:
        raise ValueError(f"it must be a space, not a {type(space).__name__}")
    attributes = vars(space)
    shape = attributes.get("_shape")
    if not (type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)):
        raise ValueError(f"the shape of a {type(space).__name__} must be a tuple of sizes")
    if not isinstance(attributes.get("dtype"), np.dtype) or attributes["dtype"].hasobject:
        raise ValueError(f"the dtype of a {type(space).__name__} must be a type of numbers")
    if not isinstance(attributes.get("_np_random"), np.random.Generator | np.random.RandomState | None):
        raise ValueError(f"the random generator of a {type(space).__name__} must be one of NumPy's")
    check(space, attributes, shape)


def _check_box(space: spaces.Box, attributes: dict[str, Any], shape: tuple[int, ...]) -> None:
    for name in ("low", "high"):
        if not _is_array(attributes.get(name), shape):
            raise ValueError(f"a Box must have its {name} as an array of shape {shape}")
    for name in ("bounded_below", "bounded_above"):
        if not _is_array(attributes.get(name), shape):
            raise ValueError(f"a Box must have {name} as an array of shape {shape}")
    for name in ("low_repr", "high_repr"):
        if not isinstance(attributes.get(name), str | None):
            raise ValueError(f"a Box must have {name} as text")


def _check_discrete(space: spaces.Discrete, attributes: dict[str, Any], shape: tuple[int, ...]) -> None:
    n, start = (attributes.get(name) for name in ("n", "start"))
    if not _is_integer(n) or not 0 < int(n) < 2**62 or not _is_integer(start) or shape != ():  # type: ignore[arg-type]  # just seen
        raise ValueError("a Discrete space must have a number of values, a first one, and no shape")


def _check_multi_discrete(space: spaces.MultiDiscrete, attributes: dict[str, Any], shape: tuple[int, ...]) -> None:
    if not all(_is_array(attributes.get(name), shape, "iu") for name in ("nvec", "start")) or not (space.nvec > 0).all():
        raise ValueError("a MultiDiscrete space must have the numbers of its values, and its first ones, as arrays")


def _check_multi_binary(space: spaces.MultiBinary, attributes: dict[str, Any], shape: tuple[int, ...]) -> None:
    n = attributes.get("n")
    sizes = (n,) if _is_integer(n) else tuple(n) if isinstance(n, tuple | list | np.ndarray) else None
    if sizes is None or not all(map(_is_integer, sizes)) or tuple(map(int, sizes)) != shape:
        raise ValueError("a MultiBinary space must have as many bits as its shape says")


_SPACES: dict[type, Any] = {
    spaces.Box: _check_box,
    spaces.Discrete: _check_discrete,
    spaces.MultiDiscrete: _check_multi_discrete,
    spaces.MultiBinary: _check_multi_binary,
}


def _is_integer(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer)


def _is_array(value: Any, shape: tuple[int, ...], kinds: str = "biuf") -> bool:
    return type(value) is np.ndarray and value.shape == shape and value.dtype.kind in kinds


_SCHEDULES: dict[str, tuple[str, ...]] = {
    ConstantSchedule.__name__: ("val",),
    LinearSchedule.__name__: ("start", "end", "end_fraction"),
    "SimpleLinearSchedule": ("initial_value",),  # the zoo's, which need not be installed
}


def check_schedule(value: Any) -> None:
    """
    :raises ValueError: unless it is a number, or a schedule of SB3's or the zoo's that has all its numbers
    """
    if isinstance(value, UnreadSchedule):
        return
    if isinstance(value, FloatSchedule):
        inner = vars(value).get("value_schedule")
        if isinstance(inner, int | float):
            raise ValueError("a FloatSchedule must hold a schedule, not a number")
        check_schedule(inner)
        return
    names = _SCHEDULES.get(type(value).__name__) if not isinstance(value, type) else None
    if names is None:
        if not is_number(value):
            raise ValueError(f"it must be a number or a schedule, not {shown(value)}")
        return
    for name in names:
        if not is_number(vars(value).get(name)):
            raise ValueError(f"a {type(value).__name__} must have a number as its {name}")
    if isinstance(value, LinearSchedule) and not value.end_fraction > 0:
        raise ValueError("a LinearSchedule must have an end_fraction above 0")


def is_number(value: Any) -> bool:
    """Whether it is a real number that a float can hold."""
    if isinstance(value, int):
        return abs(value) < 2**1023
    return isinstance(value, float | np.floating | np.integer) and not math.isnan(value)
