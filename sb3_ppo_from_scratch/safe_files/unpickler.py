"""
Pickles without running them: the one reader for models, statistics, weights, and the states of environments.

A pickle is a program: whoever unpickles it runs it. Here each of its instructions is carried out by a function that builds
what stands in :mod:`sb3_ppo_from_scratch.safe_files.table`, looking names up there *before* importing anything. A pickle can
name what is in the table, make empty objects of some of it, and give each of these its attributes, once. It can call nothing:
numbers, arrays, tensors and random generators are rebuilt by functions of ours, which check their arguments. What it makes
may not cost more than its own size allows.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files import tensors, values
from sb3_ppo_from_scratch.safe_files.old_schedules import OldFunction
from sb3_ppo_from_scratch.safe_files.parts import as_schedule, set_attributes
from sb3_ppo_from_scratch.safe_files.refusal import Refused, name_of
from sb3_ppo_from_scratch.safe_files.table import STORED, Call, find, is_built

__all__ = ["SafeUnpickler", "errors_named", "safe_call", "safe_loads", "safe_name"]

MAX_VALUES = 10**6
"""Values in one unpickled object of a few bytes, those that stand in it twice counted twice."""
MAX_DEPTH = 64
"""How deep they may be nested."""
FREE_COST = 2**22
"""Bytes and values that calls in a pickle may always copy; beyond, eight times the pickle's own size."""


class Unread:
    """Stands for what is not in the table, where a reader may leave such things out."""

    def __init__(self, what: str):
        self.what = what


_PickleMachine: Any = pickle._Unpickler  # the one written in Python: of the other one no single step can be replaced
_DICTS = (dict, OrderedDict, defaultdict, Counter)


