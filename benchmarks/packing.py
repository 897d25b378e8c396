"""
A run's folder in pieces that are small enough to be carried from one machine to the next, and back into a folder.

``benchmarks.breakout`` begins with the one and ends with the other::

    python -m benchmarks.breakout --unpack pieces --out runs/breakout --minutes 8 --pack pieces
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

from sb3_ppo_from_scratch.checkpoint.files import checkpoint_files

__all__ = ["PIECE", "pack", "unpack"]

PIECE = 15_000_000
"""Bytes of a piece, at most."""
_LIST = "pieces.json"


def pack(folder: Path, target: Path, limit: int = PIECE) -> list[Path]:
    """
    Write all files of a run, of its checkpoints only the newest, as pieces; those of an earlier call are replaced.

    :param folder: the run's
    :param target: for the pieces and a list of them with their checksums; made if need be
    :param limit: bytes per piece
    :return: the files written
    :raises FileNotFoundError: if there is no such folder
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to pack")
    old = {path for each in (folder, *folder.rglob("*/")) for path in checkpoint_files(each)[:-1]}
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:  # plain, for weights do not compress
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path not in old:
                archive.add(path, str(path.relative_to(folder)))
    content = data.getvalue()
    for leftover in _pieces(target):
        leftover.unlink()
    target.mkdir(parents=True, exist_ok=True)
    pieces = {}
    for index, start in enumerate(range(0, len(content), limit)):
        piece = content[start : start + limit]
        path = target / f"piece-{index:03d}"
        path.write_bytes(piece)
        pieces[path.name] = hashlib.sha256(piece).hexdigest()
    (target / _LIST).write_text(json.dumps(pieces, indent=2) + "\n", encoding="utf-8")
    return _pieces(target)


def unpack(source: Path, folder: Path) -> None:
    """
    The folder that :func:`pack` was given.

    :param source: of the pieces
    :param folder: must not be there yet, or be empty
    :raises FileNotFoundError: if a piece is missing
    :raises FileExistsError: if there is something in the folder
    :raises ValueError: if a piece is damaged
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, so that nothing is unpacked there")
    content = b""
    for name, digest in json.loads((source / _LIST).read_text(encoding="utf-8")).items():
        piece = (source / Path(name).name).read_bytes()
        if hashlib.sha256(piece).hexdigest() != digest:
            raise ValueError(f"{source / name} is damaged: its content does not match its checksum")
        content += piece
    aside = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(aside, filter="data")
    if folder.is_dir():
        folder.rmdir()
    aside.replace(folder)


def _pieces(target: Path) -> list[Path]:
    return sorted(path for path in target.glob("piece*") if path.name == _LIST or path.suffix == "")
