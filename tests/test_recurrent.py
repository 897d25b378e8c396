"""Policies with a memory: the bits of sb3-contrib's RecurrentPPO, and what is right here where they are not."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401  # registers the environments without velocities
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from sb3_ppo_from_scratch import ScratchPPO, UnsafeFileError
from sb3_ppo_from_scratch.recurrent import Sequences
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES
from tests.helpers import ToyEnv, assert_same_model, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*truncated mini-batch")]

LSTM = {"lstm_hidden_size": 8}
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 20, "n_epochs": 2, "policy_kwargs": LSTM}
ZOO_NETWORK = {
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "lstm_hidden_size": 64,
    "enable_critic_lstm": True,
    "net_arch": {"pi": [64], "vf": [64]},
}


def envs(env_id: str, n_envs: int = 2) -> Callable[[], VecEnv]:
    return lambda: make_vec_env(env_id, n_envs, seed=5)


def normalized(env_id: str, n_envs: int) -> Callable[[], VecEnv]:
    return lambda: VecNormalize(make_vec_env(env_id, n_envs, seed=5))


def toy(observation_space: str, action_space: str) -> Callable[[], VecEnv]:
    of, to = OBSERVATION_SPACES[observation_space], ACTION_SPACES[action_space]
    return lambda: make_vec_env(lambda: ToyEnv(of, to), 2, seed=5)


def pictures() -> VecEnv:
    return make_vec_env(lambda: ToyEnv(spaces.Box(0, 255, (36, 36, 1), np.uint8), spaces.Discrete(3)), 2, seed=5)


# ------------------------------------------------------- bits

CARTPOLE = envs("CartPoleNoVel-v1")
RUNS: dict[str, tuple[str, Callable[[], VecEnv], int, dict[str, Any]]] = {
    "the zoo's CartPoleNoVel": (
        "MlpLstmPolicy",
        normalized("CartPoleNoVel-v1", 8),
        3 * 256,
        {
            "n_steps": 32,
            "batch_size": 256,
            "n_epochs": 3,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "learning_rate": LinearSchedule(0.001, 0.0, 1.0),
            "clip_range": LinearSchedule(0.2, 0.0, 1.0),
            "policy_kwargs": ZOO_NETWORK,
        },
    ),
    "Pendulum with gSDE, where every episode is truncated": (
        "MlpLstmPolicy",
        normalized("PendulumNoVel-v1", 2),
        3 * 2 * 110,
        {"n_steps": 110, "batch_size": 64, "use_sde": True, "sde_sample_freq": 4},
    ),
    "one LSTM for both": (
        "MlpLstmPolicy",
        CARTPOLE,
        200,
        {"policy_kwargs": {**LSTM, "shared_lstm": True, "enable_critic_lstm": False}},
    ),
    "no LSTM for the critic": ("MlpLstmPolicy", CARTPOLE, 200, {"policy_kwargs": {**LSTM, "enable_critic_lstm": False}}),
    "two layers with dropout": (
        "MlpLstmPolicy",
        CARTPOLE,
        200,
        {"policy_kwargs": {**LSTM, "n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}},
    ),
    "value clipping, entropy, early stop": (
        "MlpLstmPolicy",
        CARTPOLE,
        200,
        {"clip_range_vf": 0.1, "ent_coef": 0.01, "target_kl": 1e-4, "learning_rate": 3e-3},
    ),
    "learn twice, going on": ("MlpLstmPolicy", CARTPOLE, 100, {"learns": ({}, {"reset_num_timesteps": False})}),
    "one environment": ("MlpLstmPolicy", envs("CartPoleNoVel-v1", 1), 100, {}),
    "images": ("CnnLstmPolicy", pictures, 200, {}),
    "dicts, two extractors": (
        "MultiInputLstmPolicy",
        toy("dict", "multidiscrete"),
        200,
        {"policy_kwargs": {**LSTM, "share_features_extractor": False}},
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_the_reference_has_the_bits_of_recurrent_ppo(run: tuple[str, Callable[[], VecEnv], int, dict[str, Any]]) -> None:
    policy, make_env, total, kwargs = run
    theirs = train(RecurrentPPO, policy, make_env, total, **{**SMALL, **kwargs})
    ours = train(ScratchPPO, policy, make_env, total, engine="torch", **{**SMALL, **kwargs})
    assert_same_model(ours.model, theirs.model)
    assert ours.random_states == theirs.random_states, "a random number more or less was drawn"
    assert len(ours.metrics) == len(theirs.metrics) >= 3
    for mine, reference in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine["train/kl"] >= 0
        for key, value in reference.items():
            np.testing.assert_array_equal(mine[key], value, err_msg=key)


class DoubledValues(RecurrentActorCriticPolicy):
    """A user's subclass, whose methods count."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        actions, values, log_prob, states = super().forward(*args, **kwargs)
        return actions, 2 * values, log_prob, states

    def evaluate_actions(self, *args: Any) -> Any:
        values, log_prob, entropy = super().evaluate_actions(*args)
        return 2 * values, log_prob, entropy


