"""The policy step: one action per environment, as a function over static tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, MultiCategoricalDistribution
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ppo_from_scratch.distributions import UncheckedDistributions, distribution_parameters
from sb3_ppo_from_scratch.engines.base import NAN_MESSAGE, PolicyStep
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured, unchanged_generator
from sb3_ppo_from_scratch.engines.cudagraph.transfer import page_locked
from sb3_ppo_from_scratch.errors import NonFiniteError

__all__ = ["Heads", "Player", "sample"]

Heads = Callable[[PyTorchObs], tuple[th.Tensor, Distribution]]
"""From observations to values, ``[batch_size, 1]``, and the distribution of the actions."""


def sample(distribution: Distribution) -> th.Tensor:
    """
    What ``distribution.sample()`` does, with the same random numbers, but without waiting: ``torch.multinomial`` asks whether
    its probabilities are such (PyTorch issue 134442).
    """
    if isinstance(distribution, CategoricalDistribution):
        return _draw(distribution.distribution.probs)
    if isinstance(distribution, MultiCategoricalDistribution):
        return th.stack([_draw(factor.probs) for factor in distribution.distribution], dim=1)
    return distribution.sample()


def _draw(probs: th.Tensor) -> th.Tensor:
    """
    A race of exponential clocks: the first to ring is ``i`` with probability ``probs[i]``. So does ``torch.multinomial``.

    :param probs: ``[batch_size, n]``
    :return: ``[batch_size]``, int64
    """
    return (probs / th.empty_like(probs).exponential_()).argmax(dim=-1)


class Player:
    """
    Acts on observations of one shape.

    :param heads: the policy's networks
    :param obs: an example, in memory that is the graph's input from now on: who brings later ones to the same place, as the
        buffer does, spares a copy. Those that are elsewhere are copied there; all have its shape and type.
    :param action_space: for the actions' shape
    """

    def __init__(self, heads: Heads, obs: PyTorchObs, action_space: spaces.Space):
        self.heads = heads
        self.action_shape: tuple[int, ...] = action_space.shape  # type: ignore[assignment]  # no Dict
        self.obs = dict(obs) if isinstance(obs, dict) else obs
        device = next(iter(self.obs.values())).device if isinstance(self.obs, dict) else self.obs.device
        with unchanged_generator(device):
            self.actions, self.numbers = map(th.empty_like, self._compute())
        self.is_sound = th.ones((), dtype=th.bool, device=device)
        self.device = device
        self._on_host = [page_locked(th.empty_like(x, device="cpu"), device) for x in (self.actions, self.is_sound)]
        self._step = Captured(self.step, device)
        self._step.prepare()

    def fits(self, obs: PyTorchObs) -> bool:
        """Whether this is for observations like ``obs``."""
        if isinstance(obs, dict):
            mine = self.obs
            return isinstance(mine, dict) and all(_alike(mine[key], value) for key, value in obs.items())
        return isinstance(self.obs, th.Tensor) and _alike(self.obs, obs)

    @th.no_grad()
    def _compute(self) -> tuple[th.Tensor, th.Tensor]:
        with UncheckedDistributions():
            values, distribution = self.heads(self.obs)
            actions = sample(distribution)
            log_probs = distribution.log_prob(actions)
            dist_params = distribution_parameters(distribution)
        assert dist_params is not None  # of SB3's own distributions
        return actions.reshape(-1, *self.action_shape), th.cat([values, log_probs[:, None], dist_params], dim=1)

    def step(self) -> None:
        """The part that a CUDA graph holds: from :attr:`obs` to :attr:`actions`, :attr:`numbers` and :attr:`is_sound`."""
        actions, numbers = self._compute()
        self.actions.copy_(actions)
        self.numbers.copy_(numbers)
        self.is_sound.copy_(~th.isnan(numbers[:, 1]).any())

    def act(self, obs: PyTorchObs) -> PolicyStep:
        """
        Waits for the device once, for the environments need the actions.

        :param obs: see :meth:`fits`
        :raises NonFiniteError: if the policy's probabilities are NaN
        """
        if isinstance(obs, dict):
            for key, value in obs.items():
                _bring(value, self.obs[key])  # type: ignore[index]  # then it is a dict too
        else:
            _bring(obs, self.obs)  # type: ignore[arg-type]  # likewise
        self._step()
        actions, is_sound = self._on_host
        actions.copy_(self.actions, non_blocking=True)
        is_sound.copy_(self.is_sound, non_blocking=True)
        numbers = self.numbers.clone()  # the next step writes there
        if self.device.type == "cuda":
            th.cuda.current_stream(self.device).synchronize()
        if not is_sound:
            raise NonFiniteError("probabilities", NAN_MESSAGE)
        return PolicyStep(np.array(actions.numpy()), numbers[:, :1], numbers[:, 1], numbers[:, 2:])


def _bring(source: th.Tensor, target: th.Tensor) -> None:
    if source is not target:
        target.copy_(source, non_blocking=True)


def _alike(a: th.Tensor, b: th.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype
