"""What ``torch.save`` wrote, read without torch's reader: its archive is checked, its pickle goes through ours."""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_ppo_from_scratch.safe_files.archive import read_members
from sb3_ppo_from_scratch.safe_files.refusal import Refused, name_of
from sb3_ppo_from_scratch.safe_files.tensors import Storage, make_storage, read_legacy, storage_size
from sb3_ppo_from_scratch.safe_files.unpickler import SafeUnpickler, errors_named

__all__ = ["load_torch"]

_MAX_MEMBERS = 20_000
"""Files in an archive of torch's: one for each tensor."""
_MAX_DEPTH = 16


def load_torch(data: bytes, field: str) -> Any:
    """
    Read tensors and plain data, onto the CPU.

    :param data: the file's content
    :param field: what it is, for messages
    :raises UnsafeFileError: if it holds more than tensors and plain data, or is compressed inside
    :raises ValueError: if it is damaged
    """
    if not isinstance(data, bytes | bytearray) or not data:
        raise ValueError(f"{field} is damaged: no bytes")
    with errors_named(field, "save it anew with torch.save"):
        value = _read_archive(bytes(data), field) if data.startswith(b"PK") else _read_legacy(bytes(data))
        _check_plain(value, [max(10**6, len(data))])
    return value


def _read_archive(data: bytes, field: str) -> Any:
    files = read_members(data, field, max_members=_MAX_MEMBERS, stored=True)
    (folder,) = {name.partition("/")[0] for name in files}  # torch puts all into one
    if files.get(f"{folder}/byteorder", b"little") != b"little":
        raise Refused("numbers of another byte order", "no save writes them here")
    storages: dict[str, Storage] = {}

    def storage(key: Any) -> Storage:
        name, dtype, numbers = storage_size(key, len(data))
        if name not in storages:
            content = files[f"{folder}/data/{name}"]
            if len(content) != numbers * dtype.itemsize:
                raise Refused("a tensor's memory", "it is not as long as was said before")
            storages[name] = make_storage(content, dtype)
        return storages[name]

    return SafeUnpickler(files[f"{folder}/data.pkl"], references=storage).load()


def _read_legacy(data: bytes) -> Any:
    def load(data: bytes, offset: int, references: Any = None) -> tuple[Any, int]:
        inner = SafeUnpickler(data, offset, references)
        return inner.load(), inner.end()

    return read_legacy(data, load)


def _check_plain(value: Any, left: list[int], depth: int = 0) -> None:
    """What torch's own restricted reader would give back, and no more of it than the file is long."""
    left[0] -= 1
    if depth > _MAX_DEPTH or left[0] < 0:
        raise Refused("a nested object", "no save nests weights like that")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, left, depth + 1)
            _check_plain(item, left, depth + 1)
    elif type(value) in (list, tuple, set, frozenset, th.Size):
        for item in value:
            _check_plain(item, left, depth + 1)
    elif not (value is None or isinstance(value, bool | int | float | str | bytes | th.Tensor | th.dtype | th.device)):
        raise Refused(name_of(value), "only tensors and plain data are read, no save writes anything else")
