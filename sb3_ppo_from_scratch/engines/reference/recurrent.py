"""
sb3-contrib's operations in sb3-contrib's order on its recurrent policies.

Its evaluation wants sequences padded to one length; the padding is dropped before anybody makes a loss of what comes out.
"""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.distributions import select_rows
from sb3_ppo_from_scratch.policies import mask_argument
from sb3_ppo_from_scratch.recurrent import EPISODE_STARTS, LSTM_STATES, SEQUENCE_STARTS, Memory, Sequences
from sb3_ppo_from_scratch.update import PolicyOutputs

__all__ = ["evaluate", "predict_values", "sample"]


def sample(
    policy: Any, obs: PyTorchObs, memory: Memory, action_masks: Any = None
) -> tuple[th.Tensor, th.Tensor, th.Tensor, Memory]:
    """
    :param policy: recurrent
    :param obs: ``[n_envs, *obs_shape]`` or a dict of such
    :param memory: before the step
    :param action_masks: ``[n_envs, n_choices]``, for a policy that takes them
    :return: actions, values ``[n_envs, 1]``, log-probabilities ``[n_envs]``, the memory after the step
    """
    actions, values, log_probs, after = policy(obs, _states(memory), memory.starts, **mask_argument(action_masks))
    states = after.pi if len(memory.states) == 2 else (*after.pi, *after.vf)
    return actions, values, log_probs, Memory(th.stack(states), th.zeros_like(memory.starts))


def predict_values(policy: Any, obs: PyTorchObs, memory: Memory) -> th.Tensor:
    """``[batch_size, 1]``, from one observation for each state in ``memory``."""
    return policy.predict_values(obs, memory.critic, memory.starts)


def evaluate(policy: Any, batch: RolloutData, actions: th.Tensor, action_masks: th.Tensor | None = None) -> PolicyOutputs:
    """
    :param policy: recurrent
    :param batch: B transitions in the order of time
    :param actions: ``[B, ...]``
    :param action_masks: ``[B, n_choices]``, for a policy that takes them
    :return: of the B transitions, with gradient
    """
    sequences = Sequences.beginning_at(batch.extras[SEQUENCE_STARTS])
    observations: Any = batch.observations
    if isinstance(observations, dict):
        observations = {key: sequences.padded(rows) for key, rows in observations.items()}
    else:
        observations = sequences.padded(observations)
    masks = None if action_masks is None else sequences.padded(action_masks)
    states = batch.extras[LSTM_STATES][sequences.first].movedim(0, 2).contiguous()  # [n_states, n_layers, n_seq, hidden_size]
    values, log_prob, entropy = policy.evaluate_actions(
        observations,
        sequences.padded(actions),
        _states(Memory(states, batch.extras[EPISODE_STARTS])),
        sequences.padded(batch.extras[EPISODE_STARTS]),
        **mask_argument(masks),
    )
    places = sequences.places
    entropy = None if entropy is None else entropy[places]
    return PolicyOutputs(values.flatten()[places], log_prob[places], entropy, select_rows(policy.action_dist, places))


def _states(memory: Memory) -> Any:
    from sb3_contrib.common.recurrent.type_aliases import RNNStates  # imported already, with the policy

    return RNNStates(memory.actor, memory.critic)
