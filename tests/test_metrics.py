"""Logged numbers against what they are said to be, and schedules that travel with a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch import ScratchPPO
from tests.helpers import Trained, train


def cartpole() -> VecEnv:
    return make_vec_env("CartPole-v1", 2, seed=5)


def pendulum() -> VecEnv:
    return make_vec_env("Pendulum-v1", 2, seed=5)


def run(algorithm: type, make_env: Any, **kwargs: Any) -> Trained:
    sizes = {"n_steps": 32, "batch_size": 16, "n_epochs": 3}
    return train(algorithm, "MlpPolicy", make_env, 192, **{**sizes, **kwargs})


@pytest.mark.parametrize("make_env", [cartpole, pendulum])
def test_kl_is_zero_before_the_first_step(make_env: Any) -> None:
    """With one minibatch per update the policy compared is still the one that acted."""
    metrics = run(ScratchPPO, make_env, batch_size=64, n_epochs=1).metrics
    assert [row["train/kl"] for row in metrics] == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("make_env", [cartpole, pendulum])
def test_kl_is_positive_and_near_its_estimate_after_steps(make_env: Any) -> None:
    for row in run(ScratchPPO, make_env, n_epochs=10, learning_rate=1e-3).metrics:
        assert row["train/kl"] > 0
        assert row["train/kl"] == pytest.approx(row["train/approx_kl"], rel=0.75)


def test_without_behaviour_distributions_there_is_no_kl() -> None:
    class Own(RolloutBuffer):
        """Any buffer but this package's."""

    metrics = run(ScratchPPO, cartpole, rollout_buffer_class=Own).metrics
    assert len(metrics) == 3
    assert not any("train/kl" in row for row in metrics)


@pytest.mark.parametrize("make_env", [cartpole, pendulum])
def test_grad_norm_is_the_mean_of_what_sb3_clips(make_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    clip = th.nn.utils.clip_grad_norm_

    def record(*args: Any) -> th.Tensor:
        norms.append(clip(*args).item())
        return th.tensor(norms[-1])

    with monkeypatch.context() as patch:
        patch.setattr(th.nn.utils, "clip_grad_norm_", record)
        run(PPO, make_env)
    per_update = np.array(norms).reshape(3, -1)  # 3 epochs of 4 minibatches each
    assert per_update.shape == (3, 12)
    logged = [row["train/grad_norm"] for row in run(ScratchPPO, make_env).metrics]
    assert logged == pytest.approx(per_update.mean(axis=1).tolist(), rel=1e-6)


@pytest.mark.parametrize("name", ["learning_rate", "clip_range", "clip_range_vf", "ent_coef"])
def test_trap_16_schedules_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Trap 16: a schedule that is an object of a class comes back and says the same."""
    schedule = LinearSchedule(0.3, 0.1, 1.0)
    ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, **{name: schedule}).save(tmp_path / "model")
    loaded = getattr(ScratchPPO.load(tmp_path / "model"), name)
    assert [loaded(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([0.3, 0.2, 0.1])