def test_a_policy_class_of_the_users() -> None:
    theirs = train(RecurrentPPO, DoubledValues, CARTPOLE, 200, **SMALL)
    assert_same_model(train(ScratchPPO, DoubledValues, CARTPOLE, 200, **SMALL).model, theirs.model)


# ------------------------------------------------------- where sb3-contrib is wrong


def all_finite(model: Any) -> bool:
    return all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def test_a_leftover_minibatch_of_one_row_is_learned_from() -> None:
    """Trap 23: contrib takes the standard deviation of one advantage, and all weights become NaN."""
    kwargs = {**SMALL, "n_steps": 33, "batch_size": 65, "n_epochs": 1}
    assert not all_finite(RecurrentPPO("MlpLstmPolicy", CARTPOLE(), seed=1, device="cpu", **kwargs).learn(66))
    ours = ScratchPPO("MlpLstmPolicy", CARTPOLE(), seed=1, device="cpu", **kwargs).learn(66)
    assert all_finite(ours)


def test_actions_of_bits() -> None:
    """contrib's buffer keeps them as bytes, which torch's Bernoulli refuses."""
    with pytest.raises(RuntimeError, match="can't be cast"):
        train(RecurrentPPO, "MlpLstmPolicy", toy("box", "multibinary"), 64, **SMALL)
    ours = train(ScratchPPO, "MlpLstmPolicy", toy("box", "multibinary"), 200, **SMALL)
    assert len(ours.metrics) == 4
    assert all_finite(ours.model)


def test_as_many_states_as_observations() -> None:
    """Trap 28: contrib takes three observations with one state for a sequence of three, and returns one state."""
    ours = ScratchPPO("MlpLstmPolicy", CARTPOLE(), device="cpu", **SMALL)
    observations = np.zeros((3, 4), np.float32)
    _, state = ours.policy.predict(observations, (np.zeros((1, 1, 8)),) * 2, np.zeros(1))
    assert state[0].shape == (1, 1, 8)
    for n in (1, 2, 4):
        with pytest.raises(ValueError, match=r"state must be two arrays of shape .* = \[1, 3, 8\], .* not of shapes"):
            ours.predict(observations, (np.zeros((1, n, 8)),) * 2)
        with pytest.raises(ValueError, match=r"episode_start must have shape \[3\], one per observation, not"):
            ours.predict(observations, None, np.ones(n, bool))
    with pytest.raises(ValueError, match="state must be two arrays"):
        ours.predict(observations, (np.zeros((1, 3, 8)),))
    actions, state = ours.predict(observations, episode_start=np.ones(3, bool), deterministic=True)
    assert actions.shape == (3,)
    assert [part.shape for part in state] == [(1, 3, 8)] * 2
    _, later = ours.predict(observations, state, np.array([True, False, True]), deterministic=True)
    np.testing.assert_array_equal(later[0][:, [0, 2]], state[0][:, [0, 2]])  # these began anew
    assert not np.array_equal(later[0][:, 1], state[0][:, 1])
    action, state = ours.predict(observations[0], deterministic=True)
    assert action.shape == ()
    assert state[0].shape == (1, 1, 8)
    ours.predict(observations[0], state, np.array([False]))


