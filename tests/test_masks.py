"""Masks of invalid actions: MaskablePPO's bits, the three ways, evaluation, checkpoints, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.distributions import MaskableCategorical
from sb3_contrib.common.maskable.evaluation import evaluate_policy as contribs_evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy as sb3_evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from sb3_ppo_from_scratch.distributions import distribution_parameters, exact_kl
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.evaluation import evaluate_policy
from sb3_ppo_from_scratch.vec_env import NativeVecEnv
from tests.helpers import assert_same_model

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 24, "n_epochs": 2, "ent_coef": 0.01, "seed": 1, "device": "cpu"}
ACTIONS: dict[str, spaces.Space] = {
    "Discrete": spaces.Discrete(6),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2, 4]),
    "MultiBinary": spaces.MultiBinary(4),
}


class MaskedEnv(gym.Env):
    """
    Half of the choices are forbidden, others in every step; an action that is counts. Rewards depend on the action.

    :param action_space: of the actions
    :param way: how it says what it allows: "method", "observation", "info", or "none"
    :param observes: whether observations are a Dict for the other ways too
    """

    def __init__(self, action_space: spaces.Space = ACTIONS["Discrete"], way: str = "method", observes: bool = False):
        self.action_space = action_space
        self.sizes = {
            spaces.Discrete: lambda space: [int(space.n)],
            spaces.MultiDiscrete: lambda space: space.nvec.tolist(),
            spaces.MultiBinary: lambda space: [2] * space.n,
        }[type(action_space)](action_space)
        vector = spaces.Box(-10, 10, (3,), np.float32)
        self.way, self.is_dict = way, observes or way == "observation"
        keys: dict[str, spaces.Space] = {"vector": vector}
        if way == "observation":
            keys["action_mask"] = spaces.Box(0, 1, (sum(self.sizes),), np.int8)
        self.observation_space = spaces.Dict(keys) if self.is_dict else vector
        self.forbidden_taken = 0
        if way == "method":
            self.action_masks = lambda: self.mask.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        starts = np.cumsum([0, *self.sizes[:-1]])
        self.forbidden_taken += int(not self.mask[np.atleast_1d(action) + starts].all())
        reward = float(np.sum(action * self.vector[0])) + float(self.np_random.normal())
        self.steps += 1
        obs, info = self._show()
        return obs, reward, bool(self.np_random.random() < 0.1), self.steps >= 12, info

    def _show(self) -> tuple[Any, dict[str, Any]]:
        self.mask = self.np_random.random(sum(self.sizes)) < 0.5
        for start, size in zip(np.cumsum([0, *self.sizes[:-1]]), self.sizes, strict=True):
            self.mask[start + self.np_random.integers(size)] = True
        self.vector = self.np_random.normal(size=3).astype(np.float32)
        keys = {"vector": self.vector}
        if self.way == "observation":
            keys["action_mask"] = self.mask.astype(np.int8)
        return (keys if self.is_dict else self.vector), ({"action_mask": self.mask} if self.way == "info" else {})


def make(n_envs: int = 1, normalized: bool = False, vec_env: type[VecEnv] = DummyVecEnv, **kwargs: Any) -> VecEnv:
    env = make_vec_env(partial(MaskedEnv, **kwargs), n_envs, vec_env_cls=vec_env)
    return (
        VecNormalize(env, norm_obs_keys=["vector"] if isinstance(env.observation_space, spaces.Dict) else None)
        if normalized
        else env
    )


def forbidden(env: VecEnv) -> int:
    return sum(env.get_attr("forbidden_taken"))


# ---------------------------------------------------------------- MaskablePPO's bits


@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize(
    ("kind", "env"),
    [
        ("Discrete", {}),
        ("MultiDiscrete", {"normalized": True}),
        ("MultiBinary", {}),
        ("Discrete", {"observes": True, "normalized": True}),
    ],
)
def test_bits_of_maskable_ppo_and_the_numpy_engine_equal(kind: str, env: dict[str, Any], n_envs: int) -> None:
    """Weights, optimizer and every metric after several iterations, with truncated last minibatches, then unmasked ones."""
    policy = "MultiInputPolicy" if env.get("observes") else "MlpPolicy"

    def trained(algorithm: type, name: str, **kwargs: Any) -> tuple[Any, list[Any]]:
        metrics: list[Any] = []

        class Recording(algorithm):  # type: ignore[misc, valid-type]
            def train(self) -> None:
                super().train()
                metrics.append({k: v for k, v in self.logger.name_to_value.items() if k.startswith("train/")})

        model = Recording(name, make(n_envs, action_space=ACTIONS[kind], **env), **SMALL, **kwargs)
        model.learn(64 * n_envs)
        assert forbidden(model.env) == 0
        model.learn(32 * n_envs, use_masking=False, reset_num_timesteps=False)
        assert forbidden(model.env) > 0
        return model, metrics

    theirs, their_metrics = trained(MaskablePPO, policy)
    ours, our_metrics = trained(ScratchPPO, f"Maskable{policy}", engine="torch")
    assert_same_model(ours, theirs)
    for mine, reference in zip(our_metrics, their_metrics, strict=True):
        assert {key: mine[key] for key in reference} == reference
        assert 0 <= mine["train/kl"] < 1
    if policy == "MlpPolicy":
        fast, _ = trained(ScratchPPO, f"Maskable{policy}")
        assert fast._engine.name == "numpy"
        for mine, reference in zip(fast.policy.parameters(), theirs.policy.parameters(), strict=True):
            np.testing.assert_allclose(mine.detach(), reference.detach(), rtol=0, atol=1e-6)


def test_images() -> None:
    """``MaskableCnnPolicy``, with masks that draw random numbers: as many calls as contrib makes, at the same moments."""
    from stable_baselines3.common.envs import FakeImageEnv

    def make_env() -> gym.Env:
        env = FakeImageEnv(discrete=True, channel_first=True)
        env.observation_space.seed(0)
        return ActionMasker(env, lambda env: np.arange(env.action_space.n) != np.random.randint(env.action_space.n))

    kwargs = {**SMALL, "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 16}, "share_features_extractor": False}}
    theirs = MaskablePPO("CnnPolicy", make_env(), **kwargs).learn(32)
    ours = ScratchPPO("MaskableCnnPolicy", make_env(), engine="torch", **kwargs).learn(32)
    assert_same_model(ours, theirs)


# ---------------------------------------------------------------- where masks come from


class NativeMasked(gym.vector.SyncVectorEnv):
    """One method for all environments, ``[n_envs, n]``; the masks of resets allow nothing."""

    calls = 0

    def action_masks(self) -> np.ndarray:
        type(self).calls += 1
        masks = np.array([env.unwrapped.mask for env in self.envs])
        return masks & ~self._autoreset_envs[:, None]


@pytest.mark.parametrize("way", ["method", "observation", "info"])
@pytest.mark.parametrize("kind", ["dummy", "subproc", "next-step", "same-step"])
def test_all_ways_give_the_same_masks(way: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No forbidden action is taken, over many episodes' ends: neither while learning, nor while evaluating."""
    policy = "MaskableMultiInputPolicy" if way == "observation" else "MaskableMlpPolicy"
    if kind.endswith("step"):
        mode = gym.vector.AutoresetMode.NEXT_STEP if kind == "next-step" else gym.vector.AutoresetMode.SAME_STEP
        inner = gym.vector.SyncVectorEnv([partial(MaskedEnv, way=way)] * 2, autoreset_mode=mode)
        env: VecEnv = NativeVecEnv(inner)
    else:
        env = make(2, way=way, vec_env=SubprocVecEnv if kind == "subproc" else DummyVecEnv)
    model = ScratchPPO(policy, env, verbose=1, **SMALL)
    model.learn(64)
    model.learn(64, reset_num_timesteps=False)
    assert {"method": "method", "observation": "observation", "info": "infos"}[way] in capsys.readouterr().out
    evaluate_policy(model, env, n_eval_episodes=6, warn=False)
    assert forbidden(env) == 0
    env.close()


