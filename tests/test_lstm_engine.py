"""The engine ``lstm``: the reference's training up to rounding, and a gradient that stands up to one in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.lstm import LstmEngine
from sb3_ppo_from_scratch.engines.lstm.sequences import alike
from sb3_ppo_from_scratch.engines.reference import TorchEngine
from sb3_ppo_from_scratch.recurrent import EPISODE_STARTS, LSTM_STATES, SEQUENCE_STARTS, Memory
from sb3_ppo_from_scratch.update import PolicyOutputs, minibatch_loss
from tests.helpers import ToyEnv, train, update_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*truncated mini-batch")]

LSTM = {"lstm_hidden_size": 8}
SHARED = {**LSTM, "shared_lstm": True, "enable_critic_lstm": False}
ONLY_ACTOR = {**LSTM, "enable_critic_lstm": False, "n_lstm_layers": 2}
BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


def toy(observation_space: spaces.Space, action_space: spaces.Space) -> Callable[[], VecEnv]:
    return lambda: make_vec_env(lambda: ToyEnv(observation_space, action_space), 2, seed=5)


RUNS: dict[str, tuple[str, spaces.Space, spaces.Space, dict[str, Any]]] = {
    "discrete": ("MlpLstmPolicy", BOX, spaces.Discrete(3), {"policy_kwargs": {**LSTM, "n_lstm_layers": 2}}),
    "shared, MultiDiscrete": ("MlpLstmPolicy", BOX, spaces.MultiDiscrete([2, 3]), {"policy_kwargs": SHARED}),
    "actor only, bits": ("MlpLstmPolicy", BOX, spaces.MultiBinary(2), {"policy_kwargs": ONLY_ACTOR}),
    "gSDE, no bias, AdamW": (
        "MlpLstmPolicy",
        BOX,
        spaces.Box(-1.0, 1.0, (2,)),
        {
            "use_sde": True,
            "sde_sample_freq": 4,
            "clip_range_vf": 0.2,
            "policy_kwargs": {**LSTM, "lstm_kwargs": {"bias": False}, "optimizer_class": th.optim.AdamW},
        },
    ),
    "images": ("CnnLstmPolicy", IMAGE, spaces.Discrete(3), {}),
    "dicts, two extractors": (
        "MultiInputLstmPolicy",
        spaces.Dict({"vector": BOX, "mode": spaces.Discrete(3)}),
        spaces.Discrete(3),
        {"policy_kwargs": {**LSTM, "share_features_extractor": False}},
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_it_trains_as_the_reference_does(run: tuple[str, spaces.Space, spaces.Space, dict[str, Any]]) -> None:
    """The same random numbers, hence the same steps in the environments; weights within 2e-5 of movements of 1e-3 and more."""
    policy, observations, actions, kwargs = run
    kwargs = {"n_steps": 32, "batch_size": 25, "n_epochs": 3, "ent_coef": 0.01, "policy_kwargs": LSTM, **kwargs}
    theirs = train(ScratchPPO, policy, toy(observations, actions), 192, engine="torch", **kwargs)
    ours = train(ScratchPPO, policy, toy(observations, actions), 192, engine="lstm", **kwargs)
    assert ours.random_states == theirs.random_states
    for name, weights in theirs.model.policy.state_dict().items():
        th.testing.assert_close(ours.model.policy.state_dict()[name], weights, atol=2e-5, rtol=0)
    for mine, reference in zip(ours.metrics, theirs.metrics, strict=True):
        for key, value in reference.items():
            np.testing.assert_allclose(mine[key], value, rtol=1e-3, atol=1e-5, err_msg=key)


def make_policy(**kwargs: Any) -> RecurrentActorCriticPolicy:
    th.manual_seed(1)
    return RecurrentActorCriticPolicy(BOX, spaces.Discrete(3), lambda _: 1e-3, **{**LSTM, **kwargs})


def make_batch(policy: RecurrentActorCriticPolicy, size: int = 40) -> RolloutData:
    """Sequences of many lengths; some begin episodes, others in the middle of one."""
    generator = th.Generator().manual_seed(2)
    n_states = 2 if policy.lstm_critic is None else 4
    numbers = th.randn(5, size, generator=generator)
    starts = th.rand(size, generator=generator) < 0.25
    starts[3:25] = False  # a long one
    return RolloutData(
        th.randn(size, 3, generator=generator),
        th.randint(3, (size, 1), generator=generator).float(),
        numbers[0],
        numbers[1].abs().neg(),
        numbers[2],
        numbers[3],
        extras={
            SEQUENCE_STARTS: starts,
            EPISODE_STARTS: (starts & (numbers[4] > 0)).float(),
            LSTM_STATES: th.randn(size, n_states, policy.lstm_actor.num_layers, 8, generator=generator),
        },
    )


def step_by_step(policy: Any, batch: RolloutData) -> PolicyOutputs:
    """In float64, one row after the other, as the policy would meet them; no code of ours."""
    policy = policy.double()
    states, latents = None, []
    for row in range(batch.size):
        if row == 0 or batch.extras[SEQUENCE_STARTS][row]:
            states = batch.extras[LSTM_STATES][row].double()[:, :, None] * (1 - batch.extras[EPISODE_STARTS][row].item())
        assert states is not None
        features = batch.observations[row].double()[None, None]  # type: ignore[index]  # no dict
        latent_pi, (hidden, cell) = policy.lstm_actor(features, (states[0].contiguous(), states[1].contiguous()))
        after = [hidden, cell]
        if policy.lstm_critic is not None:
            latent_vf, critic = policy.lstm_critic(features, (states[2].contiguous(), states[3].contiguous()))
            after += critic
        else:
            latent_vf = latent_pi.detach() if policy.shared_lstm else policy.critic(features)
        states = th.stack(after)
        latents.append(th.cat([latent_pi[0], latent_vf[0]], dim=1))
    latent_pi, latent_vf = th.cat(latents).chunk(2, dim=1)
    distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi))
    values = policy.value_net(policy.mlp_extractor.forward_critic(latent_vf)).flatten()
    return PolicyOutputs(values, distribution.log_prob(batch.actions.flatten()), distribution.entropy(), distribution)


@pytest.mark.parametrize("kwargs", [{}, {"n_lstm_layers": 2}, SHARED, ONLY_ACTOR], ids=["two", "deep", "shared", "actor"])
def test_gradient_against_float64(kwargs: dict[str, Any]) -> None:
    policy = make_policy(**kwargs)
    exact_policy, batch, config = copy.deepcopy(policy), make_batch(policy), update_config(ent_coef=0.01)
    exact = minibatch_loss(step_by_step(exact_policy, batch), batch, config)
    exact.total.backward()
    for engine in (TorchEngine, LstmEngine):
        policy.optimizer.zero_grad()
        loss = minibatch_loss(engine(policy).evaluate_sequences(batch, batch.actions.flatten()), batch, config)
        loss.total.backward()
        th.testing.assert_close(loss.total.double(), exact.total, rtol=1e-5, atol=1e-6)
        for (name, parameter), other in zip(policy.named_parameters(), exact_policy.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            if parameter.grad is not None and other.grad is not None:
                assert other.grad.abs().max() > 0
                th.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_in_the_environments() -> None:
    """Two environments, of which one begins an episode: actions, values and memory are the reference's."""
    for kwargs in ({"n_lstm_layers": 2}, SHARED, ONLY_ACTOR):
        policy = make_policy(**kwargs).eval()
        n_states = 2 if policy.lstm_critic is None else 4
        memory = Memory(th.randn(n_states, policy.lstm_actor.num_layers, 2, 8), th.tensor([0.0, 1.0]))
        observations = th.randn(2, 3)
        steps = []
        for engine in (TorchEngine, LstmEngine):
            th.manual_seed(4)
            steps.append(engine(policy).act(observations, memory=memory))
            values = engine(policy).predict_values(observations, memory=memory)
            th.testing.assert_close(values, steps[-1].values, rtol=1e-5, atol=1e-6)
        theirs, ours = steps
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        for name in ("values", "log_probs", "dist_params"):
            th.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
        assert ours.memory is not None
        assert theirs.memory is not None
        th.testing.assert_close(ours.memory.states, theirs.memory.states, rtol=1e-5, atol=1e-6)
        assert not ours.memory.starts.any()


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([7], 1),
        ([32, 32, 30, 12, 5], 1),
        ([1000, *[1] * 1000], 2),
        ([100, *[30] * 100, *[1] * 1000], 3),
    ],
)
def test_long_sequences_do_not_make_many_short_ones_long(lengths: list[int], groups: int) -> None:
    parts = alike(np.array(lengths), 64)
    assert len(parts) == groups
    assert [index for part in parts for index in range(len(lengths))[part]] == list(range(len(lengths)))
    padded = sum(lengths[part][0] * len(lengths[part]) for part in parts)
    assert padded <= 4 * sum(lengths)


