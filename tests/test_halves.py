"""Two halves of the environments: one ``VecEnv`` to the outside, stepped in turn by ``ScratchPPO``, with the same data."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from benchmarks import breakout
from benchmarks.cases import Contestant
from benchmarks.gpu.measure import measure_one
from sb3_ppo_from_scratch import EnvFailedError, NonFiniteError, ResumableCheckpoint, ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.engines.cudagraph import support
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, TwoHalves, make_native_atari_env
from sb3_ppo_from_scratch.vec_env.halves import joined
from sb3_ppo_from_scratch.vec_env.stepping import AtOnce, Question
from tests.envs import ACTION_SPACES, BOX, OBSERVATION_SPACES
from tests.helpers import BY_HAND, ToyEnv
from tests.test_failing_envs import Failing
from tests.test_gpu_benchmark import tiny_task

SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}
FRAMES = gym.spaces.Box(0, 255, (2, 36, 36), np.uint8)


def toys(n_envs: int, observations: gym.spaces.Space = BOX, actions: gym.spaces.Space = ACTION_SPACES["discrete"]) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(ToyEnv(deepcopy(observations), actions, length=7))] * n_envs)


def halves(**kwargs: Any) -> TwoHalves:
    return TwoHalves(toys(2, **kwargs), toys(2, **kwargs))


def cartpoles(n_envs: int, mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> NativeVecEnv:
    return NativeVecEnv(SyncVectorEnv([partial(gym.make, "CartPole-v1")] * n_envs, autoreset_mode=mode))


# ------------------------------------------------------------------ to the outside


def assert_same_steps(ours: VecEnv, theirs: VecEnv, n_steps: int = 40) -> None:
    """With one seed and the same actions; of the infos what SB3 promises."""
    theirs.action_space.seed(0)
    for env in (ours, theirs):
        env.seed(11)
    assert_equal(ours.reset(), theirs.reset())
    for _ in range(n_steps):
        actions = np.array([theirs.action_space.sample() for _ in range(theirs.num_envs)])
        (obs, *numbers, infos), (their_obs, *their_numbers, their_infos) = ours.step(actions), theirs.step(actions)
        assert_equal(obs, their_obs)
        for ours_, theirs_ in zip(numbers, their_numbers, strict=True):
            np.testing.assert_array_equal(ours_, theirs_)
        for info, their_info in zip(infos, their_infos, strict=True):
            assert info.keys() == their_info.keys()
            assert_equal(info.get("terminal_observation", 0), their_info.get("terminal_observation", 0))
        for name in ("reset_rows", "resetting"):
            if hasattr(theirs, name):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    ours.close()
    theirs.close()


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            np.testing.assert_array_equal(value, b[key])
    else:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_it_is_the_vec_env_of_all_of_them(kind: str) -> None:
    space = OBSERVATION_SPACES[kind]
    assert_same_steps(halves(observations=space), toys(4, space))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_reset_rows_are_those_of_both(mode: AutoresetMode) -> None:
    whole = cartpoles(4, mode)
    ours = TwoHalves(cartpoles(2, mode), cartpoles(2, mode))
    assert ours.has_reset_rows == whole.has_reset_rows
    assert_same_steps(ours, whole, 120)


@pytest.mark.parametrize("asynchronous", ["subproc", "async"])
def test_halves_may_play_in_processes(asynchronous: str) -> None:
    fns = [partial(gym.make, "CartPole-v1")] * 2
    if asynchronous == "subproc":
        assert_same_steps(TwoHalves(SubprocVecEnv(fns, "fork"), SubprocVecEnv(fns, "fork")), DummyVecEnv(fns * 2))
    else:
        modes = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        ours = TwoHalves(NativeVecEnv(AsyncVectorEnv(fns, **modes)), NativeVecEnv(AsyncVectorEnv(fns, **modes)))
        assert_same_steps(ours, cartpoles(4))


@pytest.mark.parametrize("backend", ["ale", "envpool"])
def test_atari_games_are_those_of_one_vec_env(backend: str) -> None:
    pytest.importorskip("envpool" if backend == "envpool" else "ale_py")
    make = partial(make_native_atari_env, "BreakoutNoFrameskip-v4", backend=backend)
    assert_same_steps(TwoHalves(make(2), make(2)), make(4), 300)


def test_attributes_and_methods_of_all() -> None:
    env = TwoHalves(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2))
    env.set_attr("x_threshold", 1.5, indices=[3, 0])
    env.set_attr("x_threshold", 3.5, indices=-2)
    assert env.get_attr("x_threshold") == [1.5, 2.4, 3.5, 1.5]
    assert env.get_attr("x_threshold", [2, 0, 2]) == [3.5, 1.5, 3.5]
    assert env.env_method("get_wrapper_attr", "x_threshold", indices=1) == [2.4]
    assert env.env_is_wrapped(Monitor) == [False] * 4
    assert env.unwrapped is env
    env.set_options([{"low": -0.01 * i, "high": 0.0} for i in range(1, 5)])
    env.reset()
    assert len(env.reset_infos) == 4


def test_options_reach_their_environments() -> None:
    env = TwoHalves(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2))
    env.set_options([{"low": i + 0.1, "high": i + 0.2} for i in range(4)])
    obs = env.reset()
    np.testing.assert_allclose(obs, np.repeat(np.arange(4) + 0.15, 4).reshape(4, 4), rtol=0, atol=0.05)
    assert (np.abs(env.reset()) <= 0.05).all()  # once


def test_sb3_trains_on_it() -> None:
    ours = PPO("MlpPolicy", halves(), **SMALL).learn(64)
    theirs = PPO("MlpPolicy", toys(4), **SMALL).learn(64)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: (toys(2), gym.make("CartPole-v1")), TypeError, "second must be a VecEnv, not .*TimeLimit"),
        (lambda: (toys(2), toys(3)), ValueError, "second must have first's num_envs, 2, not 3"),
        (lambda: (toys(2), toys(2, FRAMES)), ValueError, "second must have first's observation_space"),
        (lambda: (VecNormalize(toys(2)), toys(2)), ValueError, "first must not be inside a VecNormalize"),
        (lambda: (toys(2),) * 2, ValueError, "second must not be the same object as first"),
    ],
)
def test_bad_halves(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TwoHalves(*make())


# ------------------------------------------------------------------ in turn


class ByParts(AtOnce):
    """The oracle: steps all environments at once, but asks about each half by itself, as the random draws come in turn."""

    def answer(self, obs: Any, question: Question) -> Any:
        n = self.env.num_envs // 2
        parts = []
        for rows in (slice(0, n), slice(n, 2 * n)):
            seen, answer = question({k: v[rows] for k, v in obs.items()} if isinstance(obs, dict) else obs[rows])
            seen = (
                {k: v.clone() for k, v in seen.items()} if isinstance(seen, dict) else seen if seen is None else seen.clone()
            )
            parts.append((seen, answer))
        (seen, answers) = zip(*parts, strict=True)
        return self.join(seen), tuple(map(self.join, zip(*answers, strict=True)))

    def join(self, parts: Any) -> Any:
        if parts[0] is None:
            return None
        if isinstance(parts[0], dict):
            return {key: self.join([part[key] for part in parts]) for key in parts[0]}
        return th.cat(list(parts)) if isinstance(parts[0], th.Tensor) else joined(parts)


class Oracle(ScratchPPO):
    def _turns(self, env: VecEnv, is_users: bool, keeps_seen: bool) -> AtOnce:
        return ByParts(env)


def assert_same_weights(ours: Any, theirs: Any) -> None:
    for (name, a), b in zip(ours.policy.named_parameters(), theirs.policy.parameters(), strict=True):
        assert th.equal(a, b), name


def assert_same_training(kind: str, ours: VecEnv, theirs: VecEnv, total: int = 4 * 8 * 5, **kwargs: Any) -> None:
    a = ScratchPPO(kind, ours, **{**SMALL, **kwargs}).learn(total)
    b = Oracle(kind, theirs, **{**SMALL, **kwargs}).learn(total)
    for name in ("actions", "rewards", "episode_starts", "values", "log_probs", "advantages"):
        np.testing.assert_array_equal(getattr(a.rollout_buffer, name), getattr(b.rollout_buffer, name), err_msg=name)
    assert_equal(a.rollout_buffer.observations, b.rollout_buffer.observations)
    assert_same_weights(a, b)
    assert [each["r"] for each in a.ep_info_buffer] == [each["r"] for each in b.ep_info_buffer]
    assert_equal(a._last_obs, b._last_obs)


@pytest.mark.parametrize("engine", ["torch", *BY_HAND])
@pytest.mark.parametrize("actions", ["discrete", "box", "multibinary"])
def test_the_data_are_the_same_policys(engine: str, actions: str) -> None:
    kwargs = {"actions": ACTION_SPACES[actions]}
    assert_same_training("MlpPolicy", halves(**kwargs), toys(4, **kwargs), engine=engine)


@pytest.mark.parametrize("engine", ["torch", "cudagraph"])
@pytest.mark.parametrize(("kind", "space"), [("CnnPolicy", FRAMES), ("MultiInputPolicy", OBSERVATION_SPACES["dict"])])
def test_the_data_are_the_same_of_images_and_dicts(
    engine: str, kind: str, space: gym.spaces.Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the buffer keeps what the policy saw, both halves share the memory that it is brought to the device by."""
    monkeypatch.setattr(support, "device_reason", lambda policy: None)
    kwargs = {"observations": space}
    assert_same_training(kind, halves(**kwargs), toys(4, **kwargs), 4 * 8 * 2, engine=engine)


