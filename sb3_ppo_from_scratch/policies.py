"""
The networks. SB3's policies serve as they are; ``SharedMlpPolicy`` adds two heads on one trunk; sb3-contrib's are imported
when they are asked for by name.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.ppo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from torch import nn

__all__ = [
    "CONTRIB_POLICIES",
    "CnnPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "SharedMlpExtractor",
    "SharedMlpPolicy",
    "contrib_name",
    "contrib_policy",
]

CONTRIB_POLICIES: dict[str, str] = {
    "MlpLstmPolicy": "sb3_contrib.ppo_recurrent.policies",
    "CnnLstmPolicy": "sb3_contrib.ppo_recurrent.policies",
    "MultiInputLstmPolicy": "sb3_contrib.ppo_recurrent.policies",
}
"""sb3-contrib's policies by name, and the module that each stands in."""


def contrib_policy(name: str) -> type[BasePolicy]:
    """
    One of :data:`CONTRIB_POLICIES`.

    :raises ImportError: if sb3-contrib is not installed
    """
    try:
        return getattr(importlib.import_module(CONTRIB_POLICIES[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"policy {name!r} needs sb3-contrib: pip install 'sb3-ppo-from-scratch[contrib]'") from error


def contrib_name(policy_class: type) -> str | None:
    """The name of a class among :data:`CONTRIB_POLICIES`, none of which is imported for that; ``None`` if it has none."""
    for name, module in CONTRIB_POLICIES.items():
        if getattr(sys.modules.get(module), name, None) is policy_class:
            return name
    return None


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
