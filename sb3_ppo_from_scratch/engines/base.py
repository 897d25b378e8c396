"""The seam for speed: everything numeric that touches the networks goes through an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer
from sb3_ppo_from_scratch.recurrent import Memory
from sb3_ppo_from_scratch.update import Learner, Loss, UpdateConfig, UpdateStats, minibatch_loss, update

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
    memory: Memory | None = None
    """what a recurrent policy remembers after the step, in the same episode; ``None`` for others"""


class Engine(ABC):
    """
    Acts with a policy, and finds the gradient that improves it; the loop of an update is :func:`~.update.update`'s.

    Whatever happens inside, ``policy`` and ``policy.optimizer`` are left as SB3 would leave them: parameters in place, and the
    optimizer's state per parameter.

    :param policy: the policy to work on
    :param precision: number format of the networks' products, one of :attr:`precisions`
    :param loss: of a minibatch
    """

    name: ClassVar[str]
    batched_bootstrap: ClassVar[bool] = True
    """Whether the values behind the time limits of one step may be asked for in one call, which may round differently."""
    buffer_class: ClassVar[type[ScratchRolloutBuffer]] = ScratchRolloutBuffer
    """What holds the rollouts that it learns from, unless the user chooses another."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """What ``precision`` may be."""
    defers: ClassVar[bool] = False
    """Whether :meth:`sample_actions` in each step and one :meth:`complete` for many do what :meth:`act` does, for less."""
    shares_minibatches: ClassVar[bool] = False
    """Whether several processes may share a minibatch: its learner fills, clips and steps along the parameters' ``grad``."""

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32", loss: Loss = minibatch_loss):
        self.policy = policy
        self.precision = precision
        self.loss = loss

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        """Why this engine cannot serve ``policy``; ``None`` if it can."""

    @classmethod
    def precision_reason(cls, policy: ActorCriticPolicy, precision: str) -> str | None:
        """Why it cannot do so with that precision; ``None`` if it can."""
        return None if precision in cls.precisions else f"its precision must be {' or '.join(map(repr, cls.precisions))}"

    @classmethod
    def loss_reason(cls, loss: Loss) -> str | None:
        """Why it cannot find the gradient of ``loss``; ``None`` if it can."""
        return None

    @classmethod
    def refusal(cls, policy: ActorCriticPolicy, precision: str = "fp32", loss: Loss = minibatch_loss) -> str | None:
        """The first reason why this engine cannot do all of that; ``None`` if there is none."""
        return cls.precision_reason(policy, precision) or cls.loss_reason(loss) or cls.unsupported_reason(policy)

    def begin_rollout(self) -> None:  # noqa: B027  # most engines have nothing to prepare
        """Called before a rollout's first :meth:`act`: whatever the user did to the policy since the last one is seen here."""

    def objection(self) -> str | None:
        """:meth:`refusal` of its own policy as that is now; asked before each rollout and each update."""
        return self.refusal(self.policy, self.precision, self.loss)

    def is_unchanged(self) -> bool:
        """Whether it acts with its policy as that is now; asked after each call of a user's callback."""
        return self.objection() is None

    def release(self) -> None:  # noqa: B027  # most engines leave parameters where they are
        """Called when training ends: parameters and the optimizer's state go back to where they were."""

    @abstractmethod
    def act(self, obs: PyTorchObs, action_masks: np.ndarray | None = None, memory: Memory | None = None) -> PolicyStep:
        """
        Sample one action per environment.

        :param obs: ``[n_envs, *obs_shape]`` or a dict of such
        :param action_masks: ``[n_envs, n_choices]``, bool, which actions are allowed, for a policy that takes masks; ``None``
            for all. An engine that cannot mask refuses such policies.
        :param memory: of a recurrent policy, before the step
        :raises NonFiniteError: if the policy's probabilities are NaN
        """

    def sample_actions(self, obs: np.ndarray, action_masks: np.ndarray | None = None) -> np.ndarray:
        """
        :meth:`act` where nobody looks at a step: the same actions, to the last bit, by the same random numbers, and no more.

        Only of engines that :attr:`defers`. The weights that it began with count until :meth:`begin_rollout`.

        :param obs: ``[n_envs, *obs_shape]``, as the environments made them
        :param action_masks: as :meth:`act` takes them; the buffer keeps them in its extras
        :return: ``[n_envs, *action_shape]``
        :raises NonFiniteError: if the policy's probabilities are NaN
        """
        raise NotImplementedError

    def complete(self, buffer: ScratchRolloutBuffer) -> None:  # noqa: B027  # nothing is left to do after act
        """
        Bring the values, log-probabilities and distribution parameters of many steps at once.

        Steps that :meth:`act` acted in get them, too, where the engine :attr:`defers`: so a run has the same bits whether
        somebody looks at its steps or not.

        :param buffer: where :attr:`~.buffer.ScratchRolloutBuffer.unrated` says which steps these are, for its ``rate``
        """

    def is_as_acted(self) -> bool:
        """Whether the weights are still those of the last steps; asked after each call of a user's callback."""
        return True

    def as_acted(self) -> AbstractContextManager[None]:
        """A context in which the weights are those of the last steps, whatever has become of them since."""
        return nullcontext()

    @abstractmethod
    def predict_values(self, obs: PyTorchObs, memory: Memory | None = None) -> th.Tensor:
        """
        :param obs: ``[batch_size, *obs_shape]`` or a dict of such
        :param memory: of a recurrent policy, one state per observation
        :return: ``[batch_size, 1]``, without gradient
        """

    @abstractmethod
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> AbstractContextManager[Learner[Any]]:
        """
        Around an update: yields what the loop of :mod:`sb3_ppo_from_scratch.update` works with.

        :param buffer: full, with advantages and returns
        :param config: the update's coefficients
        """

    def update(self, buffer: RolloutBuffer, config: UpdateConfig) -> UpdateStats:
        """
        Improve the policy on one rollout, by the one loop that all engines share.

        :param buffer: full, with advantages and returns
        :param config: the update's coefficients
        :raises NonFiniteError: before a step along a gradient that is not finite (``nan_policy="raise"``)
        """
        with self.learning(buffer, config) as learner:
            return update(learner, config)
