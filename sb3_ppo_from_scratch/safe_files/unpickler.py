"""
Pickles without running them.

A pickle is a program: whoever unpickles it runs it. Here it goes through a reader that builds only what stands in one table
(:data:`ALLOWED`), and looks names up there *before* importing anything. A pickle can name what is in the table, make an empty
object of some of it, and give such an object attributes. It can call nothing: numbers, arrays, tensors and random generators
are rebuilt by functions of this module, which check their arguments.
"""

from __future__ import annotations

import importlib
import io
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.old_schedules import (
    OldFunction,
    make_cell,
    make_code,
    make_empty_cell,
    make_function,
    set_function_state,
    to_schedule,
)

__all__ = ["ALLOWED", "BUILT", "NAMED", "Allowed", "load_torch", "safe_call", "safe_loads", "safe_name"]

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


def _builtin_type(name: Any) -> _Call:
    """What cloudpickle calls to make a function; here it makes none."""
    if name not in ("CodeType", "FunctionType"):
        raise _Refused(f"types.{_text(name)}", "it is not among the objects that are safe to build")
    return _Call(make_code if name == "CodeType" else make_function)


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
    Allowed("sb3_ppo_from_scratch.engines.cudagraph.device_buffer", ("DeviceRolloutBuffer",), NAMED, "rollout_buffer_class"),
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
    # schedules of SB3 before 2.7: functions, of which only the name and the numbers are used
    Allowed("cloudpickle.cloudpickle", ("_builtin_type",), _builtin_type, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_make_function",), make_function, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_make_empty_cell",), make_empty_cell, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_make_cell",), make_cell, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_function_setstate",), set_function_state, "old schedules"),
    Allowed("builtins", ("float", "int", "bool"), NAMED, "their annotations"),
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
_RENAMED = {
    "gym.spaces.": "gymnasium.spaces.",
    "numpy.core.": "numpy._core.",
    "pathlib._local": "pathlib",
    "cloudpickle.cloudpickle_fast": "cloudpickle.cloudpickle",
    "sb3_ppo_from_scratch.device_buffer": "sb3_ppo_from_scratch.engines.cudagraph.device_buffer",
}
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
        vars(target).update({name: _schedule(value) for name, value in state.items()})


def _schedule(value: Any) -> Any:
    """A function of an old file as the schedule that it was; anything else as it is."""
    try:
        return to_schedule(value)
    except LookupError as error:
        raise _Refused(str(error), "it is not one of SB3's schedules") from None


def _count(value: Any, counted: dict[int, int | None], depth: int = 0) -> int:
    """Values in ``value``, itself included; what is shared counts as often as it is met, as for whoever walks through it."""
    if isinstance(value, _Call):
        raise _Refused("a function", "it may be called, not kept")
    if isinstance(value, OldFunction):
        _schedule(value)
        raise _Refused("a function", "only a field that is a schedule may hold one")
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
        value = _schedule(_SafeUnpickler(io.BytesIO(data)).load())
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


# -------------------------------------------------------------------- torch files


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
    _check_torch(data, field)
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


def _check_torch(data: bytes, field: str) -> None:
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
