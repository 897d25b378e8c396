"""
The state of SB3's logger: what it has written and is about to, so that a resumed run's log has no gap and no double.

A checkpoint says where the logs were, but not where to write: that is the run's own folder, beside the checkpoint, or files
that begin with what the checkpoint's run had written. Whoever copies a run continues the copy; other runs' files stay.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    make_output_format,
)

from sb3_ppo_from_scratch.checkpoint.files import LOGS
from sb3_ppo_from_scratch.checkpoint.log_files import content_at, is_mark, keep, rewrite_file
from sb3_ppo_from_scratch.checkpoint.plain_data import is_plain

__all__ = ["capture_logger", "is_own_folder", "locate_logger", "make_logger", "restore_logger"]

_EVENTS = "events.out.tfevents.*"
_FILES = {"csv": "progress.csv", "json": "progress.json", "log": "log.txt"}
"""What SB3 calls the files of its outputs."""
_HEAD = 2**16
"""Bytes of a TensorBoard file that tell whose it is; it begins with the moment and the machine at which it was begun."""


def capture_logger(logger: Logger, copies: Path) -> dict[str, Any]:
    """
    The logger's outputs and how far their files are, and the values recorded since its last row.

    :param copies: folder for copies of text files, since to open them anew empties them; TensorBoard only adds to its own
    """
    recorded = {key: value for key, value in logger.name_to_value.items() if is_plain(value)}
    return {
        "folder": None if logger.dir is None else str(Path(logger.dir).resolve()),
        "values": recorded,
        "counts": {key: count for key, count in logger.name_to_count.items() if key in recorded},
        "excluded": {key: names for key, names in logger.name_to_excluded.items() if key in recorded},
        "formats": [_capture_format(output, copies) for output in logger.output_formats],
    }


def _capture_format(output: KVWriter, copies: Path) -> dict[str, Any]:
    name = _name(output)
    if name in _FILES:
        saved = {"name": name, "keys": list(getattr(output, "keys", []))}
        return {**saved, "mark": keep(output.file, copies / _copy_name(saved))}  # type: ignore[attr-defined]  # these have one
    if isinstance(output, TensorBoardOutputFormat):
        folder = Path(output.writer.log_dir)
        output.writer.flush()
        return {
            "name": "tensorboard",
            "folder": str(folder.resolve()),
            "sizes": {f.name: f.stat().st_size for f in _event_files(folder)},
            "heads": {f.name: _head(f, f.stat().st_size) for f in _event_files(folder)},
        }
    return {"name": name}


def _copy_name(saved: dict[str, Any]) -> str:
    """A new key rewrites all of a CSV file, of which earlier checkpoints still need the copy."""
    return f"{saved['name']}.{len(saved['keys'])}"


def _event_files(folder: Path) -> list[Path]:
    return list(folder.glob(_EVENTS))


def _head(path: Path, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(min(size, _HEAD))).hexdigest()


# ------------------------------------------------------------------ whose files they are


def locate_logger(state: dict[str, Any], saved: str | None, here: Path, more: Path | None) -> dict[str, Any]:
    """
    The logger's state with its folders as they are now, without outputs that are not this run's to write.

    A run's folder is the one that its checkpoints' folder lies in. It may have been moved, or copied; and a file never chooses
    where we write. What lies there already is gone on with only if it begins with what this run had written.

    :param state: of :func:`capture_logger`
    :param saved: the checkpoints' folder when they were written, if that is known
    :param here: where they are now
    :param more: another folder, chosen by the user, that its logs may lie in
    :raises ValueError: if the state is none of ours
    """
    _check_state(state)
    own, given = here.parent.resolve(), None if more is None else more.resolve()

    def now(folder: str) -> Path:
        path = Path(folder)
        above = None if saved is None else Path(saved).parent
        return (own / path.relative_to(above) if above is not None and path.is_relative_to(above) else path).resolve()

    formats = []
    for each in state["formats"]:
        recorded = each.get("folder") or state["folder"]
        place = None if recorded is None else now(recorded)
        if "mark" in each and place is not None:
            each = _with_text(each, here / LOGS, place)
        if each["name"] not in (*_FILES, "tensorboard"):
            formats.append(each)
        elif place is not None and _may_write(each, place, own, given):
            formats.append({**each, "folder": str(place)})
        else:
            warnings.warn(
                f"the log {each['name']!r} is not gone on with, for {recorded} is not in the run's folder {own}, or holds "
                "another run's: resume with logs=, or call set_logger before continuing",
                stacklevel=5,
            )
    folders = [each["folder"] for each in formats if each.get("folder")]
    return {**state, "folder": folders[0] if folders else None, "formats": formats, "own": str(own)}


def _with_text(saved: dict[str, Any], copies: Path, place: Path) -> dict[str, Any]:
    """What a file held at the checkpoint; if that is gone, it begins anew."""
    mark, file = saved["mark"], place / _FILES[saved["name"]]
    text = None if mark is None else content_at(mark, (copies / _copy_name(saved), file))
    if text is not None:
        return {**saved, "text": text}
    warnings.warn(f"rows from before this resume are missing in {file}: no file in {copies} holds them", stacklevel=6)
    return {**saved, "text": b"", "keys": []}


def _may_write(saved: dict[str, Any], place: Path, own: Path, given: Path | None) -> bool:
    if given is not None and place.is_relative_to(given):
        return True
    return place.is_relative_to(own) and (not _exists(saved, place) or _is_continued(saved, place))


def _exists(saved: dict[str, Any], place: Path) -> bool:
    if saved["name"] == "tensorboard":
        return bool(_event_files(place))
    file = place / _FILES[saved["name"]]
    return file.exists() and file.stat().st_size > 0


def _is_continued(saved: dict[str, Any], place: Path) -> bool:
    """Whether a folder holds what the checkpoint's run had written, and perhaps more of it."""
    if saved["name"] == "tensorboard":
        return _are_same_events(saved, place)
    file, text = place / _FILES[saved["name"]], saved["text"]
    if not text or not file.is_file():
        return False
    lines, written = text.splitlines(), file.read_bytes().splitlines()
    # a new key lengthens all lines of a CSV file
    return len(written) >= len(lines) and all(now.startswith(then) for then, now in zip(lines, written, strict=False))


