"""
The engine: memory, the policy step, and what an update works with, in NumPy, for plain MLP policies on a CPU.

Small networks spend their time not in arithmetic but in getting to it. Here a minibatch is some eighty calls of NumPy on
arrays that share their memory with the policy's own parameters: no graph, no copies, no loop over parameters. Random numbers
are drawn as the reference engine draws them, so the two differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import PyTorchObs
from typing_extensions import override

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer
from sb3_ppo_from_scratch.distributions import choices, drop_graph
from sb3_ppo_from_scratch.engines.base import Engine, PolicyStep
from sb3_ppo_from_scratch.engines.inspection import Fingerprint, replaced_method
from sb3_ppo_from_scratch.engines.numpy_mlp import support
from sb3_ppo_from_scratch.engines.numpy_mlp.acting import Actor
from sb3_ppo_from_scratch.engines.numpy_mlp.flat import FlatParameters
from sb3_ppo_from_scratch.engines.numpy_mlp.heads import (
    BernoulliHead,
    CategoricalHead,
    GaussianHead,
    Head,
    StateDependentNoiseHead,
    forbidden,
    mask_out,
)
from sb3_ppo_from_scratch.engines.numpy_mlp.learning import NumpyLearner
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Observations, arrays_of
from sb3_ppo_from_scratch.engines.numpy_mlp.network import ActorCriticNetwork, parameter_order
from sb3_ppo_from_scratch.engines.numpy_mlp.optimizers import flat_optimizer
from sb3_ppo_from_scratch.engines.numpy_mlp.threads import single_threaded
from sb3_ppo_from_scratch.policies import takes_masks
from sb3_ppo_from_scratch.recurrent import Memory
from sb3_ppo_from_scratch.update import Learner, Loss, UpdateConfig, minibatch_loss

__all__ = ["NumpyEngine"]

_ROWS = 256
"""Transitions that are looked at in one go after a rollout: few enough for a cache, many enough to be worth the calls"""


class NumpyEngine(Engine):
    """Closed-form PPO for plain MLP policies with Adam or RMSprop, on one CPU thread."""

    name = "numpy"
    shares_minibatches = True
    defers = True
    _actor: Actor | None = None
    """Of this rollout, once somebody has asked for actions alone"""

    def __init__(self, policy: ActorCriticPolicy, precision: str = "fp32", loss: Loss = minibatch_loss):
        super().__init__(policy, precision, loss)
        self._attach()

    @classmethod
    @override
    def unsupported_reason(cls, policy: ActorCriticPolicy) -> str | None:
        return support.unsupported_reason(policy)

    @classmethod
    @override
    def loss_reason(cls, loss: Loss) -> str | None:
        return support.loss_reason(loss)

    # ----------------------------------------------------------------- memory

    @override
    def begin_rollout(self) -> None:
        known = self.is_unchanged() and self._optimizer is self.policy.optimizer
        if not (known and self.flat.is_current() and self.optimizer.is_current()):
            self.release()
            self._attach()
        self._actor = None

    @override
    def objection(self) -> str | None:
        if not self.is_unchanged():
            return super().objection()
        return self.loss_reason(self.loss) or support.optimizer_reason(self.policy.optimizer, self.flat.parameters)

    @override
    def is_unchanged(self) -> bool:
        distribution = self.policy.action_dist
        return self._fingerprint.is_same() and distribution is self._distribution and replaced_method(distribution) is None

    @override
    def release(self) -> None:
        self.flat.release()
        self.optimizer.release()

    def _attach(self) -> None:
        """Lay the parameters and the optimizer's state side by side, and build the network on them."""
        policy = self.policy
        self._optimizer, self._distribution = policy.optimizer, policy.action_dist
        layers = support.layers_of(policy)
        order = parameter_order(layers)
        if hasattr(policy, "log_std"):
            order.append(policy.log_std)
        self.flat = FlatParameters(order)
        self._acted_with = self.flat.vector
        self.optimizer = flat_optimizer(policy.optimizer, self.flat)
        self.network = ActorCriticNetwork(layers, self.flat)
        self._fingerprint = Fingerprint(policy)
        self.head = self._make_head()
        self._action_shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]  # known for such a space

    def _make_head(self) -> Head:
        distribution = self.policy.action_dist
        if takes_masks(type(self.policy)):
            return CategoricalHead(choices(self.policy.action_space))
        if isinstance(distribution, CategoricalDistribution):
            return CategoricalHead([distribution.action_dim])
        if isinstance(distribution, MultiCategoricalDistribution):
            return CategoricalHead([int(size) for size in distribution.action_dims])
        if isinstance(distribution, BernoulliDistribution):
            return BernoulliHead()
        log_std, grad_log_std = (array[0] for array in self.flat.arrays(self.policy.log_std))
        if isinstance(distribution, StateDependentNoiseDistribution):
            return StateDependentNoiseHead(log_std, grad_log_std, distribution)
        return GaussianHead(log_std, grad_log_std)

    # ---------------------------------------------------------------- rollout

    @override
    def act(self, obs: PyTorchObs, action_masks: np.ndarray | None = None, memory: Memory | None = None) -> PolicyStep:
        if not self.is_as_acted():
            self._actor = None
        features = self.features(arrays_of(obs))
        with np.errstate(all="ignore"), single_threaded(len(features) * self.network.largest_layer):
            actions = self._sampled(features, action_masks)
            outputs, values = self.network.forward(features)
            if action_masks is not None:
                mask_out(outputs, forbidden(action_masks))
            log_prob, parameters = self._rated(outputs, actions)
        return PolicyStep(
            actions.reshape(-1, *self._action_shape),
            th.from_numpy(values[:, None]),
            th.from_numpy(log_prob),
            th.from_numpy(parameters),
        )

    @override
    def sample_actions(self, obs: Observations, action_masks: np.ndarray | None = None) -> np.ndarray:
        features = self.features(obs)
        with np.errstate(all="ignore"), single_threaded(len(features) * self.network.largest_layer):
            return self._sampled(features, action_masks).reshape(-1, *self._action_shape)

    def _sampled(self, features: np.ndarray, action_masks: np.ndarray | None) -> np.ndarray:
        """Actions as the head has them, by the weights of the rollout's beginning."""
        if self._actor is None or self._actor.n_envs != len(features):
            self._actor, self._acted_with = Actor(self.network, len(features)), self.flat.vector.copy()
        outputs = self._actor(features)
        if action_masks is not None:
            mask_out(outputs, ~action_masks)
        return self.head.sample(outputs, self._actor.latent)

    @override
    def is_as_acted(self) -> bool:
        return self._actor is None or self.flat.holds(self._acted_with)

    @override
    def as_acted(self) -> AbstractContextManager[None]:
        return self.flat.holding(self._acted_with)

    @override
    def complete(self, buffer: ScratchRolloutBuffer) -> None:
        with np.errstate(all="ignore"), single_threaded(_ROWS * self.network.largest_layer):
            for steps in buffer.unrated_steps(_ROWS):
                observations, actions = buffer.acted(steps)
                outputs, values = self.network.forward(self.features(observations))
                if (masks := buffer.extra("action_masks", steps)) is not None:
                    mask_out(outputs, forbidden(masks))
                buffer.rate(steps, values, *self._rated(outputs, actions))
        self.network.forget()

    def _rated(self, outputs: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param outputs: of the policy head, ``[n_outputs, B]``; overwritten
        :param actions: ``[B, action_dim]``, or as the head samples them
        :return: log-probabilities ``[B]`` and distribution parameters ``[B, n_params]``
        """
        dist = self.head.forward(outputs, self.network.latent)
        return self.head.log_prob(dist, self.head.encode(actions)), self.head.parameters(dist)

    @override
    @np.errstate(all="ignore")  # numbers underflow in silence, as in torch
    def predict_values(self, obs: PyTorchObs, memory: Memory | None = None) -> th.Tensor:
        return th.from_numpy(self.network.forward(self.features(arrays_of(obs)))[1])[:, None]

    def features(self, obs: Observations) -> np.ndarray:
        """
        ``[B, n_features]``, as SB3's ``FlattenExtractor`` makes them, or from a dict its ``CombinedExtractor``.

        A view where the observations are one array of float32.
        """
        space, normalizes = self.policy.observation_space, self.policy.normalize_images
        if not isinstance(obs, dict):
            return _flattened(obs, space, normalizes)
        keys: Any = self.policy.features_extractor.extractors  # in its order
        return np.concatenate([_flattened(obs[key], space[key], normalizes) for key in keys], axis=1)  # type: ignore[index]

    # ----------------------------------------------------------------- update

    @override
    @contextmanager
    def learning(self, buffer: RolloutBuffer, config: UpdateConfig) -> Iterator[Learner[Any]]:
        self.begin_rollout()
        self.flat.publish_gradient()
        # numbers overflow in silence, as in torch
        with np.errstate(all="ignore"), single_threaded(config.batch_size * self.network.largest_layer):
            try:
                yield NumpyLearner(buffer, config, self.network, self.head, self.optimizer, self.features)
            finally:
                self.network.forget()
                drop_graph(self._distribution)  # gSDE's matrices have one


def _flattened(obs: np.ndarray, space: spaces.Space, normalize_images: bool) -> np.ndarray:
    """``[B, n_features]``"""
    if obs.dtype != np.float32:  # float32 is a Box of reals, which SB3 takes as it is
        obs = preprocess_obs(th.from_numpy(obs), space, normalize_images=normalize_images).numpy()  # type: ignore[union-attr]
    return obs.reshape(len(obs), -1)
