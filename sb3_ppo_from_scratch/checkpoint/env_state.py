"""
The state of environments: captured as bytes, and put into others of the same make, which then go on as the first would have.

A *world* is a ``gymnasium.Env`` or ``gymnasium.vector.VectorEnv`` with all its wrappers, its *levels*. A level's state is its
attributes; code, constructor arguments and render windows are not state and stay as the fresh world has them. An environment
that keeps its state elsewhere can offer ``state_dict()`` and ``load_state_dict(state)`` instead.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_from_scratch.checkpoint.log_files import rewrite_file
from sb3_ppo_from_scratch.checkpoint.own_objects import Own, WorldUnpickler
from sb3_ppo_from_scratch.checkpoint.plain_data import pack, unpack
from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.refusal import shown
from sb3_ppo_from_scratch.safe_files.table import Call
from sb3_ppo_from_scratch.safe_files.unpickler import errors_named, safe_loads
from sb3_ppo_from_scratch.vec_env.halves import TwoHalves

__all__ = [
    "CannotCaptureError",
    "capture",
    "inner_worlds",
    "level_names",
    "put_attributes",
    "restore",
    "written_files",
]

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
_INFOS = frozenset(
    {"buf_infos", "reset_infos", "kept_infos"}
)  # of the last step; they may hold anything, and nothing follows from them
_ANCHOR = (__name__, "_anchor")
_IN_PLACE = re.compile(r"sb3_ppo_from_scratch\.vec_env\.\w+\.(_\w+|Lean\w+|WatchedSubprocVecEnv)$")

Key = tuple[int, str]
"""Where an object is found in a world: its level's index, and the attribute's name (empty for the level itself)."""


class CannotCaptureError(Exception):
    """Some attribute of an environment cannot be saved."""


# ------------------------------------------------------- objects whose state is put in place


class _Kind(NamedTuple):
    """How to read and write an object that other code holds on to, or that a pickle cannot make."""

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]
    needs_trust: bool = False
    """Whether what reads the state believes it."""


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
    if not all(isinstance(generator, np.random.Generator | np.random.RandomState | None) for generator in generators):
        raise ValueError("a space's generator must be one of NumPy's")
    for part, generator in zip(_subspaces(space), generators, strict=True):
        part._np_random = generator  # type: ignore[assignment]  # a space starts without


def _set_emulator(ale: Any, state: bytes) -> None:
    from ale_py import ALEState  # whoever has an emulator has this, too

    ale.restoreState(ALEState(state))


def _rewrite(writer: ResultsWriter, content: bytes | None) -> None:
    """Earlier formats held what the file did; now ``log_files`` sees to it."""
    if content is not None:
        rewrite_file(writer.file_handler, content)


_SPACE = _Kind(_space_generators, _set_space_generators)
_WRITER = _Kind(lambda writer: None, _rewrite)
_EMULATOR = _Kind(lambda ale: ale.cloneState(include_rng=True).serialize(), _set_emulator, needs_trust=True)
"""ALE's reader uses what it reads as addresses: of 1,800 states with changed bytes two ended the process, and one hung it."""


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
        or (isinstance(level, TwoHalves) and name == "halves")
        or (isinstance(level, VecEnv) and name in _INFOS)
        or type(value).__module__.partition(".")[0] == "pygame"
    )


def _attributes(level: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(level).items() if _has_state(level, name, value)}


def _keeps_own_state(level: Any) -> bool:
    kind = type(level)  # a wrapper would answer with the attributes of what it wraps
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


def written_files(root: Any) -> dict[str, Any]:
    """The open files into which monitors of a world, or of one level of a ``VecEnv``, write; named by level and attribute."""
    found = ((index, name, value) for index, level in enumerate(_levels(root)) for name, value in vars(level).items())
    return {f"{index}.{name}": value.file_handler for index, name, value in found if isinstance(value, ResultsWriter)}


