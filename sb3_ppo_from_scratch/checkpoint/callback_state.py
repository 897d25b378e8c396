"""The state of callbacks: captured as plain data, and put into others made as they were."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, EventCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.checkpoint.env_state import put_attributes
from sb3_ppo_from_scratch.checkpoint.plain_data import is_plain
from sb3_ppo_from_scratch.safe_files.unpickler import errors_named
from sb3_ppo_from_scratch.safe_files.values import set_state

__all__ = ["all_callbacks", "capture_callback", "named_callbacks", "own_envs", "restore_callback", "unsaved"]

_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    np.random.Generator: (lambda generator: generator.bit_generator.state, set_state),
    np.random.RandomState: (lambda generator: generator.get_state(legacy=False), set_state),
    random.Random: (lambda generator: generator.getstate(), set_state),
    th.Generator: (
        lambda generator: generator.get_state().numpy(),
        lambda generator, state: generator.set_state(th.from_numpy(state.copy())),
    ),
}
"""Random generators: how to read the state of one, and how to put it into another."""
_ALWAYS = frozenset(
    {"model", "logger", "locals", "globals", "parent", "callback", "callbacks", "callback_on_new_best", "pbar"}
)
"""What every callback has of others, and progress bars."""
_NO_STATE = (type, ModuleType, BuiltinFunctionType, BaseCallback, BaseAlgorithm, Logger, VecEnv, *_GENERATORS)


# ------------------------------------------------------- which there are


def all_callbacks(callback: BaseCallback, with_lists: bool = False) -> Iterator[BaseCallback]:
    """Every callback in a tree of them, but for the lists, unless they are wanted, too."""
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children += callback.callbacks
    if with_lists or not isinstance(callback, CallbackList):
        yield callback
    if isinstance(callback, EventCallback):
        children += [callback.callback, getattr(callback, "callback_on_new_best", None)]
    for child in children:
        if child is not None:
            yield from all_callbacks(child, with_lists)


def named_callbacks(callback: BaseCallback) -> Iterator[tuple[tuple[str, int], BaseCallback]]:
    """Every callback, under its class and how many of this class came before it."""
    seen: Counter[str] = Counter()
    for each in all_callbacks(callback):
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        yield (name, seen[name]), each
        seen[name] += 1


def own_envs(callback: BaseCallback) -> list[tuple[str, VecEnv]]:
    """The environments that a callback holds, by attribute."""
    return [(name, value) for name, value in vars(callback).items() if isinstance(value, VecEnv)]


# ------------------------------------------------------- one of them


def capture_callback(callback: BaseCallback) -> dict[str, Any]:
    """What the callback offers as ``state_dict()``, or else its plain attributes and its generators' states."""
    own = getattr(callback, "state_dict", None)
    if own is not None:
        return {
            "attributes": None,
            "generators": {},
            "state": own(),
            "is_needed": type(callback).__name__ != "ResumableCheckpoint",
        }
    held = vars(callback)
    return {
        "attributes": {name: value for name, value in held.items() if _is_state(callback, name, value) and is_plain(value)},
        "generators": {name: _GENERATORS[type(value)][0](value) for name, value in held.items() if type(value) in _GENERATORS},
        "state": None,
        "is_needed": not isinstance(callback, (ConvertCallback, ProgressBarCallback)) or bool(unsaved(callback)),
    }


def restore_callback(callback: BaseCallback, saved: dict[str, Any]) -> None:
    """Put in place what :func:`capture_callback` returned."""
    if saved["attributes"] is None:
        if not hasattr(callback, "load_state_dict"):
            raise ValueError(f"the checkpoint has a state_dict for {type(callback).__name__}, which has no load_state_dict")
        callback.load_state_dict(saved["state"])
        return
    held = vars(callback)
    state = {
        name: value
        for name, value in saved["attributes"].items()
        if is_plain(held.get(name)) and _is_state(callback, name, value) and not _names_a_place(held.get(name))
    }
    with errors_named(f"the state of callback {type(callback).__name__} in the checkpoint", "pass allow_pickle=True"):
        put_attributes(callback, state)
        for name, of_generator in saved["generators"].items():
            generator = held.get(name)
            if type(generator) in _GENERATORS:
                _GENERATORS[type(generator)][1](generator, of_generator)


def _is_state(callback: BaseCallback, name: str, value: Any) -> bool:
    """Texts that are constructor's arguments are paths and names, which may be others by then; a file never chooses paths."""
    if name in ("locals", "globals", "verbose"):
        return False
    if isinstance(value, str):
        return name not in inspect.signature(type(callback).__init__).parameters and not _names_a_place(value)
    return True


def _names_a_place(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def unsaved(callback: BaseCallback) -> list[str]:
    """What of a callback's state is not saved, as far as its attributes show it."""
    if isinstance(callback, ConvertCallback):
        return _of_function("", callback.callback)
    if callable(getattr(callback, "state_dict", None)):
        return []
    name = type(callback).__name__
    found: list[str] = []
    for attribute, value in vars(callback).items():
        if attribute in _ALWAYS or is_plain(value) or isinstance(value, _NO_STATE):
            continue
        if isinstance(value, (FunctionType, MethodType)):
            found += _of_function(f"{name}.{attribute}", value)
        else:
            found.append(f"{name}.{attribute}, a {type(value).__name__}")
    slots = [slot for kind in type(callback).__mro__ for slot in _slots(kind)]
    return found + [f"{name}.{slot}, in __slots__" for slot in slots if hasattr(callback, slot)]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return tuple(slot for slot in ((slots,) if isinstance(slots, str) else slots) if slot not in ("__dict__", "__weakref__"))


def _of_function(where: str, function: Any) -> list[str]:
    """A function is code, but for the variables that it encloses; a method of a callback is none of its state."""
    if isinstance(function, MethodType):
        return [] if isinstance(function.__self__, _NO_STATE) else [f"{where or function.__qualname__}, a method of an object"]
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return (
            []
            if all(isinstance(cell, (*_NO_STATE, FunctionType)) for cell in cells)
            else [f"{where or function.__qualname__}, a function with variables of its own"]
        )
    return [] if function is None else [f"{where or type(function).__name__}, a {type(function).__name__}"]
