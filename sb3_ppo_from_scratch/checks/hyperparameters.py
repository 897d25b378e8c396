"""What ``ScratchPPO`` was given, checked all together: before a policy is built, and before training."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer, is_replaceable
from sb3_ppo_from_scratch.checks.arguments import (
    check_action_space,
    check_flag,
    check_integer,
    check_nan_observations,
    check_number,
    check_observation_space,
    check_readable,
    check_scheduled,
)
from sb3_ppo_from_scratch.checks.finite import NAN_POLICIES
from sb3_ppo_from_scratch.distributions import choices
from sb3_ppo_from_scratch.policies import takes_masks
from sb3_ppo_from_scratch.recurrent import check_recurrent_arguments, is_recurrent

__all__ = ["check_hyperparameters", "check_rollout_size"]


def check_hyperparameters(model: Any) -> None:
    """
    :param model: a ``ScratchPPO`` with its arguments as attributes; NumPy's numbers among them become Python's
    :raises TypeError: for an argument of the wrong type
    :raises ValueError: for one out of range, or a space that its policy cannot read
    """
    if not hasattr(model, "observation_space"):
        raise ValueError("env must be an environment or the name of one, not None (only load() can do without)")
    for name, value in vars(model).items():  # random.seed, SB3's schedules and saved files understand Python's
        if isinstance(value, np.integer | np.floating):
            setattr(model, name, value.item())
    _check_spaces(model)
    _check_numbers(model)
    if model.nan_policy not in NAN_POLICIES:
        raise ValueError(f"nan_policy must be one of {', '.join(map(repr, NAN_POLICIES))}, not {model.nan_policy!r}")
    buffer_class = model.rollout_buffer_class
    if buffer_class is not None and not (isinstance(buffer_class, type) and issubclass(buffer_class, RolloutBuffer)):
        raise TypeError(f"rollout_buffer_class must be a subclass of RolloutBuffer or None, not {buffer_class!r}")
    if takes_masks(model.policy_class):
        _check_maskable(model, model._policy_name)
    if is_recurrent(model.policy_class):
        _check_recurrent(model)


def _check_spaces(model: Any) -> None:
    check_observation_space(model.observation_space)
    check_action_space(model.action_space)
    name = model._policy_name
    if "features_extractor_class" not in model.policy_kwargs and model.policy_class in model._named_policies:
        check_readable(name, "MultiInput" in name, model.observation_space)
    if model.policy_kwargs.get("squash_output") and not model.use_sde:
        raise ValueError("policy_kwargs={'squash_output': True} needs use_sde=True: only gSDE's distribution can squash")
    check_nan_observations(model.nan_observations, model.observation_space)


def _check_recurrent(model: Any) -> None:
    """:raises ValueError: for networks that cannot be, and for a buffer that would lose what is remembered"""
    check_recurrent_arguments(model.policy_kwargs)
    if not _keeps_extras(model.rollout_buffer_class):
        raise ValueError(
            f"rollout_buffer_class must be a subclass of ScratchRolloutBuffer for {model._policy_name}, for what is "
            f"remembered is to be kept, not {model.rollout_buffer_class.__name__}"
        )


def _keeps_extras(buffer_class: type[RolloutBuffer] | None) -> bool:
    """Whether it does, or ours takes its place."""
    return buffer_class is None or is_replaceable(buffer_class) or issubclass(buffer_class, ScratchRolloutBuffer)


def _check_maskable(model: Any, name: str) -> None:
    """
    :param name: the policy's
    :raises ValueError: for actions that cannot be masked, and for what would lose the masks
    """
    if model.use_sde:
        raise ValueError(f"use_sde must be False for {name}, not True: gSDE is for Box actions, which cannot be masked")
    try:
        choices(model.action_space)
    except ValueError as error:
        raise ValueError(f"policy {name!r} does not fit the action space: {error}") from error
    if not _keeps_extras(model.rollout_buffer_class):
        raise ValueError(
            f"rollout_buffer_class must be a subclass of ScratchRolloutBuffer for {name}, for masks are to be kept, not "
            f"{model.rollout_buffer_class.__name__}"
        )


def _check_numbers(model: Any) -> None:
    check_flag("normalize_advantage", model.normalize_advantage)
    check_integer("n_steps", model.n_steps, 1)
    check_integer("n_epochs", model.n_epochs, 1)
    normalizing = ", since one advantage alone cannot be normalized (normalize_advantage=True)"
    check_integer("batch_size", model.batch_size, *((2, math.inf, normalizing) if model.normalize_advantage else (1,)))
    check_scheduled("learning_rate", model.learning_rate, 0.0)
    check_number("gamma", model.gamma, 0.0, 1.0)
    check_number("gae_lambda", model.gae_lambda, 0.0, 1.0)
    check_scheduled("clip_range", model.clip_range, 0.0, above=True)
    if model.clip_range_vf is not None:
        check_scheduled("clip_range_vf", model.clip_range_vf, 0.0, above=True)
    check_scheduled("ent_coef", model.ent_coef)
    check_number("vf_coef", model.vf_coef, 0.0)
    check_number("max_grad_norm", model.max_grad_norm, 0.0, above=True, finite=False)
    check_integer("sde_sample_freq", model.sde_sample_freq, -1)
    if model.target_kl is not None:
        check_number("target_kl", model.target_kl, 0.0, above=True, finite=False)
    if model.seed is not None:
        check_integer("seed", model.seed, 0, 2**32 - 1)


def check_rollout_size(n_steps: int, n_envs: int, batch_size: int, normalize_advantage: bool) -> None:
    """
    Not asked for on ``load``: whoever loads a model to watch it gives it one environment, and never trains it.

    :param n_steps: per environment
    :param n_envs: number of environments
    :param batch_size: transitions per minibatch; a warning where it does not divide the rollout
    :param normalize_advantage: whether one transition alone is too few
    :raises ValueError: if it is
    """
    size = n_steps * n_envs
    if size == 1 and normalize_advantage:
        raise ValueError(
            "n_steps * n_envs must be at least 2, since one advantage alone cannot be normalized "
            f"(normalize_advantage=True), not n_steps={n_steps} times n_envs={n_envs}"
        )
    if size < batch_size:
        warnings.warn(
            f"batch_size={batch_size} is larger than the rollout of n_steps * n_envs = {size} transitions (n_steps={n_steps}, "
            f"n_envs={n_envs}): each epoch will be one truncated mini-batch of size {size}",
            stacklevel=3,
        )
    elif size % batch_size > 0:
        warnings.warn(
            f"batch_size={batch_size} does not divide the rollout of n_steps * n_envs = {size} transitions "
            f"(n_steps={n_steps}, n_envs={n_envs}): after every {size // batch_size} full ones "
            f"there will be a truncated mini-batch of size {size % batch_size}",
            stacklevel=3,
        )
