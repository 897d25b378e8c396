"""Native vector environments: what reaches the learner is what ``DummyVecEnv`` would have brought, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize, VecTransposeImage

from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.engines import Engine, PolicyStep
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, mask_reset_rows, with_reset_rows
from tests.envs import ACTION_SPACES, BOX, OBSERVATION_SPACES, ClockEnv
from tests.helpers import ToyEnv

MODES = list(AutoresetMode)
N_ENVS = 3
FIELDS = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")


class TalkativeEnv(ToyEnv):
    """Also says something in every info."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, _ = super().reset(**kwargs)
        return obs, {"began": float(self.np_random.random())}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        info = {"clock": self.steps, "nested": {"reward": reward}, "words": f"step {self.steps}"}
        if terminated:
            info["is_success"] = reward > 0
        return obs, reward, terminated, truncated, info


def env_fns(observation: str = "box", action: str = "discrete", n: int = N_ENVS) -> list[Callable[[], gym.Env]]:
    """Environments with spaces of their own, for they draw from them."""
    pair = (OBSERVATION_SPACES[observation], ACTION_SPACES[action])
    return [lambda: TalkativeEnv(*copy.deepcopy(pair)) for _ in range(n)]


def clocks(mode: AutoresetMode = AutoresetMode.NEXT_STEP, n: int = 2, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: ClockEnv(**kwargs) for _ in range(n)], autoreset_mode=mode)


def dummy(fns: list[Callable[[], gym.Env]]) -> DummyVecEnv:
    return DummyVecEnv([lambda fn=fn: Monitor(fn()) for fn in fns])  # type: ignore[misc]


class ScriptedEngine(Engine):
    """Acts as a function of the observation alone, so that an environment's episodes do not depend on its neighbours."""

    name = "scripted"

    @classmethod
    def unsupported_reason(cls, policy: Any) -> str | None:
        return None

    def act(self, obs: Any) -> PolicyStep:
        values = self.predict_values(obs)
        digits = (values.double().numpy() * 1e4).astype(np.int64)
        space = self.policy.action_space
        if isinstance(space, spaces.Discrete):
            actions = digits[:, 0] % space.n
        elif isinstance(space, spaces.MultiDiscrete):
            actions = digits // np.arange(1, 1 + len(space.nvec)) % space.nvec
        else:
            actions = np.broadcast_to(digits % 5 / 4, (len(digits), *space.shape)).astype(np.float32)
        return PolicyStep(actions, values, values.flatten() - 1, None)

    def predict_values(self, obs: Any) -> th.Tensor:
        leaves = obs.values() if isinstance(obs, dict) else [obs]
        return sum(leaf.double().reshape(len(leaf), -1).sum(1, keepdim=True) for leaf in leaves).float()  # type: ignore[union-attr]

    def learning(self, buffer: Any, config: Any) -> Any:
        raise NotImplementedError


def rollout(env: Any, n_steps: int, rollouts: int = 1, batched: bool = True) -> ScratchPPO:
    """A model after ``rollouts`` of scripted steps, with the last one in its buffer."""
    dict_space = isinstance(getattr(env, "single_observation_space", env.observation_space), spaces.Dict)
    policy = "MultiInputPolicy" if dict_space else "MlpPolicy"
    model = ScratchPPO(policy, env, n_steps=n_steps, batch_size=n_steps, gamma=0.9, gae_lambda=0.8, seed=7, device="cpu")
    model._engine = ScriptedEngine(model.policy)
    model._engine.batched_bootstrap = batched
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(n_steps * model.n_envs * rollouts)
    return model


def columns(model: ScratchPPO) -> list[dict[str, np.ndarray]]:
    """For each environment what the buffer holds of its transitions, field by field."""
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    valid = np.ones_like(buffer.rewards, dtype=bool) if buffer.valid is None else buffer.valid
    result = []
    for i in range(model.n_envs):
        column: dict[str, np.ndarray] = {}
        for name in FIELDS:
            array = getattr(buffer, name)
            parts = array if isinstance(array, dict) else {"": array}
            column |= {name + key: part[valid[:, i], i] for key, part in parts.items()}
        result.append(column)
    return result


# ---------------------------------------------------------------- equality with DummyVecEnv

