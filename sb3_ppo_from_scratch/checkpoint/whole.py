"""What a checkpoint must hold to be resumed from, each part of its kind: it may come from anywhere."""

from __future__ import annotations

from types import UnionType
from typing import Any

import numpy as np
import torch as th

from sb3_ppo_from_scratch.checkpoint.log_files import is_mark
from sb3_ppo_from_scratch.safe_files.values import numpy_state, python_state

__all__ = ["whole_run"]

_PARTS: dict[str, type | UnionType] = {
    "n_envs": int,
    "n_processes": int,
    "model": bytes,
    "learn": dict,
    "elapsed": int,
    "random": dict,
    "env": dict,
    "callbacks": list,
    "logger": dict,
    "problems": list,
    "made_with": dict,
    "num_timesteps": int | None,
    "folder": str | None,
    "doubts": list,
}
"""What a checkpoint holds, each of its kind."""


def whole_run(state: dict[str, Any]) -> dict[str, Any]:
    """
    A checkpoint's state with all that a run is resumed from.

    :param state: of a file, perhaps of the first format, which knew less
    :raises ValueError: if something is missing, or not of its kind
    """
    state = {"n_processes": 1, "num_timesteps": None, "folder": None, "doubts": [], **state}
    if isinstance(state.get("env"), dict):
        state["env"] = {**_UNKNOWN, **state["env"]}
    if isinstance(state.get("callbacks"), list):
        state["callbacks"] = [_callback_of_today(entry) for entry in state["callbacks"]]
    _check(state)
    return state


_UNKNOWN: dict[str, Any] = {"generators": [], "trace": None, "doubts": [], "files": {}}
"""Of environments, in files of earlier formats."""


def _callback_of_today(entry: Any) -> Any:
    if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
        return entry
    state = {"generators": {}, "is_needed": False, **entry[1]}
    if isinstance(state.get("envs"), dict):
        state["envs"] = {name: {**_UNKNOWN, **env} if isinstance(env, dict) else env for name, env in state["envs"].items()}
    return entry[0], state


def _check(state: dict[str, Any]) -> None:
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"its {name!r} is missing, or not a {kind}")
    sound = {
        "problems": all(isinstance(problem, str) for problem in (*state["problems"], *state["doubts"])),
        "made_with": all(isinstance(name, str) for part in state["made_with"].items() for name in part),
        "learn": _is_learn(state["learn"]),
        "env": _is_env(state["env"]),
        "callbacks": all(map(_is_callback, state["callbacks"])),
        "random": _are_random_states(state["random"]),
    }
    for name, right in sound.items():
        if not right:
            raise ValueError(f"its {name!r} is not of the make of ours")


def _is_learn(learn: dict[str, Any]) -> bool:
    return (
        type(learn.get("total_timesteps")) is int
        and isinstance(learn.get("log_interval"), int | None)
        and isinstance(learn.get("tb_log_name"), str | None)
    )


def _is_callback(entry: Any) -> bool:
    if not isinstance(entry, tuple) or len(entry) != 2:
        return False
    name, state = entry
    return (
        isinstance(name, tuple)
        and list(map(type, name)) == [str, int]
        and isinstance(state, dict)
        and state.keys() == {"attributes", "generators", "state", "is_needed", "envs"}
        and isinstance(state["attributes"], dict | None)
        and isinstance(state["generators"], dict)
        and isinstance(state["envs"], dict)
        and all(map(_is_env, state["envs"].values()))
    )


def _are_random_states(states: dict[str, Any]) -> bool:
    cuda = states.get("cuda")
    return _are_generators(states) and isinstance(cuda, list) and all(_is_torch_state(each, None) for each in cuda)


def _are_generators(states: Any) -> bool:
    """Those of a process; torch's only where it has been imported."""
    if not isinstance(states, dict):
        return False
    python_state(states.get("python"))
    numpy_state(states.get("numpy"))
    return states.get("torch") is None or _is_torch_state(states["torch"], th.get_rng_state().numel())


def _is_env(state: Any) -> bool:
    if not isinstance(state, dict):
        return False
    lists = (("wrappers", bytes | None), ("worlds", bytes | None), ("problems", str), ("doubts", str))
    trace = state["trace"]
    return (
        all(isinstance(state.get(name), list) and all(isinstance(part, kind) for part in state[name]) for name, kind in lists)
        and isinstance(state["generators"], list)
        and len(state["generators"]) in (0, len(state["worlds"]))
        and all(each is None or _are_generators(each) for each in state["generators"])
        and isinstance(state["files"], dict)
        and all(isinstance(marks, dict) and all(map(is_mark, marks.values())) for marks in state["files"].values())
        and (trace is None or (isinstance(trace, np.ndarray) and trace.dtype == np.uint32 and trace.ndim == 2))
    )


def _is_torch_state(state: Any, size: int | None) -> bool:
    return (
        isinstance(state, np.ndarray) and state.dtype == np.uint8 and state.ndim == 1 and (size is None or state.size == size)
    )
