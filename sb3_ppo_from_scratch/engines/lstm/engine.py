"""
Policies with an LSTM on a CPU: the arithmetic of the reference engine, without its loop over time.

Three things make it faster. A minibatch's sequences go through ``nn.LSTM`` whole (:class:`SequenceRunner`), where torch has
oneDNN's. The features extractor and the heads see real rows only. And a step in the environments is one cell, which has a
fraction of the cost of a sequence of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.distributions import apply_masks
from sb3_ppo_from_scratch.engines.adam import fused_adam
from sb3_ppo_from_scratch.engines.inspection import adam_reason, has_hooks, replaced_method
from sb3_ppo_from_scratch.engines.lstm.sequences import SequenceRunner
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.policies import MASKABLE_RECURRENT, RECURRENT, imported
from sb3_ppo_from_scratch.recurrent import Memory
from sb3_ppo_from_scratch.update import Learner, PolicyOutputs, UpdateConfig

__all__ = ["LstmEngine", "cell_step"]

States = tuple[th.Tensor, ...]
"""Hidden and cell state; none of an LSTM whose states nobody asks for"""


class LstmEngine(TorchEngine):
    """
    Recurrent policies, sb3-contrib's and ours that take masks, on CPU, with Adam or AdamW. Equal to the reference up to
    rounding.

    Dropout between an LSTM's layers is left to the reference: other calls draw other numbers.
    """

    name = "lstm"
    batched_bootstrap = True

    @classmethod
    @override
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        if type(policy) not in map(imported, (RECURRENT | MASKABLE_RECURRENT).values()):
            return f"the policy must be one with an LSTM, sb3-contrib's or ours, not {type(policy).__name__}"
        if name := replaced_method(policy):
            return f"the policy's {name} was replaced"
        if has_hooks(policy):
            return "there are hooks on the policy or on all modules"
        for name in ("lstm_actor", "lstm_critic"):
            lstm = getattr(policy, name)
            if lstm is not None and (reason := _lstm_reason(lstm)):
                return f"{name} {reason}"
        if any(parameter.device.type != "cpu" or parameter.dtype != th.float32 for parameter in policy.parameters()):
            return "the parameters must be float32 and on the CPU"
        return adam_reason(policy.optimizer, policy.parameters())

    @override
    def sample_with_memory(
        self, obs: PyTorchObs, memory: Memory, action_masks: np.ndarray | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, Memory]:
        values, distribution, states = self._step(obs, memory)
        apply_masks(distribution, action_masks)
        actions = distribution.get_actions()
        log_probs = distribution.log_prob(actions)
        actions = actions.reshape(-1, *self.policy.action_space.shape)  # type: ignore[misc]  # no Dict
        return actions, values, log_probs, Memory(th.stack(states), th.zeros_like(memory.starts))

    @override
    @th.no_grad()
    def predict_values(self, obs: PyTorchObs, memory: Memory | None = None) -> th.Tensor:
        assert memory is not None  # the policy is recurrent
        return self._step(obs, memory)[0]

    def _step(self, obs: PyTorchObs, memory: Memory) -> tuple[th.Tensor, Distribution, States]:
        """Values ``[n_envs, 1]``, the distribution of the actions, and the states after the step."""
        return _heads(self.policy, obs, cell_step, memory.states * (1.0 - memory.starts)[:, None])

    @override
    def evaluate_sequences(
        self, batch: RolloutData, actions: th.Tensor, action_masks: th.Tensor | None = None
    ) -> PolicyOutputs:
        run = SequenceRunner(batch)
        values, distribution, _ = _heads(self.policy, batch.observations, run, run.states)
        apply_masks(distribution, action_masks)
        return PolicyOutputs(values.flatten(), distribution.log_prob(actions), distribution.entropy(), distribution)

    @override
    @contextmanager
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[RolloutData]]:
        with fused_adam(self.policy.optimizer), super().learning(buffer, config) as learner:
            yield learner


def _lstm_reason(lstm: nn.LSTM) -> str | None:
    """Why calling it once is not what calling it step by step is."""
    if type(lstm) is not nn.LSTM or replaced_method(lstm):
        return f"is of type {type(lstm).__name__}" if type(lstm) is not nn.LSTM else "has had a method replaced"
    if has_hooks(lstm):
        return "has hooks"
    if lstm.batch_first or lstm.bidirectional or lstm.proj_size:
        return "is batch_first, bidirectional or has projections"
    return "has dropout between its layers" if lstm.dropout and lstm.num_layers > 1 else None


def _heads(
    policy: Any,
    obs: PyTorchObs,
    remember: Callable[[nn.LSTM, th.Tensor, th.Tensor], tuple[th.Tensor, States]],
    states: th.Tensor,
) -> tuple[th.Tensor, Distribution, States]:
    """
    sb3-contrib's forward pass, whatever way the LSTMs are run.

    :param policy: one of sb3-contrib's
    :param obs: ``[n, *obs_shape]`` or a dict of such
    :param remember: of an LSTM, features ``[n, n_features]`` and its two states, makes outputs ``[n, hidden_size]`` and states
    :param states: ``[n_states, n_layers, n_sequences, hidden_size]``
    :return: values ``[n, 1]``, the distribution of the actions, and all states after
    """
    features = policy.extract_features(obs)
    pi_features, vf_features = (features, features) if policy.share_features_extractor else features
    latent_pi, after = remember(policy.lstm_actor, pi_features, states[:2])
    if policy.lstm_critic is not None:
        latent_vf, after_critic = remember(policy.lstm_critic, vf_features, states[2:])
        after = (*after, *after_critic)
    else:  # with the actor's memory, but without its gradient, or with none
        latent_vf = latent_pi.detach() if policy.shared_lstm else policy.critic(vf_features)
    values = policy.value_net(policy.mlp_extractor.forward_critic(latent_vf))
    return values, policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi)), after


def cell_step(lstm: nn.LSTM, features: th.Tensor, states: th.Tensor) -> tuple[th.Tensor, States]:
    """
    One step of each environment.

    :param lstm: forward in time, without projections
    :param features: ``[n_envs, n_features]``
    :param states: hidden and cell state, ``[2, n_layers, n_envs, hidden_size]``
    :return: the last layer's hidden state, ``[n_envs, hidden_size]``; both states after the step
    """
    output, hidden, cell = features, [], []
    for layer, weights in enumerate(lstm.all_weights):
        output, memory = th.lstm_cell(output, (states[0, layer], states[1, layer]), *weights)
        hidden.append(output)
        cell.append(memory)
    return output, (th.stack(hidden), th.stack(cell))