PAIRS = [("box", "discrete"), ("dict", "multidiscrete"), ("discrete", "box"), ("image", "discrete"), ("multibinary", "box")]


@pytest.mark.parametrize(("observation", "action"), PAIRS)
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("batched", [True, False])
def test_trap_3_without_reset_rows_the_buffer_holds_what_it_would_from_dummy(
    observation: str, action: str, mode: AutoresetMode, batched: bool
) -> None:
    """Trap 3: modes differ in how they hand over the final observation, not in what is learned from."""
    reference = rollout(dummy(env_fns(observation, action)), 60, 2)
    native = rollout(SyncVectorEnv(env_fns(observation, action), autoreset_mode=mode), 60, 2, batched)
    assert native.rollout_buffer.valid is None
    assert reference.rollout_buffer.episode_starts.sum() > 3 * N_ENVS
    for ours, theirs in zip(columns(native), columns(reference), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert [episode | {"t": 0} for episode in native.ep_info_buffer] == [e | {"t": 0} for e in reference.ep_info_buffer]


@pytest.mark.parametrize(("observation", "action"), PAIRS)
def test_trap_3_in_next_step_mode_the_buffer_holds_it_but_for_the_reset_rows(observation: str, action: str) -> None:
    """Trap 3: advantages are compared over whole episodes, since the rollouts end at different transitions."""
    reference = rollout(dummy(env_fns(observation, action)), 120)
    native = rollout(SyncVectorEnv(env_fns(observation, action)), 120)
    truncated = 0
    for ours, theirs in zip(columns(native), columns(reference), strict=True):
        assert 100 < len(ours["rewards"]) < 120
        begins = np.flatnonzero(ours["episode_starts"])
        for name in theirs:
            end = begins[-1] if name in ("advantages", "returns") else len(ours["rewards"])
            np.testing.assert_array_equal(ours[name][:end], theirs[name][:end], err_msg=name)
        truncated += (np.diff(begins) == 17).sum()
    assert truncated > 1
    pairs = zip(native.ep_info_buffer, reference.ep_info_buffer, strict=False)
    assert sorted(e["l"] for e, _ in pairs)  # and each of ours is one of theirs:
    theirs_by_end = {(e["r"], e["l"]) for e in reference.ep_info_buffer}
    assert {(e["r"], e["l"]) for e in native.ep_info_buffer} <= theirs_by_end


@pytest.mark.parametrize("mode", MODES)
def test_steps_and_infos_are_those_of_dummy(mode: AutoresetMode) -> None:
    """Step by step for one environment: observations, rewards, ends, infos, and the infos of its resets."""
    theirs, ours = dummy(env_fns(n=1)), NativeVecEnv(SyncVectorEnv(env_fns(n=1), autoreset_mode=mode))
    for env in (theirs, ours):
        env.seed(3)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    assert ours.reset_infos == theirs.reset_infos
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(80):
        action = rng.integers(3, size=1)
        mine, reference = ours.step(action), theirs.step(action)
        for part in (1, 2):
            assert mine[part].dtype == reference[part].dtype
            np.testing.assert_array_equal(mine[part], reference[part])
        (my_info,), (info,) = mine[3], reference[3]
        assert my_info.keys() == info.keys()
        for key in info.keys() - {"terminal_observation", "episode"}:
            assert my_info[key] == info[key], key
        if reference[2][0]:
            ends += 1
            np.testing.assert_array_equal(my_info["terminal_observation"], info["terminal_observation"])
            assert my_info["episode"] | {"t": 0} == info["episode"] | {"t": 0}
            if mode is AutoresetMode.NEXT_STEP:
                np.testing.assert_array_equal(mine[0][0], info["terminal_observation"])
                assert ours.resetting.tolist() == [True]
                mine = ours.step(action)
                assert ours.reset_rows.tolist() == [True]
                assert (mine[1].tolist(), mine[2].tolist(), mine[3]) == ([0.0], [False], [{"TimeLimit.truncated": False}])
        assert ours.resetting.tolist() == [False]
        np.testing.assert_array_equal(mine[0], reference[0])
        assert ours.reset_infos == theirs.reset_infos
    assert ends > 4


def test_native_cartpole_plays_the_single_environments_game() -> None:
    """The steps between two resets, replayed in ``CartPoleEnv`` from the same state with the same actions."""
    env = NativeVecEnv(gym.make_vec("CartPole-v1", 4, max_episode_steps=30))
    single = gym.make("CartPole-v1").unwrapped
    env.seed(1)
    obs = env.reset()
    rng = np.random.default_rng(2)
    states = [env.env.unwrapped.state[:, i].copy() for i in range(4)]
    actions: list[list[int]] = [[] for _ in range(4)]
    ended: list[bool] = []
    for _ in range(120):
        before, action = obs, rng.integers(2, size=4)
        obs, rewards, dones, infos = env.step(action)
        for i in np.flatnonzero(~env.reset_rows):
            single.reset()
            single.state = tuple(states[i])
            actions[i].append(int(action[i]))
            for a in actions[i]:
                expected, reward, terminated, _, _ = single.step(a)
            shown = infos[i]["terminal_observation"] if dones[i] else obs[i]
            np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-6)
            assert rewards[i] == reward
            assert dones[i] == (terminated or len(actions[i]) == 30)
            if dones[i]:
                ended.append(infos[i]["TimeLimit.truncated"])
                assert infos[i]["TimeLimit.truncated"] == (not terminated)
                assert (infos[i]["episode"]["r"], infos[i]["episode"]["l"]) == (len(actions[i]), len(actions[i]))
                actions[i] = []
        for i in np.flatnonzero(env.reset_rows):
            states[i] = env.env.unwrapped.state[:, i].copy()
            assert np.abs(obs[i]).max() <= 0.05 < np.abs(before[i]).max()
    assert True in ended
    assert False in ended