class _Pickler(pickle.Pickler):
    """:param own: gets the classes of all objects in the pickle that are not of the plainest kinds"""

    def __init__(self, file: io.BytesIO, anchors: dict[Key, Any], own: Own):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._keys = {id(anchor): key for key, anchor in anchors.items()}
        self._own = own

    def reducer_override(self, obj: Any) -> Any:
        key = self._keys.get(id(obj))
        if key is not None:
            return _anchor, key
        if isinstance(obj, (*_WORLDS, VecEnv)):
            raise CannotCaptureError(f"it holds {type(obj).__name__}, an environment that is none of its wrappers'")
        kind = obj if isinstance(obj, type) else type(obj)
        self._own[(kind.__module__, kind.__qualname__)] = kind
        return NotImplemented


def _anchor(index: int, name: str) -> Any:
    """Stands in a pickle for the fresh world's own object, which the reader puts in its place."""
    raise NotImplementedError


class _TrustingUnpickler(pickle.Unpickler):
    """Makes whatever the pickle asks for."""

    def __init__(self, data: bytes, anchors: dict[Key, Any]):
        super().__init__(io.BytesIO(data))
        self._anchors = anchors

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _ANCHOR:
            return lambda *key: self._anchors[key]
        return super().find_class(module, name)


def capture(root: Any, own: Own | None = None) -> bytes:
    """
    The state of a world, or of one level of a ``VecEnv``.

    :param own: gets the classes of the objects that it holds
    :raises CannotCaptureError: if an attribute cannot be pickled
    """
    levels = _levels(root)
    anchors = _anchors(levels)
    state = [level.state_dict() if _keeps_own_state(level) else _attributes(level) for level in levels]
    in_place = {key: kind.get(value) for key, value in anchors.items() if (kind := _kind(value)) is not None}
    own = {} if own is None else own
    try:
        return pack({"levels": level_names(levels), "state": _pickle((state, in_place), anchors, own)})
    except Exception as error:  # whatever a pickled object's own code raises
        raise CannotCaptureError(_what_fails(levels, anchors) or f"{type(error).__name__}: {error}") from error


def _pickle(state: Any, anchors: dict[Key, Any], own: Own) -> bytes:
    file = io.BytesIO()
    _Pickler(file, anchors, own).dump(state)
    return file.getvalue()


def _unpack(data: bytes) -> tuple[list[str], bytes]:
    """Names of levels, and the pickle of their state; of the first format too, which was a pickle as a whole."""
    if data.startswith((b"\x80\x04\x95", b"\x80\x05\x95")):
        names, content = safe_loads(data, _FIELD)
    else:
        parts = unpack(data, _FIELD)
        names, content = parts["levels"], parts["state"]
    if type(names) is not list or type(content) is not bytes:
        raise ValueError("it is not one of ours")
    return names, content


def level_names(levels: Sequence[Any]) -> list[str]:
    """The classes of levels: what must be the same to put a state into them."""
    return [_class_names(level)[-1] for level in levels]


