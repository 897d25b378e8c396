"""
The state of environments: captured as bytes, and put into others of the same make, which then go on as the first would have.

A *world* is a ``gymnasium.Env`` or ``gymnasium.vector.VectorEnv`` with all its wrappers, its *levels*. A level's state is its
attributes; code, constructor arguments and render windows are not state and stay as the fresh world has them. An environment
that keeps its state elsewhere can offer ``state_dict()`` and ``load_state_dict(state)`` instead.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_from_scratch.checkpoint.plain_pickle import PlainUnpickler, Reference, load_plain

__all__ = ["CannotCaptureError", "capture", "inner_worlds", "level_names", "read_file", "restore", "rewrite_file"]

_WORLDS = (gym.Env, gym.vector.VectorEnv)
_NO_STATE = (
    type,
    ModuleType,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    EnvSpec,
    logging.Logger,
    VecEnv,
    *_WORLDS,
)
_ARGUMENTS = frozenset({"_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "env_fns", "class_attributes"})
_PIPES = frozenset({"remotes", "work_remotes", "processes"})
_INFOS = frozenset({"buf_infos", "reset_infos"})  # of the last step; they may hold anything, and nothing follows from them
_ANCHOR = (__name__, "_anchor")

Key = tuple[int, str]
"""Where an object is found in a world: its level's index, and the attribute's name (empty for the level itself)."""


class CannotCaptureError(Exception):
    """Some attribute of an environment cannot be saved."""


# ------------------------------------------------------- objects whose state is put in place


class _Kind(NamedTuple):
    """How to read and write an object that other code holds on to, or that a pickle cannot make."""

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]


def read_file(file: Any) -> bytes:
    """All that an open text file holds."""
    file.flush()
    return Path(file.name).read_bytes()


def rewrite_file(file: Any, content: bytes) -> None:
    """Replace all that an open text file holds, and go on at its end."""
    file.flush()
    file.seek(0)
    file.truncate()
    file.buffer.write(content)
    file.flush()
    file.seek(0, os.SEEK_END)


def _subspaces(space: spaces.Space) -> Iterator[spaces.Space]:
    yield space
    for value in vars(space).values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in inner:
            if isinstance(item, spaces.Space):
                yield from _subspaces(item)


def _space_generators(space: spaces.Space) -> list[np.random.Generator | None]:
    return [part._np_random for part in _subspaces(space)]


def _set_space_generators(space: spaces.Space, generators: list[np.random.Generator | None]) -> None:
    for part, generator in zip(_subspaces(space), generators, strict=True):
        part._np_random = generator  # type: ignore[assignment]  # a space starts without


def _set_emulator(ale: Any, state: bytes) -> None:
    from ale_py import ALEState  # whoever has an emulator has this, too

    ale.restoreState(ALEState(state))


_SPACE = _Kind(_space_generators, _set_space_generators)
_WRITER = _Kind(lambda writer: read_file(writer.file_handler), lambda writer, text: rewrite_file(writer.file_handler, text))
_EMULATOR = _Kind(lambda ale: ale.cloneState(include_rng=True).serialize(), _set_emulator)


def _kind(value: Any) -> _Kind | None:
    if isinstance(value, spaces.Space):
        return _SPACE
    if isinstance(value, ResultsWriter):
        return _WRITER
    return _EMULATOR if type(value).__name__ == "ALEInterface" else None


# ------------------------------------------------------- one world


def inner_worlds(value: Any) -> list[Any]:
    """The environments that an attribute holds: itself, or the members of a list of them."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], _WORLDS):
        return list(value)
    return [value] if isinstance(value, _WORLDS) else []


def _levels(root: Any) -> list[Any]:
    levels = [root]
    if isinstance(root, VecEnv):  # its worlds are captured one by one
        return levels
    for level in levels:  # grows while it is read
        for value in vars(level).values():
            levels.extend(inner for inner in inner_worlds(value) if all(inner is not other for other in levels))
    return levels


def _anchors(levels: list[Any]) -> dict[Key, Any]:
    """The objects of known places, which a restored state refers to instead of bringing its own."""
    anchors: dict[Key, Any] = {(index, ""): level for index, level in enumerate(levels)}
    for index, level in enumerate(levels):
        anchors.update({(index, name): value for name, value in vars(level).items() if _kind(value) is not None})
    return anchors