# ---------------------------------------------------------------- reset rows


class Poison(BaseCallback):
    """Makes everything that the buffer holds of rows that are no transitions useless."""

    poisoned = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        assert buffer.valid is not None
        for name in (*FIELDS, "dist_params"):
            array = getattr(buffer, name)
            array[~buffer.valid] = np.nan if array.dtype.kind == "f" else 10**9
        self.poisoned += (~buffer.valid).sum()


class PoisonBeforeGae(ScratchRolloutBuffer):
    """Their rewards and values are far too large already when advantages are computed."""

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        assert self.valid is not None
        self.rewards[~self.valid] = 1e20
        self.values[~self.valid] = -1e20
        super().compute_returns_and_advantage(last_values, dones)


def trained(callback: BaseCallback | None = None, **kwargs: Any) -> tuple[dict[str, th.Tensor], list[dict[str, Any]]]:
    """Parameters and metrics after three updates on native CartPoles of at most 25 steps."""
    metrics = []

    class Recording(ScratchPPO):
        def train(self) -> None:
            super().train()
            metrics.append({k: v for k, v in self.logger.name_to_value.items() if k.startswith(("train/", "rollout/"))})

    env = gym.make_vec("CartPole-v1", 4, max_episode_steps=25)
    model = Recording("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=2, seed=1, device="cpu", engine="torch", **kwargs)
    model.learn(3 * 64 * 4, callback=callback)
    return {name: value.clone() for name, value in model.policy.state_dict().items()}, metrics


def test_trap_3_nothing_of_a_reset_row_is_learned_from_or_logged() -> None:
    """Trap 3: neither losses, nor the advantages' normalization, nor any metric."""
    clean, clean_metrics = trained()
    poison = Poison()
    for parameters, metrics in (trained(poison), trained(rollout_buffer_class=PoisonBeforeGae)):
        assert all(th.equal(parameters[name], value) for name, value in clean.items())
        assert metrics == clean_metrics
    assert poison.poisoned > 20
    assert np.isfinite([metric["train/explained_variance"] for metric in clean_metrics]).all()


def test_the_data_set_holds_the_transitions_and_no_other_row() -> None:
    model = rollout(gym.make_vec("CartPole-v1", 4, max_episode_steps=10), 60)
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    assert buffer.valid is not None
    starts_of_resets = np.argwhere(~buffer.valid)
    data = buffer.dataset()
    assert data.size == buffer.valid.sum() == 240 - len(starts_of_resets) < 240
    flat = buffer.values.T.ravel()[buffer.valid.T.ravel()]
    assert data.old_values.tolist() == flat.tolist()
    assert sum(batch.size for batch in buffer.get(7)) == data.size
    for step, i in starts_of_resets:
        assert buffer.rewards[step, i] == 0
        assert buffer.episode_starts[step, i] == 1
        if step + 1 < 60:
            assert buffer.episode_starts[step + 1, i] == 1
            assert buffer.valid[step + 1, i]


def test_a_reset_row_may_be_the_first_or_the_last_of_a_rollout() -> None:
    """Episodes of 3 transitions and a reset, in rollouts of 4, 3 and 5 steps: each begins elsewhere in this cycle."""
    for n_steps in (3, 4, 5):
        model = ScratchPPO("MlpPolicy", clocks(n=1), n_steps=n_steps, batch_size=n_steps, n_epochs=1, gamma=0.5, device="cpu")
        model._engine = ScriptedEngine(model.policy)
        seen = []

        def remember(model: ScratchPPO = model, seen: list[Any] = seen) -> None:
            buffer = model.rollout_buffer
            valid = np.ones(len(buffer.rewards), bool) if buffer.valid is None else buffer.valid[:, 0]
            seen += zip(valid, buffer.episode_starts[:, 0], buffer.rewards[:, 0], buffer.observations[:, 0, 0], strict=True)

        model.train = remember  # type: ignore[method-assign]
        model.learn(n_steps * 8)
        for t, (valid, start, reward, observed) in enumerate(seen):
            clock = t % 4
            last = 1 + 0.5 * 0.53  # the time limit's bootstrap
            assert valid == (clock != 3)
            assert start == (clock in (0, 3))
            assert reward == pytest.approx([1, 1, last, 0][clock])
            assert observed == pytest.approx(0.5 + clock / 100)


def test_a_rollout_of_nothing_but_a_reset_is_an_error() -> None:
    model = ScratchPPO("MlpPolicy", clocks(n=2, length=2), n_steps=1, batch_size=2, n_epochs=1, device="cpu")
    with pytest.raises(RuntimeError, match="n_steps must be larger"):
        model.learn(100)


def test_a_buffer_class_that_cannot_leave_rows_out_is_refused() -> None:
    class Theirs(RolloutBuffer):
        pass

    arguments = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "rollout_buffer_class": Theirs, "device": "cpu"}
    with pytest.raises(ValueError, match=r"rollout_buffer_class must be a subclass of ScratchRolloutBuffer .* not Theirs"):
        ScratchPPO("MlpPolicy", clocks(), **arguments).learn(16)
    ScratchPPO("MlpPolicy", clocks(AutoresetMode.SAME_STEP), **arguments).learn(16)