def _are_same_events(saved: dict[str, Any], place: Path) -> bool:
    sizes, heads = saved["sizes"], saved.get("heads")
    if not sizes or not all((place / name).is_file() for name in sizes):
        return False
    if heads is None:  # of the first format; the names hold a time, a machine and a process
        return True
    return all(_head(place / name, size) == heads.get(name) for name, size in sizes.items())


def is_own_folder(state: dict[str, Any], folder: Any) -> bool:
    """
    Whether the run may write into a folder that its file names.

    :param state: of :func:`locate_logger`
    """
    place = Path(folder).resolve()
    return place.is_relative_to(state["own"]) or any(
        saved.get("folder") and Path(saved["folder"]).resolve().is_relative_to(place) for saved in state["formats"]
    )


def _check_state(state: Any) -> None:
    """:raises ValueError: unless it is of the make of :func:`capture_logger`"""
    kinds = {"folder": str | None, "values": dict, "counts": dict, "excluded": dict, "formats": list}
    if not isinstance(state, dict) or not all(isinstance(state.get(name, 0), kind) for name, kind in kinds.items()):
        raise ValueError("the logger's state is damaged")
    for saved in state["formats"]:
        if not isinstance(saved, dict) or saved.get("name", "") not in (*_FILES, "tensorboard", "stdout", None):
            raise ValueError("the logger's state names an output that is not one of SB3's")
        sizes, heads, keys = saved.get("sizes", {}), saved.get("heads", {}), saved.get("keys", [])
        if not (
            isinstance(saved.get("folder", ""), str)
            and isinstance(saved.get("text", b""), bytes)
            and ("text" in saved or "mark" in saved or saved["name"] not in _FILES)
            and is_mark(saved.get("mark"))
            and isinstance(sizes, dict)
            and isinstance(heads, dict)
            and heads.keys() <= sizes.keys()
            and all(_is_event_file(name) and type(size) is int and size >= 0 for name, size in sizes.items())
            and isinstance(keys, list)
            and all(isinstance(key, str) for key in keys)
        ):
            raise ValueError(f"the state of the logger's output {saved['name']!r} is damaged")
    if not all(isinstance(key, str) for part in ("values", "counts", "excluded") for key in state[part]):
        raise ValueError("the logger's values are damaged")
    if not all(type(count) is int for count in state["counts"].values()):
        raise ValueError("the logger's counts are damaged")
    if not all(excluded is None or isinstance(excluded, str | tuple | list) for excluded in state["excluded"].values()):
        raise ValueError("the logger's values are damaged")


