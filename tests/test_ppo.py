"""What a user of SB3 does with PPO, done with ScratchPPO."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_from_scratch import MlpPolicy, ScratchPPO, ScratchRolloutBuffer, SharedMlpPolicy
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from tests.helpers import ToyEnv

SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "device": "cpu"}


def small(env: Any = "CartPole-v1", policy: Any = "MlpPolicy", **kwargs: Any) -> ScratchPPO:
    return ScratchPPO(policy, env, **{**SMALL, **kwargs})


class Rows(KVWriter):
    """Keeps every row that the logger writes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append(dict(key_values))


def logged_rows(model: OnPolicyAlgorithm, total_timesteps: int, **kwargs: Any) -> list[dict[str, Any]]:
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(total_timesteps, **kwargs)
    return rows.rows


class Collect(BaseCallback):
    """Notes the names of the local variables that a callback can read, and whatever ``see`` returns at each step."""

    def __init__(self, see: Callable[[BaseCallback], Any] = lambda _: None, stop_after: int = 10**9):
        super().__init__()
        self.see, self.stop_after = see, stop_after
        self.seen: list[Any] = []
        self.step_names: set[str] = set()
        self.rollout_end_names: set[str] = set()

    def _on_step(self) -> bool:
        self.step_names |= set(self.locals)
        self.seen.append(self.see(self))
        return self.n_calls < self.stop_after

    def _on_rollout_end(self) -> None:
        self.rollout_end_names |= set(self.locals)


def test_constructor_is_sb3s_and_more_at_the_end() -> None:
    theirs = list(inspect.signature(PPO.__init__).parameters.values())
    ours = list(inspect.signature(ScratchPPO.__init__).parameters.values())
    shared = ours[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs]
    assert {p.name: p.default for p in ours[len(theirs) :]} == {
        "engine": "auto",
        "precision": "fp32",
        "nan_policy": "raise",
        "nan_observations": None,
        "data_parallel": False,
    }
    assert not issubclass(ScratchPPO, PPO)
    assert issubclass(ScratchPPO, OnPolicyAlgorithm)


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(lambda: "CartPole-v1", id="name"),
        pytest.param(lambda: gym.make("CartPole-v1"), id="gymnasium"),
        pytest.param(lambda: make_vec_env("CartPole-v1", 3), id="vec env"),
    ],
)
def test_any_form_of_environment_and_a_float_of_steps(env: Callable[[], Any]) -> None:
    model = small(env()).learn(1e2)
    assert isinstance(model, ScratchPPO)
    assert model.num_timesteps >= 100
    action, state = model.predict(model.env.reset())
    assert action.shape == (model.n_envs,)
    assert state is None


def test_callbacks_of_every_form(tmp_path: Path) -> None:
    calls: list[int] = []
    small().learn(64, callback=lambda variables, _: calls.append(variables["n_steps"]) or True)
    assert calls == [*range(32)] * 2
    checkpoint = CheckpointCallback(50, str(tmp_path), name_prefix="cartpole")
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=40, n_eval_episodes=2, verbose=0, log_path=str(tmp_path))
    small().learn(96, callback=[checkpoint, CallbackList([evaluation])])
    assert (tmp_path / "cartpole_50_steps.zip").exists()
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [40, 80]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_callbacks_see_sb3s_local_variables(env_id: str) -> None:
    """Trap 19."""
    theirs, ours = Collect(), Collect()
    PPO("MlpPolicy", env_id, **SMALL).learn(256, callback=theirs)
    small(env_id).learn(256, callback=ours)
    loop_variables = {"idx", "done", "terminal_obs", "terminal_value"}  # of SB3's bootstrap, which is a function here
    assert theirs.step_names - loop_variables <= ours.step_names
    assert theirs.rollout_end_names - loop_variables <= ours.rollout_end_names
    documented = {"infos", "dones", "rewards", "new_obs", "actions", "values", "log_probs", "clipped_actions", "obs_tensor"}
    assert documented <= ours.step_names