# ---------------------------------------------------------------- SB3's wrappers and evaluation


def play(env: VecEnv, n_transitions: int) -> list[tuple[Any, ...]]:
    """Transitions of one environment: what was seen, and what came of it; reset rows are left out."""
    env.seed(3)
    obs, transitions = env.reset(), []
    actions = np.random.default_rng(0).integers(3, size=n_transitions)
    native = with_reset_rows(env)
    while len(transitions) < n_transitions:
        new_obs, rewards, dones, infos = env.step(actions[[len(transitions)]])
        if native is None or not native.reset_rows[0]:
            final = infos[0].get("terminal_observation")
            length = infos[0].get("episode", {}).get("l")
            transitions.append((obs[0].tolist(), rewards[0], dones[0], length, None if final is None else final.tolist()))
        obs = new_obs
    return transitions


WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "VecNormalize": lambda env: VecNormalize(env, gamma=0.9),
    "VecNormalize-obs": lambda env: VecNormalize(env, norm_reward=False),
    "VecNormalize-reward": lambda env: VecNormalize(env, norm_obs=False),
    "VecFrameStack": lambda env: VecFrameStack(env, 3),
    "VecMonitor": VecMonitor,
    "all": lambda env: VecFrameStack(VecNormalize(VecMonitor(env)), 3),
}