# ------------------------------------------------------- what is remembered, and for how long


class Watch(BaseCallback):
    """Keeps what the environments gave."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []
        self.finals: dict[tuple[int, int], Any] = {}

    def _on_step(self) -> bool:
        for row, info in enumerate(self.locals["infos"]):
            if self.locals["dones"][row] and info.get("TimeLimit.truncated"):
                self.finals[len(self.rewards), row] = info["terminal_observation"]
        self.rewards.append(self.locals["rewards"].copy())
        return True


def native() -> VecEnv:
    """Next-step autoreset: a step in which nothing but a reset happens, after each episode."""
    return ScratchPPO._wrap_env(gym.make_vec("CartPole-v1", 2, max_episode_steps=9))


def limited() -> VecEnv:
    return make_vec_env("CartPole-v1", 2, seed=5, env_kwargs={"max_episode_steps": 9})


@pytest.mark.parametrize("make_env", [native, limited])
@pytest.mark.parametrize("changes", [{}, {"enable_critic_lstm": False, "shared_lstm": True}])
@pytest.mark.parametrize("engine", ["torch", "lstm"])
def test_memory_lives_as_long_as_an_episode(make_env: Callable[[], VecEnv], changes: dict[str, Any], engine: str) -> None:
    """Values of two rollouts, and those behind time limits, are those of episodes read from their beginning (trap 27)."""
    kwargs = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "learning_rate": 0.0, "policy_kwargs": {**LSTM, **changes}}
    model, watch = ScratchPPO("MlpLstmPolicy", make_env(), seed=1, device="cpu", engine=engine, **kwargs), Watch()
    state: list[Any] = [None, None]
    bootstrapped = 0
    for _ in range(2):
        watch.rewards.clear()
        watch.finals.clear()
        model.learn(32, watch, reset_num_timesteps=False)
        buffer = model.rollout_buffer
        valid = np.ones((16, 2), bool) if buffer.valid is None else buffer.valid
        for row in range(2):
            for step in range(16):
                if buffer.episode_starts[step, row] or state[row] is None:
                    state[row] = zero_states(model.policy)
                value, state[row] = value_and_state(model.policy, buffer.observations[step, row], state[row])
                if valid[step, row]:
                    np.testing.assert_allclose(buffer.values[step, row], value, rtol=1e-5, atol=1e-6)
                if (step, row) in watch.finals:
                    final, _ = value_and_state(model.policy, watch.finals[step, row], state[row])
                    expected = watch.rewards[step][row] + model.gamma * final
                    np.testing.assert_allclose(buffer.rewards[step, row], expected, rtol=1e-5)
                    bootstrapped += 1
    assert bootstrapped >= 2
    assert (make_env is native) == (not valid.all())


def zero_states(policy: Any) -> Any:
    return tuple(th.zeros(1, 1, 8) for _ in range(4))


@th.no_grad()
def value_and_state(policy: Any, observation: np.ndarray, states: Any) -> tuple[float, Any]:
    """By the LSTMs themselves."""
    features = policy.extract_features(th.as_tensor(observation)[None])
    outputs, actor = policy.lstm_actor(features[None], states[:2])
    critic = states[2:]
    if policy.lstm_critic is not None:
        outputs, critic = policy.lstm_critic(features[None], states[2:])
    return policy.value_net(policy.mlp_extractor.forward_critic(outputs[0])).item(), (*actor, *critic)


def test_sequences_hold_every_row_once() -> None:
    starts = th.tensor([False, False, True, False, False, False, True])
    sequences = Sequences.beginning_at(starts)
    assert sequences.first.tolist() == [0, 2, 6]
    assert sequences.lengths.tolist() == [2, 4, 1]
    rows = th.arange(1, 8)
    padded = sequences.padded(rows)
    assert padded.reshape(3, 4).tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]
    assert th.equal(padded[sequences.places], rows)


@pytest.mark.parametrize("make_env", [native, limited])
def test_minibatches_rotate_and_lose_nothing(make_env: Callable[[], VecEnv]) -> None:
    model = ScratchPPO("MlpLstmPolicy", make_env(), seed=1, device="cpu", **{**SMALL, "n_epochs": 1}).learn(64)
    draw = model._current_engine().minibatches_of(model.rollout_buffer)
    whole = model.rollout_buffer.dataset()
    np.random.seed(4)
    batches = list(draw(20))
    assert [batch.size for batch in batches[:-1]] == [20] * (len(batches) - 1)
    np.random.seed(4)
    begin = np.random.randint(whole.size)
    assert th.equal(th.cat([batch.advantages for batch in batches]), whole.advantages.roll(-begin))
    np.random.seed(4)
    assert [len(batch.advantages) for batch in draw(whole.size)] == [whole.size]


# ------------------------------------------------------- files


@pytest.mark.parametrize("saver", [RecurrentPPO, ScratchPPO])
@pytest.mark.parametrize("loader", [RecurrentPPO, ScratchPPO])
def test_saved_models_train_on_in_either(saver: type, loader: type, tmp_path: Path) -> None:
    def go_on(save_class: type, load_class: type) -> Any:
        reference = {cls: {"engine": "torch"} if cls is ScratchPPO else {} for cls in (save_class, load_class)}
        path = tmp_path / f"{save_class.__name__}-{load_class.__name__}.zip"
        save_class("MlpLstmPolicy", CARTPOLE(), seed=1, device="cpu", **SMALL, **reference[save_class]).learn(100).save(path)
        return load_class.load(path, env=CARTPOLE(), device="cpu", **reference[load_class]).learn(100)

    assert_same_model(go_on(saver, loader), go_on(RecurrentPPO, RecurrentPPO))


def test_a_model_in_the_middle_of_an_episode(tmp_path: Path) -> None:
    """Saved and loaded without a reset, it remembers; contrib begins with nothing."""
    env = CARTPOLE()
    model = ScratchPPO("MlpLstmPolicy", env, seed=1, device="cpu", **SMALL).learn(64)
    model.save(tmp_path / "model.zip")
    loaded = ScratchPPO.load(tmp_path / "model.zip", env=env, device="cpu", force_reset=False)
    np.testing.assert_array_equal(loaded._last_memory, model._last_memory)
    assert np.abs(loaded._last_memory).max() > 0
    assert not loaded._last_episode_starts.all()
    more = ScratchPPO.load(tmp_path / "model.zip", env=envs("CartPoleNoVel-v1", 3)(), device="cpu")
    assert all_finite(more.learn(96))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_lstm_layers": 10**9}, "more layers than there are weights for"),
        ({"n_lstm_layers": "2"}, "n_lstm_layers must be an integer"),
        ({"lstm_hidden_size": 10**6}, "it describes .* weights"),
        ({"lstm_kwargs": {"device": "cpu"}}, "lstm_kwargs must be of"),
        ({"lstm_kwargs": 3}, "lstm_kwargs must be a dict"),
    ],
)
def test_files_that_would_ask_for_too_much(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    ScratchPPO("MlpLstmPolicy", CARTPOLE(), device="cpu", **SMALL).save(tmp_path / "model.zip")
    model = ScratchPPO("MlpLstmPolicy", CARTPOLE(), device="cpu", **SMALL)
    model.policy_kwargs = {**LSTM, **kwargs}
    model.save(tmp_path / "other.zip")
    with pytest.raises(ValueError, match=message):
        ScratchPPO.load(tmp_path / "other.zip")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """The policy's name is read, nothing else of sb3-contrib is."""
    import base64
    import json

    ScratchPPO("MlpLstmPolicy", CARTPOLE(), device="cpu", **SMALL).save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(files["data"])
    data["policy_class"][":serialized:"] = base64.b64encode(pickle.dumps(RecurrentPPO)).decode()
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive:
        for name, content in {**files, "data": json.dumps(data)}.items():
            archive.writestr(name, content)
    with pytest.raises(UnsafeFileError, match="policy_class"):
        ScratchPPO.load(tmp_path / "hostile.zip")


