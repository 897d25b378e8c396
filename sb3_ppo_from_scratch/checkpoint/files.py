"""Files that are whole or not there: a header with a checksum, an atomic rename, and the newest intact one of a folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any

from sb3_ppo_from_scratch.checkpoint.plain_data import unpack
from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.archive import read_bytes
from sb3_ppo_from_scratch.safe_files.unpickler import safe_loads

__all__ = [
    "FORMAT_VERSION",
    "LOGS",
    "CorruptCheckpointError",
    "checkpoint_files",
    "intact_checkpoints",
    "read_checkpoint",
    "remove_after",
    "write_checkpoint",
]

FORMAT_VERSION = 3
"""Goes up with every change that makes newer files unreadable for older versions of the package. All earlier ones are read."""

LOGS = "logs"
"""Folder beside the checkpoints for copies of the files that they do not hold."""

_MAGIC = b"scratch-ppo-run\n"
_HEADER = struct.Struct("<16sIQ32s")  # magic, format version, length of the content, its SHA-256
_SUFFIX = ".ckpt"
_NAME = re.compile(rf"[0-9]{{1,18}}-[0-9]{{1,18}}-steps\{_SUFFIX}")


class CorruptCheckpointError(ValueError):
    """The file is not a checkpoint, or is not whole."""


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a folder in the order in which they were written; copies under other names are none."""
    files = (path for path in folder.glob(f"*{_SUFFIX}") if _NAME.fullmatch(path.name) and path.is_file())
    return sorted(files, key=lambda path: int(path.name.partition("-")[0]))


def _steps_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def remove_after(folder: Path, num_timesteps: int) -> None:
    """Remove checkpoints of later steps: of a future that will not be."""
    for file in checkpoint_files(folder):
        if _steps_of(file) > num_timesteps:
            file.unlink(missing_ok=True)


def intact_checkpoints(folder: Path) -> dict[int, tuple[Path, dict[str, Any]]]:
    """
    All checkpoints of a folder that can be read, by their timesteps.

    :return: the files and what they hold
    :raises UnsafeFileError: see :func:`read_checkpoint`
    """
    found = {}
    for file in checkpoint_files(folder):
        try:
            found[_steps_of(file)] = (file, _read_file(file))
        except UnsafeFileError:
            raise
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=3)
    return found


def write_checkpoint(folder: Path, content: bytes, num_timesteps: int, keep: int) -> Path:
    """
    Add a checkpoint to a folder and remove all but the last ``keep``; a crash at any moment leaves the others whole.

    :param folder: made if it is not there
    :param content: plain data, of ``pack``
    :param num_timesteps: for the file's name
    :param keep: at least 1
    :return: the file
    :raises OSError: if the disk is full, or the folder cannot be written to
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = checkpoint_files(folder)
    number = int(files[-1].name.partition("-")[0]) + 1 if files else 1
    path = folder / f"{number:08d}-{num_timesteps}-steps{_SUFFIX}"
    for copy in (folder / LOGS).rglob("*"):
        _sync(copy)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, FORMAT_VERSION, len(content), hashlib.sha256(content).digest()))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _sync(folder)
    for old in [*files, path][:-keep]:
        old.unlink(missing_ok=True)
    _remove_leftovers(folder)
    return path


def _sync(path: Path) -> None:
    """So that a file, or the new names in a folder, outlive a power cut; Windows has no such call for folders."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob("[0-9]*-*.tmp"):  # of processes that were killed while they wrote
        with contextlib.suppress(OSError):
            leftover.unlink()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint, or the newest intact one of a folder, with a warning for every one that cannot be read.

    :param path: a file or a folder
    :raises FileNotFoundError: if there is none
    :raises CorruptCheckpointError: if none is intact
    :raises ValueError: for a format version that this version of the package does not know
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    files = checkpoint_files(path)
    if not files:
        raise FileNotFoundError(f"path={str(path)!r} holds no checkpoint ({len(list(path.iterdir()))} other files)")
    reasons = []
    for file in reversed(files):
        try:
            return _read_file(file)
        except UnsafeFileError:
            raise
        except (ValueError, OSError) as error:  # of another version, or gone since it was listed: as good as damaged
            reasons.append(str(error))
            if file is not files[0]:
                warnings.warn(f"{error}; trying the one before it", RuntimeWarning, stacklevel=3)
    raise CorruptCheckpointError(f"path={str(path)!r} holds no intact checkpoint: {'; '.join(reasons)[:1000]}")


def _read_file(path: Path) -> dict[str, Any]:
    data, _ = read_bytes(path)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise CorruptCheckpointError(f"{path} is not a checkpoint, or cut off in its header")
    _, version, length, digest = _HEADER.unpack_from(data)
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this version of sb3_ppo_from_scratch reads version {FORMAT_VERSION} and "
            "before"
        )
    content = data[_HEADER.size :]
    if len(content) != length or hashlib.sha256(content).digest() != digest:
        raise CorruptCheckpointError(f"{path} is damaged: its content does not match its checksum")
    state = unpack(content, str(path)) if version > 1 else safe_loads(content, str(path), "there is no way to read it")
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of ours: it holds a {type(state).__name__}")
    return state