@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("mode", MODES)
def test_sb3s_wrappers_show_what_they_show_over_dummy(name: str, mode: AutoresetMode) -> None:
    """
    To the last bit for one environment: reset rows enter neither statistics, nor stacks, nor lengths.

    But in next-step mode a final observation is normalized before the next episode's first one is known, which over
    ``DummyVecEnv`` has entered the statistics by then: one observation out of all so far.
    """
    theirs = WRAPPERS[name](dummy(env_fns(n=1)))
    ours = mask_reset_rows(WRAPPERS[name](NativeVecEnv(SyncVectorEnv(env_fns(n=1), autoreset_mode=mode))))
    ends = 0
    for t, (mine, reference) in enumerate(zip(play(ours, 100), play(theirs, 100), strict=True)):
        (*mine, final), (*reference, their_final) = mine, reference
        assert mine == reference
        if final is not None and mode is AutoresetMode.NEXT_STEP and name in ("VecNormalize", "VecNormalize-obs", "all"):
            np.testing.assert_allclose(final, their_final, atol=5 / (t + 1))
        else:
            assert final == their_final
        ends += final is not None
    assert ends > 5


def test_statistics_of_several_environments_are_those_of_their_transitions() -> None:
    """The same numbers go in; the batches in which they come differ, and so may the rounding."""
    env = mask_reset_rows(VecNormalize(NativeVecEnv(SyncVectorEnv(env_fns())), gamma=0.9))
    native = with_reset_rows(env)
    assert native is not None
    env.seed(3)
    env.reset()
    seen, returns, running = [*env.get_original_obs()], [], np.zeros(N_ENVS)
    for _ in range(100):
        _, _, dones, _ = env.step(np.zeros(N_ENVS, int))
        seen += [*env.get_original_obs()[~native.resetting]]
        running = running * 0.9 + env.get_original_reward()
        returns += running[~native.reset_rows].tolist()
        running[dones] = 0
    assert len(seen) < 303
    assert env.obs_rms.count == pytest.approx(len(seen), abs=0.01)
    np.testing.assert_allclose(env.obs_rms.mean, np.mean(seen, axis=0), atol=1e-4)
    np.testing.assert_allclose(env.obs_rms.var, np.var(seen, axis=0), rtol=1e-3)
    assert env.ret_rms.count == pytest.approx(len(returns), abs=0.01)
    assert env.ret_rms.var == pytest.approx(np.var(returns), rel=1e-3)


def test_scratch_ppo_teaches_vec_normalize_which_stays_the_users(tmp_path: Path) -> None:
    env = VecNormalize(NativeVecEnv(gym.make_vec("CartPole-v1", 2, max_episode_steps=10)))
    model = ScratchPPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, device="cpu").learn(128)
    assert model.get_vec_normalize_env() is env
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    assert buffer.valid is not None
    assert env.ret_rms.count == pytest.approx(buffer.valid.sum(), abs=0.01)
    env.save(str(tmp_path / "vecnormalize.pkl"))
    assert b"sb3_ppo_from_scratch" not in (tmp_path / "vecnormalize.pkl").read_bytes()
    loaded = VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), NativeVecEnv(gym.make_vec("CartPole-v1", 2)))
    assert type(loaded) is VecNormalize
    np.testing.assert_array_equal(loaded.obs_rms.mean, env.obs_rms.mean)
    assert type(pickle.loads(pickle.dumps(env))) is VecNormalize


def test_wrappers_elsewhere_are_left_alone() -> None:
    class Mine(VecNormalize):
        pass

    for env in (VecNormalize(dummy(env_fns())), VecNormalize(NativeVecEnv(clocks(AutoresetMode.SAME_STEP)))):
        assert type(mask_reset_rows(env)) is VecNormalize
    assert type(mask_reset_rows(Mine(NativeVecEnv(clocks())))) is Mine


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", [lambda env: env, VecMonitor], ids=["own", "VecMonitor"])
@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
@pytest.mark.filterwarnings("error:Evaluation environment")
def test_evaluation_counts_episodes_and_their_transitions(mode: AutoresetMode, wrapper: Callable[[VecEnv], VecEnv]) -> None:
    env = mask_reset_rows(wrapper(NativeVecEnv(clocks(mode, n=3, length=4))))
    model = ScratchPPO("MlpPolicy", clocks(), n_steps=8, batch_size=8, device="cpu")
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=7, return_episode_rewards=True)
    assert returns == [4.0] * 7
    assert lengths == [4] * 7


