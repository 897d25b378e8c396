"""
Files that grow while a run goes on: monitors' and loggers'. A checkpoint holds their sizes; their content is kept beside it.

To open such a file anew empties it (SB3's ``Monitor``, ``VecMonitor`` and loggers do), so cutting it is not enough: a *copy*
in the checkpoints' folder grows by what is new. A *mark* tells how far a file was, and its last bytes there, which hold times,
tell whose it is.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Mark", "content_at", "holds", "is_mark", "keep", "keep_all", "put_all_back", "rewrite_file"]

Mark = dict[str, Any]
"""``size`` in bytes, and ``digest`` of the last kilobyte before it."""
_TAIL = 2**10
_BLOCK = 2**16


def rewrite_file(file: Any, content: bytes) -> None:
    """Replace all that an open text file holds, and go on at its end."""
    file.flush()
    file.seek(0)
    file.truncate()
    file.buffer.write(content)
    file.flush()
    file.seek(0, os.SEEK_END)


def is_mark(value: Any) -> bool:
    """Whether it is of the make of what :func:`keep` returns."""
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and type(value.get("size")) is int
        and 0 <= value["size"] < 2**62
        and isinstance(value.get("digest"), bytes)
    )


def _tail(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(size - _TAIL, 0))
        return file.read(min(size, _TAIL))


def holds(path: Path, mark: Mark) -> bool:
    """Whether a file is as long as a mark says, or longer, and up to there the one that was marked."""
    size = mark["size"]
    return path.is_file() and path.stat().st_size >= size > 0 and hashlib.sha256(_tail(path, size)).digest() == mark["digest"]


def content_at(mark: Mark, paths: Iterable[Path]) -> bytes | None:
    """What a file held when it was marked, from the first of some files that still does; ``None`` if none does."""
    if mark["size"] == 0:
        return b""
    for path in paths:
        if holds(path, mark):
            with path.open("rb") as file:
                return file.read(mark["size"])
    return None


# ------------------------------------------------------------------ marking


def keep(file: Any, copy: Path) -> Mark | None:
    """
    Mark how far an open file is, and add to its copy what is new in it.

    :return: ``None`` if it is closed, or cannot be read or copied: a log that is lost does not make the run wrong
    """
    with contextlib.suppress(OSError, ValueError):
        file.flush()
        path = Path(file.name)
        size = path.stat().st_size
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
        _bring_up_to(copy, path, size)
        return {"size": size, "digest": hashlib.sha256(_tail(path, size)).digest()}
    return None


def _bring_up_to(copy: Path, path: Path, size: int) -> None:
    copied = copy.stat().st_size
    if copied > size or _tail(copy, copied) != _tail(path, copied):  # the run has gone back to an earlier checkpoint
        copied = _common(copy, path)
    if copied == size == copy.stat().st_size:
        return
    with copy.open("r+b") as target, path.open("rb") as source:
        target.seek(copied)
        source.seek(copied)
        shutil.copyfileobj(source, target, _BLOCK)
        target.truncate(size)  # last, so that at no moment less of it is in the copy than an earlier checkpoint needs


def _common(path: Path, other: Path) -> int:
    """Whole blocks that two files begin with both."""
    n = 0
    with path.open("rb") as first, other.open("rb") as second:
        while (block := first.read(_BLOCK)) and block == second.read(_BLOCK):
            n += len(block)
    return n


def keep_all(files: dict[str, Any], folder: Path) -> dict[str, Mark | None]:
    """
    Mark open files.

    :param files: by the name of their copies
    :param folder: of their copies
    """
    return {name: keep(file, folder / name) for name, file in files.items()}


# ------------------------------------------------------------------ going back


def put_all_back(files: dict[str, Any], marks: dict[str, Mark | None], folder: Path, own: Path | None) -> list[str]:
    """
    Let open files hold what marked ones did, and go on at their ends.

    A file that does is cut. One that has been opened anew is filled from its copy, or from where ``NativeVecEnv`` has put the
    one before, which is then in its old place again. Others are left as they are.

    :param files: by the name of their copies
    :param marks: of :func:`keep_all`
    :param folder: of their copies
    :param own: the run's folder if it is a copy or has been moved, outside of which nothing is cut: the run it was copied of
        may go on there. ``None`` if it is where it was
    :return: the paths of those that do not hold what they should
    """
    put_back = set()
    for name in files.keys() & marks.keys():
        with contextlib.suppress(OSError, ValueError):  # as in keep
            if _put_back(files[name], marks[name], folder / name, own):
                put_back.add(name)
    return [files[name].name for name in marks if name in files and name not in put_back]


def _put_back(file: Any, mark: Mark | None, copy: Path, own: Path | None) -> bool:
    file.flush()
    path = Path(file.name).resolve()
    if mark is None or mark["size"] == 0:
        return mark is not None and path.stat().st_size == 0
    ours = own is None or path.is_relative_to(own)
    aside = _set_aside(path)
    if ours and holds(path, mark):
        os.truncate(path, mark["size"])
        file.seek(0, os.SEEK_END)
    else:
        content = content_at(mark, (copy, *aside)) if file.mode.startswith("w") else None
        if content is None:
            return False
        rewrite_file(file, content)
    for other in aside if ours else []:
        if holds(other, mark):
            other.unlink()
    return True


def _set_aside(path: Path) -> list[Path]:
    """Files that ``NativeVecEnv`` has renamed to make place for this one."""
    return [other for other in path.parent.glob(f"{glob.escape(path.name)}.*") if other.suffix[1:].isdecimal()]
