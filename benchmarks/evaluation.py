"""How every benchmark evaluates: the same games for everybody, and training does not notice."""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.evaluation import evaluate_policy

__all__ = ["EVALUATION_SEED", "Evaluation", "evaluate"]

EVALUATION_SEED = 1_000_000
"""Far from the seeds that agents are trained with."""


class Evaluation(NamedTuple):
    """Whole episodes; on Atari whole games with raw rewards."""

    returns: list[float]
    lengths: list[int]
    """In steps; in frames on Atari."""


def evaluate(
    model: BaseAlgorithm, env: VecEnv, episodes: int, deterministic: bool, env_seed: int = EVALUATION_SEED
) -> Evaluation:
    """
    Let a model play. Torch's random generators are left as they were.

    :param model: who plays
    :param env: with ``Monitor`` or statistics of its own
    :param episodes: how many, at least 1
    :param deterministic: whether it takes its most probable actions
    :param env_seed: of the environments
    """
    env.seed(env_seed)
    with th.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [], device_type="cuda"):
        th.manual_seed(EVALUATION_SEED)
        returns, lengths = evaluate_policy(model, env, episodes, deterministic=deterministic, return_episode_rewards=True)
    return Evaluation([round(float(value), 3) for value in returns], [int(value) for value in lengths])  # type: ignore[union-attr]  # lists, as asked for
