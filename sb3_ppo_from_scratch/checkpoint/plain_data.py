"""
Plain data as bytes, and back: JSON with the raw bytes of arrays behind it. Nothing in it can name anything.

JSON has lists, numbers, texts and dicts of texts. What else there is stands in it as a list that begins with :data:`_MARK`
and a kind (tuples, sets, other dicts, big numbers, arrays and generators' states), and says where its raw bytes are.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch as th

from sb3_ppo_from_scratch.safe_files.unpickler import errors_named
from sb3_ppo_from_scratch.safe_files.values import (
    check_buffer,
    is_plain_dtype,
    is_shape,
    make_bit_generator,
    make_dtype,
    make_frozenset,
    make_ordered_dict,
    make_set,
    set_state,
)

__all__ = ["is_plain", "pack", "unpack"]

_MARK = "\0"
_LENGTH = struct.Struct("<Q")
_MAX_DEPTH = 100
_SMALL = 2**1000
_ATOMS = {type(None), bool, str, float}
"""What JSON has as it is; so it has integers of less than :data:`_SMALL`."""


def pack(value: Any) -> bytes:
    """
    Plain data as bytes.

    :param value: ``None``, numbers, texts, bytes, ranges; arrays of numbers and tensors; NumPy's random generators; lists,
        tuples, sets, deques and dicts of such
    :raises TypeError: for anything else, saying where it is
    """
    writer = _Writer()
    text = json.dumps(writer.encode(value, "", 0)).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *writer.blobs])


def unpack(data: bytes, field: str) -> Any:
    """
    What :func:`pack` was given.

    :param data: of :func:`pack`
    :param field: what it is, for messages
    :raises ValueError: if it is damaged; :class:`UnsafeFileError` if it is made to harm its reader
    """
    with errors_named(field, "there is none who should"):
        (length,) = _LENGTH.unpack_from(data)
        text, blobs = data[_LENGTH.size : _LENGTH.size + length], memoryview(data)[_LENGTH.size + length :]
        return _Reader(blobs).decode(json.loads(text))


# ------------------------------------------------------------------ writing


class _Writer:
    """:param dry: whether to see only whether all is plain"""

    def __init__(self, dry: bool = False) -> None:
        self.blobs: list[bytes] = []
        self._end = 0
        self._dry = dry

    def _blob(self, data: bytes) -> list[int]:
        self.blobs.append(data)
        self._end += len(data)
        return [self._end - len(data), len(data)]

    def encode(self, value: Any, path: str, depth: int) -> Any:
        """``value`` as JSON has it. :raises TypeError: if it is not plain"""
        kind = type(value)
        if value is None or kind in (bool, str, float) or (kind is int and abs(value) < _SMALL):
            return value
        if depth > _MAX_DEPTH:
            raise TypeError(f"{path or 'it'} is nested deeper than {_MAX_DEPTH}")
        if kind in (list, tuple, set, frozenset, deque):
            return self._encode_sequence(value, path, depth)
        if kind in (dict, OrderedDict):
            return self._encode_dict(value, path, depth)
        encode = _ENCODERS.get(kind)
        if encode is None and isinstance(value, np.generic):
            encode = _encode_scalar
        if encode is None or (isinstance(value, np.generic | np.ndarray) and not is_plain_dtype(value.dtype)):
            raise TypeError(f"{path or 'it'} is a {kind.__name__}, not plain data")
        return [_MARK, *encode(self, value, path, depth)]

    def _encode_sequence(self, value: Any, path: str, depth: int) -> list[Any]:
        kinds = set(map(type, value))
        if kinds <= _ATOMS or (kinds == {int} and min(value) > -_SMALL and max(value) < _SMALL):
            items = list(value)  # a callback may have kept a number of every step
        else:
            items = [self.encode(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        if type(value) is deque:
            return [_MARK, "deque", value.maxlen, items]
        if type(value) is list and (not items or items[0] != _MARK):
            return items
        return [_MARK, type(value).__name__, items]

    def _encode_dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        values = [self.encode(item, f"{path}[{key!r:.40}]", depth + 1) for key, item in value.items()]
        if type(value) is dict and all(type(key) is str for key in value):
            return dict(zip(value, values, strict=True))
        keys = [self.encode(key, f"a key of {path}", depth + 1) for key in value]
        return [_MARK, type(value).__name__, keys, values]

    def blob_of(self, array: np.ndarray) -> list[Any]:
        """Type, shape, order and bytes of an array."""
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        place = [] if self._dry else self._blob(array.tobytes(order))
        return [array.dtype.str, list(array.shape), order, place]


def _encode_scalar(writer: _Writer, value: Any, path: str, depth: int) -> list[Any]:
    return ["scalar", value.dtype.str, value.tobytes().hex()]


def _encode_tensor(writer: _Writer, value: th.Tensor, path: str, depth: int) -> list[Any]:
    return ["tensor", *writer.blob_of(value.detach().cpu().numpy())]


def _encode_generator(writer: _Writer, value: Any, path: str, depth: int) -> list[Any]:
    state = value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state(legacy=False)
    return [type(value).__name__, writer.encode(state, path, depth + 1)]


_ENCODERS: dict[type, Callable[[_Writer, Any, str, int], list[Any]]] = {
    int: lambda writer, value, path, depth: ["int", hex(value)],
    complex: lambda writer, value, path, depth: ["complex", value.real, value.imag],
    range: lambda writer, value, path, depth: ["range", value.start, value.stop, value.step],
    bytes: lambda writer, value, path, depth: ["bytes", writer._blob(value)],
    bytearray: lambda writer, value, path, depth: ["bytearray", writer._blob(bytes(value))],
    np.ndarray: lambda writer, value, path, depth: ["array", *writer.blob_of(value)],
    th.Tensor: _encode_tensor,
    np.random.Generator: _encode_generator,
    np.random.RandomState: _encode_generator,
}


# ------------------------------------------------------------------ reading


class _Reader:
    def __init__(self, blobs: memoryview):
        self._blobs = blobs

    def decode(self, value: Any) -> Any:
        """What JSON stands for."""
        if type(value) is dict:
            return {key: self.decode(item) for key, item in value.items()}
        if type(value) is not list:
            return value
        if not value or value[0] != _MARK:
            return [self.decode(item) for item in value]
        _, kind, *parts = value
        return _DECODERS[kind](self, *parts)

    def blob(self, place: Any) -> bytes:
        """The raw bytes at a place."""
        start, length = place
        if not is_shape((start, length)) or start + length > len(self._blobs):
            raise ValueError("a place is not in the file")
        return bytes(self._blobs[start : start + length])

    def array(self, dtype: Any, shape: Any, order: Any, place: Any) -> np.ndarray:
        """An array of its own."""
        data, kind, sizes = self.blob(place), make_dtype(dtype), tuple(shape)
        check_buffer(data, kind, sizes)
        return np.frombuffer(data, kind).reshape(sizes, order="F" if order == "F" else "C").copy("K")

    def items(self, keys: list[Any], values: list[Any]) -> list[tuple[Any, Any]]:
        """Of a dict."""
        return list(zip(map(self.decode, keys), map(self.decode, values), strict=True))

    def scalar(self, dtype: Any, digits: str) -> Any:
        """A number of NumPy's."""
        data, kind = bytes.fromhex(digits), make_dtype(dtype)
        check_buffer(data, kind, ())
        return np.frombuffer(data, kind)[0]

    def generator(self, state: Any) -> np.random.Generator:
        """One of NumPy's random generators."""
        state = self.decode(state)
        generator = np.random.Generator(make_bit_generator(state["bit_generator"]))
        set_state(generator, state)
        return generator

    def random_state(self, state: Any) -> np.random.RandomState:
        """One of the older kind."""
        state = self.decode(state)
        generator = np.random.RandomState(make_bit_generator(state["bit_generator"]))
        set_state(generator, state)
        return generator