def _is_event_file(name: Any) -> bool:
    return type(name) is str and name.startswith(_EVENTS[:-1]) and Path(name).name == name


# ------------------------------------------------------------------ going on


def make_logger(state: dict[str, Any]) -> Logger:
    """
    A logger with the outputs of the one captured; those of other classes than SB3's, and of other runs, are left out.

    :param state: of :func:`locate_logger`
    """
    outputs = []
    for saved in state["formats"]:
        if saved["name"] is None:
            warnings.warn("an output of the logger is not one of SB3's: call set_logger before continuing", stacklevel=2)
            continue
        if saved["name"] == "tensorboard":
            _cut_events(saved)
        outputs.append(make_output_format(saved["name"], saved.get("folder") or "."))
    return Logger(folder=state["folder"], output_formats=outputs)


def restore_logger(logger: Logger, state: dict[str, Any]) -> None:
    """
    Let a logger go on where the captured one was: same content of its files, same values recorded for the next row.

    :param logger: of :func:`make_logger`, or the user's own; its outputs are matched with the captured ones by kind
    :param state: of :func:`locate_logger`
    """
    left = list(state["formats"])
    for output in logger.output_formats:
        name = _name(output)
        saved = next((candidate for candidate in left if candidate["name"] == name), None)
        if saved is None:
            continue
        left.remove(saved)
        if isinstance(output, TensorBoardOutputFormat):
            _restart_tensorboard(output, saved)
        elif "text" in saved:
            rewrite_file(output.file, saved["text"])  # type: ignore[attr-defined]  # all but TensorBoard's have one
        if isinstance(output, CSVOutputFormat):
            output.keys = list(saved["keys"])
    logger.name_to_value.update(state["values"])
    logger.name_to_count.update(state["counts"])
    logger.name_to_excluded.update(state["excluded"])


def _name(output: KVWriter) -> str | None:
    if isinstance(output, HumanOutputFormat):
        return "log" if output.own_file else "stdout"
    kinds = {CSVOutputFormat: "csv", JSONOutputFormat: "json", TensorBoardOutputFormat: "tensorboard"}
    return next((name for kind, name in kinds.items() if isinstance(output, kind)), None)


def _restart_tensorboard(output: TensorBoardOutputFormat, saved: dict[str, Any]) -> None:
    """Cut the run's files with none of them open, then write on in a new one beside them, which TensorBoard reads as one."""
    if Path(output.writer.log_dir).resolve() == Path(saved["folder"]).resolve():
        output.writer.close()
        _cut_events(saved)
        output.__init__(saved["folder"])  # type: ignore[misc]  # as SB3 would make it now


def _cut_events(saved: dict[str, Any]) -> None:
    """Forget what was written after the checkpoint: SB3 flushes after every row, so a file's size stands between two."""
    folder = Path(saved["folder"])
    if not saved["sizes"]:
        return
    for path in _event_files(folder):
        size = saved["sizes"].get(path.name)
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)
    if missing := [name for name in saved["sizes"] if not (folder / name).is_file()]:
        warnings.warn(f"TensorBoard's curves have a gap: {missing} are gone from {folder}", stacklevel=3)