@pytest.mark.parametrize("normalize", [False, True])
def test_eval_callback(normalize: bool, tmp_path: Path) -> None:
    def wrap(env: VecEnv, **kwargs: Any) -> VecEnv:
        return VecNormalize(env, **kwargs) if normalize else env

    evaluation = wrap(NativeVecEnv(clocks(n=2)), **({"training": False, "norm_reward": False} if normalize else {}))
    callback = EvalCallback(evaluation, n_eval_episodes=4, eval_freq=8, log_path=str(tmp_path), verbose=0)
    model = ScratchPPO("MlpPolicy", wrap(NativeVecEnv(clocks(n=2))), n_steps=16, batch_size=8, n_epochs=1, device="cpu")
    model.learn(32, callback=callback)
    with np.load(tmp_path / "evaluations.npz") as record:
        assert record["results"].tolist() == [[3.0] * 4] * 2
        assert record["ep_lengths"].tolist() == [[3] * 4] * 2


def test_same_step_environments_serve_sb3s_own_ppo() -> None:
    env = NativeVecEnv(clocks(AutoresetMode.SAME_STEP))
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(32)
    assert model.ep_info_buffer[0]["l"] == 3


# ---------------------------------------------------------------- ways in


def test_every_way_in_takes_a_vector_environment(tmp_path: Path) -> None:
    kwargs = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu"}
    model = ScratchPPO("MlpPolicy", gym.make_vec("CartPole-v1", 2), **kwargs).learn(32)
    assert isinstance(model.get_env(), NativeVecEnv)
    assert (model.n_envs, model.observation_space.shape, model.action_space) == (2, (4,), spaces.Discrete(2))
    model.set_env(gym.make_vec("CartPole-v1", 2))
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = ScratchPPO.load(tmp_path / "model", env=gym.make_vec("CartPole-v1", 2)).learn(32)
    assert isinstance(loaded.get_env(), NativeVecEnv)
    actions, _ = loaded.predict(loaded.get_env().reset())
    assert actions.shape == (2,)
    with pytest.raises(ValueError, match="number of environments"):
        model.set_env(gym.make_vec("CartPole-v1", 3))


def test_images_are_transposed_as_ever() -> None:
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    fns = [lambda: ToyEnv(copy.deepcopy(image), spaces.Discrete(2))]
    model = ScratchPPO("CnnPolicy", SyncVectorEnv(fns), n_steps=20, batch_size=20, n_epochs=1, device="cpu").learn(20)
    assert isinstance(model.get_env(), VecTransposeImage)
    assert model.rollout_buffer.observations.shape == (20, 1, 3, 36, 36)
    assert with_reset_rows(model.get_env()) is not None


def test_wrappers_of_gymnasium_are_seen_through() -> None:
    class Halve(VectorWrapper):
        def step(self, actions: Any) -> Any:
            obs, rewards, *rest = self.env.step(actions)
            return (obs, rewards / 2, *rest)

    env = NativeVecEnv(Halve(gym.make_vec("CartPole-v1", 2)))
    env.reset()
    assert env.has_reset_rows
    assert env.step(np.zeros(2, int))[1].tolist() == [0.5, 0.5]