def test_one_call_for_all_environments_and_reset_rows_may_allow_nothing() -> None:
    env = NativeVecEnv(NativeMasked([MaskedEnv] * 3, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP))
    NativeMasked.calls = 0
    model = ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(96)
    assert NativeMasked.calls == 32
    assert model.rollout_buffer.valid is not None
    assert not model.rollout_buffer.valid.all()
    assert forbidden(env) == 0
    masks = model.rollout_buffer.extras["action_masks"]
    assert masks.shape == (16, 3, 6)
    assert masks.dtype == bool


def test_processes_are_asked_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(2, vec_env=SubprocVecEnv)
    calls = []
    ask = env.env_method
    monkeypatch.setattr(env, "env_method", lambda name, *args, **kwargs: calls.append(kwargs) or ask(name, *args, **kwargs))
    ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(32)
    assert calls == [{}] * 16
    env.close()


def test_the_method_comes_first_and_normalization_leaves_masks_alone() -> None:
    """``VecNormalize`` would make reals of a key in Dict observations; unless it is only an observation."""
    env = VecNormalize(make(2, way="observation"))
    model = ScratchPPO("MaskableMultiInputPolicy", env, **SMALL).learn(64)
    assert forbidden(env) == 0
    assert set(np.unique(model._last_obs["action_mask"])) <= {0, 1}
    assert abs(model._last_obs["vector"]).max() <= 10
    plain = VecNormalize(make(2, way="observation"))
    assert "action_mask" in ScratchPPO("MultiInputPolicy", plain, **SMALL).learn(32).env.norm_obs_keys


