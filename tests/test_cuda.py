"""What only a GPU can show. Without one all of it is skipped, and says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from benchmarks.gpu.checks import CHECKS, SUBJECTS, Subject, count_waits
from benchmarks.gpu.material import exact_products
from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured, unchanged_generator
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.cudagraph.transfer import Upload
from tests.helpers import ToyEnv

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device; none was available")
CUDA = th.device("cuda")
SIZES: dict[str, Any] = {"n_steps": 16, "batch_size": 12, "n_epochs": 2, "device": "cuda", "seed": 1}
ENGINE = {**SIZES, "engine": "cudagraph"}  # "auto" leaves it out


def make_env(frames: bool = False) -> VecEnv:
    space = spaces.Box(0, 255, (36, 36, 2), np.uint8) if frames else spaces.Box(-1.0, 1.0, (3,))
    return DummyVecEnv([lambda: ToyEnv(space, spaces.Discrete(4))] * 2)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_is_right(check: Callable[..., Any], subject: Subject) -> None:
    with exact_products():
        results = list(check(CUDA, subject))
    assert [result for result in results if not result.passed] == []


# ------------------------------------------------------------------------- graphs


def test_a_graph_is_recorded_and_replayed() -> None:
    counter, draws = th.zeros((), device=CUDA), th.zeros(4, device=CUDA)
    python: list[int] = []

    def work() -> None:
        python.append(1)
        counter.add_(1)
        draws.copy_(th.rand(4, device=CUDA))

    th.manual_seed(3)
    before = th.cuda.get_rng_state()
    captured = Captured(work, CUDA)
    captured.prepare()
    assert th.equal(th.cuda.get_rng_state(), before)
    assert captured.reason is None
    calls, rehearsed = len(python), counter.item()
    seen = []
    for _ in range(3):
        captured()
        seen.append(draws.tolist())
    assert counter.item() == rehearsed + 3
    assert len(python) == calls, "no Python in a replay"
    assert seen[0] != seen[1] != seen[2]
    th.cuda.set_rng_state(before)
    captured()
    assert draws.tolist() == seen[0], "a replay draws from the generator as it stands"


def test_a_wait_is_noticed_before_it_is_recorded() -> None:
    number = th.zeros((), device=CUDA)
    captured = Captured(lambda: number.add_(number.item()), CUDA)
    with pytest.warns(RuntimeWarning, match="no CUDA graph"):
        captured.prepare()
    captured()
    assert th.rand(3, device=CUDA).shape == (3,), "the random generator is sound"
    with unchanged_generator(CUDA):
        th.rand(1, device=CUDA)


def test_an_upload_may_be_overwritten_at_once() -> None:
    array = np.zeros((64, 84, 84, 4), np.uint8)
    upload = Upload(array, CUDA)
    sums = []
    for value in range(20):
        array[:] = value
        sums.append(upload(array).sum())
    assert [each.item() // array.size for each in sums] == list(range(20))


# ----------------------------------------------------------------------- training


@pytest.mark.parametrize(("policy", "frames", "precision"), [("MlpPolicy", False, "fp32"), ("CnnPolicy", True, "bf16")])
def test_trains_saves_and_loads(policy: str, frames: bool, precision: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a graph that could not be recorded
        model = ScratchPPO(policy, make_env(frames), precision=precision, **ENGINE)
        model.learn(160)
    assert type(model._engine) is CudaGraphEngine
    assert type(model.rollout_buffer) is DeviceRolloutBuffer
    assert model.rollout_buffer.observations.dtype == model.observation_space.dtype
    states = model.policy.optimizer.state.values()
    assert {(float(state["step"]), state["step"].device.type) for state in states} == {(5 * 6, "cpu")}
    model.save(tmp_path / "model")
    obs = model.env.reset()
    expected, _ = model.predict(obs, deterministic=True)
    for algorithm, device in ((ScratchPPO, "cuda"), (PPO, "cuda"), (ScratchPPO, "cpu"), (PPO, "cpu")):
        options = {"precision": "fp32"} if algorithm is ScratchPPO else {}
        loaded = algorithm.load(tmp_path / "model", env=make_env(frames), device=device, **options)
        assert not any("_orig_mod" in key for key in loaded.policy.state_dict())
        for key, value in model.policy.state_dict().items():
            assert th.equal(loaded.policy.state_dict()[key].cpu(), value.cpu()), key
        if device == "cuda" and precision == "fp32":
            assert np.array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        loaded.learn(32)


def test_training_is_the_same_again() -> None:
    """From the same seed, with graphs recorded anew."""
    runs = [ScratchPPO("MlpPolicy", make_env(), **ENGINE).learn(160) for _ in range(2)]
    assert {type(run._engine) for run in runs} == {CudaGraphEngine}
    for a, b in zip(*(run.policy.parameters() for run in runs), strict=True):
        th.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_resumes_where_it_was(tmp_path: Path) -> None:
    """Recording in the middle of a run moves no random generator."""
    whole = ScratchPPO("MlpPolicy", make_env(), **ENGINE).learn(160)

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 100

    ScratchPPO("MlpPolicy", make_env(), **ENGINE).learn(160, callback=[ResumableCheckpoint(32, tmp_path), Stop()])
    rest = ScratchPPO.resume(tmp_path, make_env(), device="cuda")
    assert rest.num_timesteps == 96
    rest.continue_learning()
    assert type(rest._engine) is type(whole._engine) is CudaGraphEngine
    for a, b in zip(rest.policy.parameters(), whole.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_host_waits_once_per_step_and_once_per_update() -> None:
    model = ScratchPPO("CnnPolicy", make_env(frames=True), **ENGINE).learn(64)
    engine, buffer = model._engine, model.rollout_buffer
    obs = np.asarray(model._last_obs)
    assert count_waits(lambda: engine.act(buffer.observe(obs))) <= 1  # torch may or may not report a stream's synchronize
    assert count_waits(lambda: engine.update(buffer, model._update_config())) == 1


def test_what_it_cannot_serve_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Adam or AdamW"):
        ScratchPPO("MlpPolicy", make_env(), policy_kwargs={"optimizer_class": th.optim.SGD}, **ENGINE)
    model = ScratchPPO("MlpPolicy", make_env(), **ENGINE).learn(64)
    model.policy.value_net.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        model.learn(64)


def test_a_graph_of_autograds_from_before_does_not_end_a_recording() -> None:
    """A callback's, which the policy keeps, made on the default stream."""
    model = ScratchPPO("MlpPolicy", make_env(), **ENGINE)
    obs, actions = th.zeros((2, 3), device=CUDA), th.zeros(2, dtype=th.int64, device=CUDA)
    kept = model.policy.evaluate_actions(obs, actions)
    kept[0].sum().backward(retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.learn(64)
    assert model._engine._learner._minibatch.reason is None