class SafeUnpickler(_PickleMachine):
    """
    Builds what the table holds. Every step of a pickle that could call or change something is replaced here, or refused.

    :param data: the pickle
    :param offset: where it begins
    :param references: what its references to things outside it stand for; without, it may have none
    :param lenient: put an :class:`Unread` in the place of what is not in the table, rather than refuse the whole
    """

    def __init__(
        self,
        data: bytes,
        offset: int = 0,
        references: Callable[[Any], Any] | None = None,
        lenient: bool = False,
    ):
        self._stream = io.BytesIO(data)
        self._stream.seek(offset)
        super().__init__(self._stream)
        self._references = references
        self._lenient = lenient
        self._budget = max(FREE_COST, 8 * len(data))
        self._stateless: dict[int, Any] = {}  # what has been made and has no state yet, by its id
        self._hashes: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def end(self) -> int:
        """Where the pickle ended, once it is loaded."""
        return self._stream.tell()

    # -------------------------------------------------------------- names

    def find_class(self, module: Any, name: Any) -> Any:
        """See :func:`find`."""
        try:
            return self.look_up(module, name)
        except Refused as error:
            if not self._lenient:
                raise
            return Unread(error.what)

    def look_up(self, module: Any, name: Any) -> Any:
        """What a name in the file stands for. :raises Refused: for nothing"""
        return find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """A reference to something outside the pickle."""
        if self._references is None:
            raise Refused("a reference", "there is nothing that it could refer to")
        return self._references(pid)

    # -------------------------------------------------------------- objects

    def reduce(self) -> None:
        """A call: of functions of ours, nothing else."""
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self._call(self.stack[-1], arguments))

    def _call(self, called: Any, arguments: Any) -> Any:
        if isinstance(called, Unread) or (self._lenient and type(called) is Call and _holds_unread(arguments)):
            return called if isinstance(called, Unread) else next(part for part in arguments if isinstance(part, Unread))
        if type(arguments) is not tuple:
            raise Refused(f"a call of {name_of(called)}", "it has no arguments")
        self._charge(_size(arguments))
        if called is STORED:
            return self._stored(*arguments)
        if type(called) is not Call:
            return self.call_other(called, arguments)
        try:
            return called.function(*arguments)
        except Refused as error:
            if not self._lenient:
                raise
            return Unread(error.what)

    def call_other(self, called: Any, arguments: tuple[Any, ...]) -> Any:
        """A call of something else than a function of ours. :raises Refused: always, here"""
        raise Refused(f"a call of {name_of(called)}", "it may be named, not called")

    def _stored(self, data: Any) -> Any:
        if type(data) is not bytes or not data:
            raise Refused("a tensor", "it is not made of bytes")

        def load(data: bytes, offset: int, references: Callable[[Any], Any] | None = None) -> tuple[Any, int]:
            inner = SafeUnpickler(data, offset, references)
            return inner.load(), inner.end()

        return tensors.read_legacy(data, load)

    def new(self) -> None:
        """An empty object of a class."""
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if isinstance(kind, Unread):
            self.append(kind)
            return
        if type(arguments) is not tuple:
            raise Refused(f"an object of {name_of(kind)}", "it has no arguments")
        self._charge(_size(arguments))
        self.append(self._made(self.make(kind, arguments)))

    def make(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        """An empty object. :raises Refused: if the file may make none"""
        if not is_built(kind) or arguments != ():
            raise Refused(f"an object of {name_of(kind)}", "it may be named, not built")
        return kind.__new__(kind)

    def _made(self, value: Any) -> Any:
        self._stateless[id(value)] = value
        return value

    def build(self) -> None:
        """An object's attributes, or content: only of what this pickle has made, and once."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Unread):
            return
        if self._stateless.pop(id(target), None) is None:
            raise Refused(f"the state of {name_of(type(target))}", "it is none of this file's, or has its state already")
        self._charge(_size(state))
        try:
            self.set_state(target, state)
        except Refused as error:
            if not self._lenient:
                raise
            self.stack[-1] = Unread(error.what)

    def set_state(self, target: Any, state: Any) -> None:
        """Put ``state`` into what has been made. :raises Refused: if it is not what is written for such an object"""
        if values.set_state(target, state):
            return
        if is_built(type(target)) and type(state) is dict:
            set_attributes(target, state)
        elif type(target) is OrderedDict and state:
            tensors.set_metadata(target, state)
        elif state or not isinstance(target, th.Tensor | OrderedDict | deque):
            raise Refused(f"the state of {name_of(type(target))}", "it is not what is written for such objects")

    # -------------------------------------------------------------- containers

    def append_one(self) -> None:
        """Into a list."""
        value = self.stack.pop()
        self._extend([value])

    def append_many(self) -> None:
        """Likewise."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unread):
            return
        if not isinstance(target, list | deque) or not self.is_own(target):
            raise Refused(f"an element of {name_of(type(target))}", "it is not a list")
        (list if isinstance(target, list) else deque).extend(target, items)  # type: ignore[arg-type]  # of the same kind

    def set_one(self) -> None:
        """Into a dict."""
        value = self.stack.pop()
        key = self.stack.pop()
        self._update([key, value])

    def set_many(self) -> None:
        """Likewise."""
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unread):
            return
        if not isinstance(target, dict) or not self.is_own(target):
            raise Refused(f"an item of {name_of(type(target))}", "it is not a dict")
        put = OrderedDict.__setitem__ if isinstance(target, OrderedDict) else dict.__setitem__
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, Unread):
                continue
            self._check_key(key, target)
            put(target, key, value)

    def add_many(self) -> None:
        """Into a set."""
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set) or not self.is_own(target):
            raise Refused(f"an element of {name_of(type(target))}", "it is not a set")
        for item in items:
            if isinstance(item, Unread):
                continue
            self._check_key(item, target)
            set.add(target, item)

    def new_dict(self) -> None:
        """From what is on the stack."""
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def new_frozenset(self) -> None:
        """Likewise."""
        items = [item for item in self.pop_mark() if not isinstance(item, Unread)]
        hashes: Counter[int] = Counter()
        self._charge(sum(values.check_key(item, hashes) for item in items))
        self.append(frozenset(items))

    def is_own(self, target: Any) -> bool:
        """Whether elements may be put into something: only into containers of Python's, which do nothing else with them."""
        return type(target) in (list, deque, set, *_DICTS)

    def _check_key(self, key: Any, target: Any) -> None:
        self._charge(values.check_key(key, self._hashes[id(target)] if type(key) in (tuple, frozenset) else Counter()))

    def _charge(self, cost: int) -> None:
        self._budget -= cost
        if self._budget < 0:
            raise Refused("an object", "it would grow far beyond the file that it is in")

    # -------------------------------------------------------------- the rest

    def bytearray8(self) -> None:
        """The base class allocates the bytes before it knows whether so many follow."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def refuse(self) -> None:
        """Any other way to call something, or to reach memory that is not the pickle's own."""
        raise Refused("an instruction that no save writes", "it could call something, or point anywhere")


_REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.PERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
SafeUnpickler.dispatch = {
    **_PickleMachine.dispatch,
    pickle.REDUCE[0]: SafeUnpickler.reduce,
    pickle.NEWOBJ[0]: SafeUnpickler.new,
    pickle.BUILD[0]: SafeUnpickler.build,
    pickle.APPEND[0]: SafeUnpickler.append_one,
    pickle.APPENDS[0]: SafeUnpickler.append_many,
    pickle.SETITEM[0]: SafeUnpickler.set_one,
    pickle.SETITEMS[0]: SafeUnpickler.set_many,
    pickle.ADDITEMS[0]: SafeUnpickler.add_many,
    pickle.DICT[0]: SafeUnpickler.new_dict,
    pickle.FROZENSET[0]: SafeUnpickler.new_frozenset,
    pickle.BYTEARRAY8[0]: SafeUnpickler.bytearray8,
    **{code[0]: SafeUnpickler.refuse for code in _REFUSED},
}