# ------------------------------------------------------- bad input, and SB3's tools


class OwnBuffer(RolloutBuffer):
    """A user's, which keeps no memory."""


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"policy_kwargs": {"lstm_hidden_size": 0}}, r"policy_kwargs\['lstm_hidden_size'\] must be at least 1, not 0"),
        ({"policy_kwargs": {"n_lstm_layers": 0}}, r"policy_kwargs\['n_lstm_layers'\] must be at least 1, not 0"),
        ({"policy_kwargs": {"shared_lstm": True}}, "needs 'enable_critic_lstm': False"),
        ({"policy_kwargs": {"lstm_kwargs": {"bidirectional": True}}}, r"must leave out 'bidirectional', not set it to True"),
        (
            {"policy_kwargs": {"shared_lstm": True, "enable_critic_lstm": False, "share_features_extractor": False}},
            "LSTM cannot be shared",
        ),
        ({"engine": "numpy"}, "numpy: it computes .*, and this one is of type RecurrentActorCriticPolicy"),
        ({"engine": "channels_last"}, "the policy must be CnnPolicy or .*, not RecurrentActorCriticPolicy"),
        ({"engine": "cudagraph"}, "cannot serve this model"),
        (
            {"rollout_buffer_class": OwnBuffer},
            "rollout_buffer_class must be a subclass of ScratchRolloutBuffer for MlpLstmPolicy",
        ),
        ({"policy": "MultiInputLstmPolicy"}, "policy must be 'MlpLstmPolicy' or 'CnnLstmPolicy' for the observation space"),
        ({"policy": "LstmPolicy"}, "'MlpLstmPolicy', 'CnnLstmPolicy', 'MultiInputLstmPolicy'.* or a policy class"),
    ],
)
def test_bad_input(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchPPO(**{"policy": "MlpLstmPolicy", "env": CARTPOLE(), "device": "cpu", **kwargs})


def test_more_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"policy_kwargs\['lstm_hidden_size'\] must be an integer, not 8.0"):
        ScratchPPO("MlpLstmPolicy", CARTPOLE(), policy_kwargs={"lstm_hidden_size": 8.0})
    with pytest.raises(ValueError, match="policy must be 'MultiInputLstmPolicy' for the observation space"):
        ScratchPPO("MlpLstmPolicy", toy("dict", "discrete")())
    with pytest.warns(UserWarning, match="batch_size=200 is larger than the rollout of n_steps \\* n_envs = 64 transitions"):
        ScratchPPO("MlpLstmPolicy", CARTPOLE(), n_steps=32, batch_size=200)
    monkeypatch.setitem(sys.modules, "sb3_contrib.common.recurrent.policies", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs sb3-contrib, which is not installed .*: pip install .*\[contrib\]"):
        ScratchPPO("MlpLstmPolicy", CARTPOLE())


def test_evaluation_keeps_the_state() -> None:
    """SB3's own hands it on from step to step; so it is with contrib's model."""
    callback = EvalCallback(CARTPOLE(), n_eval_episodes=2, eval_freq=32, verbose=0, warn=False)
    model = ScratchPPO("MlpLstmPolicy", CARTPOLE(), seed=1, device="cpu", **SMALL).learn(64, callback)
    assert callback.last_mean_reward > 0
    theirs = RecurrentPPO("MlpLstmPolicy", CARTPOLE(), seed=1, device="cpu", **SMALL)
    theirs.policy.load_state_dict(model.policy.state_dict())
    scores = [evaluate_policy(each, CARTPOLE(), 4, warn=False, return_episode_rewards=True)[0] for each in (model, theirs)]
    assert scores[0] == scores[1]
