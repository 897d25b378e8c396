"""
Files that earlier versions wrote open still. Those in ``tests/data/before_the_house`` were written at commit 8fa3ad4, when all
modules lay flat in the package and checkpoints were pickles: CartPole with two environments, one layer of four.
"""

from __future__ import annotations

import io
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.wrappers.common import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO, ScratchRolloutBuffer, SharedMlpPolicy, load_vec_normalize
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.safe_files.table import find, renamed
from tests.helpers import assert_same_model

DATA = Path(__file__).parent / "data" / "before_the_house"


def one_cartpole() -> gym.Env:
    """As ``gym.make`` made it; rl-zoo3, once imported, gives it another time limit."""
    limit = next(kind for kind in gym.wrappers.TimeLimit.__mro__ if kind.__module__ == "gymnasium.wrappers.common")
    return limit(OrderEnforcing(PassiveEnvChecker(CartPoleEnv())), max_episode_steps=500)


def cartpole() -> VecEnv:
    return make_vec_env(one_cartpole, 2, seed=0)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    ("name", "policy", "buffer"),
    [
        ("mlp", None, ScratchRolloutBuffer),
        ("policy_class", SharedMlpPolicy, ScratchRolloutBuffer),
        ("shared_device_buffer", SharedMlpPolicy, DeviceRolloutBuffer),
    ],
)
def test_models(name: str, policy: Any, buffer: Any, allow_pickle: bool) -> None:
    model = ScratchPPO.load(DATA / name, cartpole(), device="cpu", allow_pickle=allow_pickle)
    assert policy is None or type(model.policy) is policy
    assert isinstance(model.rollout_buffer, buffer)
    assert model.num_timesteps == 16
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32


def test_models_are_the_same_either_way() -> None:
    assert_same_model(*(ScratchPPO.load(DATA / "mlp", device="cpu", allow_pickle=trust) for trust in (False, True)))


def test_statistics() -> None:
    for allow_pickle in (False, True):
        statistics = load_vec_normalize(DATA / "vecnormalize.pkl", cartpole(), allow_pickle)
        np.testing.assert_allclose(statistics.obs_rms.mean[0], 0.01237563, rtol=1e-5)  # type: ignore[union-attr]  # of a Box


def test_checkpoints(tmp_path: Path) -> None:
    """Of the first format: a pickle, in which each environment's state is a pickle in a pickle."""
    shutil.copy(DATA / "00000003-32-steps.ckpt", tmp_path)
    ended = []
    for allow_pickle in (False, True):
        env = VecNormalize(cartpole())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this resume may not be bit-exact")  # other versions, perhaps
            model = ScratchPPO.resume(tmp_path, env, device="cpu", allow_pickle=allow_pickle)
        assert model.num_timesteps == 32
        model.continue_learning()
        ended.append(model.learn(32, reset_num_timesteps=False))
    assert_same_model(*ended)


def test_a_checkpoint_of_the_first_format_is_followed_by_one_of_today(tmp_path: Path) -> None:
    shutil.copy(DATA / "00000003-32-steps.ckpt", tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this resume may not be bit-exact")
        model = ScratchPPO.resume(tmp_path, VecNormalize(cartpole()), device="cpu")
        model.continue_learning(ResumableCheckpoint(16, tmp_path))
        assert len(list(tmp_path.iterdir())) == 2
        ScratchPPO.resume(tmp_path, VecNormalize(cartpole()), device="cpu")


@pytest.mark.parametrize(
    ("module", "name", "today"),
    [
        ("gym.spaces.box", "Box", "gymnasium.spaces.box"),
        ("numpy.core.multiarray", "scalar", "numpy._core.multiarray"),
        ("pathlib._local", "PosixPath", "pathlib"),
        ("cloudpickle.cloudpickle_fast", "_make_function", "cloudpickle.cloudpickle"),
        ("sb3_ppo_from_scratch.device_buffer", "DeviceRolloutBuffer", "sb3_ppo_from_scratch.engines.cudagraph.device_buffer"),
    ],
)
def test_names_of_other_versions(module: str, name: str, today: str) -> None:
    assert renamed(module) == today
    assert find(module, name) == find(today, name)


def test_errors_that_were_pickled_elsewhere_have_moved_too() -> None:
    assert renamed("sb3_ppo_from_scratch.env_failure") == "sb3_ppo_from_scratch.vec_env.failures"
    assert renamed("sb3_ppo_from_scratch.stats") == "sb3_ppo_from_scratch.update"


def test_a_field_that_names_a_moved_module_is_found_with_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy's argument of a public class that has moved."""
    moved = ModuleType("sb3_ppo_from_scratch.device_buffer")
    moved.DeviceRolloutBuffer = DeviceRolloutBuffer  # type: ignore[attr-defined]  # as it was
    monkeypatch.setitem(sys.modules, moved.__name__, moved)
    monkeypatch.setattr(DeviceRolloutBuffer, "__module__", moved.__name__)
    stream = io.BytesIO()
    ScratchPPO(
        "MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", rollout_buffer_class=DeviceRolloutBuffer
    ).save(stream)
    monkeypatch.undo()
    for allow_pickle in (False, True):
        loaded = ScratchPPO.load(stream, device="cpu", allow_pickle=allow_pickle)
        assert loaded.rollout_buffer_class is DeviceRolloutBuffer
