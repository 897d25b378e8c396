"""The state of a ``VecEnv``: its wrappers', and its worlds', be they in this process or in others."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_ppo_from_scratch.checkpoint.env_state import capture, inner_worlds, level_names, restore, written_files
from sb3_ppo_from_scratch.checkpoint.log_files import Mark, keep_all, put_all_back
from sb3_ppo_from_scratch.checkpoint.replay import (
    CANNOT_FORK,
    ForkError,
    difference,
    generators,
    in_a_fork,
    set_generators,
    trace,
)
from sb3_ppo_from_scratch.vec_env.halves import halves_of

__all__ = ["Trial", "capture_vec_env", "difference_after", "keep_files", "put_files_back", "restore_vec_env"]

_HIDDEN = (
    "put back, it does not do again what it did: some of its state is not in its attributes, but in a closure, a class, a "
    "module, __slots__, a clock, or an array or generator that it shares"
)


class Trial(NamedTuple):
    """How captured environments are tried out, in a fork."""

    seconds: float
    """that a trace may take"""
    again: bool = False
    """whether to put their state back in place, and see if they do the same again"""
    reset_at: int = 3
    """steps before all are reset; 0 for those that have not been yet"""


# ------------------------------------------------------- in a worker of SubprocVecEnv


class _Installer:
    """
    Arrives in a worker as the name of a method that ``gymnasium.Env`` has got there.

    SB3's worker calls methods of its environment and nothing else, and the environment has been made by the time we meet it.
    """

    def __reduce__(self) -> Any:
        return _install, ()


def _install() -> str:
    # Ctrl-C goes to all processes of a terminal; the one that trains will end its workers once it has finished its iteration
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for function in (_capture_here, _restore_here, _trace_here, _keep_here, _put_back_here):
        setattr(gym.Env, _method_of(function), function)
    return "scratch_ppo_capture"


def _method_of(function: Callable[..., Any]) -> str:
    return f"scratch_ppo{function.__name__.removesuffix('_here')}"


def _capture_here(env: gym.Env, trial: Trial | None) -> tuple[bytes | None, str, Any, Any, list[str]]:
    """State or reason, the process's generators, trace and doubts."""
    state, reason = _state_or_reason(env)
    own = generators()
    if state is None:
        return None, reason, own, None, []
    found, doubts, problem = _tried_out(_as_vec_env(env), partial(restore, env, state, from_here=True), trial)
    return (None if problem else state), problem, own, found, doubts


def _restore_here(env: gym.Env, data: bytes | None, own: dict[str, Any] | None, trust: bool) -> Exception | None:
    """An error would end the worker, so it is returned."""
    try:
        if own is not None:
            set_generators(own)
        if data is not None:
            restore(env, data, trust)
    except ValueError as error:
        return error
    except Exception as error:  # noqa: BLE001  # other classes may not travel
        return ValueError(f"{type(error).__name__}: {error}")
    return None


def _trace_here(env: gym.Env, trial: Trial) -> Any:
    return _tried_out(_as_vec_env(env), None, trial)[0]


def _keep_here(world: Any, copies: Path) -> dict[str, Mark | None]:
    return keep_all(written_files(world), copies)


def _put_back_here(world: Any, marks: dict[str, Mark | None], copies: Path, own: Path | None) -> list[str]:
    return put_all_back(written_files(world), marks, copies, own)


def _state_or_reason(level: Any) -> tuple[bytes | None, str]:
    try:
        return capture(level), ""
    except Exception as error:  # noqa: BLE001  # the caller gets to know
        return None, str(error)


def _as_vec_env(env: gym.Env) -> VecEnv:
    return DummyVecEnv([lambda: env])


# ------------------------------------------------------- trying out


