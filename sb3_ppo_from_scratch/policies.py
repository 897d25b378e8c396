"""The networks. SB3's and sb3-contrib's policies serve as they are; ``SharedMlpPolicy`` adds two heads on one trunk."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from functools import cache
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.ppo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from torch import nn

__all__ = [
    "MASKABLE",
    "MASKABLE_RECURRENT",
    "RECURRENT",
    "CnnPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "SharedMlpExtractor",
    "SharedMlpPolicy",
    "import_policy",
    "imported",
    "mask_argument",
    "takes_masks",
]

MASKABLE = {
    "MaskableMlpPolicy": "sb3_contrib.common.maskable.policies:MaskableActorCriticPolicy",
    "MaskableCnnPolicy": "sb3_contrib.common.maskable.policies:MaskableActorCriticCnnPolicy",
    "MaskableMultiInputPolicy": "sb3_contrib.common.maskable.policies:MaskableMultiInputActorCriticPolicy",
}
"""Policies that choose among the actions that a mask allows: sb3-contrib's classes, by module and name."""

RECURRENT = {
    "MlpLstmPolicy": "sb3_contrib.common.recurrent.policies:RecurrentActorCriticPolicy",
    "CnnLstmPolicy": "sb3_contrib.common.recurrent.policies:RecurrentActorCriticCnnPolicy",
    "MultiInputLstmPolicy": "sb3_contrib.common.recurrent.policies:RecurrentMultiInputActorCriticPolicy",
}
"""Policies that remember, by an LSTM: sb3-contrib's classes, by module and name."""

MASKABLE_RECURRENT = {
    "MaskableMlpLstmPolicy": "sb3_ppo_from_scratch.recurrent.maskable:MaskableMlpLstmPolicy",
    "MaskableCnnLstmPolicy": "sb3_ppo_from_scratch.recurrent.maskable:MaskableCnnLstmPolicy",
    "MaskableMultiInputLstmPolicy": "sb3_ppo_from_scratch.recurrent.maskable:MaskableMultiInputLstmPolicy",
}
"""Both at once: ours, on sb3-contrib's, by module and name."""


def import_policy(where: str) -> Any:
    """
    A policy that needs sb3-contrib, which is imported for those who ask for one.

    :param where: its module and its name, as in :data:`MASKABLE`
    :raises ModuleNotFoundError: if sb3-contrib is not installed
    """
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sb3_contrib":
            raise
        raise ModuleNotFoundError(
            f"this policy needs sb3-contrib, which is not installed ({error}): pip install 'sb3-ppo-from-scratch[contrib]'"
        ) from error


def imported(where: str) -> Any:
    """The same without importing anything: ``None`` where nobody has imported it, and nothing can be of that class."""
    module, _, name = where.partition(":")
    return getattr(sys.modules.get(module), name, None)


@cache
def takes_masks(policy_class: type) -> bool:
    """Whether policies of a class choose among the actions that a mask allows, as sb3-contrib's maskable ones do."""
    forward = getattr(policy_class, "forward", None)
    return forward is not None and "action_masks" in inspect.signature(forward).parameters


def mask_argument(action_masks: Any) -> dict[str, Any]:
    """A keyword argument for policies that take masks, and none where there are no masks."""
    return {} if action_masks is None else {"action_masks": action_masks}


class SharedMlpExtractor(nn.Module):
    """
    The trunk: fully connected layers whose output both heads read.

    It has the interface of SB3's ``MlpExtractor``, where actor and critic have layers of their own.

    :param feature_dim: size of the features that come in
    :param net_arch: sizes of the layers, first to last; ``[]`` passes the features on
    :param activation_fn: activation after every layer
    """

    def __init__(self, feature_dim: int, net_arch: list[int], activation_fn: type[nn.Module]):
        super().__init__()
        sizes = [feature_dim, *net_arch]
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), activation_fn()]
        self.trunk = nn.Sequential(*layers)
        self.latent_dim_pi = self.latent_dim_vf = sizes[-1]

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """``[batch_size, feature_dim]`` to the latent of the policy head and that of the value head: one tensor."""
        latent = self.trunk(features)
        return latent, latent

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        """``[batch_size, feature_dim]`` to ``[batch_size, net_arch[-1]]``."""
        return self.trunk(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        """``[batch_size, feature_dim]`` to ``[batch_size, net_arch[-1]]``."""
        return self.trunk(features)


class SharedMlpPolicy(ActorCriticPolicy):
    """
    One trunk of fully connected layers with a policy head and a value head on top.

    Fewer parameters and one forward pass less than ``MlpPolicy``'s two towers; the two losses then pull on the same layers.
    Takes all of ``ActorCriticPolicy``'s arguments.

    :param net_arch: sizes of the trunk's layers, ``[64, 64]`` by default
    :raises ValueError: if ``net_arch`` is not a list of positive integers
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        arch = [64, 64] if net_arch is None else net_arch
        if not isinstance(arch, list | tuple) or not all(isinstance(size, int) and size > 0 for size in arch):
            raise ValueError(f"net_arch of SharedMlpPolicy must be a list of positive integers (the trunk), not {net_arch!r}")
        super().__init__(observation_space, action_space, lr_schedule, list(arch), *args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        assert isinstance(self.net_arch, list)  # the constructor made it one
        # SB3's attribute is typed as its own MlpExtractor; ours has the same interface
        self.mlp_extractor = SharedMlpExtractor(self.features_dim, self.net_arch, self.activation_fn)  # type: ignore[assignment]
