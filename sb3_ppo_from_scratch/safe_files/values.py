"""
What a file's calls become: functions that build plain values, NumPy's arrays and random generators from checked parts.

None of them hands what it gets on to a constructor that could read or write beyond it: sizes, kinds and ranges are checked
first. In particular no array is ever laid over memory that the file points to, and no object array over numbers.
"""

from __future__ import annotations

import array
import datetime
import itertools
import pathlib
import random
import re
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from sb3_ppo_from_scratch.safe_files.refusal import Refused, shown

__all__ = [
    "BIT_GENERATORS",
    "check_buffer",
    "check_key",
    "is_plain_dtype",
    "is_shape",
    "numpy_state",
    "python_state",
    "set_state",
]

_DTYPES = {"?", "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
_TEXT = re.compile(r"[<>=|]?[SU][1-9][0-9]{0,5}")
_OBJECT = {"O", "O8"}
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_FACTORIES = (None, int, float, bool, str, list, dict, set, tuple)

# ------------------------------------------------------------------ keys

_PLAIN_KEYS = (str, bytes, bool, float, type(None))
_MAX_KEY_PARTS = 16
_MAX_KEY_DEPTH = 4
_MAX_SAME_HASH = 16


def check_key(key: Any, hashes: Counter[int], depth: int = 0) -> int:
    """
    Whether something may be a key, or in a set. What hashing costs, how deep it goes and what collides is up to the file.

    :param hashes: how many keys of each hash are in the container already
    :return: how many values it consists of
    :raises Refused: for what has a hash of its own, for more than a few values in one key, and for many of the same hash
    """
    kind = type(key)
    if kind in _PLAIN_KEYS or (kind is int and abs(key) < 2**63):
        return 1
    if (isinstance(key, np.number | np.bool_) and not isinstance(key, np.complexfloating)) or _hashes_by_identity(kind):
        return 1
    if kind in (tuple, frozenset) and depth < _MAX_KEY_DEPTH and len(key) <= _MAX_KEY_PARTS:
        parts = 1
        for part in key:
            parts += check_key(part, hashes, depth + 1)
            if parts > _MAX_KEY_PARTS:
                break
        else:
            if depth == 0:
                hashes[hash(key)] += 1
                if hashes[hash(key)] > _MAX_SAME_HASH:
                    raise Refused("a set or dict", "it is made of keys that collide")
            return parts
    raise Refused(f"{shown(key)} as a key", f"only plain values are, and tuples of at most {_MAX_KEY_PARTS} of them")


def _hashes_by_identity(kind: type) -> bool:
    own: Any = kind.__hash__
    return own is object.__hash__ or (issubclass(kind, Enum) and own is Enum.__hash__)


# ------------------------------------------------------------------ Python


def make_ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    """As ``OrderedDict.__reduce__`` has it, or from pairs."""
    if type(items) not in (list, tuple):
        raise Refused("an OrderedDict", "it is not made of pairs")
    result: OrderedDict[Any, Any] = OrderedDict()
    hashes: Counter[int] = Counter()
    for key, value in items:
        check_key(key, hashes)
        result[key] = value
    return result


def make_counter(counts: Any = None) -> Counter[Any]:
    """As ``Counter.__reduce__`` has it."""
    if counts is not None and type(counts) is not dict:
        raise Refused("a Counter", "it is not made of a dict")
    return Counter(counts)


def make_defaultdict(factory: Any = None) -> defaultdict[Any, Any]:
    """Its items follow; the factory is one of Python's own kinds."""
    if factory not in _FACTORIES:
        raise Refused("a defaultdict", "its defaults are not of Python's own kinds")
    return defaultdict(factory)


def make_deque(items: Any = (), maxlen: Any = None) -> deque[Any]:
    """From a list and a bound."""
    if type(items) not in (list, tuple) or not (maxlen is None or (type(maxlen) is int and 0 <= maxlen < 2**62)):
        raise Refused("a deque", "it is not made of a list and a length")
    return deque(items, maxlen)


def make_set(items: Any = ()) -> set[Any]:
    """From a list."""
    return set(_checked(items))


def make_frozenset(items: Any = ()) -> frozenset[Any]:
    """From a list."""
    return frozenset(_checked(items))


def _checked(items: Any) -> Any:
    if type(items) not in (list, tuple):
        raise Refused("a set", "it is not made of a list")
    hashes: Counter[int] = Counter()
    for item in items:
        check_key(item, hashes)
    return items


def make_bytes(text: Any, encoding: Any) -> bytes:
    """As pickles of before protocol 3 have them, as text."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("bytes", "they are not what Python writes")
    return text.encode("latin-1")


def make_bytearray(content: Any = b"", encoding: Any = None) -> bytearray:
    """From bytes, or from text as old pickles have it; never from a size."""
    if type(content) is str and encoding == "latin-1":
        content = content.encode(encoding)
    if type(content) is not bytes:
        raise Refused("a bytearray", "it is not made of bytes")
    return bytearray(content)


def make_complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    """From two floats."""
    return complex(_float(real), _float(imaginary))


def make_range(*numbers: Any) -> range:
    """From integers; a range is as small as they are."""
    return range(*(_integer(number) for number in numbers))


def make_slice(*numbers: Any) -> slice:
    """From integers or None."""
    return slice(*(None if number is None else _integer(number) for number in numbers))


def make_count(start: Any = 0, step: Any = 1) -> Any:
    """``itertools.count``."""
    return itertools.count(*(number if type(number) is float else _integer(number) for number in (start, step)))


def make_namespace() -> SimpleNamespace:
    """Empty; its attributes follow."""
    return SimpleNamespace()


def make_path(*parts: Any) -> pathlib.Path:
    """From its parts."""
    if not all(type(part) is str for part in parts):
        raise Refused("a path", "it is not made of text")
    return pathlib.Path(*parts)


def make_datetime(packed: Any, timezone: Any = None) -> datetime.datetime:
    """From the ten bytes that pickles have, each checked as the constructor checks its arguments."""
    if type(packed) is not bytes or len(packed) != 10 or timezone is not None:
        raise Refused("a datetime", "it is not what Python writes")
    high, low, month, day, hour, minute, second, *micro = packed
    return datetime.datetime(
        256 * high + low, month & 127, day, hour, minute, second, int.from_bytes(micro, "big"), fold=month >> 7
    )


def make_date(packed: Any) -> datetime.date:
    """As :func:`make_datetime`."""
    if type(packed) is not bytes or len(packed) != 4:
        raise Refused("a date", "it is not what Python writes")
    return datetime.date(256 * packed[0] + packed[1], packed[2], packed[3])


def make_timedelta(*numbers: Any) -> datetime.timedelta:
    """From days, seconds and microseconds."""
    return datetime.timedelta(*(_integer(number) for number in numbers[:3]))


_UNSIGNED, _SIGNED = {1: 0, 2: 2, 4: 6, 8: 10}, {1: 1, 2: 4, 4: 8, 8: 12}
_FORMATS: dict[str, int] = {
    **{code: _UNSIGNED[array.array(code).itemsize] for code in "BHILQ"},
    **{code: _SIGNED[array.array(code).itemsize] for code in "bhilq"},
    "f": 14,
    "d": 16,
}
"""What pickles call the formats of the numbers in Python's arrays, least byte first, by the code of their type here."""


def rebuild_python_array(kind: Any, code: Any, machine_format: Any, data: Any) -> array.array[Any]:
    """``array._array_reconstructor``, of this machine's own formats."""
    if kind is not array.array or type(code) is not str or type(data) is not bytes or _FORMATS.get(code) != machine_format:
        raise Refused("an array.array", "it is not written as this machine writes one")
    return array.array(code, data)


def make_random() -> random.Random:
    """Its state follows."""
    return random.Random(0)


def _integer(value: Any) -> int:
    if type(value) not in (int, bool) or not -(2**63) <= value < 2**63:
        raise Refused(shown(value), "it is not an integer of 64 bits")
    return value


def _float(value: Any) -> float:
    if type(value) is not float:
        raise Refused(shown(value), "it is not a number")
    return value


# ------------------------------------------------------------------ NumPy's arrays


def make_dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    """Numbers, booleans, texts and objects: a structure's layout could point anywhere."""
    if type(code) is str and (code.lstrip("<>=|") in _DTYPES or _TEXT.fullmatch(code) or code in _OBJECT):
        return np.dtype(code, copy=True)  # a dtype of its own, since its byte order may be set
    raise Refused(f"numpy.dtype({shown(code)})", "only arrays of numbers are read")


def is_plain_dtype(dtype: np.dtype) -> bool:
    """Whether arrays of this type can be read from a file without an object being made of each element."""
    return dtype.str.lstrip("<>=|") in _DTYPES or bool(_TEXT.fullmatch(dtype.str))


def make_empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What ``ndarray.__reduce__`` names; the content follows as the array's state."""
    if kind is not np.ndarray or type(shape) is not tuple or shape not in ((0,), ()):
        raise Refused(f"numpy array of type {shown(kind)} and shape {shown(shape)}", "it is not what NumPy writes")
    return np.empty(0, np.int8)


def make_array(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """An array from its bytes, which must be exactly as many as it needs; ``axes`` say how its memory is laid out."""
    check_buffer(data, dtype, shape)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    if axes is None:
        return array
    if type(axes) not in (tuple, list) or sorted(map(_integer, axes)) != list(range(array.ndim)):
        raise Refused("a numpy array", "its axes are not as many as it has")
    return array.transpose(axes)


def make_scalar(dtype: Any, data: Any) -> np.generic:
    """NumPy's scalar, of a number."""
    check_buffer(data, dtype, ())
    return np.frombuffer(data, dtype)[0]


def check_buffer(data: Any, dtype: Any, shape: Any) -> None:
    """:raises Refused: unless ``data`` are the bytes of an array of numbers or texts of that type and shape."""
    if not (
        type(data) in (bytes, bytearray)
        and isinstance(dtype, np.dtype)
        and is_plain_dtype(dtype)
        and is_shape(shape)
        and prod(shape) * dtype.itemsize == len(data)
    ):
        raise Refused(f"numpy array of shape {shown(shape)}", "its bytes are not as many as it needs")
    if dtype.kind == "U" and len(data) and np.frombuffer(data, dtype.byteorder.replace("|", "=") + "u4").max() > 0x10FFFF:
        raise Refused("a numpy array of text", "it holds what is no character")


def is_shape(shape: Any) -> bool:
    """Whether something is a tuple of sizes."""
    return type(shape) is tuple and len(shape) <= 32 and all(type(size) is int and 0 <= size < 2**48 for size in shape)


def _set_array(target: np.ndarray, state: Any) -> None:
    if type(state) is not tuple or len(state) != 5:
        raise Refused("a numpy array", "its state is not what NumPy writes")
    _, shape, dtype, fortran, data = state
    if isinstance(dtype, np.dtype) and dtype.char == "O":  # each element an object of its own, as the list has them
        if type(data) is not list or not is_shape(shape) or prod(shape) != len(data):
            raise Refused(f"numpy array of shape {shown(shape)}", "its elements are not as many as it needs")
        target.__setstate__((1, shape, np.dtype(object), bool(fortran), data))  # type: ignore[arg-type]  # of a pickle: plain
    else:
        check_buffer(data, dtype, shape)
        target.__setstate__((1, shape, dtype, bool(fortran), bytes(data)))  # type: ignore[arg-type]  # likewise


def _set_dtype(target: np.dtype, state: Any) -> None:
    if type(state) is not tuple or len(state) < 8 or state[0] not in (3, 4) or state[1] not in ("<", ">", "|", "="):
        raise Refused("numpy.dtype", "only arrays of numbers are read")
    layout = state[2:8]
    sizes = (target.itemsize, target.alignment) if target.kind in "SU" else (-1, -1)
    if layout != (None, None, None, *sizes, target.flags):
        raise Refused("numpy.dtype", "only arrays of numbers are read")
    if target.char != "O":
        target.__setstate__(state[:8])  # type: ignore[attr-defined]  # as pickle calls it


# ------------------------------------------------------------------ NumPy's random generators


def make_bit_generator(kind: Any = "MT19937") -> np.random.BitGenerator:
    """By its class, or as older versions of NumPy wrote it, by its name."""
    name = kind.__name__ if isinstance(kind, type) else kind
    if type(name) is not str or name not in BIT_GENERATORS:
        raise Refused(f"numpy.random.{shown(name)}", f"only {', '.join(BIT_GENERATORS)} are read")
    return getattr(np.random, name)(0)


def make_generator(bit_generator: Any = "MT19937", constructor: Any = None) -> np.random.Generator:
    """Around a bit generator, or one of that name."""
    source = bit_generator if isinstance(bit_generator, np.random.BitGenerator) else make_bit_generator(bit_generator)
    return np.random.Generator(source)


def make_random_state(bit_generator: Any = "MT19937", constructor: Any = None) -> np.random.RandomState:
    """As :func:`make_generator`, of the old kind."""
    source = bit_generator if isinstance(bit_generator, np.random.BitGenerator) else make_bit_generator(bit_generator)
    return np.random.RandomState(source)


def make_seed_sequence(kind: Any, checksum: Any, state: Any) -> np.random.SeedSequence:
    """Empty; the state follows."""
    return np.random.SeedSequence(0)


def _set_seed_sequence(target: np.random.SeedSequence, state: Any) -> None:
    if type(state) is not tuple or len(state) != 5:
        raise Refused("numpy.random.SeedSequence", "its state is not what NumPy writes")
    entropy, spawned, _, pool_size, spawn_key = state  # the pool follows from the others
    if pool_size != 4 or type(spawn_key) is not tuple or len(spawn_key) > 64:
        raise Refused("numpy.random.SeedSequence", "its pool is not of NumPy's size")
    entropy = [_words(part) for part in entropy[:65]] if type(entropy) in (list, tuple) else _words(entropy)
    if type(entropy) is list and len(entropy) > 64:
        raise Refused("numpy.random.SeedSequence", "its entropy is longer than any seed")
    key = tuple(_words(part) for part in spawn_key)
    target.__init__(entropy, spawn_key=key, pool_size=4, n_children_spawned=_bits(spawned, 32))  # type: ignore[misc]


def _words(value: Any) -> int:
    return _bits(int(value) if isinstance(value, np.integer) else value, 1024)


def _bits(value: Any, bits: int) -> int:
    if type(value) not in (int, bool) or not 0 <= value < 2**bits:
        raise Refused(shown(value), f"it is not a number of {bits} bits")
    return int(value)


def _array_of(value: Any, dtype: type, size: int) -> np.ndarray:
    if type(value) is not np.ndarray or value.dtype != dtype or value.shape != (size,):
        raise Refused("a random generator", f"its state is not {size} numbers of NumPy's")
    return value.copy()


def _bit_state(kind: str, state: Any) -> dict[str, Any]:
    """A bit generator's state put together anew from checked parts: NumPy itself reads beyond its key or buffer."""
    if type(state) is not dict or state.get("bit_generator") != kind or type(inner := state.get("state")) is not dict:
        raise Refused("a random generator", "its state is not one of NumPy's")
    if kind == "MT19937":
        key = _array_of(inner.get("key"), np.uint32, 624)
        return {"bit_generator": kind, "state": {"key": key, "pos": _in_range(inner.get("pos"), 625)}}
    more: dict[str, Any] = {"has_uint32": _in_range(state.get("has_uint32"), 2), "uinteger": _bits(state.get("uinteger"), 32)}
    if kind == "Philox":
        numbers = {"counter": _array_of(inner.get("counter"), np.uint64, 4), "key": _array_of(inner.get("key"), np.uint64, 2)}
        more |= {"buffer": _array_of(state.get("buffer"), np.uint64, 4), "buffer_pos": _in_range(state.get("buffer_pos"), 5)}
        return {"bit_generator": kind, "state": numbers, **more}
    if kind == "SFC64":
        return {"bit_generator": kind, "state": {"state": _array_of(inner.get("state"), np.uint64, 4)}, **more}
    return {"bit_generator": kind, "state": {name: _bits(inner.get(name), 128) for name in ("state", "inc")}, **more}


def _in_range(value: Any, size: int) -> int:
    if isinstance(value, np.integer):
        value = int(value)
    if type(value) is not int or not 0 <= value < size:
        raise Refused("a random generator", f"a position or flag in its state is {shown(value)}, not below {size}")
    return value


def _set_bit_generator(target: np.random.BitGenerator, state: Any) -> None:
    numbers, *sequence = state if type(state) is tuple else (state,)
    checked = _bit_state(type(target).__name__, numbers)
    if sequence and type(sequence[0]) is np.random.SeedSequence:
        target.__setstate__((checked, sequence[0]))  # type: ignore[attr-defined]  # as pickle calls it
    else:
        target.state = checked


def _set_random_state(target: np.random.RandomState, state: Any) -> None:
    checked = _bit_state(target.get_state(legacy=False)["bit_generator"], state)
    more = {"has_gauss": _in_range(state.get("has_gauss"), 2), "gauss": _float(state.get("gauss"))}
    target.set_state({**checked, **more})


def python_state(state: Any) -> tuple[Any, ...]:
    """What ``random.getstate()`` returns, checked."""
    if type(state) is not tuple or len(state) != 3 or state[0] != 3 or type(state[1]) is not tuple or len(state[1]) != 625:
        raise Refused("random.Random", "its state is not what Python writes")
    if not (state[2] is None or type(state[2]) is float):
        raise Refused("random.Random", "its state is not what Python writes")
    return 3, (*(_bits(number, 32) for number in state[1][:-1]), _in_range(state[1][-1], 625)), state[2]


def numpy_state(state: Any) -> tuple[Any, ...]:
    """What ``numpy.random.get_state()`` returns, checked."""
    if type(state) is not tuple or len(state) != 5 or state[0] != "MT19937":
        raise Refused("numpy.random.RandomState", "its state is not what NumPy writes")
    _, key, position, has_gauss, gauss = state
    return "MT19937", _array_of(key, np.uint32, 624), _in_range(position, 625), _in_range(has_gauss, 2), _float(gauss)


def set_state(target: Any, state: Any) -> bool:
    """
    What a pickle's BUILD does, for what the functions of this module have made.

    :return: whether ``target`` is of these kinds
    :raises Refused: if the state is not what is written for such an object
    """
    if type(target) is np.ndarray:
        _set_array(target, state)
    elif isinstance(target, np.dtype):
        _set_dtype(target, state)
    elif type(target) is np.random.SeedSequence:
        _set_seed_sequence(target, state)
    elif isinstance(target, np.random.BitGenerator):
        _set_bit_generator(target, state)
    elif type(target) is np.random.Generator:
        _set_bit_generator(target.bit_generator, state)
    elif type(target) is np.random.RandomState:
        _set_random_state(target, state)
    elif type(target) is random.Random:
        target.setstate(python_state(state))
    elif type(target) is SimpleNamespace and type(state) is dict:
        vars(target).update(state)
    else:
        return False
    return True