def test_callbacks_get_sb3s_values() -> None:
    def see(callback: BaseCallback) -> tuple[Any, ...]:
        names = ("rewards", "dones", "new_obs", "actions", "clipped_actions", "values", "log_probs")
        return tuple(np.asarray(callback.locals[name]).tolist() for name in names)

    theirs, ours = Collect(see), Collect(see)
    PPO("MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=1), seed=1, **SMALL).learn(300, callback=theirs)
    small(make_vec_env("Pendulum-v1", 2, seed=1), seed=1, engine="torch").learn(300, callback=ours)
    assert ours.seen == theirs.seen


def test_a_callback_can_stop_in_the_middle_of_a_rollout() -> None:
    model = small()
    before = model.policy.parameters_to_vector()
    model.learn(1000, callback=Collect(stop_after=10))
    assert model.num_timesteps == 10
    assert np.array_equal(model.policy.parameters_to_vector(), before)


def test_callbacks_may_change_the_learning_rate_schedule_and_the_policy() -> None:
    model = small()
    model.lr_schedule = lambda _: 0.0
    before = model.policy.parameters_to_vector()
    model.learn(64)
    assert np.array_equal(model.policy.parameters_to_vector(), before)
    replacement = MlpPolicy(model.observation_space, model.action_space, lambda _: 1e-3)
    model.policy = replacement
    model.lr_schedule = lambda _: 1e-3
    before = replacement.parameters_to_vector()
    model.learn(64)
    assert not np.array_equal(replacement.parameters_to_vector(), before)


def test_each_row_holds_a_rollout_and_its_own_update_and_the_last_is_there() -> None:
    """Trap 18."""
    updates: list[dict[str, Any]] = []

    class Recording(ScratchPPO):
        def train(self) -> None:
            super().train()
            updates.append(dict(self.logger.name_to_value))

    rows = logged_rows(Recording("MlpPolicy", "CartPole-v1", **SMALL), 5 * 32)
    assert [row["time/iterations"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["train/n_updates"] for row in rows] == [2, 4, 6, 8, 10]
    assert [row["time/total_timesteps"] for row in rows] == [32, 64, 96, 128, 160]
    for row, update in zip(rows, updates, strict=True):
        assert {key: row[key] for key in row if key.startswith("train/")} == {
            key: update[key] for key in update if key.startswith("train/")
        }
        assert row["time/rollout_seconds"] > 0
        assert row["time/update_seconds"] > 0


@pytest.mark.parametrize(
    ("log_interval", "iterations"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5]), (None, [])]
)
def test_log_interval(log_interval: int | None, iterations: list[int]) -> None:
    rows = logged_rows(small(), 5 * 32, log_interval=log_interval)
    assert [row["time/iterations"] for row in rows] == iterations


def test_sb3s_keys_are_all_there() -> None:
    kwargs: dict[str, Any] = {**SMALL, "clip_range_vf": 0.2}
    theirs = logged_rows(PPO("MlpPolicy", "Pendulum-v1", **kwargs), 320)[-1].keys()
    ours = logged_rows(small("Pendulum-v1", clip_range_vf=0.2), 320)[-1].keys()
    assert ours - theirs == {"train/kl", "train/grad_norm", "time/rollout_seconds", "time/update_seconds"}
    assert theirs <= ours


def test_steps_per_second_start_with_each_learn() -> None:
    """Trap 21."""
    model = small()
    model.learn(320)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 384
    assert model._num_timesteps_at_start == 320


