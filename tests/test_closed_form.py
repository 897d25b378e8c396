"""The written-out gradient of the reference engine has the bits of autograd's, whatever the network and the options."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

from sb3_ppo_from_scratch import MlpPolicy
from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.engines.closed_form import ClosedFormMlp
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.update import UpdateConfig

VECTOR = spaces.Box(-1.0, 1.0, (4,))
widths = st.lists(st.sampled_from([2, 3, 7, 16, 64, 65]), max_size=3)


def make_policy(n_actions: int = 3, obs_shape: tuple[int, ...] = (4,), **kwargs: object) -> ActorCriticPolicy:
    return MlpPolicy(spaces.Box(-1.0, 1.0, obs_shape), spaces.Discrete(n_actions), ConstantSchedule(1e-3), **kwargs)


def random_batch(policy: ActorCriticPolicy, size: int, policy_change: float) -> RolloutData:
    """Transitions as an older policy might have left them: ratios on both sides of the clip range."""
    observations = th.randn(size, *policy.observation_space.shape)
    with th.no_grad():
        actions, values, log_prob = policy(observations)
    noise = policy_change * th.randn(3, size)
    return RolloutData(
        observations, actions.float()[:, None], values.flatten() + noise[0], log_prob + noise[1], th.randn(size), noise[2]
    )


def gradients(policy: ActorCriticPolicy, fill: Callable[[], None]) -> list[th.Tensor]:
    policy.zero_grad(set_to_none=True)
    fill()
    assert not any(parameter.grad.requires_grad for parameter in policy.parameters())
    return [parameter.grad.clone() for parameter in policy.parameters()]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    arch=st.builds(lambda pi, vf: {"pi": pi, "vf": vf}, widths, widths),
    activation=st.sampled_from([nn.Tanh, nn.ReLU]),
    n_actions=st.integers(2, 9),
    obs_shape=st.sampled_from([(4,), (2,), (17,), (3, 5)]),
    size=st.sampled_from([1, 2, 33, 64, 100, 256]),
    policy_change=st.sampled_from([0.0, 1e-7, 1e-6, 0.1, 1.0]),
    clip_range=st.sampled_from([-1e-4, 1e-7, 1e-6, 0.2]),  # a schedule may cross 0 at the very end
    clip_range_vf=st.sampled_from([None, 0.1]),
    normalize_advantage=st.booleans(),
    ent_coef=st.sampled_from([0.0, 0.01, -0.1]),
    vf_coef=st.sampled_from([0.0, 0.5, 1.3]),
)
def test_same_bits_as_autograd(
    seed: int,
    arch: dict[str, list[int]],
    activation: type[nn.Module],
    n_actions: int,
    obs_shape: tuple[int, ...],
    size: int,
    policy_change: float,
    clip_range: float,
    clip_range_vf: float | None,
    normalize_advantage: bool,
    ent_coef: float,
    vf_coef: float,
) -> None:
    th.manual_seed(seed)
    policy = make_policy(n_actions, obs_shape, net_arch=arch, activation_fn=activation)
    batch = random_batch(policy, size, policy_change)
    config = UpdateConfig(size, 1, clip_range, clip_range_vf, normalize_advantage, ent_coef, vf_coef, 0.5, None)
    engine, network = TorchEngine(policy), ClosedFormMlp.of(policy)
    assert network is not None
    expected_loss, expected_params, fill = engine._autograd(batch, config)
    expected = gradients(policy, fill)
    loss, params, fill = engine._closed_form(network, batch, config)
    actual = gradients(policy, fill)
    assert all(th.equal(a, b) for a, b in zip(loss, expected_loss, strict=True))
    assert th.equal(params, expected_params)
    for name, a, b in zip(dict(policy.named_parameters()), actual, expected, strict=True):
        assert th.equal(a, b), f"{name}: differs by {(a - b).abs().max()}"


@pytest.mark.parametrize("n_envs", [1, 8])
def test_acts_as_the_policy_does(n_envs: int) -> None:
    policy = make_policy()
    obs = th.randn(n_envs, 4)
    engine = TorchEngine(policy)
    assert engine._network is not None
    th.manual_seed(3)
    actions, values, log_prob = policy(obs)
    th.manual_seed(3)
    step = engine.act(obs)
    assert np.array_equal(step.actions, actions.numpy())
    assert th.equal(step.values, values)
    assert th.equal(step.log_probs, log_prob)


class Overriding(ActorCriticPolicy):
    pass


def with_hook(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.action_net.register_forward_hook(lambda *_: None)
    return policy


def with_shared_weight(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.mlp_extractor.value_net[0].weight = policy.mlp_extractor.policy_net[0].weight
    return policy


def with_frozen_parameter(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.value_net.bias.requires_grad_(False)
    return policy


def with_gradient_hook(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.value_net.weight.register_hook(lambda gradient: 2 * gradient)
    return policy


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(lambda: with_hook(make_policy()), id="module hook"),
        pytest.param(lambda: with_gradient_hook(make_policy()), id="parameter hook"),
        pytest.param(lambda: with_shared_weight(make_policy()), id="shared weight"),
        pytest.param(lambda: with_frozen_parameter(make_policy()), id="frozen parameter"),
        pytest.param(lambda: make_policy(activation_fn=nn.GELU), id="another activation"),
        pytest.param(lambda: make_policy(net_arch=[8, 1, 8]), id="one unit wide"),
        pytest.param(lambda: make_policy(share_features_extractor=False), id="two extractors"),
        pytest.param(lambda: Overriding(VECTOR, spaces.Discrete(2), ConstantSchedule(1e-3)), id="subclass"),
        pytest.param(lambda: MlpPolicy(VECTOR, spaces.MultiBinary(2), ConstantSchedule(1e-3)), id="other actions"),
        pytest.param(lambda: MlpPolicy(spaces.Discrete(5), spaces.Discrete(2), ConstantSchedule(1e-3)), id="one-hot"),
        pytest.param(lambda: make_policy().double(), id="float64"),
    ],
)
def test_anything_else_goes_through_autograd(policy: Callable[[], ActorCriticPolicy]) -> None:
    assert ClosedFormMlp.of(make_policy()) is not None
    assert ClosedFormMlp.of(policy()) is None