def _tried_out(env: VecEnv, put_back: Callable[[], Any] | None, trial: Trial | None) -> tuple[Any, list[str], str]:
    """
    What environments in this process do next, in a fork.

    :param put_back: puts their captured state in place
    :return: the trace or ``None``, what is doubtful, and why the state cannot be put back
    """
    if CANNOT_FORK or trial is None:
        return None, [], ""

    def twice() -> tuple[Any, Any, str, str]:
        own, failed = generators(), ""
        try:
            first = trace(env, trial.seconds, reset_at=trial.reset_at)
        except Exception as error:  # noqa: BLE001  # of an environment's own; whether it can be put back is another question
            first, failed = None, f"{type(error).__name__}: {error}"
        if put_back is None or not trial.again:
            return first, None, "", failed
        set_generators(own)
        try:
            put_back()
        except Exception as error:  # noqa: BLE001  # whatever keeps a state from being put back will do so on resume
            return first, None, f"it cannot be put back: {type(error).__name__}: {error}", ""
        second = None if first is None else trace(env, 10 * trial.seconds, len(first), trial.reset_at)
        return first, second, "", failed

    try:
        first, second, problem, failed = in_a_fork(twice, 20 * trial.seconds + 5.0)
    except (ForkError, OSError) as error:
        first, second, problem, failed = None, None, "", str(error)
    doubts = [f"{_names(env)}: it could not be tried out ({failed})"] if failed and trial.again else []
    parted = None if second is None else difference(first, second)
    doubts += [] if parted is None else [f"{_names(env, parted[1])}: {_HIDDEN}"]
    return first, doubts, f"{_names(env)}: {problem}" if problem else ""


def _names(env: VecEnv, index: int | None = None) -> str:
    """What environments are, for messages."""
    levels = _vec_levels(env)
    worlds = [] if _workers(levels) else _worlds(levels)
    wrappers = [type(level).__name__ for level in levels[:-1]]
    if not worlds:
        return ", ".join(wrappers)
    world = worlds[0 if index is None or index >= len(worlds) else index]
    made_of = [*wrappers, str(world)] if wrappers else [str(world)]
    return f"{'environments' if index is None else f'environment {index}'} ({' over '.join(made_of)})"


class _Echo(VecEnv):
    """Stands in for environments of other processes under wrappers that are tried out: answers by the clock."""

    def __init__(self, env: VecEnv):
        super().__init__(env.num_envs, env.observation_space, env.action_space)
        self._clock = 0

    def _observe(self) -> Any:
        self.observation_space.seed(self._clock)
        samples = [self.observation_space.sample() for _ in range(self.num_envs)]
        if isinstance(samples[0], dict):
            return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        return np.stack(samples)

    def reset(self) -> Any:
        """Another observation."""
        return self._observe()

    def step_async(self, actions: np.ndarray) -> None:
        """Goes on."""
        self._clock += 1

    def step_wait(self) -> Any:
        """Episodes of seven steps."""
        dones = np.full(self.num_envs, self._clock % 7 == 0)
        rewards = np.full(self.num_envs, self._clock, np.float32)
        final = self._observe()
        infos = [
            {"terminal_observation": {k: v[i] for k, v in final.items()} if isinstance(final, dict) else final[i]}
            for i in range(self.num_envs)
        ]
        return final, rewards, dones, infos

    def close(self) -> None:
        """Nothing."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """None has any."""
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Nothing."""

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """None has any."""
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """None is."""
        return [False] * self.num_envs


def _try_wrappers(levels: list[VecEnv], states: list[bytes | None], trial: Trial) -> list[str]:
    """Those over environments of other processes, on environments that answer by the clock."""

    def put_back() -> None:
        echo._clock = 0
        for level, state in zip(levels[:-1], states[:-1], strict=True):
            if state is not None:
                restore(level, state, from_here=True)

    if len(levels) == 1 or CANNOT_FORK:
        return []
    base, echo = levels[-1], _Echo(levels[-1])
    levels[-2].venv = echo  # type: ignore[attr-defined]  # a wrapper, of which only the fork will step it
    try:
        _, doubts, problem = _tried_out(levels[0], put_back, trial)
    finally:
        levels[-2].venv = base  # type: ignore[attr-defined]  # as before
    return [*doubts, *([problem] if problem else [])]


# ------------------------------------------------------- a VecEnv


