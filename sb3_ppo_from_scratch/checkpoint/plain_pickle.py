"""Pickles that can hold data but run nothing: only known, harmless classes are ever looked up."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = ["PlainUnpickler", "Reference", "is_plain", "load_plain"]

Reference = tuple[str, str]
"""Module and name of what a pickle looks up."""

_BUILTINS = ("bytearray", "complex", "frozenset", "range", "set", "slice")
_PLAIN: frozenset[Reference] = frozenset(
    {
        *(("builtins", name) for name in _BUILTINS),
        *(("collections", name) for name in ("OrderedDict", "deque")),
        *(("numpy", name) for name in ("dtype", "ndarray")),
        *(
            (f"numpy.{core}.{module}", name)
            for core in ("_core", "core")  # NumPy 2 and 1
            for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
        ),
        *(("numpy.random._pickle", f"__{kind}_ctor") for kind in ("generator", "bit_generator", "randomstate")),
        ("numpy.random._pcg64", "PCG64"),
        ("numpy.random._pcg64", "PCG64DXSM"),
        ("numpy.random._mt19937", "MT19937"),
        ("numpy.random._philox", "Philox"),
        ("numpy.random._sfc64", "SFC64"),
        ("numpy.random.bit_generator", "SeedSequence"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
    }
)


class PlainUnpickler(pickle.Unpickler):
    """
    Reads plain data, NumPy's arrays and random generators, and what else is allowed.

    :param data: a pickle
    :param allowed: more classes that it may look up
    :param trust: whether it may look up anything, and so run anything
    """

    def __init__(self, data: bytes, allowed: Iterable[Reference] = (), trust: bool = False):
        super().__init__(io.BytesIO(data))
        self._allowed = _PLAIN.union(allowed)
        self._trust = trust

    def find_class(self, module: str, name: str) -> Any:
        """
        See :class:`pickle.Unpickler`.

        :raises pickle.UnpicklingError: for what is not allowed
        """
        if self._trust or (module, name) in self._allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, which is not plain data and could run code; "
            "pass allow_pickle=True if you trust whoever wrote it"
        )


def load_plain(data: bytes) -> Any:
    """
    Read a pickle of plain data and NumPy arrays.

    :raises pickle.UnpicklingError: if it holds anything else
    """
    return PlainUnpickler(data).load()


def is_plain(value: Any) -> bool:
    """Whether :func:`load_plain` could read a pickle of ``value``."""
    if value is None or isinstance(value, np.generic):
        return not isinstance(value, np.object_)
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and not value.dtype.hasobject
    kind = type(value)
    if kind in (bool, int, float, complex, str, bytes, bytearray, range):
        return True
    if kind in (list, tuple, set, frozenset, deque):
        return _all_plain(value)
    return kind in (dict, OrderedDict) and _all_plain(value.keys()) and _all_plain(value.values())


def _all_plain(values: Iterable[Any], test: Callable[[Any], bool] = is_plain) -> bool:
    return all(map(test, values))
