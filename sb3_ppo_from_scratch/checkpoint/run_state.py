"""
Everything that the rest of a training run depends on, as one object of plain data.

It is taken between two iterations. Such a *boundary* is the one moment at which the rollout buffer holds nothing that
matters: its data have been learned from and logged, and the next rollout has not begun. SB3's ``CheckpointCallback`` saves in
the middle of one (SB3 issues 1526 and 1643).
"""

from __future__ import annotations

import inspect
import io
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.checkpoint.env_state import put_attributes
from sb3_ppo_from_scratch.checkpoint.files import read_checkpoint
from sb3_ppo_from_scratch.checkpoint.log_state import capture_logger, is_own_folder, locate_logger, make_logger, restore_logger
from sb3_ppo_from_scratch.checkpoint.plain_data import is_plain, pack
from sb3_ppo_from_scratch.checkpoint.vec_env_state import capture_vec_env, restore_vec_env
from sb3_ppo_from_scratch.safe_files.unpickler import errors_named
from sb3_ppo_from_scratch.safe_files.values import numpy_state, python_state

if TYPE_CHECKING:
    from sb3_ppo_from_scratch.ppo import ScratchPPO

__all__ = ["Resumed", "all_callbacks", "capture_run", "load_run"]


# ------------------------------------------------------- what a run depends on


def capture_run(model: ScratchPPO, callback: BaseCallback) -> tuple[bytes, list[str]]:
    """
    Everything that the rest of a run depends on; only at a boundary.

    :return: plain data as bytes, and what of the environments cannot be captured
    """
    saved_model = io.BytesIO()
    model.save(saved_model)
    env = capture_vec_env(model.env)  # type: ignore[arg-type]  # training has one
    callbacks = [(name, _capture_callback(each)) for name, each in _named(callback)]
    of_callbacks = [part for _, state in callbacks for part in state["envs"].values()]
    problems = [problem for part in (env, *of_callbacks) for problem in part["problems"]]
    unique = list(dict.fromkeys(problems))
    learn = {name: callback.locals.get(name) for name in ("total_timesteps", "log_interval", "tb_log_name")}
    state = {
        "n_envs": model.n_envs,
        "model": saved_model.getvalue(),
        "learn": learn,
        "elapsed": time.time_ns() - int(model.start_time),
        "random": _random_states(),
        "env": env,
        "callbacks": callbacks,
        "logger": capture_logger(model.logger),
        "problems": unique,
        "made_with": _surroundings(),
    }
    return pack(state), unique


def _surroundings() -> dict[str, str]:
    """What else the bits depend on, as far as it can be named."""
    packages = ("torch", "numpy", "stable_baselines3", "gymnasium")
    return {**{name: version(name) for name in packages}, "torch threads": str(th.get_num_threads())}


def _random_states() -> dict[str, Any]:
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in cuda],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(python_state(states["python"]))
    np.random.set_state(numpy_state(states["numpy"]))
    th.set_rng_state(th.from_numpy(states["torch"].copy()))
    if states["cuda"] and th.cuda.device_count() == len(states["cuda"]):
        th.cuda.set_rng_state_all([th.from_numpy(state.copy()) for state in states["cuda"]])


# ------------------------------------------------------- callbacks


def all_callbacks(callback: BaseCallback) -> Iterator[BaseCallback]:
    """Every callback in a tree of them, but for the lists."""
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children += callback.callbacks
    else:
        yield callback
    if isinstance(callback, EventCallback):
        children += [callback.callback, getattr(callback, "callback_on_new_best", None)]
    for child in children:
        if child is not None:
            yield from all_callbacks(child)


def _named(callback: BaseCallback) -> Iterator[tuple[tuple[str, int], BaseCallback]]:
    """Every callback, under its class and how many of this class came before it."""
    seen: Counter[str] = Counter()
    for each in all_callbacks(callback):
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        yield (name, seen[name]), each
        seen[name] += 1


def _capture_callback(callback: BaseCallback) -> dict[str, Any]:
    """What the callback offers as ``state_dict()``, or else its plain attributes; and its environments."""
    own = getattr(callback, "state_dict", None)
    return {
        "attributes": None if own is not None else _plain_attributes(callback),
        "state": None if own is None else own(),
        "envs": {name: capture_vec_env(env) for name, env in _own_envs(callback)},
    }


def _plain_attributes(callback: BaseCallback) -> dict[str, Any]:
    """Without texts that are constructor's arguments: such are paths and names, which may be others by then."""
    arguments = inspect.signature(type(callback).__init__).parameters
    return {
        name: value
        for name, value in vars(callback).items()
        if name not in ("locals", "globals", "verbose")
        and not (isinstance(value, str) and name in arguments)
        and is_plain(value)
    }


def _own_envs(callback: BaseCallback) -> list[tuple[str, VecEnv]]:
    return [(name, value) for name, value in vars(callback).items() if isinstance(value, VecEnv)]


