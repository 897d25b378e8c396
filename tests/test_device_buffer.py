"""The rollout buffer on the policy's device: the same data as in the one on the host, and what crosses the bus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_from_scratch import NonFiniteError, ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.advantages import compute_gae, fill_gae
from sb3_ppo_from_scratch.checks.finite import check_rollout
from sb3_ppo_from_scratch.engines.cudagraph import device_buffer
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.cudagraph.transfer import Upload
from tests.emulated_graph import EmulatedCapture
from tests.envs import ACTION_SPACES, BOX, OBSERVATION_SPACES
from tests.helpers import ToyEnv, train
from tests.test_buffer import N_ENVS, N_STEPS, PAIRS, fill, make

IMAGE = spaces.Box(0, 255, (2, 36, 36), np.uint8)


def pair(observation: str = "box", action: str = "discrete") -> tuple[ScratchRolloutBuffer, DeviceRolloutBuffer]:
    """The same rollout in both."""
    on_host, on_device = (make(kind, observation, action) for kind in (ScratchRolloutBuffer, DeviceRolloutBuffer))
    fill([on_host, on_device])
    assert isinstance(on_host, ScratchRolloutBuffer)
    assert isinstance(on_device, DeviceRolloutBuffer)
    return on_host, on_device


def assert_same_batch(ours: Any, theirs: Any) -> None:
    keys = theirs.observations if isinstance(theirs.observations, dict) else [...]
    for key in keys:
        assert ours.observations[key].dtype == theirs.observations[key].dtype
        assert th.equal(ours.observations[key], theirs.observations[key])
    for name in ("actions", "old_values", "old_log_prob"):
        assert th.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("advantages", "returns"):
        th.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("observation", "action"), PAIRS)
def test_same_minibatches_as_on_the_host(observation: str, action: str) -> None:
    on_host, on_device = pair(observation, action)
    batches = []
    for buffer in (on_device, on_host):
        np.random.seed(1)
        batches.append([*buffer.get(4), np.random.random()])
    (*ours, our_next), (*theirs, their_next) = batches
    assert our_next == their_next, "as many draws"
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_batch(mine, other)


@pytest.mark.parametrize("observation", ["box", "dict"])
def test_public_arrays_are_those_of_the_host(observation: str) -> None:
    on_host, on_device = pair(observation)
    for name in ("rewards", "episode_starts", "values", "log_probs", "advantages", "returns", "actions"):
        ours, theirs = getattr(on_device, name), getattr(on_host, name)
        assert isinstance(ours, np.ndarray)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    ours, theirs = on_device.observations, on_host.observations
    for key in theirs if isinstance(theirs, dict) else [...]:
        assert np.array_equal(ours[key], theirs[key])
    assert on_device.dist_params is None


def test_is_a_rollout_buffer_of_sb3() -> None:
    assert issubclass(DeviceRolloutBuffer, RolloutBuffer)
    buffer = make(DeviceRolloutBuffer)
    fill([buffer], steps=2)
    assert (buffer.pos, buffer.full) == (2, False)
    with pytest.raises(RuntimeError, match="holds 2 of 7 steps"):
        buffer.dataset()
    fill([buffer], steps=5)
    with pytest.raises(IndexError, match="already holds its 7 steps"):
        fill([buffer], steps=1)
    buffer.reset()
    assert not buffer.full


def test_rows_are_views_of_the_storage() -> None:
    _, buffer = pair()
    data = buffer.dataset()
    for field, name in (("observations", "observations"), ("old_values", "values"), ("advantages", "advantages")):
        assert getattr(data, field).data_ptr() == buffer.on_device[name].data_ptr(), "a copy"
    addresses = [each.data_ptr() for each in data if isinstance(each, th.Tensor)]
    buffer.reset()
    fill([buffer])
    assert [each.data_ptr() for each in buffer.rows() if isinstance(each, th.Tensor)] == addresses, (
        "graphs hold these addresses"
    )


def test_rows_that_are_no_transitions_are_left_out() -> None:
    buffers = [make(kind) for kind in (ScratchRolloutBuffer, DeviceRolloutBuffer)]
    rng = np.random.default_rng(2)
    for rollout in range(2):  # the second knows nothing of the first
        for step in range(N_STEPS):
            valid = rng.random(N_ENVS) < 0.6 if rollout == 0 else None
            obs, reward = rng.normal(size=(N_ENVS, 3)).astype(np.float32), rng.normal(size=N_ENVS)
            numbers = th.from_numpy(rng.normal(size=(N_ENVS, 4))).float()
            for buffer in buffers:
                if step == 0:
                    buffer.reset()
                buffer.add(obs, np.zeros(N_ENVS), reward, reward > 1, numbers[:, :1], numbers[:, 1], numbers[:, 2:], valid)
        for buffer in buffers:
            buffer.compute_returns_and_advantage(th.ones(N_ENVS, 1), np.zeros(N_ENVS, bool))
        theirs, ours = (buffer.dataset() for buffer in buffers)
        assert ours.size == theirs.size
        assert (ours.size < N_STEPS * N_ENVS) == (rollout == 0)
        assert_same_batch(ours, theirs)
        assert th.equal(ours.dist_params, theirs.dist_params)
        assert buffers[1].rows().size == N_STEPS * N_ENVS


def test_a_rollout_of_resets_only() -> None:
    buffer = make(DeviceRolloutBuffer)
    fill([buffer])
    buffer.valid = np.zeros((N_STEPS, N_ENVS), bool)
    with pytest.raises(RuntimeError, match="holds no transition"):
        buffer.dataset()


# ---------------------------------------------------------------------- advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("n_steps", [1, 2, 40])
def test_advantages_are_those_of_compute_gae(gamma: float, gae_lambda: float, n_steps: int) -> None:
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(2, n_steps, 5))
    starts, last, dones = (
        (rng.random((n_steps, 5)) < 0.2).astype(float),
        rng.normal(size=5),
        (rng.random(5) < 0.4).astype(float),
    )
    expected = compute_gae(rewards, values, starts, last, dones, gamma, gae_lambda)
    actual = {name: th.full((n_steps, 5), th.nan, dtype=th.float64) for name in ("advantages", "returns")}
    inputs = [th.from_numpy(np.asarray(each)) for each in (rewards, values, starts, last, dones, gamma, gamma * gae_lambda)]
    fill_gae(*inputs, **actual)
    for ours, theirs in zip(actual.values(), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("capture", [Captured, EmulatedCapture])
def test_gamma_may_change_between_rollouts(capture: type[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves all rollouts."""
    monkeypatch.setattr(device_buffer, "Captured", capture)
    monkeypatch.setattr(EmulatedCapture, "made", 0)
    on_host, on_device = pair()
    for buffer in (on_host, on_device):
        buffer.gamma, buffer.gae_lambda = 0.5, 0.3
        buffer.reset()
        fill([buffer])
    assert EmulatedCapture.made == (capture is EmulatedCapture)
    np.testing.assert_allclose(on_device.advantages, on_host.advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["values", "log_probs", "rewards"])