def _holds_unread(arguments: Any) -> bool:
    return type(arguments) is tuple and any(isinstance(part, Unread) for part in arguments)


def _size(value: Any, depth: int = 2) -> int:
    """What copying ``value`` costs: bytes, and elements two levels deep."""
    if type(value) in (bytes, bytearray, str):
        return len(value)
    if type(value) in (tuple, list) and depth:
        return len(value) + sum(_size(part, depth - 1) for part in value) if len(value) <= 64 else len(value)
    return len(value) if type(value) in (tuple, list, dict, set, frozenset, deque, *_DICTS) else 1


def _count(value: Any, counted: dict[int, int | None], limit: int, depth: int = 0) -> int:
    """Values in ``value``, itself included; what is shared counts as often as it is met, as for whoever walks through it."""
    if isinstance(value, Call) or value is STORED:
        raise Refused("a function", "it may be called, not kept")
    if isinstance(value, OldFunction):
        as_schedule(value)
        raise Refused("a function", "only a field that is a schedule may hold one")
    if isinstance(value, tensors.Storage):
        raise Refused("a tensor's memory", "only tensors are kept")
    children = _children(value)
    if children is None:
        return 1
    if id(value) in counted:
        known = counted[id(value)]
        if known is None:
            raise Refused("an object that contains itself", "SB3's files have none")
        return known
    if depth > MAX_DEPTH:
        raise Refused("a nested object", f"it is nested deeper than {MAX_DEPTH}")
    counted[id(value)] = None
    total = 1
    for child in children:
        total += _count(child, counted, limit, depth + 1)
        if total > limit:
            raise Refused("a nested object", f"it holds more than {limit} values")
    counted[id(value)] = total
    return total


def _children(value: Any) -> Iterable[Any] | None:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if is_built(type(value)):
        return vars(value).values()
    return value.flat if type(value) is np.ndarray and value.dtype.hasobject else None


def safe_loads(data: bytes, field: str, remedy: str = "load with allow_pickle=True", lenient: bool = False) -> Any:
    """
    Unpickle ``data`` without running anything that it holds.

    :param data: a pickle, of any protocol, or one of cloudpickle
    :param field: what the pickle is, for messages
    :param remedy: what a user does who trusts the file, for messages
    :param lenient: leave out what is not in the table, where that leaves something; an :class:`Unread` if not
    :return: the object
    :raises UnsafeFileError: if it holds anything that the table does not; nothing has been run or imported for it
    :raises ValueError: if it is damaged
    """
    with errors_named(field, remedy):
        value = SafeUnpickler(data, lenient=lenient).load()
        try:
            value = as_schedule(value)
        except Refused as error:
            if not lenient:
                raise
            return Unread(error.what)
        _count(value, {}, max(MAX_VALUES, len(data)))
    return value


def safe_name(name: str, field: str) -> Any:
    """
    What stands under a name in the table, for readers of other formats.

    :param name: ``"module.name"``
    :param field: where it was found, for messages
    :raises UnsafeFileError: if nothing does, or if it may only be called
    """
    with errors_named(field):
        module, _, attribute = name.rpartition(".")
        found = find(module, attribute)
        _count(found, {}, MAX_VALUES)
        return found


def safe_call(name: str, arguments: Iterable[Any], state: Any, field: str) -> Any:
    """
    The object that a call makes, of what the table lets a file call, for readers of other formats.

    :param name: ``"module.name"``
    :param arguments: of the call
    :param state: what the object is given then, ``None`` for nothing
    :param field: where it was found, for messages
    :raises UnsafeFileError: if it does not stand in the table
    """
    with errors_named(field):
        module, _, attribute = name.rpartition(".")
        reader = SafeUnpickler(b"")
        value = reader._call(find(module, attribute), tuple(arguments))
        if state is not None:
            reader.set_state(value, state)
        _count(value, {}, MAX_VALUES)
        return value


@contextmanager
def errors_named(field: str, remedy: str = "load with allow_pickle=True") -> Iterator[None]:
    """
    Whatever goes wrong while a file is read, as an error that names it.

    :raises UnsafeFileError: in place of :class:`Refused`
    :raises ValueError: in place of anything else
    """
    try:
        yield
    except UnsafeFileError:
        raise
    except Refused as error:
        raise UnsafeFileError(
            f"{field} holds {error.what}: {error.why}. Nothing of it was run. If you trust the file, {remedy}"
        ) from None
    except ImportError as error:
        raise ValueError(f"{field} needs a package that is not installed: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way; none of them is the caller's
        raise ValueError(f"{field} is damaged: {type(error).__name__}: {str(error)[:300]}") from error
