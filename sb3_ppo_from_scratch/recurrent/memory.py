"""What a recurrent policy remembers of each environment, from step to step and from rollout to rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_ppo_from_scratch.checks.arguments import check_flag, check_integer
from sb3_ppo_from_scratch.policies import RECURRENT, imported

__all__ = ["LSTM_STATES", "Memory", "check_recurrent_arguments", "check_remembered", "is_recurrent", "remembered"]

LSTM_STATES = "lstm_states"
"""Under this name a rollout's extras hold the states *before* each step, ``[n_envs, n_states, n_layers, hidden_size]``."""

States = tuple[th.Tensor, th.Tensor]
"""An LSTM's hidden state and cell state, each ``[n_layers, n_envs, hidden_size]``"""


class Memory(NamedTuple):
    """What a policy is to remember while it looks at one observation of each environment."""

    states: th.Tensor
    """``[n_states, n_layers, n_envs, hidden_size]``: the actor's hidden and cell state, then the critic's if it has its own"""
    starts: th.Tensor
    """``[n_envs]``, float32: 1 where the observation is the first of an episode, so that the state counts as zero"""

    @property
    def actor(self) -> States:
        """The states of the actor's LSTM."""
        return self.states[0], self.states[1]

    @property
    def critic(self) -> States:
        """Those of the critic's; the actor's where it has none, as in sb3-contrib."""
        return self.states[-2], self.states[-1]

    def of(self, rows: list[int]) -> Memory:
        """Some environments'."""
        return Memory(self.states[:, :, rows], self.starts[rows])

    def array(self) -> np.ndarray:
        """The states environment by environment, ``[n_envs, n_states, n_layers, hidden_size]``."""
        return np.moveaxis(self.states.numpy(force=True), 2, 0)


def is_recurrent(policy: Any) -> bool:
    """Whether a policy, or a class of policies, is one of sb3-contrib's with an LSTM; contrib is not imported for that."""
    base = imported(RECURRENT["MlpLstmPolicy"])
    return base is not None and issubclass(policy if isinstance(policy, type) else type(policy), base)


def remembered(policy: Any, kept: np.ndarray | None, episode_starts: np.ndarray) -> Memory:
    """
    The memory to act with.

    :param policy: recurrent
    :param kept: :meth:`Memory.array` after the last step; ``None``, or of another shape than the policy's, for none
    :param episode_starts: ``[n_envs]``, whether an episode begins
    """
    lstm = policy.lstm_actor
    n_states = 2 if policy.lstm_critic is None else 4
    shape = (len(episode_starts), n_states, lstm.num_layers, lstm.hidden_size)
    if kept is None or kept.shape != shape or kept.dtype != np.float32:
        kept = np.zeros(shape, np.float32)
    states = th.from_numpy(np.ascontiguousarray(np.moveaxis(kept, 0, 2))).to(policy.device)
    return Memory(states, th.tensor(episode_starts, dtype=th.float32, device=policy.device))


def check_remembered(policy: Any, observation: Any, state: Any, episode_start: Any) -> None:
    """
    What ``predict`` is given besides observations: contrib takes three observations with one state for a sequence of three.

    :param policy: recurrent
    :param observation: ``[*obs_shape]`` or ``[n, *obs_shape]``, or a dict of such
    :param state: hidden and cell state, each ``[n_layers, n, hidden_size]``; ``None`` for zeros
    :param episode_start: ``[n]``, whether an episode begins; ``None`` for nowhere
    :raises ValueError: for another number of states or of starts than of observations
    """
    if state is None and episode_start is None:
        return
    tensors = policy.obs_to_tensor(observation)[0]
    n = len(next(iter(tensors.values())) if isinstance(tensors, dict) else tensors)
    shape = (policy.lstm_actor.num_layers, n, policy.lstm_actor.hidden_size)
    if state is not None and (len(state) != 2 or any(np.shape(part) != shape for part in state)):
        given = [list(np.shape(part)) for part in state]
        raise ValueError(
            f"state must be two arrays of shape [n_layers, n, hidden_size] = {list(shape)}, as predict returns them for "
            f"n = {n} observations, not of shapes {given}"
        )
    if episode_start is not None and np.shape(np.atleast_1d(episode_start)) != (n,):
        raise ValueError(f"episode_start must have shape [{n}], one per observation, not {list(np.shape(episode_start))}")


def check_recurrent_arguments(policy_kwargs: Mapping[str, Any]) -> None:
    """
    :param policy_kwargs: of a recurrent policy
    :raises TypeError: for sizes that are no integers
    :raises ValueError: for sizes below 1, or an LSTM of a make that the policy's heads do not fit
    """
    for name in ("lstm_hidden_size", "n_lstm_layers"):
        check_integer(f"policy_kwargs[{name!r}]", policy_kwargs.get(name, 1), 1)
    for name in ("shared_lstm", "enable_critic_lstm"):
        check_flag(f"policy_kwargs[{name!r}]", policy_kwargs.get(name, True))
    if policy_kwargs.get("shared_lstm", False) and policy_kwargs.get("enable_critic_lstm", True):
        raise ValueError(
            "policy_kwargs={'shared_lstm': True} needs 'enable_critic_lstm': False: the critic has one LSTM or none"
        )
    lstm_kwargs = policy_kwargs.get("lstm_kwargs") or {}
    for name in ("proj_size", "bidirectional", "batch_first"):
        if lstm_kwargs.get(name):
            raise ValueError(
                f"policy_kwargs['lstm_kwargs'] must leave out {name!r}, not set it to {lstm_kwargs[name]!r}: the policy is "
                "made for outputs of lstm_hidden_size numbers, forward in time"
            )
