"""Products: how far other engines' arithmetic leads the weights away from the reference's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from benchmarks.breakout import ENV_ID
from benchmarks.evaluation import EVALUATION_SEED
from benchmarks.tasks import load_task
from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.vec_env import make_native_atari_env

__all__ = ["CANDIDATES", "measure_products"]

Record = dict[str, Any]


class _Rollouts(BaseCallback):
    """Keeps a copy of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[ScratchRolloutBuffer] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.kept.append(copy.deepcopy(self.model.rollout_buffer))  # type: ignore[attr-defined]  # PPO has one


CANDIDATES: dict[str, tuple[dict[str, Any], int]] = {
    "reference": ({"engine": "torch"}, 0),
    "channels_last fp32": ({"engine": "channels_last"}, 0),
    "channels_last bf16": ({"engine": "channels_last", "precision": "bf16"}, 0),
    "reference, minibatches in another order": ({"engine": "torch"}, 10_000),
}
"""Engines, and what is added to the seed of the minibatches' order: the last one is the yardstick."""


def measure_products(model: ScratchPPO, n_updates: int, n_envs: int = 8, n_steps: int = 128) -> Record:
    """
    The same minibatches for all, from rollouts of one agent in ALE's games; a rollout is drawn once, then the next one's turn.

    :param model: where everybody starts
    :param n_updates: steps along a minibatch's gradient, a multiple of the four that a rollout gives
    :param n_envs: parallel games
    :param n_steps: of a rollout, per game
    :return: per candidate and number of updates, how far the weights are from the reference's, relative to how far these have
        come
    """
    arguments = {**load_task("atari").arguments, "learning_rate": 2.5e-4, "clip_range": 0.1, "n_epochs": 1, "n_steps": n_steps}
    arguments["batch_size"] = n_envs * n_steps // 4
    env = make_native_atari_env(ENV_ID, n_envs, seed=EVALUATION_SEED)
    start, rollouts = model.policy.state_dict(), _Rollouts()
    collector = ScratchPPO("CnnPolicy", env, seed=1, device="cpu", engine="torch", **{**arguments, "learning_rate": 0.0})
    collector.policy.load_state_dict(start)
    collector.learn(min(6, n_updates // 4) * n_envs * n_steps, callback=rollouts)
    weights: dict[str, list[th.Tensor]] = {}
    for name, (choice, offset) in CANDIDATES.items():
        each = ScratchPPO("CnnPolicy", env, seed=1, device="cpu", **choice, **arguments)
        each.policy.load_state_dict(start)
        each.set_logger(configure(None, []))
        weights[name] = [_flat(each)]
        for index in range(n_updates // 4):
            each.rollout_buffer = copy.deepcopy(rollouts.kept[index % len(rollouts.kept)])
            np.random.seed(index + offset)
            each.train()
            weights[name].append(_flat(each))
        print(f"{name}: {n_updates} updates", flush=True)
    env.close()
    first, *reached = weights.pop("reference")
    return {
        "updates": [4 * (index + 1) for index in range(len(reached))],
        "distance": {
            name: [
                float((ours - theirs).norm() / (theirs - first).norm()) for ours, theirs in zip(own[1:], reached, strict=True)
            ]
            for name, own in weights.items()
        },
    }


def _flat(model: ScratchPPO) -> th.Tensor:
    return th.cat([parameter.detach().flatten().clone() for parameter in model.policy.parameters()])