_DECODERS: dict[str, Callable[..., Any]] = {
    "list": lambda reader, items: [reader.decode(item) for item in items],
    "tuple": lambda reader, items: tuple(map(reader.decode, items)),
    "set": lambda reader, items: make_set([reader.decode(item) for item in items]),
    "frozenset": lambda reader, items: make_frozenset([reader.decode(item) for item in items]),
    "deque": lambda reader, maxlen, items: deque(map(reader.decode, items), maxlen),
    "dict": lambda reader, keys, values: dict(make_ordered_dict(reader.items(keys, values))),
    "OrderedDict": lambda reader, keys, values: make_ordered_dict(reader.items(keys, values)),
    "int": lambda reader, digits: int(digits, 16),
    "complex": lambda reader, real, imaginary: complex(real, imaginary),
    "range": lambda reader, start, stop, step: range(start, stop, step),
    "bytes": lambda reader, place: reader.blob(place),
    "bytearray": lambda reader, place: bytearray(reader.blob(place)),
    "scalar": _Reader.scalar,
    "array": _Reader.array,
    "tensor": lambda reader, *parts: th.from_numpy(reader.array(*parts)),
    "Generator": _Reader.generator,
    "RandomState": _Reader.random_state,
}


def is_plain(value: Any) -> bool:
    """Whether :func:`pack` takes ``value``."""
    try:
        _Writer(dry=True).encode(value, "", 0)
    except TypeError:
        return False
    return True