def test_without_masks() -> None:
    """All is as if every action were allowed; no mask is asked for."""
    env = make(2, way="none")
    model = ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(32, use_masking=False)
    assert "action_masks" not in model.rollout_buffer.extras
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(env.reset())


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("kind", list(ACTIONS))
def test_the_gradient_by_hand_is_autograds_in_float64(kind: str) -> None:
    """The entropy's too; masked logits get none."""
    from sb3_ppo_from_scratch.distributions import choices
    from sb3_ppo_from_scratch.engines.numpy_mlp.heads import CategoricalHead, forbidden, mask_out

    sizes = choices(ACTIONS[kind])
    rng = np.random.default_rng(0)
    env = MaskedEnv(ACTIONS[kind])
    masks = np.array([(env.reset(seed=seed), env.mask)[1] for seed in range(20)])
    outputs = th.tensor(rng.normal(size=(20, sum(sizes))), requires_grad=True)
    parts = [
        MaskableCategorical(logits=part, masks=mask)
        for part, mask in zip(outputs.split(sizes, 1), th.tensor(masks).split(sizes, 1), strict=True)
    ]
    actions = th.stack([part.sample() for part in parts], 1)
    log_prob = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(1), strict=True))
    entropy = sum(part.entropy() for part in parts)
    weight = th.tensor(rng.normal(size=20))
    (log_prob * weight - 0.3 * entropy).sum().backward()

    head = CategoricalHead(sizes)
    rows = np.ascontiguousarray(outputs.detach().numpy().T)
    mask_out(rows, forbidden(masks))
    dist = head.forward(rows)
    encoded = head.encode(actions.numpy())
    gradient = head.gradient(dist, encoded, weight.numpy(), -0.3)
    np.testing.assert_allclose(head.log_prob(dist, encoded), log_prob.detach(), atol=1e-12)
    np.testing.assert_allclose(head.entropy(dist), entropy.detach(), atol=1e-12)
    np.testing.assert_allclose(gradient.T, outputs.grad, atol=1e-12)
    assert (gradient.T[~masks] == 0).all()


def test_the_exact_kl_of_masked_distributions_is_finite() -> None:
    """Between distributions of different masks too."""
    env = MaskedEnv(ACTIONS["MultiDiscrete"])
    policy = ScratchPPO("MaskableMlpPolicy", env, **SMALL).policy
    obs, rows = th.randn(2, 5, 3), []
    for seed in range(2):
        env.reset(seed=seed)
        distribution = policy.get_distribution(obs[seed], np.repeat(env.mask[None], 5, 0))
        rows.append(distribution_parameters(distribution).detach())
    assert (exact_kl(policy.action_dist, rows[0], rows[0]) == 0).all()
    assert th.isfinite(exact_kl(policy.action_dist, *rows)).all()
    assert distribution_parameters(type(policy.action_dist)([2, 3])) is None


# ---------------------------------------------------------------- where contrib is wrong


def test_a_last_minibatch_of_one_spoils_no_weights() -> None:
    """In MaskablePPO the standard deviation of one advantage makes all weights NaN."""
    kwargs = {**SMALL, "batch_size": 15}
    theirs = MaskablePPO("MlpPolicy", make(), **kwargs)
    with pytest.raises(ValueError, match="nan"):
        theirs.learn(64)
    for engine in ("torch", "numpy"):
        model = ScratchPPO("MaskableMlpPolicy", make(), engine=engine, **kwargs).learn(64)
        assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_a_mask_that_allows_nothing_is_an_error() -> None:
    """MaskablePPO chooses among all actions then, without a word."""

    def none_after(env: gym.Env) -> np.ndarray:
        return np.full(4, env.unwrapped.steps < 3)

    def make_env() -> gym.Env:
        env = MaskedEnv(spaces.MultiBinary(2), way="none")
        return ActionMasker(env, none_after)

    MaskablePPO("MlpPolicy", DummyVecEnv([make_env] * 2), **SMALL).learn(32)
    model = ScratchPPO("MaskableMlpPolicy", DummyVecEnv([make_env] * 2), **SMALL)
    with pytest.raises(ValueError, match=r"environment 0 allows no action in dimension 0 \(at step 3 of the rollout"):
        model.learn(32)
    with pytest.raises(ValueError, match=r"environment 1 allows no action in dimension 1"):
        model.predict(np.zeros((2, 3)), action_masks=np.array([[1, 1, 1, 1], [0, 1, 0, 0]]))