def test_what_is_not_finite_is_found_with_one_question(name: str) -> None:
    _, buffer = pair()
    assert buffer.is_known_finite()
    check_rollout(buffer)
    if name == "rewards":
        buffer.rewards[2, 1] = np.inf
    else:
        buffer.on_device[name][1, 2] = np.nan
    buffer.compute_returns_and_advantage(th.zeros(N_ENVS), np.zeros(N_ENVS, bool))
    assert not buffer.is_known_finite()
    with pytest.raises(NonFiniteError, match=rf"(values|{name}) is not finite .* in environment 1 at step 2|{name}"):
        check_rollout(buffer)


# ------------------------------------------------------------------------- the bus


def test_observations_cross_the_bus_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the host to the device when the policy looks at them; the buffer takes them from there."""
    uploads: list[tuple[int, ...]] = []
    upload = Upload.__call__
    monkeypatch.setattr(Upload, "__call__", lambda self, array: (uploads.append(array.shape), upload(self, array))[1])
    buffer = DeviceRolloutBuffer(4, IMAGE, spaces.Discrete(2), "cpu", n_envs=N_ENVS)
    zeros = np.zeros(N_ENVS)
    for step in range(4):
        obs = np.full((N_ENVS, *IMAGE.shape), step, np.uint8)
        seen = buffer.observe(obs)
        assert th.equal(seen, th.from_numpy(obs))
        buffer.add(seen, zeros, zeros, zeros, th.zeros(N_ENVS), th.zeros(N_ENVS))
    assert uploads == [(N_ENVS, *IMAGE.shape)] * 4
    assert buffer.observations[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3]
    buffer.compute_returns_and_advantage(th.zeros(N_ENVS), zeros)
    assert len(uploads) == 4 + 4, "rewards, episode starts, actions; and the end"


def test_observations_that_were_not_brought_there_first_are_stored_all_the_same() -> None:
    buffer = make(DeviceRolloutBuffer)
    first, second = (np.full((N_ENVS, 3), x, np.float32) for x in (1.0, 2.0))
    buffer.observe(first)
    zeros = np.zeros(N_ENVS)
    buffer.add(second, zeros, zeros, zeros, th.zeros(N_ENVS), th.zeros(N_ENVS))
    assert buffer.observations[0].tolist() == second.tolist()


def test_an_array_that_is_used_again_is_uploaded_again() -> None:
    buffer = make(DeviceRolloutBuffer)
    obs = np.zeros((N_ENVS, 3), np.float32)
    buffer.observe(obs)
    obs += 1.0
    assert buffer.observe(obs).tolist() == obs.tolist()


@pytest.mark.parametrize("order", ["channels first", "channels last", "backwards"])
def test_frames_keep_their_order_on_the_way(order: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (N_ENVS, 36, 36, 2), np.uint8)
    obs = np.moveaxis(frames, -1, 1)
    if order == "channels first":
        obs = np.ascontiguousarray(obs)
    elif order == "backwards":
        obs = obs[:, :, ::-1]
    upload = Upload(obs, th.device("cpu"))
    tensor = upload(obs)
    assert np.array_equal(tensor.numpy(), obs)
    if order != "backwards":
        assert tensor.numpy().strides == obs.strides, "nothing is transposed on the host"
    assert upload(obs).data_ptr() == tensor.data_ptr()
    buffer = DeviceRolloutBuffer(1, IMAGE, spaces.Discrete(2), "cpu", n_envs=N_ENVS)
    zeros = np.zeros(N_ENVS)
    buffer.add(obs, zeros, zeros, zeros, th.zeros(N_ENVS), th.zeros(N_ENVS))
    assert np.array_equal(buffer.observations[0], obs)
    assert buffer.flat_observations().is_contiguous(memory_format=th.channels_last)


# ------------------------------------------------------------------------- training


def make_env(observation: str, action: str) -> Callable[[], Any]:
    return lambda: make_vec_env(lambda: ToyEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action]), 2, seed=5)


@pytest.mark.parametrize(
    ("policy", "observation", "action"),
    [("MlpPolicy", "box", "box-2d"), ("MlpPolicy", "multidiscrete", "multibinary"), ("MultiInputPolicy", "dict", "discrete")],
)
def test_trains_as_on_the_host(policy: str, observation: str, action: str) -> None:
    sizes = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "engine": "torch"}
    runs = [
        train(ScratchPPO, policy, make_env(observation, action), 192, rollout_buffer_class=kind, **sizes)
        for kind in (ScratchRolloutBuffer, DeviceRolloutBuffer)
    ]
    assert runs[0].random_states == runs[1].random_states
    for a, b in zip(runs[0].model.policy.parameters(), runs[1].model.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_rollout_uploads_each_observation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one after the last step, for its value."""
    uploads: list[int] = []
    observe = DeviceRolloutBuffer.observe
    monkeypatch.setattr(DeviceRolloutBuffer, "observe", lambda self, obs: (uploads.append(self.pos), observe(self, obs))[1])
    ScratchPPO(
        "MlpPolicy",
        make_env("box", "discrete")(),
        n_steps=4,
        batch_size=8,
        rollout_buffer_class=DeviceRolloutBuffer,
        device="cpu",
    ).learn(16)
    assert uploads == [0, 1, 2, 3, 4] * 2