def _has_state(level: Any, name: str, value: Any) -> bool:
    return not (
        name in _ARGUMENTS
        or isinstance(value, _NO_STATE)
        or bool(inner_worlds(value))
        or (isinstance(level, SubprocVecEnv) and name in _PIPES)
        or (isinstance(level, VecEnv) and name in _INFOS)
        or type(value).__module__.partition(".")[0] == "pygame"
    )


def _attributes(level: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(level).items() if _has_state(level, name, value)}


def _keeps_own_state(level: Any) -> bool:
    kind = type(level)  # a wrapper would answer with the attributes of what it wraps
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, anchors: dict[Key, Any]):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._keys = {id(anchor): key for key, anchor in anchors.items()}

    def reducer_override(self, obj: Any) -> Any:
        key = self._keys.get(id(obj))
        if key is not None:
            return _anchor, key
        if isinstance(obj, (*_WORLDS, VecEnv)):
            raise CannotCaptureError(f"it holds {type(obj).__name__}, an environment that is none of its wrappers'")
        return NotImplemented


def _anchor(index: int, name: str) -> Any:
    """Stands in a pickle for the fresh world's own object, which :class:`_Unpickler` puts in its place."""
    raise NotImplementedError


class _Unpickler(PlainUnpickler):
    def __init__(self, data: bytes, anchors: dict[Key, Any], allowed: set[Reference], trust: bool):
        super().__init__(data, allowed, trust)
        self._anchors = anchors
        self.classes: set[Reference] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _ANCHOR:
            return lambda *key: self._anchors[key]
        found = super().find_class(module, name)
        if isinstance(found, type):
            self.classes.add((module, name))
        return found


def capture(root: Any) -> bytes:
    """
    The state of a world, or of one level of a ``VecEnv``.

    :raises CannotCaptureError: if an attribute cannot be pickled
    """
    levels = _levels(root)
    anchors = _anchors(levels)
    state = [level.state_dict() if _keeps_own_state(level) else _attributes(level) for level in levels]
    in_place = {key: kind.get(value) for key, value in anchors.items() if (kind := _kind(value)) is not None}
    try:
        return pickle.dumps((level_names(levels), _pickle((state, in_place), anchors)))
    except Exception as error:  # whatever a pickled object's own code raises
        raise CannotCaptureError(_what_fails(levels, anchors) or f"{type(error).__name__}: {error}") from error


def _pickle(state: Any, anchors: dict[Key, Any]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, anchors).dump(state)
    return file.getvalue()


def level_names(levels: Sequence[Any]) -> list[str]:
    """The classes of levels: what must be the same to put a state into them."""
    return [f"{type(level).__module__}.{type(level).__qualname__}" for level in levels]


def _what_fails(levels: list[Any], anchors: dict[Key, Any]) -> str | None:
    for level in levels:
        for name, value in _attributes(level).items():
            try:
                _pickle(value, anchors)
            except Exception as error:  # noqa: BLE001  # as in capture
                return f"{type(level).__name__}.{name}: {type(error).__name__}: {error}"
    return None


def restore(root: Any, data: bytes, trust: bool = False) -> None:
    """
    Put a captured state into a world of the same make.

    Besides plain data the state may hold objects of the classes that the fresh world's own state holds; they and nothing else
    get made.

    :param trust: whether to make whatever objects the state asks for
    :raises ValueError: if the world is of another make, or for other objects without ``trust``
    """
    levels = _levels(root)
    anchors = _anchors(levels)
    names, content = load_plain(data)
    if names != level_names(levels):
        raise ValueError(f"env must be made as the checkpoint's was, of {names}, not of {level_names(levels)}")
    try:
        state, in_place = _Unpickler(content, anchors, _classes(root, anchors), trust).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    for level, values in zip(levels, state, strict=True):
        if _keeps_own_state(level):
            level.load_state_dict(values)
        else:
            vars(level).update(values)
    for key, value in in_place.items():
        kind = _kind(anchors.get(key))
        if kind is not None:
            kind.set(anchors[key], value)


def _classes(root: Any, anchors: dict[Key, Any]) -> set[Reference]:
    """The classes of the objects in a world's own state."""
    with contextlib.suppress(CannotCaptureError):
        _, content = load_plain(capture(root))
        unpickler = _Unpickler(content, anchors, set(), trust=True)  # it has just been written here
        unpickler.load()
        return unpickler.classes
    return set()