def test_a_monitor_inside_has_the_last_word() -> None:
    """As with ``DummyVecEnv``: what it counted was not changed by wrappers around it."""
    from gymnasium.wrappers import TransformReward

    fns = [lambda: TransformReward(Monitor(ClockEnv()), lambda reward: 10 * reward)]
    env = NativeVecEnv(SyncVectorEnv(fns, autoreset_mode="SameStep"))
    env.reset()
    episodes = [env.step(np.zeros((1, 1)))[3][0].get("episode") for _ in range(3)]
    assert episodes[:2] == [None, None]
    assert (episodes[2]["r"], episodes[2]["l"]) == (3.0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_seeds_are_those_of_dummy_and_used_once(mode: AutoresetMode) -> None:
    ours, theirs = NativeVecEnv(SyncVectorEnv(env_fns(), autoreset_mode=mode)), dummy(env_fns())
    for env in (ours, theirs):
        env.seed(11)
    for _ in range(2):
        np.testing.assert_array_equal(ours.reset(), theirs.reset())
    ours._seeds = theirs._seeds = [5, None, 3]
    np.testing.assert_array_equal(ours.reset()[[0, 2]], theirs.reset()[[0, 2]])


def test_a_models_seed_makes_native_training_repeatable() -> None:
    (first, _), (second, _) = trained(), trained()
    assert all(th.equal(value, second[name]) for name, value in first.items())


def test_options_reach_the_reset() -> None:
    env = NativeVecEnv(gym.make_vec("CartPole-v1", 2))
    env.set_options({"low": 0.5, "high": 0.6})
    assert (env.reset() >= 0.5).all()
    assert (env.reset() < 0.5).all()
    env.set_options([{"low": 0.5}, {"low": 0.6}])
    with pytest.raises(ValueError, match="options must be the same for all environments"):
        env.reset()


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_an_observation_stays_what_it_was_though_the_environment_reuses_its_memory(
    mode: AutoresetMode, observation: str
) -> None:
    reference = rollout(dummy(env_fns(observation)), 50, 2) if mode is not AutoresetMode.NEXT_STEP else None
    vector = SyncVectorEnv(env_fns(observation), autoreset_mode=mode, copy=False)
    env = NativeVecEnv(vector)
    obs = env.reset()
    for _ in range(40):
        before = copy.deepcopy(obs)
        new_obs = env.step(np.zeros(N_ENVS, int))[0]
        for kept, was in zip(leaves(obs), leaves(before), strict=True):
            np.testing.assert_array_equal(kept, was)
        obs = new_obs
    if reference is not None:
        model = rollout(SyncVectorEnv(env_fns(observation), autoreset_mode=mode, copy=False), 50, 2)
        for ours, theirs in zip(columns(model), columns(reference), strict=True):
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def leaves(obs: Any) -> list[np.ndarray]:
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def test_new_memory_is_handed_on_without_a_copy() -> None:
    handed: list[np.ndarray] = []

    class Spy(VectorWrapper):
        def step(self, actions: Any) -> Any:
            result = self.env.step(actions)
            handed.append(result[0])
            return result

    env = NativeVecEnv(Spy(gym.make_vec("CartPole-v1", 2)))
    env.reset()
    got = [env.step(np.zeros(2, int))[0] for _ in range(6)]
    assert all(mine is theirs for mine, theirs in zip(got[1:], handed[1:], strict=True))


# ---------------------------------------------------------------- inside


def test_attributes_and_methods_of_single_environments() -> None:
    env = NativeVecEnv(clocks(n=3))
    assert env.get_attr("length") == [3, 3, 3]
    env.set_attr("length", 5, indices=1)
    assert env.get_attr("length", indices=[0, 1]) == [3, 5]
    env.reset()
    assert env.env_method("_observe", indices=[2])[0].tolist() == [0.5]
    assert callable(env.get_attr("_observe")[0])
    assert env.has_attr("truncated")
    assert not env.has_attr("nothing")


def test_attributes_and_methods_of_a_native_environment_are_its_own() -> None:
    env = NativeVecEnv(gym.make_vec("CartPole-v1", 3))
    assert env.get_attr("gravity") == [9.8] * 3
    env.set_attr("gravity", 1.6)
    assert env.env.unwrapped.gravity == 1.6
    assert not env.has_attr("nothing")
    with pytest.raises(ValueError, match="indices must be None or cover all"):
        env.set_attr("gravity", 1.6, indices=[0])
    with pytest.raises(ValueError, match="indices must be None or cover all"):
        env.env_method("reset", indices=1)
    assert len(env.env_method("reset")) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes start anew, and cannot find these environments")
def test_environments_in_other_processes() -> None:
    vector = AsyncVectorEnv([ClockEnv, ClockEnv], autoreset_mode="SameStep")
    env = NativeVecEnv(vector)
    try:
        assert env.get_attr("length", indices=[1]) == [3]
        env.set_attr("length", 2)
        assert env.get_attr("length") == [2, 2]
        with pytest.raises(ValueError, match="indices must be None or cover all"):
            env.set_attr("length", 2, indices=[1])
        assert [obs.tolist() for obs in (env.reset(), env.env_method("_observe")[1])] == [[[0.5], [0.5]], [0.5]]
        lengths = [[info.get("episode", {}).get("l") for info in env.step(np.zeros((2, 1)))[3]] for _ in range(4)]
        assert lengths == [[None, None], [2, 2]] * 2
    finally:
        env.close()


def test_env_is_wrapped() -> None:
    fns = [lambda: gym.wrappers.TimeLimit(ClockEnv(), 2), ClockEnv]
    env = NativeVecEnv(SyncVectorEnv(fns))
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, False]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=1) == [False]
    assert NativeVecEnv(gym.make_vec("CartPole-v1", 2)).env_is_wrapped(gym.wrappers.TimeLimit) == [False, False]


