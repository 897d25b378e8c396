"""Models that a user has taken apart after building them still train to SB3's bits: no shortcut is taken past a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_from_scratch import ScratchPPO
from tests.helpers import assert_same_model

Change = Callable[[ActorCriticPolicy], Any]


def trained(algorithm: type[OnPolicyAlgorithm], change: Change, env_id: str, **kwargs: Any) -> OnPolicyAlgorithm:
    engine = {"engine": "torch"} if algorithm is ScratchPPO else {}
    sizes = {"n_steps": 32, "batch_size": 32, "n_epochs": 3, **kwargs}
    model = algorithm("MlpPolicy", make_vec_env(env_id, 4, seed=5), seed=3, device="cpu", **sizes, **engine)
    change(model.policy)
    return model.learn(384)


def assert_equal_after(change: Change, env_id: str = "CartPole-v1", **kwargs: Any) -> None:
    ours, theirs = (trained(algorithm, change, env_id, **kwargs) for algorithm in (ScratchPPO, PPO))
    assert_same_model(ours, theirs)


def doubled(owner: Callable[[ActorCriticPolicy], Any], name: str, first_of: bool = False) -> Change:
    """Shadow a method on the instance by one that doubles what it returns, or the value in a tuple of results."""

    def change(policy: ActorCriticPolicy) -> None:
        target = owner(policy)
        method = getattr(target, name)

        def shadow(*args: Any) -> Any:
            result = method(*args)
            return (2 * result[0], *result[1:]) if first_of else 2 * result

        setattr(target, name, shadow)

    return change


def tie(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net[0].weight = policy.mlp_extractor.policy_net[0].weight


def shadow_step(policy: ActorCriticPolicy) -> None:
    step = policy.optimizer.step

    def noisy(*args: Any) -> Any:
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.01)
        return step(*args)

    policy.optimizer.step = noisy  # type: ignore[method-assign]  # what the test is about


def new_optimizer(choose: Callable[[list[nn.Parameter]], Any]) -> Change:
    def change(policy: ActorCriticPolicy) -> None:
        policy.optimizer = th.optim.Adam(choose(list(policy.parameters())), lr=1e-3)

    return change


def itself(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    return policy


CHANGES: dict[str, Change] = {
    "frozen critic head": lambda policy: policy.value_net.requires_grad_(False),
    "frozen actor head": lambda policy: policy.action_net.requires_grad_(False),
    "frozen towers": lambda policy: policy.mlp_extractor.requires_grad_(False),
    "one frozen weight": lambda policy: policy.mlp_extractor.policy_net[0].weight.requires_grad_(False),
    "tied weights": tie,
    "gradient hook": lambda policy: policy.action_net.weight.register_hook(lambda gradient: 2 * gradient),
    "forward hook": lambda policy: policy.action_net.register_forward_hook(lambda _, __, output: 2 * output),
    "forward pre-hook": lambda policy: policy.value_net.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)),
    "backward hook": lambda policy: policy.value_net.register_full_backward_hook(lambda _, inputs, __: (2 * inputs[0],)),
    "evaluate_actions of the instance": doubled(itself, "evaluate_actions", first_of=True),
    "predict_values of the instance": doubled(itself, "predict_values"),
    "a layer's forward of the instance": doubled(lambda policy: policy.action_net, "forward"),
    "two parameter groups": new_optimizer(lambda p: [{"params": p[:3]}, {"params": p[3:], "weight_decay": 0.1}]),
    "parameters in another order": new_optimizer(lambda p: p[::-1]),
    "extract_features of the instance": doubled(itself, "extract_features"),
    "step of the optimizer's instance": shadow_step,
    "optimizer of some parameters": new_optimizer(lambda p: p[:3]),
    "parametrized layer": lambda policy: nn.utils.parametrizations.weight_norm(policy.action_net),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_models(change: Change) -> None:
    assert_equal_after(change)


class OwnDistribution(ActorCriticPolicy):
    """Has no use for SB3's ``action_dist``, which stays as it was built."""

    def _categorical(self, obs: Any) -> tuple[th.distributions.Categorical, th.Tensor]:
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        return th.distributions.Categorical(logits=self.action_net(latent_pi)), self.value_net(latent_vf)

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        distribution, values = self._categorical(obs)
        actions = distribution.sample()
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        distribution, values = self._categorical(obs)
        return values, distribution.log_prob(actions), distribution.entropy()


def test_a_policy_with_a_distribution_of_its_own() -> None:
    ends = []
    for algorithm, kwargs in ((PPO, {}), (ScratchPPO, {"engine": "torch"})):
        model = algorithm(OwnDistribution, make_vec_env("CartPole-v1", 2, seed=5), n_steps=32, seed=3, device="cpu", **kwargs)
        ends.append(model.learn(192))
    assert_same_model(ends[1], ends[0])
    assert "train/kl" not in ends[1].logger.name_to_value