def test_the_data_are_the_same_with_channels_last_and_with_reset_rows() -> None:
    make = partial(make_native_atari_env, "BreakoutNoFrameskip-v4", noop_max=3)
    kwargs = {"engine": "channels_last", "n_steps": 40}
    assert_same_training("CnnPolicy", TwoHalves(make(1), make(1)), make(2), 160, **kwargs)


@pytest.mark.parametrize("buffer", [ScratchRolloutBuffer, DeviceRolloutBuffer])
def test_time_limits_are_bootstrapped(buffer: type[ScratchRolloutBuffer]) -> None:
    """Every episode of the toys ends by its seventh step."""
    assert_same_training("MlpPolicy", halves(), toys(4), rollout_buffer_class=buffer, engine="torch", n_steps=24)


class Reusing(VecEnvWrapper):
    """Hands out the same arrays for ever, and writes into them as soon as it is sent."""

    def reset(self) -> Any:
        self.obs = self.venv.reset().copy()
        return self.obs

    def step_async(self, actions: np.ndarray) -> None:
        super().step_async(actions)
        obs, self.rewards, self.dones, self.infos = self.venv.step_wait()
        self.obs[...] = obs
        if not hasattr(self, "kept"):
            self.kept = self.rewards, self.dones
        for array, new in zip(self.kept, (self.rewards, self.dones), strict=True):
            array[...] = new

    def step_wait(self) -> Any:
        return self.obs, *self.kept, self.infos


