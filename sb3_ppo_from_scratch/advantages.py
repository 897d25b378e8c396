"""Advantages: how much better an action turned out than the critic expected. Pure NumPy and torch functions."""

from __future__ import annotations

import numpy as np
import torch as th

__all__ = ["compute_gae", "fill_gae", "normalize_advantages"]


def compute_gae(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Generalized Advantage Estimation: a reverse recursion with a mask for ended trajectories.

    .. math::
        \delta_t &= r_t + \gamma \, m_{t+1} V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma \lambda \, m_{t+1} A_{t+1} \\
        R_t &= A_t + V(s_t)

    for ``t = 0 .. n_steps - 1``, where ``m_{t+1}`` is 0 if ``s_{t+1}`` begins a new episode and 1 otherwise, and
    ``A_{n_steps} = 0``. Limits: ``gae_lambda=0`` is the one-step TD error, ``gae_lambda=1`` the Monte-Carlo return minus
    the value. A time limit is no terminal state: add ``gamma * V(final observation)`` to that step's reward first
    (:func:`sb3_ppo_from_scratch.rollout.bootstrap_time_limits`).

    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equations 11-16; the TD(lambda) return of
    SB3's pull request 375.

    :param rewards: ``[n_steps, n_envs]``, reward received after step t
    :param values: ``[n_steps, n_envs]``, critic's value of the observation at step t
    :param episode_starts: ``[n_steps, n_envs]``, 1 where the observation at step t is the first of an episode
    :param last_values: ``[n_envs]``, critic's value of the observation after the last step
    :param dones: ``[n_envs]``, whether the last step ended an episode
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: trade-off between bias (0) and variance (1), in [0, 1]
    :return: advantages and returns, each ``[n_steps, n_envs]`` in the dtype of ``rewards``
    :raises ValueError: if the shapes do not agree
    """
    _check_shapes(rewards, values, episode_starts, last_values, dones)
    dtype = rewards.dtype
    next_values = np.concatenate([values[1:], last_values[None]])
    next_non_terminal = 1.0 - np.concatenate([episode_starts[1:], dones[None]], dtype=dtype, casting="unsafe")
    deltas = rewards + gamma * next_values * next_non_terminal - values
    decay = gamma * gae_lambda * next_non_terminal

    advantages = np.empty_like(deltas)
    advantage = np.zeros_like(deltas[0])
    for step in reversed(range(len(rewards))):
        advantage = deltas[step] + decay[step] * advantage
        advantages[step] = advantage
    return advantages, advantages + values


def fill_gae(
    rewards: th.Tensor,
    values: th.Tensor,
    episode_starts: th.Tensor,
    last_values: th.Tensor,
    dones: th.Tensor,
    gamma: th.Tensor,
    decay: th.Tensor,
    *,
    advantages: th.Tensor,
    returns: th.Tensor,
) -> None:
    """
    :func:`compute_gae` on any device, into memory that is there: no shape is checked and nobody waits for a number, so that a
    CUDA graph can hold it. All tensors are floating-point and on one device; the first five are those of :func:`compute_gae`.

    :param gamma: scalar
    :param decay: scalar, ``gamma * gae_lambda``
    :param advantages: ``[n_steps, n_envs]``, filled
    :param returns: ``[n_steps, n_envs]``, filled
    """
    next_values = th.cat([values[1:], last_values[None]])
    next_non_terminal = 1.0 - th.cat([episode_starts[1:], dones[None]])
    th.sub(rewards + gamma * next_values * next_non_terminal, values, out=advantages)  # delta, where the recursion begins
    decay = decay * next_non_terminal
    for step in reversed(range(len(rewards) - 1)):
        advantages[step].addcmul_(decay[step], advantages[step + 1])
    th.add(advantages, values, out=returns)


def _check_shapes(
    rewards: np.ndarray, values: np.ndarray, episode_starts: np.ndarray, last_values: np.ndarray, dones: np.ndarray
) -> None:
    if rewards.ndim != 2 or len(rewards) == 0:
        raise ValueError(f"rewards must have shape [n_steps, n_envs] with n_steps >= 1, not {rewards.shape}")
    for name, array, shape in (
        ("values", values, rewards.shape),
        ("episode_starts", episode_starts, rewards.shape),
        ("last_values", last_values, rewards.shape[1:]),
        ("dones", dones, rewards.shape[1:]),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to go with rewards of shape {rewards.shape}, not {array.shape}")


def normalize_advantages(advantages: th.Tensor, weights: th.Tensor | None = None, epsilon: float = 1e-8) -> th.Tensor:
    r"""
    Shift and scale a minibatch's advantages to mean 0 and standard deviation 1:
    :math:`(A - \bar A) / (\mathrm{std}(A) + \epsilon)`, with the unbiased standard deviation.

    A minibatch of one element has no standard deviation and is returned as it is (SB3 issue 325).

    Source: OpenAI Baselines' ppo2; detail 7 of https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details.

    :param advantages: ``[batch_size]``
    :param weights: ``[batch_size]``, how often each row counts; ``None`` for once each. Shares, which sum to 1, are as one row
        to it: multiply them by the number of rows.
    :param epsilon: keeps the division finite when all advantages are equal
    :return: ``[batch_size]``
    """
    if advantages.numel() <= 1:
        return advantages
    if weights is None:
        return (advantages - advantages.mean()) / (advantages.std() + epsilon)
    n_rows = weights.sum()
    centred = advantages - (weights * advantages).sum() / n_rows
    deviation = ((weights * centred.square()).sum() / (n_rows - 1)).sqrt()
    is_one = n_rows < 1 + 1e-3  # shares sum to 1 up to rounding, and their deviation would be made of that rounding
    return th.where(is_one, advantages, centred / (deviation + epsilon))