def test_sb3_ppo_trains_on_it() -> None:
    """SB3's own loop adds NumPy arrays, and asks for ``values`` and ``returns``."""
    sizes = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
    theirs = train(PPO, "MlpPolicy", make_env("box", "discrete"), 128, **sizes)
    mixed = train(PPO, "MlpPolicy", make_env("box", "discrete"), 128, rollout_buffer_class=DeviceRolloutBuffer, **sizes)
    for a, b in zip(mixed.model.policy.parameters(), theirs.model.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_each_engine_has_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_ppo_from_scratch.engines.cudagraph.support.device_reason", lambda policy: None)
    for engine, kind in (("torch", ScratchRolloutBuffer), ("numpy", ScratchRolloutBuffer), ("cudagraph", DeviceRolloutBuffer)):
        model = ScratchPPO("MlpPolicy", ToyEnv(BOX, spaces.Discrete(2)), n_steps=8, batch_size=8, device="cpu", engine=engine)
        assert type(model.rollout_buffer) is kind, engine


def test_a_saved_model_may_name_it(tmp_path: Path) -> None:
    model = ScratchPPO("MlpPolicy", ToyEnv(BOX, spaces.Discrete(2)), rollout_buffer_class=DeviceRolloutBuffer, device="cpu")
    model.save(tmp_path / "model")
    assert ScratchPPO.load(tmp_path / "model").rollout_buffer_class is DeviceRolloutBuffer