@pytest.mark.parametrize("buffer", [ScratchRolloutBuffer, DeviceRolloutBuffer])
def test_a_half_may_write_over_what_it_has_handed_out(buffer: type[ScratchRolloutBuffer]) -> None:
    env = TwoHalves(Reusing(toys(2)), Reusing(toys(2)))
    assert_same_training("MlpPolicy", env, toys(4), rollout_buffer_class=buffer, engine="torch")


class Diary(TwoHalves):
    """Writes down who is sent and received."""

    def __init__(self, *args: Any):
        self.lines: list[str] = []
        super().__init__(*args)

    def send(self, index: int, actions: np.ndarray) -> None:
        self.lines.append(f"send {index}")
        super().send(index, actions)

    def receive(self, index: int) -> Any:
        self.lines.append(f"receive {index}")
        return super().receive(index)


IN_TURN = ["send 0", "send 1", *["receive 0", "send 0", "receive 1", "send 1"] * 7, "receive 0", "receive 1"]
AT_ONCE = ["send 0", "send 1", "receive 0", "receive 1"] * 8


def test_one_half_plays_while_the_other_is_answered_and_nobody_during_an_update() -> None:
    env = Diary(toys(2), toys(2))
    ScratchPPO("MlpPolicy", env, **SMALL).learn(64)
    assert env.lines == IN_TURN * 2