def _restore_callbacks(callback: BaseCallback, saved: list[Any], trust: bool) -> None:
    states = dict(saved)
    for name, each in _named(callback):
        state = states.get(name)
        if state is None:
            continue
        if state["attributes"] is None:
            if not hasattr(each, "load_state_dict"):
                raise ValueError(f"the checkpoint holds a state_dict of {name[0]}, which has no load_state_dict to take it")
            each.load_state_dict(state["state"])
        else:
            mine = vars(each)
            put_attributes(each, {key: value for key, value in state["attributes"].items() if is_plain(mine.get(key))})
        envs = dict(_own_envs(each))
        for attribute, env_state in state["envs"].items():
            if attribute in envs:
                _restore_env(envs[attribute], env_state, trust, fresh=True)


# ------------------------------------------------------- resuming


class Resumed:
    """
    What is left to restore of a run once its model is loaded.

    :param state: of :func:`load_run`
    :param allow_pickle: whether to make whatever objects the environments' states ask for
    """

    def __init__(self, state: dict[str, Any], allow_pickle: bool):
        self._state = state
        self._trust = allow_pickle
        self._fresh = True
        self.learn: dict[str, Any] = state["learn"]
        self.exact = not state["problems"]

    def restore_env(self, model: ScratchPPO) -> None:
        """The environments and the random generators; and if the former could not be captured, new first observations."""
        env = model.env
        assert env is not None  # resume() takes one
        _set_random_states(self._state["random"])
        fresh, self._fresh = self._fresh, False
        if _restore_env(env, self._state["env"], self._trust, fresh):
            return
        model._last_obs = env.reset()  # type: ignore[assignment]  # SB3 narrows the type of VecEnvObs
        model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)

    def restore_run(self, model: ScratchPPO, callback: BaseCallback) -> None:
        """All the rest, when the callbacks are ready to go on."""
        if model.tensorboard_log is not None and not is_own_folder(self._state["logger"], model.tensorboard_log):
            warnings.warn(f"tensorboard_log={str(model.tensorboard_log)!r} is not of this run: set it anew", stacklevel=3)
            model.tensorboard_log = None
        _set_random_states(self._state["random"])
        _restore_callbacks(callback, self._state["callbacks"], self._trust)
        restore_logger(model.logger, self._state["logger"])
        self.restore_env(model)
        model.start_time = time.time_ns() - self._state["elapsed"]

    def make_logger(self) -> Any:
        """A logger with the outputs that the run had."""
        return make_logger(self._state["logger"])


def _restore_env(env: VecEnv, state: dict[str, Any], trust: bool, fresh: bool) -> bool:
    """:return: whether the environments go on where they were; if not, they are to be reset, and are seeded for it"""
    if fresh and not state["problems"]:
        env.reset()  # many make the objects of their state only here, and only their classes are then allowed in the file
    restore_vec_env(env, state, trust)
    if state["problems"]:
        env.seed(int(np.random.randint(2**31)))  # from the saved stream
    return not state["problems"]


_PARTS: dict[str, type | UnionType] = {
    "n_envs": int,
    "model": bytes,
    "learn": dict,
    "elapsed": int,
    "random": dict,
    "env": dict,
    "callbacks": list,
    "logger": dict,
    "problems": list,
    "made_with": dict,
}
"""What a checkpoint holds, each of its kind; the engine's state is the engine's."""


def _check_run(state: dict[str, Any]) -> None:
    """:raises ValueError: unless a checkpoint holds all that a run is resumed from"""
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"its {name!r} is missing, or not a {kind}")
    sound = {
        "problems": all(isinstance(problem, str) for problem in state["problems"]),
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
        and state.keys() == {"attributes", "state", "envs"}
        and isinstance(state["attributes"], dict | None)
        and isinstance(state["envs"], dict)
        and all(map(_is_env, state["envs"].values()))
    )


def _are_random_states(states: dict[str, Any]) -> bool:
    python_state(states.get("python"))
    numpy_state(states.get("numpy"))
    cuda = states.get("cuda")
    return (
        _is_torch_state(states.get("torch"), th.get_rng_state().numel())
        and isinstance(cuda, list)
        and all(_is_torch_state(each, None) for each in cuda)
    )


def _is_env(state: Any) -> bool:
    return isinstance(state, dict) and all(
        isinstance(state.get(name), list) and all(isinstance(part, kind) for part in state[name])
        for name, kind in (("wrappers", bytes | None), ("worlds", bytes | None), ("problems", str))
    )


def _is_torch_state(state: Any, size: int | None) -> bool:
    return (
        isinstance(state, np.ndarray) and state.dtype == np.uint8 and state.ndim == 1 and (size is None or state.size == size)
    )


def load_run(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint's file, or a folder's newest intact one.

    :raises FileNotFoundError: if there is none
    :raises ValueError: if it is damaged, or of an unknown format
    """
    state = read_checkpoint(path)
    with errors_named(str(path), "there is no way to read it"):
        _check_run(state)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        state["logger"] = locate_logger(state["logger"], folder)
    if state["problems"]:
        warnings.warn(
            f"this resume is not bit-exact: environments start new episodes, for their state could not be saved "
            f"({'; '.join(state['problems'])})",
            stacklevel=3,
        )
    here, there = _surroundings(), state["made_with"]
    if differences := [f"{name} {here.get(name)} instead of {there[name]}" for name in there if there[name] != here.get(name)]:
        warnings.warn(f"this resume may not be bit-exact, with {', '.join(differences)}", stacklevel=3)
    return state
