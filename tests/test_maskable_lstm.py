"""Masks and memory at once: contrib's recurrent policies with contrib's masked distributions."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.lstm import LstmEngine
from sb3_ppo_from_scratch.engines.reference import TorchEngine
from sb3_ppo_from_scratch.evaluation import evaluate_policy
from sb3_ppo_from_scratch.recurrent import EPISODE_STARTS, LSTM_STATES, SEQUENCE_STARTS
from sb3_ppo_from_scratch.recurrent.maskable import MaskableMlpLstmPolicy
from sb3_ppo_from_scratch.update import minibatch_loss
from sb3_ppo_from_scratch.vec_env import NativeVecEnv
from tests.helpers import assert_same_model, update_config
from tests.test_masks import ACTIONS, MaskedEnv, NativeMasked, forbidden, make

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated mini-batch")

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 24, "n_epochs": 2, "ent_coef": 0.01, "seed": 1, "device": "cpu"}
LSTM = {"lstm_hidden_size": 8}
SHARED = {**LSTM, "shared_lstm": True, "enable_critic_lstm": False}
ONLY_ACTOR = {**LSTM, "enable_critic_lstm": False, "n_lstm_layers": 2}


def trained(policy: Any, env: VecEnv, n: int = 128, use_masking: bool = True, **kwargs: Any) -> ScratchPPO:
    arguments = {**SMALL, "policy_kwargs": LSTM, **kwargs}
    return ScratchPPO(policy, env, **arguments).learn(n * env.num_envs, use_masking=use_masking)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("engine", ["torch", "lstm"])
def test_without_masks_it_is_the_recurrent_policy(engine: str) -> None:
    """Same layers and draws; differs by rounding, since a masked entropy is summed in another way."""
    plain = trained("MlpLstmPolicy", make(2), engine=engine)
    everything = make(2)
    for env in everything.envs:  # type: ignore[attr-defined]
        env.unwrapped.action_masks = lambda: np.ones(6, bool)
    for masked in (
        trained("MaskableMlpLstmPolicy", make(2), engine=engine, use_masking=False),
        trained("MaskableMlpLstmPolicy", everything, engine=engine),
    ):
        for (name, ours), theirs in zip(masked.policy.state_dict().items(), plain.policy.state_dict().values(), strict=True):
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "method": ("MaskableMlpLstmPolicy", {}, {}),
    "MultiDiscrete, VecNormalize, one LSTM": (
        "MaskableMlpLstmPolicy",
        {"action_space": ACTIONS["MultiDiscrete"], "normalized": True},
        {"policy_kwargs": SHARED},
    ),
    "MultiBinary, infos, no LSTM for the critic": (
        "MaskableMlpLstmPolicy",
        {"action_space": ACTIONS["MultiBinary"], "way": "info"},
        {"policy_kwargs": ONLY_ACTOR},
    ),
    "observation": ("MaskableMultiInputLstmPolicy", {"way": "observation"}, {"target_kl": 0.01}),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_the_fast_engine_trains_as_the_reference_does(run: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    policy, env, kwargs = run
    theirs = trained(policy, make(3, **env), engine="torch", **kwargs)
    ours = trained(policy, make(3, **env), **kwargs)
    assert choose_engine("auto", ours.policy).engine is LstmEngine
    assert forbidden(ours.env) == forbidden(theirs.env) == 0
    for mine, reference in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        th.testing.assert_close(mine, reference, rtol=0, atol=2e-5)
    assert 0 <= ours.logger.name_to_value.get("train/kl", 0.0) < 1


@pytest.mark.parametrize("engine_class", [TorchEngine, LstmEngine])
@pytest.mark.parametrize("kind", ACTIONS)
def test_a_mask_is_applied_to_the_logits_after_the_lstm(kind: str, engine_class: type[TorchEngine]) -> None:
    """Log-probabilities, entropy and gradient against the formula, step by step in float64, across episodes."""
    env = make(2, action_space=ACTIONS[kind])
    model = ScratchPPO("MaskableMlpLstmPolicy", env, **SMALL, policy_kwargs=LSTM, engine="torch").learn(32)
    policy: Any = model.policy
    buffer = model.rollout_buffer
    engine = engine_class(policy)
    batch = next(iter(engine.minibatches_of(buffer)(24)))
    actions = batch.actions.long().flatten() if kind == "Discrete" else batch.actions
    outputs = engine.evaluate_sequences(batch, actions, batch.extras["action_masks"])

    double = MaskableMlpLstmPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **LSTM)
    double.load_state_dict(policy.state_dict())
    double.double()
    sizes = MaskedEnv(ACTIONS[kind]).sizes
    log_probs, entropies, values = [], [], []
    states: Any = None
    for row in range(batch.size):
        if batch.extras[SEQUENCE_STARTS][row] or row == 0:
            kept = batch.extras[LSTM_STATES][row].double() * (1 - batch.extras[EPISODE_STARTS][row])
            states = [(kept[i][:, None], kept[i + 1][:, None]) for i in (0, 2)]
        seen = batch.observations[row : row + 1].double()[None]
        (pi, states[0]), (vf, states[1]) = double.lstm_actor(seen, states[0]), double.lstm_critic(seen, states[1])
        logits = double.action_net(double.mlp_extractor.forward_actor(pi[0]))[0]
        values.append(double.value_net(double.mlp_extractor.forward_critic(vf[0]))[0, 0])
        log_prob, entropy = th.zeros(()), th.zeros(())
        parts = zip(logits.split(sizes), batch.extras["action_masks"][row].split(sizes), batch.actions[row], strict=True)
        for part, allowed, action in parts:
            mask = allowed.bool()
            probabilities = part.masked_fill(~mask, -np.inf).softmax(0)
            log_prob = log_prob + probabilities[int(action)].log()
            entropy = entropy - (probabilities[mask] * probabilities[mask].log()).sum()
        log_probs.append(log_prob)
        entropies.append(entropy)
    expected = outputs._replace(values=th.stack(values), log_prob=th.stack(log_probs), entropy=th.stack(entropies))
    th.testing.assert_close(outputs.log_prob.double(), expected.log_prob, rtol=1e-4, atol=1e-5)
    th.testing.assert_close(outputs.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-5)
    config = update_config(ent_coef=0.01)
    policy.optimizer.zero_grad()
    minibatch_loss(outputs, batch, config).total.backward()
    minibatch_loss(expected, batch, config).total.backward()
    for mine, exact in zip(policy.parameters(), double.parameters(), strict=True):
        th.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_images() -> None:
    class Pictures(MaskedEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

        def _show(self) -> tuple[Any, dict[str, Any]]:
            super()._show()
            return self.np_random.integers(0, 255, (36, 36, 1), np.uint8), {}

    model = trained("MaskableCnnLstmPolicy", make_vec_env(Pictures, 2, seed=1), 32)
    assert forbidden(model.env) == 0
    assert choose_engine("auto", model.policy).engine is LstmEngine


def test_reset_rows_are_no_transitions() -> None:
    """In them a mask may allow nothing, and an episode's memory ends."""
    env = NativeVecEnv(NativeMasked([partial(MaskedEnv, way="none")] * 2))
    model = trained("MaskableMlpLstmPolicy", env, 64)
    assert model.rollout_buffer.valid is not None
    assert not model.rollout_buffer.valid.all()
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