def _vec_levels(env: VecEnv) -> list[VecEnv]:
    """A ``VecEnv``'s wrappers, outermost first, and the one that they wrap; where that is two halves, likewise theirs."""
    inner = getattr(env, "venv", None)
    if isinstance(inner, VecEnv):
        return [env, *_vec_levels(inner)]
    return [env, *(level for half in halves_of(env) for level in _vec_levels(half))]


def _worlds(levels: list[VecEnv]) -> list[Any]:
    return [world for level in levels for value in vars(level).values() for world in inner_worlds(value)]


def _workers(levels: list[VecEnv]) -> SubprocVecEnv | None:
    """What steps all environments in other processes, if that is what there is."""
    base = levels[-1]
    return base if isinstance(base, SubprocVecEnv) and not any(map(halves_of, levels)) else None


def _half_in_processes(levels: list[VecEnv]) -> str | None:
    """Why the state cannot be captured, where only a half of the environments is in other processes."""
    if _workers(levels) or not any(isinstance(level, SubprocVecEnv) for level in levels):
        return None
    return "TwoHalves: of halves that are a SubprocVecEnv, the environments' state is not saved"


def capture_vec_env(env: VecEnv, trial: Trial | None = None) -> dict[str, Any]:
    """
    The state of a ``VecEnv``: its wrappers' and its worlds'.

    :param trial: how to try out what has been captured; ``None`` not to
    :return: ``wrappers`` and ``worlds``, lists of bytes, or ``None`` where a state cannot be captured, and ``problems``,
        which say why; ``doubts``, which say what is captured but will not go on with the same bits; ``generators`` of other
        processes, and a ``trace`` of what the environments do next, ``None`` if that could not be seen
    """
    levels = _vec_levels(env)
    wrappers = [_state_or_reason(level) for level in levels]
    problems = [reason for state, reason in wrappers if state is None]
    state: dict[str, Any] = {"wrappers": [each for each, _ in wrappers], "generators": [], "trace": None, "doubts": []}
    if (problem := _half_in_processes(levels)) is not None:
        state["worlds"], problems = [], [*problems, problem]
    elif workers := _workers(levels):
        problems += _capture_workers(workers, state, trial)
        if trial is not None and trial.again and not problems:
            state["doubts"] += _try_wrappers(levels, state["wrappers"], trial)
    else:
        worlds = [_state_or_reason(world) for world in _worlds(levels)]
        state["worlds"] = [each for each, _ in worlds]
        problems += [reason for each, reason in worlds if each is None]
        if not problems:
            state["trace"], state["doubts"], problem = _tried_out(
                env, partial(restore_vec_env, env, state, from_here=True), trial
            )
            problems += [problem] if problem else []
    return {**state, "problems": list(dict.fromkeys(problems))}


def _capture_workers(base: SubprocVecEnv, state: dict[str, Any], trial: Trial | None) -> list[str]:
    base.has_attr(_Installer())  # type: ignore[arg-type]  # see there
    replies = base.env_method("scratch_ppo_capture", trial)
    state["worlds"], reasons, state["generators"], traces, doubts = map(list, zip(*replies, strict=True))
    state["trace"] = _side_by_side(traces)
    for index, found in enumerate(doubts):
        state["doubts"] += [doubt.replace("environment 0", f"environment {index}") for doubt in found]
    return [reason for each, reason in zip(state["worlds"], reasons, strict=True) if each is None]


def _side_by_side(traces: list[Any]) -> Any:
    if any(each is None for each in traces):
        return None
    n = min(map(len, traces))
    return np.concatenate([each[:n] for each in traces], axis=1)