def test_harmless_callbacks_change_nothing(tmp_path: Path) -> None:
    env = Diary(toys(2), toys(2))
    ScratchPPO("MlpPolicy", env, **SMALL).learn(32, EvalCallback(toys(1), eval_freq=5, n_eval_episodes=1, verbose=0))
    assert env.lines == IN_TURN


class Idle(BaseCallback):
    def _on_step(self) -> bool:
        return True


class Bystander(Idle):
    is_bystander = True


def test_a_bystander_changes_nothing() -> None:
    env = Diary(toys(2), toys(2))
    ScratchPPO("MlpPolicy", env, **SMALL).learn(32, Bystander())
    assert env.lines == IN_TURN


def test_the_benchmarks_step_the_halves_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their callbacks are bystanders."""
    pytest.importorskip("ale_py")
    lines: list[str] = []
    send = TwoHalves.send
    monkeypatch.setattr(
        TwoHalves, "send", lambda self, index, actions: (lines.append(str(index)), send(self, index, actions))[1]
    )
    monkeypatch.setattr(TwoHalves, "step_async", None)
    measure_one(Contestant("torch", "ale", halves=True), 2, 0.01, tiny_task(), "cpu")
    assert lines[:4] == ["0", "1", "0", "1"]
    monkeypatch.setattr(breakout, "load_task", lambda name: tiny_task())
    arguments = ["--out", str(tmp_path), "--timesteps", "40", "--halves", "--final-episodes", "1", "--eval-episodes", "0"]
    breakout.train_breakout(breakout.parse_options([*arguments, "--minutes", "0"]), tiny_task())


@pytest.mark.parametrize(
    ("reason", "wrap", "callback", "kwargs"),
    [
        ("a VecMonitor is around them: wrap each half instead", VecMonitor, None, {}),
        ("VecNormalize takes its statistics from all environments", VecNormalize, None, {}),
        (
            "a callback of your own may change the policy at each step, for it has no is_bystander = True",
            lambda env: env,
            Idle,
            {},
        ),
        ("gSDE draws its noise for all environments", lambda env: env, None, {"use_sde": True}),
    ],
)
def test_what_forbids_it_is_said_once(reason: str, wrap: Any, callback: Any, kwargs: Any, capsys: Any) -> None:
    actions = ACTION_SPACES["box"]
    env = Diary(toys(2, actions=actions), toys(2, actions=actions))
    model = ScratchPPO("MlpPolicy", wrap(env), **{**SMALL, **kwargs}, engine="torch", verbose=1)
    model.learn(64, callback and callback())
    assert env.lines == AT_ONCE * 2
    assert capsys.readouterr().out.count(f"Stepping both halves of the environments at once: {reason}\n") == 1
    whole = wrap(toys(4, actions=actions))
    plain = ScratchPPO("MlpPolicy", whole, **{**SMALL, **kwargs}, engine="torch").learn(64)
    assert_same_weights(model, plain)


def test_masks_and_memory_take_all_at_once() -> None:
    env = Diary(toys(2), toys(2))
    ScratchPPO("MlpLstmPolicy", env, **SMALL, policy_kwargs={"lstm_hidden_size": 4}).learn(32)
    assert env.lines == AT_ONCE


# ------------------------------------------------------------------ ends, errors, resumption


def test_an_early_end_leaves_nobody_behind() -> None:
    """The step that has begun is waited for: its observations are the last ones, and its episodes count."""
    env = Diary(toys(2), toys(2))
    model = ScratchPPO("MlpPolicy", env, **SMALL, engine="torch").learn(10**6, StopTrainingOnMaxEpisodes(3))
    assert env.lines.count("send 0") == env.lines.count("receive 0")
    assert env.lines.count("send 1") == env.lines.count("receive 1")
    current = np.concatenate([half.buf_obs[None] for half in env.halves])  # type: ignore[attr-defined]  # a DummyVecEnv
    np.testing.assert_array_equal(model._last_obs, current)
    model.learn(64, reset_num_timesteps=False)
    model.learn(64)


def test_whoever_resets_waits_for_what_is_played() -> None:
    env = TwoHalves(SubprocVecEnv([Failing] * 2, "fork"), SubprocVecEnv([Failing] * 2, "fork"))
    env.reset()
    env.send(1, np.zeros(2, int))
    assert env.reset().shape == (4, 4)
    env.send(0, np.zeros(2, int))
    assert env.step(np.ones(4, int))[0].shape == (4, 4)
    env.close()


class Poisoned(gym.Wrapper):
    """CartPole whose second observation is NaN."""

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return np.full_like(obs, np.nan), *rest


def test_nan_is_the_environments_not_the_policys() -> None:
    def make(wrapper: Any) -> VecEnv:
        return DummyVecEnv([lambda: gym.make("CartPole-v1"), lambda: wrapper(gym.make("CartPole-v1"))])

    for first, second, number in ((Poisoned, Monitor, 1), (Monitor, Poisoned, 3)):
        model = ScratchPPO("MlpPolicy", TwoHalves(make(first), make(second)), **SMALL)
        with pytest.raises(NonFiniteError, match=f"observation is not finite .*in environment {number} at step 0"):
            model.learn(64)


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("kind", ["dummy", "subproc"])
def test_a_failure_has_its_environments_number(kind: str, dies: bool) -> None:
    if dies and kind == "dummy":
        pytest.skip("that would be this process")

    def make(fns: list[Any]) -> VecEnv:
        return DummyVecEnv(fns) if kind == "dummy" else SubprocVecEnv(fns, "fork")

    model = ScratchPPO(
        "MlpPolicy", TwoHalves(make([Failing] * 2), make([Failing, partial(Failing, at=5, dies=dies)])), **SMALL
    )
    with pytest.raises(EnvFailedError, match="environment 3") as failed:
        model.learn(64)
    assert failed.value.env_index == 3
    model.get_env().close()


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def make() -> VecEnv:
        fns = [lambda: Monitor(gym.make("CartPole-v1"))] * 2
        return TwoHalves(DummyVecEnv(fns), DummyVecEnv(fns))

    whole = ScratchPPO("MlpPolicy", make(), **SMALL).learn(320)
    ScratchPPO("MlpPolicy", make(), **SMALL).learn(320, [ResumableCheckpoint(64, tmp_path), StopTrainingOnMaxEpisodes(1)])
    resumed = ScratchPPO.resume(tmp_path, make())
    assert 0 < resumed.num_timesteps < 320
    resumed.continue_learning()
    assert_same_weights(whole, resumed)
    assert_equal(whole._last_obs, resumed._last_obs)


def test_halves_in_processes_say_that_their_state_is_not_saved(tmp_path: Path) -> None:
    def make() -> VecEnv:
        return TwoHalves(SubprocVecEnv([Failing] * 2, "fork"), SubprocVecEnv([Failing] * 2, "fork"))

    model = ScratchPPO("MlpPolicy", make(), **SMALL)
    with pytest.warns(UserWarning, match="TwoHalves: .*SubprocVecEnv.*not be bit-exact"):
        model.learn(64, ResumableCheckpoint(32, tmp_path))
    model.get_env().close()
    env = make()
    resumed = ScratchPPO.resume(tmp_path, env)
    resumed.learn(64, reset_num_timesteps=False)
    env.close()


@pytest.mark.parametrize("dies", [False, True])
def test_whoever_closes_after_a_failure_hears_of_no_other(dies: bool) -> None:
    """The other half is in the middle of a step, and its processes may have been ended."""
    mode = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    first, second = AsyncVectorEnv([partial(Failing, at=5, dies=dies), Failing], **mode), AsyncVectorEnv([Failing] * 2, **mode)
    env = TwoHalves(NativeVecEnv(first), NativeVecEnv(second))
    with pytest.raises(EnvFailedError, match="environment 0"):
        ScratchPPO("MlpPolicy", env, **SMALL).learn(64)
    env.close()
    assert first.closed
    assert second.closed


def test_games_may_be_closed_in_the_middle_of_a_step() -> None:
    pytest.importorskip("ale_py")
    env = make_native_atari_env("BreakoutNoFrameskip-v4", 2)
    env.reset()
    env.step_async(np.zeros(2, int))
    env.close()


# ------------------------------------------------------------------ what a tester found


class Changing(gym.Wrapper):
    """CartPole whose steps show integers after a reset's floats; ``SubprocVecEnv`` passes on what comes."""

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return (1000 * obs).astype(np.int64), *rest


