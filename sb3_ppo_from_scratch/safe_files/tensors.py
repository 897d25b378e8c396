"""torch's tensors, built over memory that is as long as they need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch as th

from sb3_ppo_from_scratch.safe_files.refusal import Refused, shown
from sb3_ppo_from_scratch.safe_files.values import is_shape

__all__ = ["STORAGES", "Storage", "make_parameter", "make_tensor", "read_legacy", "storage_size"]

STORAGES = {
    "BFloat16Storage": th.bfloat16,
    "BoolStorage": th.bool,
    "ByteStorage": th.uint8,
    "CharStorage": th.int8,
    "ComplexDoubleStorage": th.complex128,
    "ComplexFloatStorage": th.complex64,
    "DoubleStorage": th.float64,
    "FloatStorage": th.float32,
    "HalfStorage": th.float16,
    "IntStorage": th.int32,
    "LongStorage": th.int64,
    "ShortStorage": th.int16,
}
"""What torch calls memory in its files, by the type of its numbers."""


class Storage(NamedTuple):
    """A tensor's memory: ``content`` are its numbers, flat."""

    content: th.Tensor


def storage_size(key: Any, limit: int) -> tuple[str, th.dtype, int]:
    """
    What torch's files say of a tensor's memory.

    :param key: ``("storage", type, name, device, numbers)``, as torch writes it; more is ignored
    :param limit: bytes that it can have at most
    :return: its name, its numbers' type, and how many they are
    :raises Refused: if it is something else
    """
    if type(key) is not tuple or len(key) < 5 or key[0] != "storage" or not isinstance(key[1], type):
        raise Refused("a reference", "it is not to a tensor's memory")
    _, kind, name, _, numbers, *more = key
    dtype = STORAGES.get(kind.__name__)
    if dtype is None or type(name) is not str or type(numbers) is not int or not 0 <= numbers * dtype.itemsize <= limit:
        raise Refused("a tensor's memory", "the file is too short for it")
    if more and more[0] is not None:
        raise Refused("a tensor's memory", "it lies in another's, as torch no longer writes it")
    return name, dtype, numbers


def make_storage(data: bytes | bytearray, dtype: th.dtype) -> Storage:
    """Of bytes, which are copied."""
    return Storage(th.frombuffer(bytearray(data), dtype=dtype) if data else th.empty(0, dtype=dtype))


def make_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> th.Tensor:
    """``torch._utils._rebuild_tensor_v2``: nothing of a tensor lies beyond its storage."""
    size, stride = (tuple(part) if isinstance(part, th.Size) else part for part in (size, stride))
    whole = (
        type(storage) is Storage and is_shape((offset,)) and is_shape(size) and is_shape(stride) and len(size) == len(stride)
    )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if whole and prod(size) else -1
    length = len(storage.content) if type(storage) is Storage else 0
    if not whole or last >= length or offset > length or prod(size) > length:  # one number can stand for any number of them
        raise Refused(f"torch.Tensor of size {shown(size)}", "its storage does not hold it")
    memory = storage.content
    tensor = memory.new_empty(0).set_(memory.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(bool(requires_grad) and tensor.is_floating_point())


def make_parameter(data: Any, requires_grad: Any, hooks: Any) -> th.nn.Parameter:
    """``torch._utils._rebuild_parameter``."""
    if type(data) is not th.Tensor:
        raise Refused("torch.nn.Parameter", "it is not made of a tensor")
    return th.nn.Parameter(data, bool(requires_grad) and data.is_floating_point())


def make_size(sizes: Any = ()) -> th.Size:
    """``torch.Size``, nothing but a tuple."""
    if not is_shape(sizes):
        raise Refused("torch.Size", "it is not made of sizes")
    return th.Size(sizes)


def make_device(kind: Any, index: Any = None) -> th.device:
    """``torch.device``, nothing but a name."""
    if type(kind) is not str or not (index is None or is_shape((index,))):
        raise Refused("torch.device", "it is not made of a name and a number")
    return th.device(kind) if index is None else th.device(kind, index)


_MAGIC = (0x1950A86A20F9469CFC6C, 1001)


def read_legacy(data: bytes, load: Callable[..., tuple[Any, int]]) -> Any:
    """
    What torch wrote before its files were archives, and still writes for a tensor inside a pickle: pickles one behind the
    other, then the memory of each storage.

    :param data: the content
    :param load: reads the pickle at an offset, and returns it with the offset of what follows
    :raises Refused: if it is something else
    """
    storages: dict[str, Storage] = {}

    def promised(key: Any) -> Storage:
        name, dtype, numbers = storage_size(key, len(data))
        if name not in storages:
            if sum(storage.content.nbytes for storage in storages.values()) > len(data):
                raise Refused("a tensor's memory", "the file is too short for it")
            storages[name] = Storage(th.zeros(numbers, dtype=dtype))
        return storages[name]

    offset, head = 0, []
    for _ in range(3):
        value, offset = load(data, offset)
        head.append(value)
    if tuple(head[:2]) != _MAGIC or head[2].get("little_endian") is not True:
        raise Refused("a tensor", "it is not written as torch writes one")
    value, offset = load(data, offset, promised)
    names, offset = load(data, offset)
    for name in names:
        memory = storages[name].content
        if int.from_bytes(data[offset : offset + 8], "little") != len(memory):
            raise Refused("a tensor's memory", "it is not as long as was said before")
        content = data[offset + 8 : offset + 8 + memory.nbytes]
        offset += 8 + memory.nbytes
        memory.copy_(make_storage(content, memory.dtype).content)
    return value


def set_metadata(target: OrderedDict[Any, Any], state: Any) -> None:
    """A state dict's own attribute: the version of each module that wrote into it."""
    metadata = state.get("_metadata") if type(state) is dict else None
    if (
        not isinstance(metadata, dict)
        or state.keys() != {"_metadata"}
        or not all(
            type(name) is str and type(of) is dict and all(type(version) is int for version in of.values())
            for name, of in metadata.items()
        )
    ):
        raise Refused("the state of OrderedDict", "it is not what is written for such objects")
    vars(target)["_metadata"] = metadata
