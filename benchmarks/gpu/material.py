"""Rollouts, updates and gradients to compare an engine with: for the checks on a GPU and for the tests on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_from_scratch import ScratchRolloutBuffer
from sb3_ppo_from_scratch.advantages import normalize_advantages
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.losses import PPOLoss, ppo_loss
from sb3_ppo_from_scratch.update import UpdateConfig

__all__ = ["config", "exact_gradient", "exact_loss", "exact_products", "fill", "flat_parameters", "observe", "relative"]


def observe(space: spaces.Space, n_envs: int) -> Any:
    """Random observations, ``[n_envs, *obs_shape]`` or a dict of such."""
    samples = [space.sample() for _ in range(n_envs)]
    if isinstance(space, spaces.Dict):
        return {key: th.as_tensor(np.stack([sample[key] for sample in samples])) for key in space.spaces}
    return th.as_tensor(np.stack(samples))


def fill(policy: ActorCriticPolicy, *buffers: ScratchRolloutBuffer, seed: int = 7, share_valid: float = 1.0) -> None:
    """
    A rollout of random observations and rewards, with what the policy says of them.

    :param policy: on the CPU
    :param buffers: of one size; all get the same
    :param seed: of everything random
    :param share_valid: of the rows; the others are reset rows
    """
    rng, engine, n_envs = np.random.default_rng(seed), TorchEngine(policy), buffers[0].n_envs
    policy.observation_space.seed(seed)
    th.manual_seed(seed)
    for buffer in buffers:
        buffer.reset()
    for _ in range(buffers[0].buffer_size):
        obs = observe(policy.observation_space, n_envs)
        step = engine.act(obs)
        stored = {key: value.numpy() for key, value in obs.items()} if isinstance(obs, dict) else obs.numpy()
        valid, reward, start = rng.random(n_envs) < share_valid, rng.normal(size=n_envs), rng.random(n_envs) < 0.1
        for buffer in buffers:
            buffer.add(stored, step.actions, reward, start, step.values, step.log_probs, step.dist_params, valid)
    for buffer in buffers:
        buffer.compute_returns_and_advantage(th.ones(n_envs), np.zeros(n_envs, bool))


def config(**changes: Any) -> UpdateConfig:
    """An update of two epochs with truncated last minibatches."""
    values: dict[str, Any] = {
        "batch_size": 48,
        "n_epochs": 2,
        "clip_range": 0.1,
        "clip_range_vf": None,
        "normalize_advantage": True,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "target_kl": None,
    }
    return UpdateConfig(**{**values, **changes})


def relative(actual: th.Tensor, expected: th.Tensor) -> float:
    """The norm of the difference, relative to that of what is expected."""
    expected = expected.detach().double().cpu()
    return ((actual.detach().double().cpu() - expected).norm() / expected.norm()).item()


def flat_parameters(policy: ActorCriticPolicy) -> th.Tensor:
    """A copy on the CPU."""
    return th.cat([parameter.detach().flatten().cpu() for parameter in policy.parameters()])


def exact_loss(policy: ActorCriticPolicy, batch: Any, options: UpdateConfig) -> PPOLoss:
    """
    In float64, by :func:`ppo_loss`, to be differentiated by autograd.

    :param policy: on the CPU; it becomes one of float64
    :param batch: the rows of a minibatch that count
    :param options: coefficients
    """
    policy = policy.double()
    obs = batch.observations.double() / (255.0 if batch.observations.dtype is th.uint8 else 1.0)
    extractor: Any = policy.features_extractor
    latent_pi, latent_vf = policy.mlp_extractor(extractor(obs))
    distribution = policy._get_action_dist_from_latent(latent_pi)
    discrete = isinstance(policy.action_space, spaces.Discrete)
    return ppo_loss(
        policy.value_net(latent_vf).flatten(),
        distribution.log_prob(batch.actions.long().flatten() if discrete else batch.actions.double()),
        distribution.entropy(),
        advantages=normalize_advantages(batch.advantages.double()),
        returns=batch.returns.double(),
        old_values=batch.old_values.double(),
        old_log_prob=batch.old_log_prob.double(),
        clip_range=options.clip_range,
        clip_range_vf=options.clip_range_vf,
        ent_coef=options.ent_coef,
        vf_coef=options.vf_coef,
    )


def exact_gradient(policy: ActorCriticPolicy, batch: Any, options: UpdateConfig) -> th.Tensor:
    """Of :func:`exact_loss`, flat."""
    loss = exact_loss(policy, batch, options)
    return th.cat([gradient.flatten() for gradient in th.autograd.grad(loss.total, list(policy.parameters()))])


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Without TensorFloat-32, which cuDNN uses by default and which has 10 bits; off CUDA nothing changes."""
    switches: tuple[Any, ...] = (th.backends.cudnn, th.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
