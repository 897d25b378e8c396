"""The seam for speed: everything numeric that touches the networks goes through an engine's three calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer
from sb3_ppo_from_scratch.update import UpdateConfig, UpdateStats

__all__ = ["NAN_MESSAGE", "Engine", "PolicyStep"]

NAN_MESSAGE = (
    "the policy's action probabilities are NaN: check observations and rewards for NaN and for very large values, and try a "
    "lower learning_rate"
)


class PolicyStep(NamedTuple):
    """What the policy says about one step of every environment."""

    actions: np.ndarray
    """``[n_envs, *action_shape]``, as sampled"""
    values: th.Tensor
    """``[n_envs, 1]``"""
    log_probs: th.Tensor
    """``[n_envs]``"""
    dist_params: th.Tensor | None
    """``[n_envs, n_params]``, see :func:`sb3_ppo_from_scratch.distributions.distribution_parameters`"""


class Engine(ABC):
    """
    Acts with a policy, and improves it.

    Whatever happens inside, ``policy`` and ``policy.optimizer`` are left as SB3 would leave them: parameters in place, and the
    optimizer's state per parameter.

    :param policy: the policy to work on
    :param precision: number format of the networks' products, one of :attr:`precisions`
    """

    name: ClassVar[str]
    batched_bootstrap: ClassVar[bool] = True
    """Whether the values behind the time limits of one step may be asked for in one call, which may round differently."""
    buffer_class: ClassVar[type[ScratchRolloutBuffer]] = ScratchRolloutBuffer
    """What holds the rollouts that it learns from, unless the user chooses another."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """What ``precision`` may be."""

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32"):
        self.policy = policy
        self.precision = precision

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        """Why this engine cannot serve ``policy``; ``None`` if it can."""

    @classmethod
    def precision_reason(cls, policy: ActorCriticPolicy, precision: str) -> str | None:
        """Why it cannot do so with that precision; ``None`` if it can."""
        return None if precision in cls.precisions else f"its precision must be {' or '.join(map(repr, cls.precisions))}"

    def begin_rollout(self) -> None:  # noqa: B027  # most engines have nothing to prepare
        """Called before a rollout's first :meth:`act`: whatever the user did to the policy since the last one is seen here."""

    def get_state(self) -> Any:
        """What the next iteration depends on besides the policy and its optimizer, as plain data; ``None`` for nothing."""
        return None

    def set_state(self, state: Any) -> None:  # noqa: B027  # most engines have none
        """Go on from what :meth:`get_state` returned."""

    @abstractmethod
    def act(self, obs: PyTorchObs) -> PolicyStep:
        """
        Sample one action per environment.

        :param obs: ``[n_envs, *obs_shape]`` or a dict of such
        :raises NonFiniteError: if the policy's probabilities are NaN
        """

    @abstractmethod
    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``[batch_size, *obs_shape]`` or a dict of such
        :return: ``[batch_size, 1]``, without gradient
        """

    @abstractmethod
    def update(self, buffer: RolloutBuffer, config: UpdateConfig) -> UpdateStats:
        """
        Improve the policy on one rollout.

        :param buffer: full, with advantages and returns
        :param config: this update's coefficients
        :raises NonFiniteError: before a step along a gradient that is not finite (``nan_policy="raise"``): engines pass each
            minibatch's loss and gradient norm to :func:`sb3_ppo_from_scratch.update.accept`, or leave it out and count
            it (``"skip"``). Where asking would make the host wait, the step is undone, and the error comes after the update.
        """