def _class_names(level: Any) -> list[str]:
    """A level's class; and if it is one that ``vec_env`` has put in the place of SB3's or Gymnasium's, theirs."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(level).__mro__]
    n_ours = next(i for i, name in enumerate(names) if not _IN_PLACE.match(name))
    return names[: n_ours + 1]


def _what_fails(levels: list[Any], anchors: dict[Key, Any]) -> str | None:
    for level in levels:
        for name, value in _attributes(level).items():
            try:
                _pickle(value, anchors, {})
            except Exception as error:  # noqa: BLE001  # as in capture
                return f"{type(level).__name__}.{name}: {type(error).__name__}: {error}"
    return None


def restore(root: Any, data: bytes, trust: bool = False, from_here: bool = False) -> None:
    """
    Put a captured state into a world of the same make.

    Besides plain data the state may hold objects of the classes that the fresh world's own state holds; they and nothing else
    get made, empty, and given their attributes. No function, constructor or ``__setstate__`` of theirs is called.

    :param trust: whether to make whatever objects the state asks for
    :param from_here: whether this process has captured the state, so that an emulator's is what the emulator wrote
    :raises UnsafeFileError: without ``trust``, for other objects, and for an emulator's state that comes from a file; for
        attributes that are not state
    :raises ValueError: if the world is of another make, or the state is damaged
    """
    levels = _levels(root)
    anchors = _anchors(levels)
    with errors_named(_FIELD, _REMEDY):
        names, content = _unpack(data)
    if len(names) != len(levels) or any(name not in _class_names(each) for name, each in zip(names, levels, strict=True)):
        raise ValueError(f"env must be made as the checkpoint's was, of {_shown_names(names)}, not of {level_names(levels)}")
    if trust:
        state, in_place = _TrustingUnpickler(content, anchors).load()
    else:
        own: Own = {}
        with contextlib.suppress(CannotCaptureError):
            capture(root, own)
        state, in_place = _read(content, anchors, own)
        if not from_here:
            _refuse_emulators(anchors, in_place)
    with errors_named(_FIELD, _REMEDY):
        for level, values in zip(levels, state, strict=True):
            if _keeps_own_state(level):
                level.load_state_dict(values)
            else:
                put_attributes(level, values)
        for key, anchor in anchors.items():
            kind = _kind(anchor)
            if kind is not None and key in in_place:
                kind.set(anchor, in_place[key])


def _refuse_emulators(anchors: dict[Key, Any], in_place: dict[Key, Any]) -> None:
    for key, anchor in anchors.items():
        kind = _kind(anchor)
        if kind is not None and kind.needs_trust and key in in_place:
            raise UnsafeFileError(
                f"{_FIELD} holds that of an emulator ({type(anchor).__name__}), which believes what it reads: a made-up one "
                f"can end the process, or worse. Nothing was run. If you trust the checkpoint, {_REMEDY}"
            )


_FIELD = "the state of environments in the checkpoint"
_REMEDY = "pass allow_pickle=True"


def _read(content: bytes, anchors: dict[Key, Any], own: Own) -> tuple[list[Any], dict[Key, Any]]:
    with errors_named(_FIELD, _REMEDY):
        reader = WorldUnpickler(content, own, {_ANCHOR: Call(lambda *key: anchors[key])})
        state, in_place = reader.load()
        if type(state) is not list or type(in_place) is not dict:
            raise ValueError("it is not one of ours")
        return state, in_place


def _shown_names(names: Any) -> str:
    """Names from a file, for messages."""
    return ", ".join(map(shown, names[:20])) if isinstance(names, list) else shown(names)


def put_attributes(target: Any, values: dict[str, Any]) -> None:
    """
    Give a live object its attributes back: state, and nothing that decides what it does or where it writes.

    What is not state (functions, other environments, windows), and a text or path that is a constructor's argument or leads
    from the root of a disk, stays as the fresh object has it.

    :raises UnsafeFileError: for what would take the place of a method
    """
    if type(values) is not dict:
        raise ValueError("it is not one of ours")
    live = vars(target)
    arguments: Iterable[str] = ()
    with contextlib.suppress(ValueError):  # of a constructor written in C
        arguments = inspect.signature(type(target).__init__).parameters
    for name, value in values.items():
        if type(name) is not str or name.startswith("__") or _is_method(type(target), name):
            raise UnsafeFileError(f"{_FIELD} holds {type(target).__name__}.{shown(name)}, which is not state. Nothing was run")
        is_path = isinstance(value, str | PurePath) and (name in arguments or PurePath(value).is_absolute())
        if not is_path and _has_state(target, name, live.get(name)):
            live[name] = value


def _is_method(kind: type, name: str) -> bool:
    found = inspect.getattr_static(kind, name, None)
    return callable(found) or isinstance(found, staticmethod | classmethod)