def test_pictures() -> None:
    pytest.importorskip("pygame")
    env = NativeVecEnv(gym.make_vec("CartPole-v1", 2, render_mode="rgb_array"))
    env.reset()
    images = env.get_images()
    assert [image.shape for image in images] == [(400, 600, 3)] * 2
    assert env.render().shape == (800, 600, 3)  # one above the other
    assert NativeVecEnv(gym.make_vec("CartPole-v1", 2)).get_images() == [None, None]


def test_episodes_are_written_as_vec_monitor_writes_them(tmp_path: Path) -> None:
    fns = env_fns(n=2)
    env = NativeVecEnv(SyncVectorEnv(fns), str(tmp_path / "all"), info_keywords=("clock",))
    env.reset()
    episodes = [info["episode"] for _ in range(60) for info in env.step(np.zeros(2, int))[3] if "episode" in info]
    env.close()
    table = load_results(str(tmp_path))
    assert len(table) == len(episodes) > 2
    assert table["r"].tolist() == [episode["r"] for episode in episodes]
    assert table["l"].tolist() == table["clock"].tolist() == [episode["l"] for episode in episodes]


# ---------------------------------------------------------------- errors


def test_what_is_no_vector_environment_is_refused() -> None:
    with pytest.raises(TypeError, match=r"env must be a gymnasium.vector.VectorEnv, not ClockEnv"):
        NativeVecEnv(ClockEnv())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [None, "sometimes"])
def test_an_environment_must_say_how_it_resets(mode: str | None) -> None:
    env = gym.make_vec("CartPole-v1", 2)
    env.metadata = {"autoreset_mode": mode}
    with pytest.raises(ValueError, match=rf"metadata\['autoreset_mode'\] must be one of .*NEXT_STEP.*, not {mode!r}"):
        ScratchPPO("MlpPolicy", env)


def test_a_mode_by_its_name() -> None:
    env = gym.make_vec("CartPole-v1", 2)
    env.metadata = {"autoreset_mode": "NextStep"}
    assert NativeVecEnv(env).has_reset_rows


def test_an_environment_that_steps_only_some_is_refused() -> None:
    env = gym.make_vec("CartPole-v1", 4)
    env.batch_size = 2  # as ALE's and EnvPool's have it
    with pytest.raises(ValueError, match=r"must step all of its 4 environments at once, not batch_size=2"):
        NativeVecEnv(env)


def test_a_same_step_environment_without_final_observations_is_refused() -> None:
    class Forgetful(VectorWrapper):
        def step(self, actions: Any) -> Any:
            *rest, info = self.env.step(actions)
            info.pop("final_obs", None)
            return (*rest, info)

    env = NativeVecEnv(Forgetful(clocks(AutoresetMode.SAME_STEP, length=1)))
    env.reset()
    with pytest.raises(ValueError, match=r"final observations into info\['final_obs'\]"):
        env.step(np.zeros((2, 1)))


def test_spaces_are_checked_before_anything_else() -> None:
    class Strange(VectorEnv):
        num_envs = 1
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  # as Gymnasium declares it
        single_observation_space = observation_space = spaces.Tuple([BOX, BOX])
        single_action_space = action_space = spaces.Discrete(2)

    with pytest.raises(ValueError, match="the observation space must be"):
        ScratchPPO("MlpPolicy", Strange())


def test_an_earlier_runs_monitor_file_is_kept(tmp_path: Path) -> None:
    contents = []
    for run in range(3):
        with pytest.warns(UserWarning, match="kept as .*monitor.csv.") if run else contextlib.nullcontext():
            env = NativeVecEnv(gym.make_vec("CartPole-v1", 2), filename=str(tmp_path / "run"))
        ScratchPPO("MlpPolicy", env, n_steps=64, batch_size=128, n_epochs=1, seed=run, device="cpu").learn(128)
        env.close()
        contents.append((tmp_path / "run.monitor.csv").read_text())
    assert [(tmp_path / f"run.monitor.csv.{i}").read_text() for i in (1, 2)] == contents[:2]
    assert len(load_results(str(tmp_path))) == len(contents[2].splitlines()) - 2