def restore_vec_env(env: VecEnv, state: dict[str, Any], trust: bool = False, from_here: bool = False) -> None:
    """
    Put a captured state into a ``VecEnv`` of the same make; what could not be captured or put back stays as it is.

    :param trust: see ``restore``
    :param from_here: see there
    :raises ValueError: if it is of another make, or for objects of classes that it does not hold without ``trust``
    """
    levels = _vec_levels(env)
    workers = _workers(levels)
    n_worlds = workers.num_envs if workers else len(_worlds(levels))
    if len(levels) != len(state["wrappers"]) or n_worlds != len(state["worlds"]):
        raise ValueError(
            f"env must have {len(state['wrappers'])} vectorized levels and {len(state['worlds'])} environments as the "
            f"checkpoint's had, not {level_names(levels)} and {n_worlds}"
        )
    problems = state.get("problems")  # they have been said
    with contextlib.suppress(*([ValueError] if problems else [])):
        if workers:
            _restore_workers(workers, state, trust)
        else:
            _restore_all(_worlds(levels), state["worlds"], trust, from_here)
    with contextlib.suppress(*([ValueError] if problems else [])):
        _restore_all(levels, state["wrappers"], trust, from_here)


def _restore_all(levels: list[Any], states: list[bytes | None], trust: bool, from_here: bool) -> None:
    for level, state in zip(levels, states, strict=True):
        if state is not None:
            restore(level, state, trust, from_here)


def _restore_workers(base: SubprocVecEnv, state: dict[str, Any], trust: bool) -> None:
    base.has_attr(_Installer())  # type: ignore[arg-type]  # see there
    own = state["generators"] or [None] * base.num_envs  # those of a run in one process have been put back there
    for index, arguments in enumerate(zip(state["worlds"], own, strict=True)):
        (error,) = base.env_method("scratch_ppo_restore", *arguments, trust, indices=index)
        if error is not None:
            raise error


# ------------------------------------------------------- the files that monitors write


def keep_files(env: VecEnv, copies: Path) -> dict[str, dict[str, Mark | None]]:
    """
    Mark how far the files of a ``VecEnv``'s monitors are, those of other processes too, and bring their copies up to it.

    :param copies: folder for the copies
    :return: marks, by level or world
    """
    marks = _of_each(env, _keep_here, lambda place: (copies / place,))
    return {place: found for place, found in marks.items() if found}


def put_files_back(env: VecEnv, marks: dict[str, Any], copies: Path, own: Path | None) -> list[str]:
    """
    Let the files of a ``VecEnv``'s monitors hold what they did.

    :param marks: of :func:`keep_files`
    :param copies: folder of the copies
    :param own: see ``put_all_back``
    :return: the paths of those that do not
    """
    lost = _of_each(env, _put_back_here, lambda place: (marks.get(place, {}), copies / place, own))
    return [path for paths in lost.values() for path in paths]


def _of_each(env: VecEnv, function: Callable[..., Any], arguments: Callable[[str], tuple[Any, ...]]) -> dict[str, Any]:
    """What a function says of each level and each world."""
    levels = _vec_levels(env)
    workers, here = _workers(levels), {f"wrapper {index}": level for index, level in enumerate(levels)}
    if not workers:
        here |= {f"environment {index}": world for index, world in enumerate(_worlds(levels))}
    said = {place: function(each, *arguments(place)) for place, each in here.items()}
    if workers:
        workers.has_attr(_Installer())  # type: ignore[arg-type]  # see there
        for index in range(workers.num_envs):
            place = f"environment {index}"
            said[place] = workers.env_method(_method_of(function), *arguments(place), indices=index)[0]
    return said


def difference_after(env: VecEnv, state: dict[str, Any]) -> str | None:
    """
    Whether restored environments do what those that were captured did next.

    :param state: of :func:`capture_vec_env`, which has just been put back
    :return: what they do differently, ``None`` if nothing or if it cannot be told
    """
    if state["trace"] is None:
        return None
    workers, trial = _workers(_vec_levels(env)), Trial(1.0)
    found = _side_by_side(workers.env_method("scratch_ppo_trace", trial)) if workers else _tried_out(env, None, trial)[0]
    parted = None if found is None else difference(np.asarray(state["trace"]), found)
    if parted is None:
        return None
    name = f"environment {parted[1]}" if workers else _names(env, parted[1])
    return f"{name} gives another observation, reward or end {parted[0]} steps after the checkpoint than the run's did"
