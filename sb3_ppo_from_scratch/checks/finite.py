"""
NaN and infinity are stopped before they reach the weights: in what the environments send, in a rollout, in a minibatch.

A weight that is NaN makes every later one NaN, and the run is lost since then, however late somebody notices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer
from sb3_ppo_from_scratch.errors import NonFiniteError

__all__ = ["check_minibatch", "check_rollout", "check_step"]

_CAUSES = {
    "environment": "the environment divides by zero or overflows, or its observations need VecNormalize(clip_obs=...)",
    "policy": "the weights or observations have grown very large: try a lower learning_rate, or VecNormalize",
    "update": "very large rewards or returns, or too high a learning_rate: try VecNormalize, or a lower learning_rate",
}


def check_minibatch(name: str, value: float) -> None:
    """
    Before a step along a minibatch's gradient.

    :param name: of its number, ``"loss"`` or ``"gradient"``
    :param value: the number
    :raises NonFiniteError: if it is NaN or infinite
    """
    if not math.isfinite(value):
        raise NonFiniteError(
            name,
            f"the {name} of a minibatch is not finite ({value}). No step was taken on it; the model is as it was before. "
            f"Likely causes: {_CAUSES['update']}; nan_policy='skip' leaves out such minibatches",
        )


def check_step(observations: np.ndarray | dict[str, np.ndarray], rewards: np.ndarray | None, step: int) -> None:
    """
    What the environments sent.

    :param observations: ``[n_envs, *obs_shape]`` or a dict of such; integers are finite, and not looked at
    :param rewards: ``[n_envs]``; ``None`` after a reset
    :param step: number of the step within the rollout, for the message
    :raises NonFiniteError: naming the tensor, the environment and the step
    """
    if isinstance(observations, dict):
        for key, value in observations.items():
            _check_envs(f"observation {key!r}", value, step)
    else:
        _check_envs("observation", observations, step)
    if rewards is not None:
        _check_envs("reward", rewards, step)


def _check_envs(name: str, array: np.ndarray, step: int) -> None:
    if array.dtype.kind == "f" and not np.logical_and.reduce(np.isfinite(array), axis=None):  # faster than all(), a detour
        _raise_at(name, array[np.newaxis], step, "environment")


def check_rollout(buffer: RolloutBuffer) -> None:
    """
    What the policy made of it, rewards with the values behind time limits included.

    :param buffer: full, its arrays ``[n_steps, n_envs]``
    :raises NonFiniteError: naming the tensor, the environment and the step
    """
    if isinstance(buffer, ScratchRolloutBuffer) and buffer.is_known_finite():
        return
    for name in ("values", "log_probs", "rewards", "advantages", "returns"):
        array: Any = getattr(buffer, name, None)  # a class of the user's may keep others
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            _raise_at(name, array, 0, "policy" if name in ("values", "log_probs") else "update")


def _raise_at(name: str, array: np.ndarray, first_step: int, cause: str) -> None:
    """:param array: ``[n_steps, n_envs, ...]`` with something not finite in it."""
    at = np.argwhere(~np.isfinite(array))[0].tolist()
    step, env, *rest = at
    where = f" at index {rest}" if rest else ""
    raise NonFiniteError(
        name,
        f"{name} is not finite ({array[tuple(at)]}{where}) in environment {env} at step {first_step + step} of the "
        f"rollout. Nothing was learned from it; the model is as it was before. Likely causes: {_CAUSES[cause]}",
    )
