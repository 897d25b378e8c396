"""
Policies that remember and choose among the actions that a mask allows.

sb3-contrib has either, but not both (its issues 76, 101 and 241). Here its recurrent policies get its masked distributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.maskable.distributions import MaskableDistribution, make_masked_proba_distribution
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_ppo_from_scratch.distributions import apply_masks, choices

__all__ = ["MaskableCnnLstmPolicy", "MaskableMlpLstmPolicy", "MaskableMultiInputLstmPolicy"]

Masks = np.ndarray | th.Tensor | None
"""``[n, n_choices]``, which actions are allowed; ``None`` for all"""


class _Masked(RecurrentActorCriticPolicy):
    """All of contrib's methods ask one for the distribution; there the mask is applied. The names in files are contrib's."""

    _action_masks: Masks = None

    def _build(self, lr_schedule: Schedule) -> None:
        # a layer with a logit per choice, for bits too: the one that sb3-contrib's maskable policies have
        self.action_dist = MultiCategoricalDistribution(choices(self.action_space))
        super()._build(lr_schedule)
        self.action_dist: Any = make_masked_proba_distribution(self.action_space)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> MaskableDistribution:
        distribution = self.action_dist.proba_distribution(action_logits=self.action_net(latent_pi))
        apply_masks(distribution, self._action_masks)
        return distribution

    @contextmanager
    def _masked_by(self, action_masks: Masks) -> Iterator[None]:
        self._action_masks = action_masks
        try:
            yield
        finally:
            self._action_masks = None

    def forward(  # type: ignore[override]  # as contrib's own, against SB3's
        self,
        obs: PyTorchObs,
        lstm_states: RNNStates,
        episode_starts: th.Tensor,
        deterministic: bool = False,
        action_masks: Masks = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, RNNStates]:
        """As contrib's recurrent policies, with ``action_masks`` of ``[n_envs, n_choices]``."""
        with self._masked_by(action_masks):
            return super().forward(obs, lstm_states, episode_starts, deterministic)  # type: ignore[arg-type]  # dicts too

    def evaluate_actions(  # type: ignore[override]  # likewise
        self,
        obs: PyTorchObs,
        actions: th.Tensor,
        lstm_states: RNNStates,
        episode_starts: th.Tensor,
        action_masks: Masks = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """As contrib's recurrent policies, with ``action_masks`` of ``[B, n_choices]``."""
        with self._masked_by(action_masks):
            return super().evaluate_actions(obs, actions, lstm_states, episode_starts)  # type: ignore[arg-type]  # dicts too

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Masks = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As contrib's recurrent policies, with ``action_masks`` of ``[n, n_choices]``."""
        with self._masked_by(action_masks):
            return super().predict(observation, state, episode_start, deterministic)


class MaskableMlpLstmPolicy(_Masked):
    """``MlpLstmPolicy`` with masks of invalid actions; Discrete, MultiDiscrete or MultiBinary actions."""


class MaskableCnnLstmPolicy(_Masked, RecurrentActorCriticCnnPolicy):
    """``CnnLstmPolicy`` with masks of invalid actions; Discrete, MultiDiscrete or MultiBinary actions."""


class MaskableMultiInputLstmPolicy(_Masked, RecurrentMultiInputActorCriticPolicy):
    """``MultiInputLstmPolicy`` with masks of invalid actions; Discrete, MultiDiscrete or MultiBinary actions."""
