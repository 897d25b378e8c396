"""It learns real tasks."""

from __future__ import annotations

import pytest
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_from_scratch import ScratchPPO
from tests.test_equality import ZOO_CARTPOLE


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_cartpole(policy: str) -> None:
    th.set_num_threads(1)
    model = ScratchPPO(policy, make_vec_env("CartPole-v1", 8, seed=1), seed=1, device="cpu", **ZOO_CARTPOLE)
    model.learn(1e5)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=100), n_eval_episodes=40)
    assert mean >= 475


@pytest.mark.slow
def test_pendulum_improves() -> None:
    th.set_num_threads(1)
    env = make_vec_env("Pendulum-v1", 4, seed=1)
    sizes = {"n_steps": 1024, "batch_size": 256, "n_epochs": 10}
    model = ScratchPPO("MlpPolicy", env, seed=1, device="cpu", gamma=0.9, learning_rate=1e-3, **sizes)  # type: ignore[arg-type]
    untrained, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", 4, seed=100), n_eval_episodes=20)
    callback = EvalCallback(make_vec_env("Pendulum-v1", 4, seed=100), n_eval_episodes=20, eval_freq=10_000, verbose=0)
    model.learn(80_000, callback=callback)
    assert untrained < -900
    assert callback.best_mean_reward > untrained + 500