# ---------------------------------------------------------------- what it is for


class Doors(gym.Env):
    """
    A light says left or right, then it is dark; then ten doors, five on each side, of which one on each side is open.

    The mask alone says which. Whoever forgets the light is right half of the time; whoever knows no mask finds a fifth of the
    doors open.
    """

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(10)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_number, self.side = 0, int(self.np_random.integers(2))
        return self._show()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(self.step_number == 2 and action // 5 == self.side and self.mask[action])
        self.step_number += 1
        return (*self._show()[:1], reward, self.step_number == 3, False, self._info())

    def _show(self) -> tuple[Any, dict[str, Any]]:
        shown = np.zeros(3, np.float32)
        if self.step_number == 0:
            shown[self.side] = 1
        shown[2] = self.step_number == 2
        self.mask = np.zeros(10, bool)
        self.mask[self.np_random.integers(5)] = self.mask[5 + self.np_random.integers(5)] = True
        return shown, self._info()

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.mask}


def test_a_task_that_needs_both() -> None:
    def score(policy: str, **kwargs: Any) -> float:
        arguments = {
            "n_steps": 48,
            "batch_size": 96,
            "n_epochs": 4,
            "learning_rate": 5e-3,
            "gamma": 0.9,
            "seed": 3,
            "device": "cpu",
        }
        model = ScratchPPO(policy, make_vec_env(Doors, 8, seed=3), **arguments, **kwargs).learn(48 * 8 * 20)
        return float(evaluate_policy(model, make_vec_env(Doors, 8, seed=4), n_eval_episodes=200)[0])

    assert score("MaskableMlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 16}) > 0.95
    assert 0.35 < score("MaskableMlpPolicy") < 0.65, "without a memory, it guesses the side"
    assert score("MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 16}) < 0.35, "without masks, it guesses the door"


# ---------------------------------------------------------------- acting, files, runs


def test_predict_takes_states_and_masks(tmp_path: Path) -> None:
    model = trained("MaskableMlpLstmPolicy", make(2), 32)
    model.save(tmp_path / "model.zip")
    loaded = ScratchPPO.load(tmp_path / "model.zip", device="cpu")  # runs nothing: the class is on the list
    assert type(loaded.policy) is MaskableMlpLstmPolicy
    assert {*loaded.policy.state_dict()} == {
        *RecurrentActorCriticPolicy(model.observation_space, model.action_space, lambda _: 1e-3, **LSTM).state_dict()
    }, "contrib's names"
    obs, masks = model.env.reset(), np.zeros((2, 6), bool)
    masks[0, 4] = masks[1, 1] = True
    state = None
    for _ in range(3):
        actions, state = loaded.predict(obs, state, np.array([False, True]), action_masks=masks)
        assert actions.tolist() == [4, 1]
        assert [part.shape for part in state] == [(1, 2, 8)] * 2
    action, _ = loaded.predict(obs[0], action_masks=masks[0])
    assert action == 4
    with pytest.raises(ValueError, match="state must be two arrays"):
        loaded.predict(obs, (state[0][:, :1], state[1][:, :1]), action_masks=masks)
    with pytest.raises(ValueError, match="allow"):
        loaded.predict(obs, action_masks=np.zeros((2, 6), bool))
    env = make(2)
    mean, _ = evaluate_policy(loaded, env, n_eval_episodes=4)
    assert np.isfinite(mean)
    assert forbidden(env) == 0


def test_evaluations_while_learning_have_masks_and_states() -> None:
    env = make(1)
    model = ScratchPPO("MaskableMlpLstmPolicy", make(2), **SMALL, policy_kwargs=LSTM)
    model.learn(96, EvalCallback(env, n_eval_episodes=2, eval_freq=16, verbose=0))
    assert forbidden(env) == forbidden(model.env) == 0


_RUN = """
import os, signal, sys
from stable_baselines3.common.callbacks import ConvertCallback
from tests.test_maskable_lstm import LSTM, SMALL, Path, ResumableCheckpoint, ScratchPPO, normalized_env
def kill(locals, globals):
    if locals["self"].num_timesteps >= 200:
        os.kill(os.getpid(), signal.SIGKILL)
    return True
model = ScratchPPO("MaskableMlpLstmPolicy", normalized_env(), **SMALL, policy_kwargs=LSTM)
model.learn(320, [ResumableCheckpoint(32, Path(sys.argv[1])), ConvertCallback(kill)])
"""


def normalized_env() -> VecEnv:
    return VecNormalize(make_vec_env(partial(MaskedEnv, way="info"), 2, seed=2))


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """What is remembered in the middle of an episode, and its mask, are in the checkpoint."""
    command = [sys.executable, "-c", _RUN, str(tmp_path)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert killed.returncode == -9, killed.stderr
    whole = ScratchPPO("MaskableMlpLstmPolicy", normalized_env(), **SMALL, policy_kwargs=LSTM)
    whole.learn(320, ResumableCheckpoint(32, tmp_path / "whole"))
    resumed = ScratchPPO.resume(tmp_path, normalized_env()).continue_learning()
    assert_same_model(resumed, whole)
    np.testing.assert_array_equal(resumed._last_action_masks, whole._last_action_masks)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env": "Pendulum-v1"}, "actions can be masked in a Discrete, MultiDiscrete or MultiBinary space"),
        ({"engine": "numpy"}, "engine='numpy'"),
        ({"engine": "compiled"}, "engine='compiled'"),
        ({"policy_kwargs": {"lstm_hidden_size": 0}}, "lstm_hidden_size"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchPPO(**{"policy": "MaskableMlpLstmPolicy", "env": make(1), **SMALL, **kwargs})


def test_a_mask_that_allows_nothing_names_the_environment() -> None:
    env = make(2)
    env.envs[1].unwrapped.action_masks = lambda: np.zeros(6, bool)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="environment 1"):
        trained("MaskableMlpLstmPolicy", env)
