"""
Objects of the user's classes in the states of environments: built empty, and given their attributes.

Only classes count of which the user's own, fresh environment holds objects. None of their code runs: ``__new__`` is that of
the built-in type under them, attributes are put where they lie. A class that can only be made by its own code
(``__reduce__`` with arguments, ``__setstate__``) needs trust, or an environment with a ``state_dict``.
"""

from __future__ import annotations

import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from enum import Enum
from types import MemberDescriptorType
from typing import Any

from sb3_ppo_from_scratch.safe_files.refusal import Refused, name_of, shown
from sb3_ppo_from_scratch.safe_files.table import Call, is_named
from sb3_ppo_from_scratch.safe_files.unpickler import SafeUnpickler

__all__ = ["Own", "WorldUnpickler"]

Reference = tuple[str, str]
"""Module and name of what a pickle looks up."""
Own = dict[Reference, type]
"""Classes whose objects a fresh world holds."""

_EMPTY = (object, list, dict, set, OrderedDict, deque, defaultdict, Counter)
"""What a class may be built on if its objects begin empty ..."""
_OF_VALUE = (int, float, str, bytes, tuple)
"""... and if they are made of a value."""


class WorldUnpickler(SafeUnpickler):
    """
    :param data: a pickle
    :param own: the classes that it may build besides those of the table
    :param calls: what else it may call
    """

    def __init__(self, data: bytes, own: Own, calls: Mapping[Reference, Call]):
        super().__init__(data)
        self._own = own
        self._calls = calls

    def look_up(self, module: Any, name: Any) -> Any:
        """Anchors, the table, the world's own classes."""
        call = self._calls.get((module, name))
        if call is not None:
            return call
        try:
            return super().look_up(module, name)
        except Refused:
            kind = self._own.get((module, name))
            if kind is None:
                raise
            return kind

    def _is_ours(self, kind: Any) -> bool:
        """A class of the world's, written in Python: what others hold beneath is not ours to fill."""
        own = isinstance(kind, type) and not is_named(kind) and self._own.get((kind.__module__, kind.__qualname__)) is kind
        return own and bool(kind.__flags__ & (1 << 9)) and _base(kind) is not None  # Py_TPFLAGS_HEAPTYPE

    def make(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        """As the built-in type under the class makes them."""
        if not self._is_ours(kind) or issubclass(kind, Enum):
            return super().make(kind, arguments)
        base = _base(kind)
        if base in _EMPTY and arguments == ():
            return base.__new__(kind)
        if base is tuple and hasattr(kind, "_fields") and len(arguments) == len(kind._fields):
            return tuple.__new__(kind, arguments)
        if base in _OF_VALUE and len(arguments) == 1 and type(arguments[0]) is base:
            return base.__new__(kind, arguments[0])
        raise Refused(f"an object of {name_of(kind)}", "only its own code could make it")

    def call_other(self, called: Any, arguments: tuple[Any, ...]) -> Any:
        """A member of an enumeration; an empty object."""
        if self._is_ours(called) and issubclass(called, Enum) and len(arguments) == 1:
            members = [each for each in called.__members__.values() if _same(each.value, arguments[0])]
            if members:
                return members[0]
        elif self._is_ours(called) and arguments == ():
            return self.make(called, arguments)
        raise Refused(f"a call of {name_of(called)}", "only its own code could make such an object")

    def set_state(self, target: Any, state: Any) -> None:
        """Attributes, and what lies in slots."""
        kind = type(target)
        if not self._is_ours(kind) or issubclass(kind, Enum):
            super().set_state(target, state)
            return
        setter = getattr(kind, "__setstate__", None)
        if setter is not None:
            if getattr(setter, "__module__", None) != "dataclasses" or type(state) is not list:
                raise Refused(f"the state of {name_of(kind)}", "only its own __setstate__ could read it")
            state = (None, dict(zip(kind.__dataclass_fields__, state, strict=True)))
        attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
        for name, value in {**(attributes or {}), **(slots or {})}.items():
            _put(target, name, value)

    def is_own(self, target: Any) -> bool:
        """Lists and dicts of the world's own classes are filled as lists and dicts are."""
        return super().is_own(target) or self._is_ours(type(target))


def _base(kind: type) -> type | None:
    """The built-in type that the objects of a class are, beneath what Python adds."""
    for base in kind.__mro__:
        if base in _EMPTY or base in _OF_VALUE:
            return base
        if not base.__flags__ & (1 << 9):  # another type written in C
            return None
    return None


def _same(value: Any, other: Any) -> bool:
    if type(value) is tuple and type(other) is tuple and len(value) == len(other):
        return all(map(_same, value, other))
    return type(value) is type(other) and type(value) in (int, str, float, bool, bytes) and value == other


def _put(target: Any, name: Any, value: Any) -> None:
    found = inspect.getattr_static(type(target), name, None) if type(name) is str else None
    if type(name) is not str or name.startswith("__") or callable(found) or isinstance(found, staticmethod | classmethod):
        raise Refused(f"{name_of(type(target))}.{shown(name)}", "an object's methods are not for a file to set")
    if isinstance(found, MemberDescriptorType):
        found.__set__(target, value)
    else:
        vars(target)[name] = value
