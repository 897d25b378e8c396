"""
Reading model files without running anything that they hold.

SB3's files keep most of a model as pickles, and a pickle is a program: whoever unpickles it runs it. Here pickles go through a
reader that builds only what stands in one table (:data:`ALLOWED`), and looks names up there *before* importing anything.
A pickle can name what is in the table, make an empty object of some of it, and give such an object attributes. It can call
nothing: numbers, arrays, tensors and random generators are rebuilt by functions of this module, which check their arguments.

The archive around the pickles is checked before anything is inflated, and everything is read into memory once: what was
checked is what is used.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import json
import pathlib
import pickle
import re
import stat
import warnings
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.validation import errors_for_assertions

__all__ = [
    "ALLOWED",
    "check_weights",
    "load_torch",
    "load_vec_normalize",
    "read_archive",
    "read_fields",
    "safe_archive",
    "safe_call",
    "safe_loads",
    "safe_name",
    "weights_archive",
]

# Bounds on what reading may cost; a model of a gigabyte, or a rollout's worth of pickled values, stays far below them.
FREE_BYTES = 64 * 2**20
"""An archive may always inflate to so many bytes ..."""
MAX_RATIO = 20
"""... and beyond that to so many times its own size. Weights compress by less than 2, pickles as text by less than 10."""
MAX_MEMBERS = 64
"""Files in an archive; SB3 writes six."""
MAX_VALUES = 10**6
"""Values in one unpickled object, those that stand in it twice counted twice."""
MAX_DEPTH = 64
"""How deep they may be nested."""


# --------------------------------------------------------------------- the table


class Allowed(NamedTuple):
    """A row of :data:`ALLOWED`."""

    module: str
    names: tuple[str, ...]
    use: str | Callable[..., Any]
    """``NAMED``, ``BUILT``, or the function of this module that a call of that name in the file becomes"""
    why: str


NAMED = "named"
"""The file may name this class, not call it. What a model then does with it is build a part of itself."""
BUILT = "built"
"""The file may make an empty object of this class, and set attributes that are not the names of its methods."""


class _Call(NamedTuple):
    """Stands on the unpickler's stack for a function that a file may call."""

    function: Callable[..., Any]


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    """Numbers and booleans only: an object array's elements could be anything, a structure's layout points anywhere."""
    if isinstance(code, str) and code.lstrip("<>=|") in _DTYPES:
        return np.dtype(code, copy=True)  # a dtype of its own, since its byte order may be set
    raise _Refused(f"numpy.dtype({_short(code)})", "only arrays of numbers are read")


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What ``ndarray.__reduce__`` names; the content follows as the array's state."""
    if kind is not np.ndarray or shape != (0,):
        raise _Refused(f"numpy array of type {_short(kind)} and shape {_short(shape)}", "it is not what NumPy writes")
    return np.empty(0, np.int8)


def _array(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """An array from its bytes, which must be exactly as many as it needs; ``axes`` say how its memory is laid out."""
    _check_buffer(data, dtype, shape)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(axes)


def _scalar(dtype: Any, data: Any) -> np.generic:
    """NumPy's scalar, of a number."""
    _check_buffer(data, dtype, ())
    return np.frombuffer(data, dtype)[0]


def _check_buffer(data: Any, dtype: Any, shape: Any) -> None:
    sound = (
        isinstance(data, bytes | bytearray)
        and isinstance(dtype, np.dtype)
        and isinstance(shape, tuple)
        and all(isinstance(size, int) and size >= 0 for size in shape)
    )
    if not sound or prod(shape) * dtype.itemsize != len(data):
        raise _Refused(f"numpy array of shape {_short(shape)}", "its bytes are not as many as it needs")


def _bit_generator(kind: Any = "MT19937") -> np.random.BitGenerator:
    """By its class, or as older versions of NumPy wrote it, by its name."""
    name = kind.__name__ if isinstance(kind, type) else kind
    if name not in _BIT_GENERATORS:
        raise _Refused(f"numpy.random.{_short(name)}", f"only {', '.join(_BIT_GENERATORS)} are read")
    return getattr(np.random, name)(0)


def _generator(bit_generator: Any = "MT19937", constructor: Any = None) -> np.random.Generator:
    source = bit_generator if isinstance(bit_generator, np.random.BitGenerator) else _bit_generator(bit_generator)
    return np.random.Generator(source)


def _random_state(bit_generator: Any = "MT19937", constructor: Any = None) -> np.random.RandomState:
    source = bit_generator if isinstance(bit_generator, np.random.BitGenerator) else _bit_generator(bit_generator)
    return np.random.RandomState(source)


def _seed_sequence(kind: Any, checksum: Any, state: Any) -> np.random.SeedSequence:
    """Empty; the state follows."""
    return np.random.SeedSequence(0)


def _storage(data: Any) -> Any:
    """A tensor's memory, read by torch's own restricted loader (torch itself would unpickle it here without restriction)."""
    try:
        return load_torch(data, "a tensor")
    except UnsafeFileError as error:
        raise _Refused("a tensor", str(error)) from None


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> th.Tensor:
    whole = isinstance(storage, th.storage.TypedStorage) and all(
        isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)
    )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if whole and prod(size) else -1
    if not whole or last >= storage._size():  # its len() warns
        raise _Refused(f"torch.Tensor of size {_short(size)}", "its storage does not hold it")
    return th._utils._rebuild_tensor_v2(storage, offset, size, stride, bool(requires_grad), OrderedDict())


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> th.nn.Parameter:
    return th.nn.Parameter(data, bool(requires_grad))


