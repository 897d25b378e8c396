"""The state of SB3's logger: what it has written and is about to, so that a resumed run's log has no gap and no double."""

from __future__ import annotations

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

from sb3_ppo_from_scratch.checkpoint.env_state import read_file, rewrite_file
from sb3_ppo_from_scratch.checkpoint.plain_data import is_plain

__all__ = ["capture_logger", "make_logger", "restore_logger"]

_EVENTS = "events.out.tfevents.*"


def capture_logger(logger: Logger) -> dict[str, Any]:
    """
    The logger's outputs and their content, and the values recorded since its last row.

    Text files are kept whole, since to open them anew empties them; of TensorBoard's files their sizes, since it only adds.
    """
    recorded = {key: value for key, value in logger.name_to_value.items() if is_plain(value)}
    return {
        "folder": logger.dir,
        "values": recorded,
        "counts": {key: count for key, count in logger.name_to_count.items() if key in recorded},
        "excluded": {key: names for key, names in logger.name_to_excluded.items() if key in recorded},
        "formats": [_capture_format(output) for output in logger.output_formats],
    }


def _capture_format(output: KVWriter) -> dict[str, Any]:
    if isinstance(output, CSVOutputFormat):
        return {"name": "csv", "text": read_file(output.file), "keys": list(output.keys)}
    if isinstance(output, JSONOutputFormat):
        return {"name": "json", "text": read_file(output.file)}
    if isinstance(output, HumanOutputFormat):
        return {"name": "log", "text": read_file(output.file)} if output.own_file else {"name": "stdout"}
    if isinstance(output, TensorBoardOutputFormat):
        folder = Path(output.writer.log_dir)
        output.writer.flush()
        return {
            "name": "tensorboard",
            "folder": str(folder),
            "sizes": {f.name: f.stat().st_size for f in _event_files(folder)},
        }
    return {"name": None}


def _event_files(folder: Path) -> list[Path]:
    return list(folder.glob(_EVENTS))


def make_logger(state: dict[str, Any]) -> Logger:
    """A logger with the outputs of the one captured, in the same folder; outputs of other classes than SB3's are left out."""
    outputs = []
    for saved in state["formats"]:
        if saved["name"] is None:
            warnings.warn("an output of the logger is not one of SB3's: call set_logger before continuing", stacklevel=2)
            continue
        if saved["name"] == "tensorboard":
            _cut_events(saved)
        outputs.append(make_output_format(saved["name"], saved.get("folder") or state["folder"] or "."))
    return Logger(folder=state["folder"], output_formats=outputs)


def restore_logger(logger: Logger, state: dict[str, Any]) -> None:
    """
    Let a logger go on where the captured one was: same content of its files, same values recorded for the next row.

    :param logger: of :func:`make_logger`, or the user's own; its outputs are matched with the captured ones by kind
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
    for path in _event_files(folder):
        size = saved["sizes"].get(path.name)
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)
    if missing := [name for name in saved["sizes"] if not (folder / name).is_file()]:
        warnings.warn(f"TensorBoard's curves have a gap: {missing} are gone from {folder}", stacklevel=3)
