"""
Zip archives from strangers: read into memory once, whole, and only if they are what they look like to every reader.

What was checked is what is used: nobody opens the file a second time, and no other reader sees its bytes.
"""

from __future__ import annotations

import io
import pathlib
import stat
import struct
import zipfile
import zlib
from typing import Any

from stable_baselines3.common.save_util import open_path

from sb3_ppo_from_scratch.errors import UnsafeFileError

__all__ = ["read_archive", "read_members"]

# Bounds on what reading may cost; a model of a gigabyte, or a rollout's worth of pickled values, stays far below them.
MAX_STREAM = 2**31
"""Bytes of an open stream that is not a file on a disk; such a one need have no end."""
FREE_BYTES = 64 * 2**20
"""An archive may always inflate to so many bytes ..."""
MAX_RATIO = 20
"""... and beyond that to so many times its own size. Weights compress by less than 2, pickles as text by less than 10."""
MAX_MEMBERS = 64
"""Files in an archive; SB3 writes six."""


def read_archive(path: str | pathlib.Path | io.BufferedIOBase, suffix: str = "zip") -> dict[str, bytes]:
    """
    Read all files of a zip archive into memory, once the archive has been found to be what it looks like.

    :param path: a path, with or without ``suffix``, or an open binary file
    :return: the content of each file, by name
    :raises UnsafeFileError: for files outside the archive, links, twins, encryption, for more bytes than
        ``FREE_BYTES`` or ``MAX_RATIO`` times the archive's size, and where two readers would see different files
    :raises ValueError: for an archive that is damaged or incomplete, and for what is neither a file nor a binary stream
    :raises FileNotFoundError: if there is no such file
    """
    data, name = read_bytes(path, suffix)
    return read_members(data, name)


def read_bytes(path: str | pathlib.Path | io.BufferedIOBase, suffix: str = "") -> tuple[bytes, str]:
    """
    All of a file, or of a stream from its beginning, and its name.

    :raises ValueError: for a device, a pipe or a folder, for a text stream, and for one without an end
    :raises FileNotFoundError: if there is no such file
    """
    if isinstance(path, str | pathlib.Path):
        _check_regular(path)
    try:
        file = open_path(path, "r", suffix=suffix)
    except TypeError as error:
        raise ValueError(f"path must be a path or an open binary file, not a {type(path).__name__}") from error
    name = str(getattr(file, "name", "the file"))
    try:
        if isinstance(path, str | pathlib.Path):
            _check_regular(name)
            return file.read(), name
        return _read_stream(file, name), name
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()


def _check_regular(path: str | pathlib.Path) -> None:
    """A pipe would be waited for, a device read for ever."""
    file = pathlib.Path(path)
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(f"{file} is not a file but a device, a pipe or a socket")


def _read_stream(file: Any, name: str) -> bytes:
    try:
        size = file.seek(0, io.SEEK_END)
        if size > MAX_STREAM:
            raise ValueError(f"{name} has {size} bytes, more than {MAX_STREAM}: pass its path instead")
        file.seek(0)
        return file.read(size)
    except OSError as error:
        raise ValueError(f"{name} must be a file that can be read from its beginning: {error}") from error


def read_members(data: bytes, name: str, max_members: int = MAX_MEMBERS, stored: bool = False) -> dict[str, bytes]:
    """
    The files in an archive.

    :param data: the archive
    :param name: for messages
    :param max_members: how many files it may hold
    :param stored: whether none of them may be compressed
    :raises UnsafeFileError: see :func:`read_archive`
    :raises ValueError: if it is damaged or incomplete
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if members and min(member.header_offset for member in members) > 0:  # another archive may be all that is left
                raise zipfile.BadZipFile("it does not begin at its beginning")
            _check_end(data, members, name)
            _check_members(members, len(data), name, max_members, stored)
            return {member.filename: archive.read(member) for member in members if not member.is_dir()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, struct.error, RuntimeError) as error:
        raise ValueError(f"{name} is not a zip archive, or a damaged or incomplete one: {str(error)[:300]}") from error


_END = struct.Struct(
    "<4s4H2LH"
)  # signature, disk, its first, files on the disk, files, size and offset of the directory, comment
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")


def _check_end(data: bytes, members: list[zipfile.ZipInfo], name: str) -> None:
    """Readers differ in whether they look for the directory where the record at the end says, or right before it."""
    at = data.rfind(b"PK\5\6")
    _, disk, first, here, count, size, offset, comment = _END.unpack_from(data, at)
    sound = (disk, first) == (0, 0) and here == count and at + _END.size + comment == len(data)
    start64 = at - _LOCATOR64.size - _END64.size
    if sound and start64 >= 0 and data.startswith(b"PK\6\7", at - _LOCATOR64.size):
        _, _, where, _ = _LOCATOR64.unpack_from(data, at - _LOCATOR64.size)
        mark, _, _, _, _, _, here64, count64, size64, offset64 = _END64.unpack_from(data, start64)
        sound = mark == b"PK\6\6" and where == start64 and here64 == count64
        for short, long, unknown in ((count, count64, 2**16 - 1), (size, size64, 2**32 - 1), (offset, offset64, 2**32 - 1)):
            sound = sound and short in (long, unknown)
        count, size, offset, at = count64, size64, offset64, start64
    if not sound or count != len(members) or offset + size != at:
        raise UnsafeFileError(f"{name} has a directory and an end that disagree: two readers would see different files in it")


def _check_members(members: list[zipfile.ZipInfo], size: int, name: str, max_members: int, stored: bool) -> None:
    names = [member.filename for member in members]
    problem = next(filter(None, map(_member_problem, members)), None)
    inflated = sum(member.file_size for member in members)
    if len(names) > max_members:
        problem = f"{len(names)} files, more than {max_members}"
    elif len(set(names)) < len(names):
        problem = "two files of the same name"
    elif sum(member.compress_size for member in members) > size:
        problem = "files that overlap"
    elif stored and (inflated > size or any(member.compress_type != zipfile.ZIP_STORED for member in members)):
        raise UnsafeFileError(f"{name} is compressed inside, as torch never writes it; nothing of it was read")
    elif inflated > max(FREE_BYTES, MAX_RATIO * size):
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
