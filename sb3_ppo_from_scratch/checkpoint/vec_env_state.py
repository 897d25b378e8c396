"""The state of a ``VecEnv``: its wrappers', and its worlds', be they in this process or in others."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_ppo_from_scratch.checkpoint.env_state import capture, inner_worlds, level_names, restore

__all__ = ["capture_vec_env", "restore_vec_env"]


# ------------------------------------------------------- in a worker of SubprocVecEnv


class _Installer:
    """
    Arrives in a worker as the name of a method that ``gymnasium.Env`` has got there.

    SB3's worker calls methods of its environment and nothing else, and the environment has been made by the time we meet it.
    """

    def __reduce__(self) -> Any:
        return _install, ()


def _install() -> str:
    gym.Env.scratch_ppo_capture = _reply_with_state  # type: ignore[attr-defined]
    gym.Env.scratch_ppo_restore = _reply_to_restore  # type: ignore[attr-defined]
    return "scratch_ppo_capture"


def _reply_with_state(env: gym.Env) -> tuple[bytes | None, str]:
    """State or reason: an error would end the worker."""
    try:
        return capture(env), ""
    except Exception as error:  # noqa: BLE001  # the caller gets to know
        return None, str(error)


def _reply_to_restore(env: gym.Env, data: bytes, trust: bool) -> Exception | None:
    try:
        restore(env, data, trust)
    except ValueError as error:
        return error
    except Exception as error:  # noqa: BLE001  # other classes may not travel
        return ValueError(f"{type(error).__name__}: {error}")
    return None


# ------------------------------------------------------- a VecEnv


def _vec_levels(env: VecEnv) -> list[VecEnv]:
    """A ``VecEnv``'s wrappers, outermost first, and the one that they wrap."""
    levels = [env]
    while isinstance(inner := getattr(levels[-1], "venv", None), VecEnv):
        levels.append(inner)
    return levels


def _worlds(base: VecEnv) -> list[Any]:
    return [world for value in vars(base).values() for world in inner_worlds(value)]


def capture_vec_env(env: VecEnv) -> dict[str, Any]:
    """
    The state of a ``VecEnv``: its wrappers' and its worlds'.

    :return: ``wrappers`` and ``worlds``, lists of bytes, or ``None`` where a state cannot be captured, and ``problems``,
        which say why
    """
    levels = _vec_levels(env)
    base = levels[-1]
    if isinstance(base, SubprocVecEnv):
        base.has_attr(_Installer())  # type: ignore[arg-type]  # see there
        worlds = base.env_method("scratch_ppo_capture")
    else:
        worlds = [_reply_with_state(world) for world in _worlds(base)]
    wrappers = [_reply_with_state(level) for level in levels]  # type: ignore[arg-type]  # it takes both
    problems = [reason for state, reason in (*wrappers, *worlds) if state is None]
    return {
        "wrappers": [state for state, _ in wrappers],
        "worlds": [state for state, _ in worlds],
        "problems": list(dict.fromkeys(problems)),
    }


def restore_vec_env(env: VecEnv, state: dict[str, Any], trust: bool = False) -> None:
    """
    Put a captured state into a ``VecEnv`` of the same make; what could not be captured stays as it is.

    :raises ValueError: if it is of another make, or for objects of classes that it does not hold without ``trust``
    """
    levels = _vec_levels(env)
    base = levels[-1]
    n_worlds = base.num_envs if isinstance(base, SubprocVecEnv) else len(_worlds(base))
    if len(levels) != len(state["wrappers"]) or n_worlds != len(state["worlds"]):
        raise ValueError(
            f"env must have {len(state['wrappers'])} vectorized levels and {len(state['worlds'])} environments as the "
            f"checkpoint's had, not {level_names(levels)} and {n_worlds}"
        )
    if isinstance(base, SubprocVecEnv):
        base.has_attr(_Installer())  # type: ignore[arg-type]  # see there
    for index, world_state in enumerate(state["worlds"]):
        if world_state is not None and isinstance(base, SubprocVecEnv):
            (error,) = base.env_method("scratch_ppo_restore", world_state, trust, indices=index)
            if error is not None:
                raise error
        elif world_state is not None:
            restore(_worlds(base)[index], world_state, trust)
    for level, level_state in zip(levels, state["wrappers"], strict=True):
        if level_state is not None:
            restore(level, level_state, trust)
