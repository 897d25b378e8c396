"""The compiled engine computes what the reference engine computes, on every instruction set, and steps aside where it cannot."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import nn

from sb3_ppo_from_scratch import NonFiniteError, ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.compiled import CompiledEngine, library
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import UpdateConfig, UpdateStats
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES
from tests.helpers import make_engine, update_config
from tests.test_numpy_engine import (
    ACTIVATIONS,
    action_spaces,
    autograd,
    compare_update,
    make_policy,
    outputs_of,
    random_batch,
    widths,
)

ROOT = Path(__file__).parent.parent
is_built = pytest.mark.skipif(library.kernel_reason() is not None, reason=str(library.kernel_reason()))


def instruction_sets() -> list[str]:
    """Those that this machine has."""
    with pytest.MonkeyPatch.context() as patch:

        def runs_on(name: str) -> bool:
            patch.setenv(library.VARIABLE, name)
            return library.kernel_reason() is None

        return [name for name in library.INSTRUCTION_SETS if runs_on(name)]


AVAILABLE = instruction_sets()
on_every_instruction_set = pytest.mark.parametrize(
    "instruction_set",
    [
        pytest.param(name, marks=[pytest.mark.skipif(name not in AVAILABLE, reason=f"no {name} here, or no kernel")])
        for name in library.INSTRUCTION_SETS
    ],
)


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(library.VARIABLE, request.param)
    return request.param


class Samples(RolloutBuffer):
    """A class of the user's that hands out minibatches of its own."""

    def __init__(self, policy: ActorCriticPolicy, *batches: Batch):
        super().__init__(1, policy.observation_space, policy.action_space)
        self.batches = batches

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples]:
        return (RolloutBufferSamples(*map(th.as_tensor, batch[:6])) for batch in self.batches)


def in_double(batch: Batch) -> Batch:
    return Batch(*(None if field is None else field.astype(np.float64) for field in batch))  # type: ignore[arg-type]


def learned(policy: ActorCriticPolicy, *batches: Batch, **config: Any) -> tuple[CompiledEngine, UpdateStats]:
    """One epoch of these minibatches."""
    engine = CompiledEngine(policy)
    options = {"n_epochs": 1, "batch_size": 64, **config}
    return engine, engine.update(Samples(policy, *batches), update_config(**options))


# ------------------------------------------------------------------- the gradient


def distance_to_kinks(policy: ActorCriticPolicy, batch: Batch, config: UpdateConfig) -> float:
    """How near something lies to where the loss has no derivative: on which side of it, rounding decides."""
    distances = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: distances.append(inputs[0].abs()))
        for module in policy.modules()
        if isinstance(module, nn.ReLU | nn.LeakyReLU | nn.ELU)
    ]
    with th.no_grad():
        distribution, values = outputs_of(policy, th.from_numpy(batch.observations))
        actions = th.from_numpy(batch.actions)
        actions = actions.long().flatten() if isinstance(policy.action_space, spaces.Discrete) else actions
        ratio = th.exp(distribution.log_prob(actions) - th.from_numpy(batch.old_log_prob))
    for handle in handles:
        handle.remove()
    distances.append(((ratio - 1).abs() - config.clip_range).abs())
    if config.clip_range_vf is not None:
        distances.append(((values - th.from_numpy(batch.old_values)).abs() - config.clip_range_vf).abs())
    return min(float(each.min()) for each in distances)


@is_built
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(AVAILABLE or ["generic"]),
    action_space=action_spaces,
    pi=widths,
    vf=st.one_of(st.none(), widths),
    shared=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    size=st.sampled_from([1, 2, 33, 64, 100]),
    policy_change=st.sampled_from([0.01, 0.1, 1.0]),
    clip_range=st.sampled_from([-1e-4, 0.1, 0.2]),
    clip_range_vf=st.sampled_from([None, 0.1]),
    normalize_advantage=st.booleans(),
    ent_coef=st.sampled_from([0.0, 0.01, -0.1]),
    vf_coef=st.sampled_from([0.0, 0.5, 1.3]),
)
def test_gradient_is_autograds(
    seed: int,
    name: str,
    action_space: spaces.Space,
    pi: list[int],
    vf: list[int] | None,
    shared: bool,
    activation: type[nn.Module],
    size: int,
    policy_change: float,
    **coefficients: Any,
) -> None:
    """In float32, to 1e-5 of the largest entry of what float64 yields."""
    th.manual_seed(seed)
    net_arch: Any = pi if shared else {"pi": pi, "vf": pi if vf is None else vf}
    policy = make_policy(action_space, shared, net_arch=net_arch, activation_fn=activation)
    batch = random_batch(policy, size, policy_change, th.float32)
    exact, exact_batch = copy.deepcopy(policy).double(), in_double(batch)
    config = UpdateConfig(batch_size=size, n_epochs=1, max_grad_norm=1e9, target_kl=None, **coefficients)
    assume(distance_to_kinks(exact, exact_batch, config) > 2e-6)
    expected_loss, expected = autograd(exact, exact_batch, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.VARIABLE, name)
        _, stats = learned(policy, batch, **{**vars(config), "batch_size": 7})
    loss = PPOLoss(*stats._rows[0][:6])
    np.testing.assert_allclose(loss, [part.item() for part in expected_loss], rtol=2e-5, atol=2e-6)
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for (key, parameter), b in zip(policy.named_parameters(), expected, strict=True):
        difference = float((parameter.grad - (0 if b is None else b)).abs().max())
        assert difference <= 1e-5 * largest + 1e-12, f"{key}: differs by {difference}, of {largest}"
