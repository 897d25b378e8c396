"""The rollout buffer: SB3's order and numbers, arrays that keep their shape, and one data set per rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from tests.envs import ACTION_SPACES, BOX, OBSERVATION_SPACES
from tests.helpers import ToyEnv, assert_same_model, train

N_STEPS, N_ENVS = 7, 3
FIELDS = ("rewards", "episode_starts", "values", "log_probs", "advantages", "returns")


def stack(space: spaces.Space) -> Any:
    """One observation or action per environment, as a ``VecEnv`` or a policy has them."""
    samples = [space.sample() for _ in range(N_ENVS)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack(samples)


def fill(buffers: list[RolloutBuffer], steps: int = N_STEPS) -> None:
    """The same random steps into each; a ``ScratchRolloutBuffer`` gets distribution parameters too."""
    rng = np.random.default_rng(5)
    observation_space, action_space = buffers[0].observation_space, buffers[0].action_space
    observation_space.seed(1)
    action_space.seed(2)
    for _ in range(steps):
        obs, action = stack(observation_space), stack(action_space)
        reward, start = rng.normal(size=N_ENVS), rng.random(N_ENVS) < 0.3
        value, log_prob = th.from_numpy(rng.normal(size=(N_ENVS, 1))).float(), th.from_numpy(rng.normal(size=N_ENVS)).float()
        for buffer in buffers:
            buffer.add(obs, action, reward, start, value, log_prob)
    last, dones = th.from_numpy(rng.normal(size=(N_ENVS, 1))).float(), rng.random(N_ENVS) < 0.5
    for buffer in buffers:
        buffer.compute_returns_and_advantage(last, dones)


def make(kind: type[RolloutBuffer], observation: str = "box", action: str = "discrete") -> RolloutBuffer:
    spaces_of = (OBSERVATION_SPACES[observation], ACTION_SPACES[action])
    return kind(N_STEPS, *spaces_of, "cpu", gae_lambda=0.9, gamma=0.95, n_envs=N_ENVS)


def full_buffer(observation: str = "box", action: str = "discrete") -> ScratchRolloutBuffer:
    buffer = make(ScratchRolloutBuffer, observation, action)
    fill([buffer])
    return buffer


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    assert ours.dtype == theirs.dtype
    assert th.equal(ours, theirs)


PAIRS = [*((name, "discrete") for name in OBSERVATION_SPACES), *(("box", name) for name in ACTION_SPACES)]


@pytest.mark.parametrize(("observation", "action"), PAIRS)
@pytest.mark.parametrize("batch_size", [None, 4, 21, 50])
def test_trap_14_same_minibatches_as_sb3(observation: str, action: str, batch_size: int | None) -> None:
    """Traps 14 and 17: one permutation per ``get`` over environment-major indices; actions of every shape."""
    theirs = make(DictRolloutBuffer if observation == "dict" else RolloutBuffer, observation, action)
    ours = make(ScratchRolloutBuffer, observation, action)
    fill([ours, theirs])
    for epoch in range(2):
        batches = []
        for buffer in (ours, theirs):
            np.random.seed(epoch)
            batches.append([*buffer.get(batch_size), np.random.random()])
        (*mine, my_next), (*reference, reference_next) = batches
        assert my_next == reference_next  # as many draws
        for a, b in zip(mine, reference, strict=True):
            keys = b.observations if isinstance(b.observations, dict) else [...]
            for key in keys:
                assert_same_tensors(a.observations[key], b.observations[key])
            for name in b._fields[1:]:
                assert_same_tensors(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("observation", ["box", "dict"])
def test_public_arrays_keep_their_shape_and_numbers(observation: str) -> None:
    buffer = full_buffer(observation)
    before = {name: getattr(buffer, name).copy() for name in FIELDS}
    list(buffer.get(4))
    assert all(getattr(buffer, name).shape == (N_STEPS, N_ENVS) for name in FIELDS)
    assert all(np.array_equal(getattr(buffer, name), array) for name, array in before.items())
    assert buffer.actions.shape == (N_STEPS, N_ENVS, 1)
    if observation == "dict":
        assert {key: array.shape for key, array in buffer.observations.items()} == {
            "vector": (N_STEPS, N_ENVS, 3),
            "choice": (N_STEPS, N_ENVS, 1),
            "bits": (N_STEPS, N_ENVS, 3),
        }
    else:
        assert buffer.observations.shape == (N_STEPS, N_ENVS, 3)


def test_data_set_is_a_view_in_environment_major_order() -> None:
    buffer = full_buffer()
    data = buffer.dataset()
    assert data.size == N_STEPS * N_ENVS
    buffer.observations[2, 1] = 9.0
    buffer.advantages[2, 1] = 8.0
    row = 1 * N_STEPS + 2  # environment 1, step 2
    assert data.observations[row].tolist() == [9.0] * 3
    assert data.advantages[row].item() == 8.0


def test_minibatches_are_copies() -> None:
    buffer = full_buffer()
    before = buffer.advantages.copy()
    for batch in buffer.get(5):
        batch.advantages.zero_()
    assert np.array_equal(buffer.advantages, before)


def test_every_transition_comes_once_per_pass() -> None:
    buffer = full_buffer()
    buffer.values[:] = np.arange(N_STEPS * N_ENVS).reshape(N_STEPS, N_ENVS)
    batches = list(buffer.get(4))
    assert [batch.size for batch in batches] == [4, 4, 4, 4, 4, 1]
    assert sorted(th.cat([batch.old_values for batch in batches]).tolist()) == list(range(N_STEPS * N_ENVS))


def test_a_reset_buffer_is_filled_anew() -> None:
    buffer = full_buffer()
    first = buffer.dataset().advantages.clone()
    buffer.reset()
    assert not buffer.full
    buffer.gamma = 0.5
    fill([buffer])
    assert not th.equal(buffer.dataset().advantages, first)


def test_a_full_buffer_takes_no_more() -> None:
    buffer = full_buffer()
    with pytest.raises(IndexError, match="already holds its 7 steps"):
        fill([buffer], steps=1)


def test_an_incomplete_rollout_is_no_data_set() -> None:
    buffer = make(ScratchRolloutBuffer)
    fill([buffer], steps=2)
    with pytest.raises(RuntimeError, match="holds 2 of 7 steps"):
        buffer.dataset()
    with pytest.raises(RuntimeError, match="holds 2 of 7 steps"):
        list(buffer.get(4))


def test_distribution_parameters_travel_with_their_transitions() -> None:
    buffer = make(ScratchRolloutBuffer)
    for step in range(N_STEPS):
        ids = th.arange(N_ENVS, dtype=th.float32) * N_STEPS + step
        obs = np.zeros((N_ENVS, *BOX.shape), np.float32)
        buffer.add(obs, np.zeros(N_ENVS), np.zeros(N_ENVS), np.zeros(N_ENVS), ids, ids, th.stack([ids, -ids], dim=1))
    assert buffer.dist_params.shape == (N_STEPS, N_ENVS, 2)
    for batch in buffer.get(4):
        assert th.equal(batch.dist_params, th.stack([batch.old_values, -batch.old_values], dim=1))


def test_without_distribution_parameters_there_are_none() -> None:
    assert full_buffer().dataset().dist_params is None


def test_rows_that_are_no_transitions_are_left_out() -> None:
    buffer = make(ScratchRolloutBuffer)
    for rollout in range(2):  # the second knows nothing of the first
        buffer.reset()
        kept = []
        for step in range(N_STEPS):
            ids = th.arange(N_ENVS, dtype=th.float32) * N_STEPS + step
            valid = np.ones(N_ENVS, bool)
            if step in (2 + rollout, 5):
                valid[step % N_ENVS] = False
            obs = np.tile(ids.numpy()[:, None], (1, 3))
            zeros = np.zeros(N_ENVS)
            buffer.add(obs, zeros, zeros, zeros, ids, ids, th.stack([ids, -ids], 1), None if step == 0 else valid)
            kept += ids[th.from_numpy(valid)].tolist()
        data = buffer.dataset()
        assert data.size == N_STEPS * N_ENVS - 2
        assert data.old_values.tolist() == data.old_log_prob.tolist() == data.observations[:, 1].tolist() == sorted(kept)
        assert data.dist_params[:, 1].tolist() == [-x for x in sorted(kept)]
        assert sorted(th.cat([batch.old_values for batch in buffer.get(4)]).tolist()) == sorted(kept)


def test_a_mask_is_kept_only_where_there_is_something_to_leave_out() -> None:
    buffer = make(ScratchRolloutBuffer)
    zeros = np.zeros(N_ENVS)
    for _ in range(N_STEPS):
        buffer.add(np.zeros((N_ENVS, 3)), zeros, zeros, zeros, th.zeros(N_ENVS), th.zeros(N_ENVS), valid=np.ones(N_ENVS, bool))
    assert buffer.valid is None
    buffer.observations[:] = 1.0
    assert (buffer.dataset().observations == 1).all()  # still a view


def test_is_what_scratch_ppo_uses() -> None:
    model = ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8)
    assert type(model.rollout_buffer) is ScratchRolloutBuffer
    model.learn(8)
    # logits of a two-armed categorical, normalised
    np.testing.assert_allclose(np.exp(model.rollout_buffer.dist_params).sum(axis=-1), np.ones((8, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("policy", "observation", "action"),
    [("MlpPolicy", "box", "box-2d"), ("MlpPolicy", "multidiscrete", "multibinary"), ("MultiInputPolicy", "dict", "discrete")],
)
def test_sb3_ppo_trains_on_it_to_the_same_bits(policy: str, observation: str, action: str) -> None:
    def make_env() -> Any:
        return make_vec_env(lambda: ToyEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action]), 2, seed=5)

    sizes = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
    theirs = train(PPO, policy, make_env, 192, **sizes)
    mixed = train(PPO, policy, make_env, 192, rollout_buffer_class=ScratchRolloutBuffer, **sizes)
    assert len(theirs.metrics) == 3
    assert_same_model(mixed.model, theirs.model)
