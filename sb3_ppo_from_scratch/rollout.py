"""Between the policy and the environments: the action an environment gets, and the value behind a time limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

__all__ = ["bootstrap_time_limits", "bootstrap_time_limits_at_once", "cut_short", "to_env_actions"]


def to_env_actions(actions: np.ndarray, action_space: spaces.Space, policy: ActorCriticPolicy) -> np.ndarray:
    """
    The actions to step the environments with: within a Box's bounds, unchanged for any other space.

    A squashed policy's actions lie in [-1, 1] and are scaled to the bounds; a Gaussian's are unbounded and get clipped.
    The buffer keeps ``actions`` as they were sampled, for those have the log-probability that the policy reported.

    :param actions: ``[n_envs, *action_shape]``
    :param action_space: the environments' action space
    :param policy: for ``squash_output`` and ``unscale_action``
    :return: ``[n_envs, *action_shape]``
    """
    if not isinstance(action_space, spaces.Box):
        return actions
    if policy.squash_output:
        return policy.unscale_action(actions)
    return np.clip(actions, action_space.low, action_space.high)


def cut_short(dones: np.ndarray, infos: list[dict[str, Any]]) -> list[int]:
    """
    The environments whose episode was cut by a time limit in this step.

    :param dones: ``[n_envs]``
    :param infos: one dict per environment, as ``VecEnv.step`` returns them
    """
    return [
        index
        for index in np.asarray(dones).nonzero()[0].tolist()
        if infos[index].get("terminal_observation") is not None and infos[index].get("TimeLimit.truncated", False)
    ]


def bootstrap_time_limits(
    rewards: np.ndarray,
    rows: list[int],
    infos: list[dict[str, Any]],
    predict_value: Callable[[Any], Any],
    gamma: float,
) -> np.ndarray:
    r"""
    Where an episode was cut by a time limit, add what would have followed: :math:`r_t \leftarrow r_t + \gamma V(s_{final})`.

    The value is of the *final* observation (``infos[i]["terminal_observation"]``), never of the one that the environment
    was reset to; advantages are cut there all the same (SB3 issues 633 and 651). One environment at a time, as SB3 does: a
    batched call may round differently. What SB3 does otherwise: it adds to the environment's own array, which may be
    read-only or handed out again, and into an array of integers, which rounds the value away.

    :param rewards: ``[n_envs]``
    :param rows: of :func:`cut_short`
    :param infos: one dict per environment, as ``VecEnv.step`` returns them
    :param predict_value: from one unbatched observation to its value, shape ``[1]``
    :param gamma: discount factor
    :return: ``[n_envs]``, rewards in an array of their own
    """
    rewards = _reals(rewards)
    for index in rows:
        rewards[index] += gamma * predict_value(infos[index]["terminal_observation"])
    return rewards


def bootstrap_time_limits_at_once(
    rewards: np.ndarray,
    rows: list[int],
    infos: list[dict[str, Any]],
    predict_values: Callable[[Any], np.ndarray],
    gamma: float,
) -> np.ndarray:
    """
    :func:`bootstrap_time_limits` with one call for all environments, the same up to rounding.

    :param rewards: as there
    :param rows: as there, at least one
    :param infos: as there
    :param predict_values: from a batch of observations, ``[n, *obs_shape]`` or a dict of such, to their values, ``[n]``
    :param gamma: as there
    :return: as there
    """
    rewards = _reals(rewards)
    finals = [infos[index]["terminal_observation"] for index in rows]
    is_dict = isinstance(finals[0], dict)
    batch = {key: np.stack([final[key] for final in finals]) for key in finals[0]} if is_dict else np.stack(finals)
    rewards[rows] += gamma * predict_values(batch)
    return rewards


def _reals(rewards: np.ndarray) -> np.ndarray:
    """A copy that can hold a value; the precision of floats stays."""
    return np.array(rewards, dtype=rewards.dtype if rewards.dtype.kind == "f" else np.float32)