def test_grad_norm_is_that_before_clipping() -> None:
    first = logged_rows(small(seed=1, n_epochs=1, batch_size=32, max_grad_norm=1e-3), 32)[0]
    again = logged_rows(small(seed=1, n_epochs=1, batch_size=32, max_grad_norm=1e6), 32)[0]
    assert first["train/grad_norm"] == again["train/grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("env", "kwargs"),
    [
        pytest.param(lambda: "CartPole-v1", {}, id="discrete"),
        pytest.param(lambda: "Pendulum-v1", {}, id="box"),
        pytest.param(lambda: "Pendulum-v1", {"use_sde": True}, id="gSDE"),
        pytest.param(lambda: ToyEnv(spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3])), {}, id="multidiscrete"),
        pytest.param(lambda: ToyEnv(spaces.Box(-1, 1, (2,)), spaces.MultiBinary(3)), {}, id="multibinary"),
    ],
)
def test_kl_is_exact(env: Callable[[], Any], kwargs: dict[str, Any]) -> None:
    """One epoch after the first step at a whole batch: KL between the policy that collected and the one that stepped once."""
    model = small(env(), seed=1, batch_size=32, n_epochs=2, learning_rate=1e-2, **kwargs)
    collected_with = MlpPolicy(model.observation_space, model.action_space, lambda _: 0.0, use_sde=model.use_sde)
    collected_with.load_state_dict(model.policy.state_dict())
    stepped_once: dict[str, th.Tensor] = {}

    class AfterOneStep(TorchEngine):
        def update(self, buffer: Any, config: Any) -> Any:
            one = TorchEngine(self.policy)
            state = {key: value.clone() for key, value in self.policy.state_dict().items()}
            random_state = np.random.get_state()
            one.update(buffer, config.__class__(**{**config.__dict__, "n_epochs": 1}))
            stepped_once.update({key: value.clone() for key, value in self.policy.state_dict().items()})
            self.policy.load_state_dict(state)
            self.policy.optimizer.state.clear()
            np.random.set_state(random_state)
            return super().update(buffer, config)

    model._engine = AfterOneStep(model.policy)
    row = logged_rows(model, 32)[0]
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    after = MlpPolicy(model.observation_space, model.action_space, lambda _: 0.0, use_sde=model.use_sde)
    after.load_state_dict(stepped_once)
    observations = buffer.dataset().observations
    kl = kl_divergence(collected_with.get_distribution(observations), after.get_distribution(observations))
    expected = kl.sum(dim=1).mean() if kl.dim() == 2 else kl.mean()
    assert row["train/kl"] == pytest.approx(expected.item(), rel=1e-3, abs=1e-7)
    assert row["train/kl"] > 0


def test_entropy_coefficient_may_be_scheduled() -> None:
    rows = logged_rows(small(ent_coef=lambda progress: 0.1 * progress), 128)
    assert [row["train/ent_coef"] for row in rows] == pytest.approx([0.075, 0.05, 0.025, 0.0])
    constant = small(seed=1, ent_coef=0.1).learn(64)
    scheduled = small(seed=1, ent_coef=lambda _: 0.1).learn(64)
    assert np.array_equal(constant.policy.parameters_to_vector(), scheduled.policy.parameters_to_vector())