def refusal(policy: RecurrentActorCriticPolicy) -> str:
    reason = LstmEngine.refusal(policy)
    assert reason is not None
    assert choose_engine("auto", policy).engine is TorchEngine
    return reason


class Own(RecurrentActorCriticPolicy):
    """A user's subclass."""


def test_what_it_leaves_to_the_reference() -> None:
    assert choose_engine("auto", make_policy()).engine is LstmEngine
    dropout = {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}
    assert "dropout between its layers" in refusal(make_policy(**dropout))
    assert "must be Adam or AdamW, not SGD" in refusal(make_policy(optimizer_class=th.optim.SGD))
    assert "not Own" in refusal(Own(BOX, spaces.Discrete(3), lambda _: 1e-3))
    policy = make_policy()
    policy.lstm_critic.register_forward_hook(lambda *_: None)
    assert "lstm_critic has hooks" in refusal(policy)
    policy = make_policy()
    policy._process_sequence = RecurrentActorCriticPolicy._process_sequence  # type: ignore[method-assign]  # by the user
    assert "_process_sequence was replaced" in refusal(policy)
    assert "float32" in refusal(make_policy().double())
    with pytest.raises(
        ValueError, match=r"engine='lstm' .* must be one with an LSTM, sb3-contrib's or ours, not ActorCriticPolicy"
    ):
        ScratchPPO("MlpPolicy", "CartPole-v1", engine="lstm")