@pytest.mark.parametrize("engine", ["torch", *BY_HAND])
def test_steps_of_another_type_are_rated_too(engine: str) -> None:
    def make(n_envs: int) -> VecEnv:
        return SubprocVecEnv([lambda: Monitor(Changing(gym.make("CartPole-v1")))] * n_envs, "fork")

    env = TwoHalves(make(2), make(2))
    model = ScratchPPO("MlpPolicy", env, **SMALL, engine=engine).learn(32)
    env.close()
    assert isinstance(model.rollout_buffer, ScratchRolloutBuffer)
    assert not model.rollout_buffer.unrated.any()
    assert (model.rollout_buffer.log_probs != 0).all()
    assert (model.rollout_buffer.values != 0).all()


class Asking(Bystander):
    """Asks the environments in the middle of a rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[list[int]] = []

    def _on_step(self) -> bool:
        self.answers.append(self.training_env.get_attr("length"))
        return True


@pytest.mark.parametrize("kind", ["dummy", "subproc", "async"])
def test_environments_that_play_finish_before_they_answer(kind: str) -> None:
    """No step is lost or taken twice."""
    fns = [lambda: ToyEnv(deepcopy(BOX), ACTION_SPACES["discrete"], length=9)] * 2

    def make() -> VecEnv:
        if kind == "async":
            return NativeVecEnv(AsyncVectorEnv(fns, autoreset_mode=AutoresetMode.SAME_STEP))
        return DummyVecEnv(fns) if kind == "dummy" else SubprocVecEnv(fns, "fork")

    asking, models = Asking(), []
    for callback in (asking, Bystander()):
        env = TwoHalves(make(), make())
        models.append(ScratchPPO("MlpPolicy", env, **SMALL, engine="torch").learn(64, callback))
        env.close()
    assert asking.answers == [[9] * 4] * 16
    assert_same_weights(*models)


class FailsInReset(ToyEnv):
    def reset(self, **kwargs: Any) -> Any:
        raise LookupError("no such level")


@pytest.mark.parametrize("kind", ["dummy", "subproc"])
def test_a_failure_in_a_reset_has_its_environments_number(kind: str) -> None:
    def make(*classes: Any) -> VecEnv:
        fns = [partial(each, deepcopy(BOX), ACTION_SPACES["discrete"]) for each in classes]
        return DummyVecEnv(fns) if kind == "dummy" else SubprocVecEnv(fns, "fork")

    env = TwoHalves(make(ToyEnv, ToyEnv), make(ToyEnv, FailsInReset))
    with pytest.raises(EnvFailedError, match="environment 3") as failed:
        ScratchPPO("MlpPolicy", env, **SMALL).learn(64)
    assert failed.value.env_index == 3
    assert "no such level" in str(failed.value)
    env.close()


def test_nested_halves_know_their_reset_rows() -> None:
    env = TwoHalves(TwoHalves(cartpoles(1), cartpoles(1)), TwoHalves(cartpoles(1), cartpoles(1)))
    assert env.has_reset_rows
    assert_same_steps(env, cartpoles(4), 120)


class Counting(ToyEnv):
    calls = 0

    def call(self) -> int:
        self.calls += 1
        return self.calls


def test_indices_are_those_of_any_vec_env() -> None:
    fns = [lambda: Counting(deepcopy(BOX), ACTION_SPACES["discrete"])] * 2
    env = TwoHalves(DummyVecEnv(fns), DummyVecEnv(fns))
    assert env.env_method("call", indices=[3, 0, 3]) == [1, 1, 2]
    for index in (4, -5):
        with pytest.raises(IndexError):
            env.get_attr("calls", [index])
        with pytest.raises(IndexError):
            env.set_attr("calls", 0, [index])


@pytest.mark.parametrize("backend", ["ale", "envpool"])
@pytest.mark.parametrize("halved", [False, True])
def test_ctrl_c_as_a_step_begins_is_survived(backend: str, halved: bool) -> None:
    """Python raises as ``send`` returns; the step has begun, and must not begin again, which would end the process."""
    pytest.importorskip("envpool" if backend == "envpool" else "ale_py")
    make = partial(make_native_atari_env, "BreakoutNoFrameskip-v4", backend=backend)
    env = TwoHalves(make(1), make(1)) if halved else make(2)
    model = ScratchPPO("CnnPolicy", env, **SMALL).learn(32)
    games: Any = (env.halves[0] if isinstance(env, TwoHalves) else env).env  # type: ignore[attr-defined]  # native
    send, calls = games.send, []

    def interrupted(actions: np.ndarray) -> None:
        send(actions)
        calls.append(1)
        if len(calls) == 3:
            del games.send
            raise KeyboardInterrupt

    games.send = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, reset_num_timesteps=False)
    model.learn(64)
    env.close()


def test_who_could_not_be_sent_does_not_play() -> None:
    env = TwoHalves(cartpoles(2), cartpoles(2))
    env.reset()
    with pytest.raises(ValueError, match="left"):
        env.step_async(np.array(["left"] * 4))
    assert env.step(np.zeros(4, int))[0].shape == (4, 4)


class Stuck(VecEnvWrapper):
    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def close(self) -> None:
        raise OSError("stuck")


def test_both_halves_are_closed_where_one_cannot_be() -> None:
    second = SubprocVecEnv([Failing] * 2, "fork")
    with pytest.raises(OSError, match="stuck"):
        TwoHalves(Stuck(DummyVecEnv([Failing] * 2)), second).close()
    assert second.closed


class ReusedInfos(VecEnvWrapper):
    """Plays as soon as it is sent, and hands out the same infos and final observations for ever."""

    def reset(self) -> Any:
        obs: Any = self.venv.reset()
        self.infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self.finals = np.zeros_like(obs)
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        self.venv.step_async(actions)
        self.obs, self.rewards, self.dones, infos = self.venv.step_wait()
        for row, (kept, info) in enumerate(zip(self.infos, infos, strict=True)):
            kept.clear()
            kept.update(info)
            self.finals[row] = info.get("terminal_observation", -1.0)
            if "terminal_observation" in info:
                kept["terminal_observation"] = self.finals[row]

    def step_wait(self) -> Any:
        return self.obs, self.rewards, self.dones, self.infos


def test_infos_and_final_observations_stay_as_they_were() -> None:
    env = TwoHalves(ReusedInfos(toys(2)), ReusedInfos(toys(2)))
    assert_same_training("MlpPolicy", env, toys(4), engine="torch")