def test_progress_bar_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = small(tensorboard_log=str(tmp_path))
    model.learn(96, progress_bar=True)
    model.learn(64, reset_num_timesteps=False)
    events = EventAccumulator(str(tmp_path / "ScratchPPO_1"))
    events.Reload()
    assert {"train/kl", "train/loss", "train/grad_norm", "time/update_seconds"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [32, 64, 96, 128, 160]


def test_set_env() -> None:
    model = small().learn(32)
    other = make_vec_env("CartPole-v1")
    model.set_env(other)
    model.learn(32)
    assert model.get_env() is other


def test_environments_by_name(tmp_path: Path) -> None:
    """For whoever loads a model or sets its environment, as for who makes one."""
    model = small().learn(32)
    model.save(tmp_path / "model")
    for other in (ScratchPPO.load(tmp_path / "model", env="CartPole-v1"), model):
        other.set_env("CartPole-v1")
        other.learn(32, reset_num_timesteps=False)
        assert other.num_timesteps == 64
    with pytest.raises(gym.error.NameNotFound, match="CartPool"):
        model.set_env("CartPool-v1")


def test_parameters_round_trip(tmp_path: Path) -> None:
    trained, fresh = small(seed=1).learn(64), small(seed=2)
    fresh.set_parameters(trained.get_parameters())
    assert np.array_equal(fresh.policy.parameters_to_vector(), trained.policy.parameters_to_vector())
    assert set(trained.get_parameters()) == {"policy", "policy.optimizer"}


@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_save_and_load(policy: str, tmp_path: Path) -> None:
    model = small(policy=policy, seed=1, ent_coef=0.01, engine="torch", policy_kwargs={"net_arch": [16]}).learn(64)
    stream = io.BytesIO()
    model.save(stream)
    model.save(tmp_path / "model")
    obs = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    for source in (io.BytesIO(stream.getvalue()), tmp_path / "model.zip"):
        loaded = ScratchPPO.load(source)
        assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
        assert (loaded.ent_coef, loaded.engine, loaded.batch_size) == (0.01, "torch", 16)


def test_loading_to_predict_allocates_no_rollout_buffer(tmp_path: Path) -> None:
    small().learn(32).save(tmp_path / "model")
    loaded = ScratchPPO.load(tmp_path / "model")
    loaded.predict(np.zeros(4, np.float32))
    assert "rollout_buffer" not in vars(loaded)
    loaded.set_env(make_vec_env("CartPole-v1"))
    loaded.learn(32)
    assert isinstance(vars(loaded)["rollout_buffer"], ScratchRolloutBuffer)


def test_the_number_of_environments_may_change_on_load(tmp_path: Path) -> None:
    """Trap 12."""
    small().learn(32).save(tmp_path / "model")
    loaded = ScratchPPO.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 4))
    loaded.learn(128)
    assert loaded.rollout_buffer.rewards.shape == (32, 4)


def test_normalized_environments(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = small(env).learn(64)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 64


def test_the_shared_trunk_is_shared() -> None:
    model = small(policy="SharedMlpPolicy", policy_kwargs={"net_arch": [10, 20]})
    assert isinstance(model.policy, SharedMlpPolicy)
    trunk, heads = 4 * 10 + 10 + 10 * 20 + 20, (20 + 1) + (20 * 2 + 2)
    assert sum(parameter.numel() for parameter in model.policy.parameters()) == trunk + heads
    obs = th.ones(1, 4)
    model.policy.predict_values(obs).backward()
    first_layer = model.policy.mlp_extractor.trunk[0]
    assert first_layer.weight.grad.abs().sum() > 0
    first_layer.weight.grad = None
    model.policy.get_distribution(obs).distribution.logits[0, 0].backward()
    assert first_layer.weight.grad.abs().sum() > 0
    default = small(policy="SharedMlpPolicy").policy.mlp_extractor
    assert (default.latent_dim_pi, default.latent_dim_vf, len(default.trunk)) == (64, 64, 4)


def test_ctrl_c_in_an_update_leaves_a_model_that_trains_on() -> None:
    model = small(n_epochs=10, seed=1).learn(32)
    state, steps = model.policy.optimizer.state, [0]

    def interrupt(*_: Any) -> None:
        steps[0] += 1
        if steps[0] == 7:
            raise KeyboardInterrupt

    handle = model.policy.value_net.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.train()
    handle.remove()
    counts = {float(entry["step"]) for entry in state.values()}
    assert counts == {20.0 + 6.0}, "the moments have come as far as the parameters"
    model.learn(32)
    assert {float(entry["step"]) for entry in state.values()} == {26.0 + 20.0}


def test_verbose_says_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    model = small(verbose=1, target_kl=1e-9, learning_rate=0.1).learn(32)
    printed = capsys.readouterr().out
    assert f"Using the engine {choose_engine('auto', model.policy).engine.name}" in printed
    assert "KL above 1.5 * target_kl" in printed
    small(verbose=0).learn(32)
    assert capsys.readouterr().out == ""