def _path(*parts: Any) -> pathlib.Path:
    return pathlib.Path(*map(str, parts))


_DTYPES = {"?", "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
    *("RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
)
_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_NUMBERS = ("bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# fmt: off
ALLOWED: tuple[Allowed, ...] = (
    # what a model is made of
    Allowed("stable_baselines3.common.policies",
            ("ActorCriticPolicy", "ActorCriticCnnPolicy", "MultiInputActorCriticPolicy"), NAMED, "policy_class"),
    Allowed("sb3_ppo_from_scratch.policies", ("SharedMlpPolicy",), NAMED, "policy_class"),
    Allowed("stable_baselines3.common.torch_layers", ("FlattenExtractor", "NatureCNN", "CombinedExtractor"), NAMED,
            "policy_kwargs: features_extractor_class"),
    Allowed("torch.nn.modules.activation", _ACTIVATIONS, NAMED, "policy_kwargs: activation_fn"),
    Allowed("torch.nn.modules.linear", ("Identity",), NAMED, "policy_kwargs: activation_fn"),
    *(Allowed(f"torch.optim.{name.lower()}", (name,), NAMED, "policy_kwargs: optimizer_class") for name in _OPTIMIZERS),
    Allowed("stable_baselines3.common.sb2_compat.rmsprop_tf_like", ("RMSpropTFLike",), NAMED,
            "policy_kwargs: optimizer_class"),
    Allowed("stable_baselines3.common.buffers", ("RolloutBuffer", "DictRolloutBuffer"), NAMED, "rollout_buffer_class"),
    Allowed("sb3_ppo_from_scratch.buffer", ("ScratchRolloutBuffer",), NAMED, "rollout_buffer_class"),
    # spaces, schedules, statistics
    Allowed("gymnasium.spaces.box", ("Box",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.discrete", ("Discrete",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.multi_discrete", ("MultiDiscrete",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.multi_binary", ("MultiBinary",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.dict", ("Dict",), BUILT, "spaces"),
    Allowed("stable_baselines3.common.utils", ("FloatSchedule", "ConstantSchedule", "LinearSchedule"), BUILT, "schedules"),
    Allowed("rl_zoo3.utils", ("SimpleLinearSchedule",), BUILT, "schedules of models that rl-zoo3 trained"),
    Allowed("stable_baselines3.common.running_mean_std", ("RunningMeanStd",), BUILT, "VecNormalize"),
    Allowed("stable_baselines3.common.vec_env.vec_normalize", ("VecNormalize",), BUILT, "VecNormalize"),
    # plain data
    Allowed("collections", ("OrderedDict",), OrderedDict, "dict observations, nothing but a dict"),
    Allowed("collections", ("deque",), deque, "ep_info_buffer, nothing but a list"),
    Allowed("builtins", ("set",), set, "nothing but a set"),
    Allowed("pathlib", ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"), _path, "tensorboard_log"),
    # NumPy: numbers, arrays of numbers, the random generators of spaces
    Allowed("numpy", ("ndarray",), NAMED, "argument of the next rows"),
    Allowed("numpy", _NUMBERS, NAMED, "types of numbers, in policy_kwargs and spaces"),
    Allowed("numpy", ("dtype",), _dtype, "of arrays of numbers"),
    Allowed("numpy._core.multiarray", ("_reconstruct",), _empty_array, "arrays"),
    Allowed("numpy._core.multiarray", ("scalar",), _scalar, "numbers"),
    Allowed("numpy._core.numeric", ("_frombuffer",), _array, "arrays"),
    *(Allowed(f"numpy.random._{name.lower().removesuffix('dxsm')}", (name,), NAMED, "kinds of random generators")
      for name in _BIT_GENERATORS),
    Allowed("numpy.random.bit_generator", ("SeedSequence",), NAMED, "argument of the next row"),
    Allowed("numpy.random.bit_generator", ("__pyx_unpickle_SeedSequence",), _seed_sequence, "random generators"),
    Allowed("numpy.random._pickle", ("__bit_generator_ctor",), _bit_generator, "random generators"),
    Allowed("numpy.random._pickle", ("__generator_ctor",), _generator, "random generators"),
    Allowed("numpy.random._pickle", ("__randomstate_ctor",), _random_state, "random generators of old spaces"),
    # torch: tensors, and what describes them
    Allowed("torch", ("float16", "float32", "float64", "bfloat16", "int32", "int64", "uint8", "bool"), NAMED, "dtypes"),
    Allowed("torch", ("device",), th.device, "the name of a device"),
    Allowed("torch", ("Size",), th.Size, "nothing but a tuple"),
    Allowed("torch.storage", ("_load_from_bytes",), _storage, "tensors"),
    Allowed("torch._utils", ("_rebuild_tensor_v2",), _tensor, "tensors"),
    Allowed("torch._utils", ("_rebuild_parameter",), _parameter, "tensors"),
)
"""All that a file may name, and what comes of it. Names are exact: there is no attribute access below them."""
# fmt: on

_TABLE = {(row.module, name): row.use for row in ALLOWED for name in row.names}
_RENAMED = {"gym.spaces.": "gymnasium.spaces.", "numpy.core.": "numpy._core.", "pathlib._local": "pathlib"}
"""Beginnings of module names in files of other versions, and what they are called in the table."""


# ------------------------------------------------------------------ the unpickler


class _Refused(Exception):
    """What was refused, and why; becomes an :class:`UnsafeFileError` where the field's name is known."""

    def __init__(self, what: str, why: str):
        super().__init__(what, why)
        self.what, self.why = what, why


def _text(name: Any) -> str:
    return name[:80] if isinstance(name, str) and name.isprintable() else _short(name)


def _short(value: Any) -> str:
    """``repr`` for messages: of plain values only, for others may be made to explode."""
    if isinstance(value, str | bytes):
        return repr(value[:80])
    if isinstance(value, tuple) and all(isinstance(part, int) and abs(part) < 10**20 for part in value):
        return repr(value[:8])
    return type(value).__name__


def _find(module: Any, name: Any) -> Any:
    """Look a name up in the table; only then may its module be imported."""
    for old, new in _RENAMED.items():
        if isinstance(module, str) and module.startswith(old):
            module = new + module[len(old) :]
    use = _TABLE.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
    if use is None:
        raise _Refused(f"{_text(module)}.{_text(name)}", "it is not among the objects that are safe to build")
    if callable(use):
        return _Call(use)
    return getattr(importlib.import_module(module), name)


def _call(called: Any, arguments: Any) -> Any:
    """A call: of the functions here that stand in the table, nothing else."""
    if not isinstance(called, _Call) or not isinstance(arguments, tuple):
        raise _Refused(f"a call of {_name(called)}", "it may be named, not called")
    return called.function(*arguments)


_PickleMachine: Any = pickle._Unpickler  # the one written in Python: of the other one no single step can be replaced


class _SafeUnpickler(_PickleMachine):
    """Builds what :data:`ALLOWED` holds. Every step of a pickle that could call something is replaced here, or refused."""

    def find_class(self, module: Any, name: Any) -> Any:
        """See :func:`_find`."""
        return _find(module, name)

    def reduce(self) -> None:
        """See :func:`_call`."""
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def new(self) -> None:
        """An empty object of a class."""
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if not _is_built(kind) or arguments != ():
            raise _Refused(f"an object of {_name(kind)}", "it may be named, not built")
        self.append(kind.__new__(kind))

    def build(self) -> None:
        """An object's attributes, or content."""
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    def bytearray8(self) -> None:
        """The base class allocates the bytes before it knows whether so many follow."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    def refuse(self) -> None:
        """Any other way to call something."""
        raise _Refused("an instruction that SB3's files do not contain", "it could call something")


_SafeUnpickler.dispatch = {
    **_PickleMachine.dispatch,
    pickle.REDUCE[0]: _SafeUnpickler.reduce,
    pickle.NEWOBJ[0]: _SafeUnpickler.new,
    pickle.BUILD[0]: _SafeUnpickler.build,
    pickle.BYTEARRAY8[0]: _SafeUnpickler.bytearray8,
    **{
        code[0]: _SafeUnpickler.refuse for code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID)
    },
    **{code[0]: _SafeUnpickler.refuse for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4)},
}


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else type(value).__name__


def _is_built(kind: Any) -> bool:
    return isinstance(kind, type) and _TABLE.get((kind.__module__, kind.__qualname__)) is BUILT


def _set_state(target: Any, state: Any) -> None:
    """What a pickle's BUILD does, for the kinds of objects that the table makes."""
    if isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        _check_buffer(data, dtype, shape)
        target.__setstate__((1, shape, dtype, bool(fortran), bytes(data)))  # type: ignore[arg-type]  # of a pickle: plain
    elif isinstance(target, np.dtype) and isinstance(state, tuple) and len(state) >= 8:
        if state[0] not in (3, 4) or state[1] not in ("<", ">", "|", "=") or state[2:8] != (None, None, None, -1, -1, 0):
            raise _Refused("numpy.dtype", "only arrays of numbers are read")
        target.__setstate__(state[:8])  # type: ignore[attr-defined]  # as pickle calls it
    elif isinstance(target, np.random.SeedSequence) and isinstance(state, tuple) and len(state) == 5:
        entropy, spawned, _, pool_size, spawn_key = state  # the pool follows from the others
        if pool_size != 4:
            raise _Refused("numpy.random.SeedSequence", "its pool is not of NumPy's size")
        target.__init__(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=spawned)  # type: ignore[misc]
    elif isinstance(target, np.random.BitGenerator | np.random.Generator | np.random.RandomState):
        _set_random_state(target, state)
    elif _is_built(type(target)) and isinstance(state, dict):
        _set_attributes(target, state)
    elif not (isinstance(target, th.Tensor | OrderedDict) and not state):
        raise _Refused(f"the state of {type(target).__name__}", "it is not what is written for such objects")


def _set_random_state(target: Any, state: Any) -> None:
    """NumPy checks it all but the position in MT19937's key, which it would read beyond."""
    numbers, *sequence = state if isinstance(state, tuple) else (state,)
    inner = numbers.get("state", {}) if isinstance(numbers, dict) else {}
    if not isinstance(inner, dict) or inner.get("pos", 0) not in range(625) or inner.get("buffer_pos", 0) not in range(5):
        raise _Refused("a random generator", "its state is not one of NumPy's")
    if isinstance(target, np.random.Generator):
        target = target.bit_generator
    if sequence and isinstance(target, np.random.BitGenerator) and isinstance(sequence[0], np.random.SeedSequence):
        target.__setstate__((numbers, sequence[0]))  # type: ignore[attr-defined]  # as pickle calls it
    elif isinstance(target, np.random.RandomState):
        target.set_state(numbers)
    else:
        target.state = numbers


def _set_attributes(target: Any, state: dict[Any, Any]) -> None:
    kind = type(target)
    for name in state:
        if not isinstance(name, str) or name.startswith("__") or callable(getattr(kind, name, None)):
            raise _Refused(f"{_name(kind)}.{_short(name)}", "an object's methods are not for a file to set")
    if hasattr(kind, "__setstate__"):
        target.__setstate__(state)
    else:
        vars(target).update(state)


def _count(value: Any, counted: dict[int, int | None], depth: int = 0) -> int:
    """Values in ``value``, itself included; what is shared counts as often as it is met, as for whoever walks through it."""
    if isinstance(value, _Call):
        raise _Refused("a function", "it may be called, not kept")
    if id(value) in counted:
        known = counted[id(value)]
        if known is None:
            raise _Refused("an object that contains itself", "SB3's files have none")
        return known
    if depth > MAX_DEPTH:
        raise _Refused("a nested object", f"it is nested deeper than {MAX_DEPTH}")
    children: Iterable[Any] = ()
    if isinstance(value, dict):
        children = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        children = value
    elif _is_built(type(value)):
        children = vars(value).values()
    else:
        return 1
    counted[id(value)] = None
    total = 1 + sum(_count(child, counted, depth + 1) for child in children)
    if total > MAX_VALUES:
        raise _Refused("a nested object", f"it holds more than {MAX_VALUES} values")
    counted[id(value)] = total
    return total


def safe_loads(data: bytes, field: str, remedy: str = "load with allow_pickle=True") -> Any:
    """
    Unpickle ``data`` without running anything that it holds.

    :param data: a pickle, of any protocol, or one of cloudpickle
    :param field: what the pickle is, for messages
    :param remedy: what a user does who trusts the file, for messages
    :return: the object
    :raises UnsafeFileError: if it holds anything that :data:`ALLOWED` does not; nothing has been run or imported for it
    :raises ValueError: if it is damaged
    """
    with _errors_named(field, remedy):
        value = _SafeUnpickler(io.BytesIO(data)).load()
        _count(value, {})
    return value


def safe_name(name: str, field: str) -> Any:
    """
    What stands under a name in :data:`ALLOWED`, for readers of other formats.

    :param name: ``"module.name"``
    :param field: where it was found, for messages
    :raises UnsafeFileError: if nothing does, or if it may only be called
    """
    with _errors_named(field):
        module, _, attribute = name.rpartition(".")
        found = _find(module, attribute)
        _count(found, {})
        return found


def safe_call(name: str, arguments: Iterable[Any], state: Any, field: str) -> Any:
    """
    The object that a call makes, of what :data:`ALLOWED` lets a file call, for readers of other formats.

    :param name: ``"module.name"``
    :param arguments: of the call
    :param state: what the object is given then, ``None`` for nothing
    :param field: where it was found, for messages
    :raises UnsafeFileError: if it does not stand in the table
    """
    with _errors_named(field):
        module, _, attribute = name.rpartition(".")
        value = _call(_find(module, attribute), tuple(arguments))
        if state is not None:
            _set_state(value, state)
        _count(value, {})
        return value


@contextmanager
def _errors_named(field: str, remedy: str = "load with allow_pickle=True") -> Iterator[None]:
    try:
        yield
    except _Refused as error:
        raise UnsafeFileError(
            f"{field} holds {error.what}: {error.why}. Nothing of it was run. If you trust the file, {remedy}"
        ) from None
    except ImportError as error:
        raise ValueError(f"{field} needs a package that is not installed: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way; none of them is the caller's
        raise ValueError(f"{field} is damaged: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------ the archive


def read_archive(path: str | pathlib.Path | io.BufferedIOBase, suffix: str = "zip") -> dict[str, bytes]:
    """
    Read all files of a zip archive into memory, once the archive has been found to be what it looks like.

    :param path: a path, with or without ``suffix``, or an open binary file
    :return: the content of each file, by name
    :raises UnsafeFileError: for files outside the archive, links, twins, encryption, and for more bytes than
        ``FREE_BYTES`` or ``MAX_RATIO`` times the archive's size
    :raises ValueError: for an archive that is damaged or incomplete
    :raises FileNotFoundError: if there is no such file
    """
    file = open_path(path, "r", suffix=suffix)
    try:
        return _read_archive(file, str(getattr(file, "name", "the file")))
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()


def _read_archive(file: Any, name: str) -> dict[str, bytes]:
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (
                members and min(member.header_offset for member in members) > 0
            ):  # the weights' own archive may be all that is left
                raise zipfile.BadZipFile("it does not begin at its beginning")
            _check_members(members, size, name)
            return {member.filename: archive.read(member) for member in members if not member.is_dir()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{name} is not a zip archive, or a damaged or incomplete one: {error}") from error


def _check_members(members: list[zipfile.ZipInfo], size: int, name: str) -> None:
    names = [member.filename for member in members]
    problem = next(filter(None, map(_member_problem, members)), None)
    if len(names) > MAX_MEMBERS:
        problem = f"{len(names)} files, more than {MAX_MEMBERS}"
    elif len(set(names)) < len(names):
        problem = "two files of the same name"
    elif sum(member.compress_size for member in members) > size:
        problem = "files that overlap"
    elif sum(member.file_size for member in members) > max(FREE_BYTES, MAX_RATIO * size):
        inflated = sum(member.file_size for member in members)
        problem = f"{inflated} bytes in {size} (a zip bomb: more than {MAX_RATIO} times, and more than {FREE_BYTES})"
    if problem is not None:
        raise UnsafeFileError(f"{name} holds {problem}. No model has that; nothing of it was read")


def _member_problem(member: zipfile.ZipInfo) -> str | None:
    name = member.filename
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or "\0" in member.orig_filename:
        return f"the file name {member.orig_filename[:80]!r}, which leads out of the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return f"{name[:80]!r}, a symbolic link"
    if member.flag_bits & 0x1:
        return f"{name[:80]!r}, which is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"{name[:80]!r}, compressed in a way that SB3 does not use"
    return None


def load_torch(data: bytes, field: str, device: th.device | str = "cpu") -> Any:
    """
    Read what ``torch.save`` wrote, with torch's restricted loader.

    :param data: the file's content
    :param field: what it is, for messages
    :param device: where tensors go
    :raises UnsafeFileError: if it holds more than tensors and plain data
    :raises ValueError: if it is damaged
    """
    if not isinstance(data, bytes | bytearray):
        raise ValueError(f"{field} is damaged: no bytes")
    check_torch(data, field)
    try:
        return th.load(io.BytesIO(data), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = name[1] if name else "more than tensors"
        raise UnsafeFileError(
            f"{field} holds {what}: only tensors and plain data are read, no save writes anything else. Nothing of it was run"
        ) from error
    except Exception as error:  # as for pickles
        raise ValueError(f"{field} is damaged: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def check_torch(data: bytes, field: str) -> None:
    """
    The archive that ``torch.save`` writes is not compressed, so neither can it be a bomb.

    :raises UnsafeFileError: if it is
    """
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{field} is damaged or incomplete: {error}") from error
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > len(data):
        raise UnsafeFileError(f"{field} is compressed inside, as torch never writes it; nothing of it was read")


# ------------------------------------------------------------------ model files

_RECOMPUTED = frozenset({"lr_schedule"})
"""Fields that every load computes anew, from ``learning_rate``; old files hold a function here."""
_NEVER_SAVED = frozenset(
    {"policy", "device", "env", "replay_buffer", "rollout_buffer", "_vec_normalize_env", "_logger", "_engine"}
)
"""Fields that no save writes, and that would be used; making an ``env`` by its name can import a module that it names."""
_NEEDED = ("policy_class", "policy_kwargs", "observation_space", "action_space", "verbose")


def read_fields(data: bytes, custom_objects: dict[str, Any] | None = None, owner: type = object) -> dict[str, Any]:
    """
    A model's attributes from the file ``data`` of its archive, without running anything.

    :param data: JSON, with pickles in base64 under ``":serialized:"``
    :param custom_objects: values to use instead of the file's, which are not even looked at
    :param owner: the class of the model; fields named as its methods are refused
    :return: the attributes by name
    :raises UnsafeFileError: naming the field and the object, for anything that :data:`ALLOWED` does not hold
    :raises ValueError: for a damaged file
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file 'data' is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the file 'data' is damaged: it holds a {type(fields).__name__}, not the fields of a model")
    custom = custom_objects or {}
    return {name: custom[name] if name in custom else _read_field(name, value, owner) for name, value in fields.items()}


def _read_field(name: str, value: Any, owner: type) -> Any:
    if name in _RECOMPUTED:
        return None
    if (name in _NEVER_SAVED and value is not None) or name.startswith("__") or callable(getattr(owner, name, None)):
        raise UnsafeFileError(
            f"field {name!r} is not one that a save writes, and using it could run something. Nothing was run"
        )
    if not isinstance(value, dict) or ":serialized:" not in value:
        return value
    try:
        pickled = base64.b64decode(value[":serialized:"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"field {name!r} is damaged: {error}") from error
    return safe_loads(
        pickled,
        f"field {name!r}",
        f"load with allow_pickle=True; or give the value yourself: custom_objects={{{name!r}: ...}}",
    )


def safe_archive(
    path: str | pathlib.Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None, owner: type
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    A model file in two parts that SB3's ``load`` puts together again without unpickling anything.

    :param path: as ``load`` takes it
    :param custom_objects: as ``load`` takes them
    :param owner: the class that loads
    :return: an archive without pickled fields; all fields' values, to be passed as ``custom_objects``
    :raises UnsafeFileError: see :func:`read_archive` and :func:`read_fields`
    :raises ValueError: if the file is damaged, or not a model's
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects must be a dict or None, not {custom_objects!r}")
    files = _read_model(path)
    fields = read_fields(files["data"], custom_objects, owner)
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise ValueError(f"{path} is not a model of PPO: its data lack {', '.join(missing)}")
    _check_kinds(fields)
    return _stored(files | {"data": json.dumps(dict.fromkeys(fields)).encode()}), fields


def weights_archive(path: str | pathlib.Path | io.BufferedIOBase) -> io.BytesIO:
    """
    A model file without anything but its weights, checked as :func:`safe_archive` does.

    :param path: as ``set_parameters`` takes it
    :raises UnsafeFileError: see :func:`read_archive`
    :raises ValueError: if the file is damaged, or not a model's
    """
    return _stored(_read_model(path))


def _read_model(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, bytes]:
    files = read_archive(path)
    missing = [name for name in ("data", "policy.pth", "policy.optimizer.pth") if name not in files]
    if missing:
        raise ValueError(f"{path} is not a model of PPO: the archive has no {', '.join(missing)}")
    return files


def _stored(files: dict[str, bytes]) -> io.BytesIO:
    """The archive again, uncompressed, once its weights are known to be nothing but weights."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            if name.endswith(".pth"):
                load_torch(content, name)
            archive.writestr(name, content)
    stream.seek(0)
    return stream


def _check_kinds(fields: dict[str, Any]) -> None:
    """What SB3's ``load`` relies on before the arguments are checked as the constructor's are."""
    kinds = {"policy_class": type, "policy_kwargs": dict, "observation_space": spaces.Space, "action_space": spaces.Space}
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise ValueError(f"field {name!r} must be a {kind.__name__}, not {_short(fields[name])}")


def check_weights(policy: ActorCriticPolicy, params: dict[str, Any]) -> None:
    """
    Whether a file's tensors have the shapes of the parameters that they are for. Numbers that are not finite are a warning.

    :param policy: the policy as built, with its optimizer
    :param params: state dicts by name, as ``get_parameters`` returns them
    :raises ValueError: naming the first parameter that does not fit
    """
    ours = policy.state_dict()
    for name, tensor in params.get("policy", {}).items():
        _check_tensor(f"weights of {name}", tensor, ours.get(name))
    optimizer = params.get("policy.optimizer", {})
    parameters = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in optimizer.get("param_groups", []) for key in group["params"]]
    for key, parameter in zip(keys, parameters, strict=False):  # torch itself says if their number differs
        for name, tensor in optimizer.get("state", {}).get(key, {}).items():
            if isinstance(tensor, th.Tensor) and tensor.dim() > 0:
                _check_tensor(f"the optimizer's {name} of parameter {key}", tensor, parameter)


def _check_tensor(name: str, tensor: Any, ours: th.Tensor | None) -> None:
    if not isinstance(tensor, th.Tensor):
        raise ValueError(f"the {name} must be a tensor, not {_short(tensor)}")
    if ours is not None and tensor.shape != ours.shape:
        raise ValueError(f"the {name} must have shape {tuple(ours.shape)}, not {tuple(tensor.shape)}")
    if not th.isfinite(tensor).all():
        warnings.warn(f"the {name} are not finite: the model will act at random, or not at all", stacklevel=5)


# ------------------------------------------------------------- VecNormalize's files


def load_vec_normalize(path: str | pathlib.Path, venv: VecEnv, allow_pickle: bool = False) -> VecNormalize:
    """
    ``VecNormalize.load`` without running anything that the file holds.

    :param path: a file that ``VecNormalize.save`` wrote
    :param venv: the environments to normalise
    :param allow_pickle: for a trusted file: let SB3 unpickle it as it is
    :return: ``venv``, normalised with the file's statistics
    :raises UnsafeFileError: if the file holds anything that :data:`ALLOWED` does not
    :raises ValueError: if it is damaged, or the statistics do not fit ``venv``
    """
    if allow_pickle:
        return VecNormalize.load(str(path), venv)
    loaded = safe_loads(pathlib.Path(path).read_bytes(), str(path))
    if not isinstance(loaded, VecNormalize):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the statistics of VecNormalize")
    with errors_for_assertions(f"the statistics in {path} do not fit the environments"):
        loaded.set_venv(venv)
    return loaded
