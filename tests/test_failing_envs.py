"""Environments that raise, and processes that die: training ends with an error that says which, after a checkpoint."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_ppo_from_scratch import EnvFailedError, ResumableCheckpoint, ScratchPPO, has_checkpoint
from sb3_ppo_from_scratch.vec_env import failures
from sb3_ppo_from_scratch.vec_env.failures import WatchedSubprocVecEnv
from tests.helpers import assert_same_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"policy": "MlpPolicy", "n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 4, "device": "cpu"}
TOTAL = 3 * 16 * 3


class Failing(gym.Wrapper):
    """CartPole that at its step ``at`` raises, or dies; -1 for never."""

    def __init__(self, at: int = -1, dies: bool = False, in_reset: bool = False):
        super().__init__(gym.make("CartPole-v1"))
        self.left = at
        self.dies = dies
        self.in_reset = in_reset

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.in_reset:
            self.fail()
        return super().step(action)

    def reset(self, **kwargs: Any) -> Any:
        if self.in_reset and self.left < 0 and kwargs.get("seed") is None:
            self.fail()
        return super().reset(**kwargs)

    def fail(self) -> None:
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise LookupError("the simulator lost its marbles")


def three(**failing: Any) -> list[Any]:
    """The second of three fails."""
    return [Failing, partial(Failing, **failing), Failing]


def subproc(method: str, **failing: Any) -> SubprocVecEnv:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    return SubprocVecEnv(three(**failing), start_method=method)


def learn_until_it_fails(env: Any, *callbacks: Any) -> EnvFailedError:
    with pytest.raises(EnvFailedError) as failed:
        ScratchPPO(env=env, **SMALL).learn(TOTAL, list(callbacks))
    return failed.value


def test_an_error_names_its_environment_and_carries_its_traceback(tmp_path: Path) -> None:
    error = learn_until_it_fails(VecNormalize(DummyVecEnv(three(at=40))), ResumableCheckpoint(1, tmp_path))
    assert error.env_index == 1
    assert "environment 1 (CartPole-v1) failed in step with LookupError: the simulator lost its marbles" in str(error)
    assert isinstance(error.__cause__, LookupError)
    names = []
    trace = error.__cause__.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == "fail"


def test_a_run_continues_from_before_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn_until_it_fails(DummyVecEnv(three(at=40)), ResumableCheckpoint(10**9, tmp_path))
    monkeypatch.setattr(Failing, "fail", lambda env: None)
    ours = ScratchPPO.resume(tmp_path, DummyVecEnv(three()))
    assert ours.num_timesteps < 3 * 40
    whole = ScratchPPO(env=DummyVecEnv(three()), **SMALL).learn(TOTAL)
    ours = ScratchPPO.resume(tmp_path, DummyVecEnv(three())).continue_learning()
    assert_same_model(ours, whole)


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])  # imports torch in each
@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
def test_a_process_that_ends(method: str, dies: bool, tmp_path: Path) -> None:
    env = subproc(method, at=40, dies=dies)
    error = learn_until_it_fails(VecNormalize(env), ResumableCheckpoint(1, tmp_path))
    assert error.env_index == 1
    assert "environment 1 (CartPole-v1) failed: its process ended" in str(error)
    if dies:
        assert "by signal 9" in str(error)
    else:
        assert "LookupError: the simulator lost its marbles" in str(error)
        assert 'in fail\n    raise LookupError("the simulator lost its marbles")' in str(error)
    assert not any(process.is_alive() for process in env.processes)
    assert has_checkpoint(tmp_path)
    env.close()


def test_a_process_that_dies_during_an_update(tmp_path: Path) -> None:
    env = subproc("fork")

    class Killing(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            env.processes[2].kill()
            env.processes[2].join()

    error = learn_until_it_fails(env, ResumableCheckpoint(1, tmp_path), Killing())
    assert "environment 2 (CartPole-v1) failed: its process ended by signal 9" in str(error)
    assert has_checkpoint(tmp_path)


def test_a_reset_that_fails_within_a_step() -> None:
    env = subproc("fork", at=1, in_reset=True)
    assert "LookupError" in str(learn_until_it_fails(env))
    assert learn_until_it_fails(DummyVecEnv(three(at=1, in_reset=True))).env_index == 1


class FailingEarly(gym.Wrapper):
    """CartPole whose constructor or reset raises, or dies."""

    def __init__(self, where: str = "", dies: bool = False):
        super().__init__(gym.make("CartPole-v1"))
        self.where = where
        self.dies = dies
        self.fail("constructor")

    def reset(self, **kwargs: Any) -> Any:
        self.fail("reset")
        return super().reset(**kwargs)

    def fail(self, where: str) -> None:
        if self.where == where:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError(f"no {where} today")


def early(**failing: Any) -> list[Any]:
    return [FailingEarly, partial(FailingEarly, **failing), FailingEarly]


@pytest.mark.parametrize(
    ("method", "index", "dies"),
    [("fork", 0, False), ("fork", 1, False), ("fork", 1, True), pytest.param("spawn", 1, False, marks=pytest.mark.slow)],
)
def test_a_constructor_that_fails(method: str, index: int, dies: bool) -> None:
    fns = [partial(FailingEarly, *(("constructor", dies) if i == index else ())) for i in range(3)]
    with pytest.raises(EnvFailedError, match=f"environment {index} failed: its process ended") as failed:
        WatchedSubprocVecEnv(fns, start_method=method)
    assert failed.value.env_index == index
    assert ("LookupError: no constructor today" in str(failed.value)) is not dies


@pytest.mark.parametrize(
    ("method", "dies"), [("fork", False), ("fork", True), pytest.param("forkserver", False, marks=pytest.mark.slow)]
)
def test_a_first_reset_that_fails(method: str, dies: bool) -> None:
    env = SubprocVecEnv(early(where="reset", dies=dies), start_method=method)
    error = learn_until_it_fails(env)
    assert error.env_index == 1
    assert ("LookupError: no reset today" in str(error)) is not dies
    assert not any(process.is_alive() for process in env.processes)
    with pytest.raises(EnvFailedError, match="is closed: make it anew"):
        ScratchPPO(env=env, **SMALL).learn(TOTAL)


def test_a_first_reset_that_fails_in_this_process() -> None:
    error = learn_until_it_fails(DummyVecEnv(early(where="reset")))
    assert "environment 1 (CartPole-v1) failed in reset with LookupError: no reset today" in str(error)


@pytest.mark.parametrize("known", [False, True], ids=["before ScratchPPO", "before learn"])
def test_a_process_that_is_dead_already(known: bool) -> None:
    env = subproc("fork")
    model = ScratchPPO(env=env, **SMALL) if known else None
    env.processes[1].kill()
    env.processes[1].join()
    with pytest.raises(EnvFailedError, match=r"environment 1.* failed: its process ended by signal 9"):
        (model or ScratchPPO(env=env, **SMALL)).learn(TOTAL)
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.parametrize("failing", [{"where": "reset"}, {"where": "reset", "dies": True}], ids=["raises", "dies"])
def test_an_evaluation_environment_that_fails(failing: dict[str, Any]) -> None:
    env, evaluated_in = subproc("fork"), SubprocVecEnv(early(**failing), start_method="fork")
    error = learn_until_it_fails(env, EvalCallback(evaluated_in, eval_freq=8, warn=False))
    assert "environment 1 (CartPole-v1) failed: its process ended" in str(error)
    assert not any(process.is_alive() for process in (*env.processes, *evaluated_in.processes))


def test_a_reset_that_fails_in_resume(tmp_path: Path) -> None:
    ScratchPPO(env=DummyVecEnv(early()), **SMALL).learn(TOTAL, ResumableCheckpoint(1, tmp_path))
    for env in (SubprocVecEnv(early(where="reset"), start_method="fork"), DummyVecEnv(early(where="reset"))):
        with pytest.raises(EnvFailedError, match="LookupError: no reset today"):
            ScratchPPO.resume(tmp_path, env)


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium's own report
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("make", [SyncVectorEnv, partial(AsyncVectorEnv, context="fork")], ids=["sync", "async"])
def test_gymnasiums_own_vector_environments(make: Any, mode: AutoresetMode) -> None:
    error = learn_until_it_fails(make(three(at=5), autoreset_mode=mode))
    assert (error.env_index, "the simulator lost its marbles" in str(error)) == (1, True)
    assert "environment 1 (CartPole-v1) failed in step with LookupError" in str(error)
    error = learn_until_it_fails(make(early(where="reset"), autoreset_mode=mode))
    assert "environment 1 (CartPole-v1) failed in reset with LookupError: no reset today" in str(error)


@pytest.mark.parametrize("context", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_process_of_gymnasiums_that_dies(context: str) -> None:
    env = AsyncVectorEnv(three(at=5, dies=True), context=context)
    error = learn_until_it_fails(env)
    assert "environment 1 (CartPole-v1) failed: its process ended by signal 9" in str(error)
    assert not any(process.is_alive() for process in env.processes)


class Leaving(Failing):
    """Ends the program, or behaves as if somebody had."""

    error: type[BaseException] = SystemExit

    def fail(self) -> None:
        raise self.error("enough")


def test_an_environment_that_leaves_the_program() -> None:
    error = learn_until_it_fails(DummyVecEnv([Failing, partial(Leaving, at=5)]))
    assert "environment 1 (CartPole-v1) failed in step with SystemExit: enough" in str(error)


def test_ctrl_c_within_a_step_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaving, "error", KeyboardInterrupt)
    model = ScratchPPO(env=DummyVecEnv([Failing, partial(Leaving, at=5)]), **SMALL)
    with pytest.raises(KeyboardInterrupt):
        model.learn(TOTAL)
    assert model._last_obs is None  # one environment has been stepped and the other not: the next learn resets both
    model.learn(TOTAL, reset_num_timesteps=False)


class Slow(Failing):
    """Takes its time for the fifth step."""

    def fail(self) -> None:
        time.sleep(0.5)


def test_ctrl_c_leaves_no_answers_in_the_pipes() -> None:
    env = SubprocVecEnv([Failing, partial(Slow, at=5)], start_method="fork")
    model = ScratchPPO(env=env, **SMALL)

    class Interrupting(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 4:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            return True

    with pytest.raises(KeyboardInterrupt):
        model.learn(TOTAL, Interrupting())
    assert not any(process.is_alive() for process in env.processes)
    with pytest.raises(EnvFailedError, match="is closed: make it anew"):
        model.learn(TOTAL)
    model.set_env(DummyVecEnv([Failing] * 2))
    model.learn(TOTAL)


def test_a_signals_handler_may_leave_the_program_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(number: int, frame: Any) -> None:
        sys.exit(7)

    monkeypatch.setattr(Leaving, "fail", lambda env: signal.raise_signal(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, leave)
    try:
        with pytest.raises(SystemExit, match="7"):
            ScratchPPO(env=DummyVecEnv([partial(Leaving, at=5)]), **SMALL).learn(TOTAL)
    finally:
        signal.signal(signal.SIGUSR1, before)


class Stubborn(Failing):
    """Does not end when it is asked to."""

    def step(self, action: Any) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return super().step(action)


def test_a_worker_that_does_not_end_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_PATIENCE", 0.2)
    env = SubprocVecEnv([Stubborn, partial(Failing, at=40)], start_method="fork")
    learn_until_it_fails(env)
    assert env.processes[0].exitcode == -signal.SIGKILL


class Chatty(Failing):
    """Writes a lot, then fails in a chain of errors."""

    def step(self, action: Any) -> Any:
        sys.stderr.write("a contact buffer is full\n" * 100)
        try:
            raise ValueError("this one was caught")
        except ValueError:
            traceback.print_exc()
        return super().step(action)


def test_what_a_worker_writes_is_not_kept() -> None:
    env = SubprocVecEnv([partial(Chatty, at=20)], start_method="fork")
    sizes: list[int] = []

    class Looking(BaseCallback):
        def _on_step(self) -> bool:
            sizes.append(Path(failures._workers[env].file(0)).stat().st_size)
            return True

    error = learn_until_it_fails(env, Looking())
    assert 0 < max(sizes) < 5_000
    assert "LookupError: the simulator lost its marbles" in str(error)
    assert "caught" not in str(error)


class InPlace(gym.Env):
    """Observes its clock in one array for ever, and is cut after five steps."""

    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self) -> None:
        self.shown = np.zeros(1, np.float32)

    def reset(self, **kwargs: Any) -> Any:
        self.shown[:] = 0
        return self.shown, {}

    def step(self, action: Any) -> Any:
        self.shown += 1
        return self.shown, 0.0, False, bool(self.shown[0] == 5), {}


class InPlaceDict(InPlace):
    observation_space = gym.spaces.Dict(clock=InPlace.observation_space)

    def reset(self, **kwargs: Any) -> Any:
        return {"clock": super().reset(**kwargs)[0]}, {}

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return {"clock": obs}, *rest


@pytest.mark.parametrize("env_class", [InPlace, InPlaceDict])
@pytest.mark.parametrize(
    "make",
    [
        DummyVecEnv,
        partial(SubprocVecEnv, start_method="fork"),
        *(partial(SyncVectorEnv, autoreset_mode=mode) for mode in AutoresetMode),
        *(partial(AsyncVectorEnv, context="fork", autoreset_mode=mode) for mode in AutoresetMode),
    ],
)
def test_a_final_observation_survives_the_reset(make: Any, env_class: type[InPlace]) -> None:
    """With V(s) = s and gamma = 1, the reward at the cut is the final observation."""
    policy = "MlpPolicy" if env_class is InPlace else "MultiInputPolicy"
    model = ScratchPPO(
        **{**SMALL, "policy": policy}, env=make([env_class]), gamma=1.0, learning_rate=0.0, policy_kwargs={"net_arch": []}
    )
    with th.no_grad():
        model.policy.value_net.weight.fill_(1.0)
        model.policy.value_net.bias.zero_()
    model.learn(16)
    assert model.rollout_buffer.rewards[4, 0] == 5
    obs = model.rollout_buffer.observations
    assert (obs if isinstance(obs, np.ndarray) else obs["clock"])[:5, 0, 0].tolist() == [0, 1, 2, 3, 4]
    model.get_env().close()


def test_an_observation_of_another_shape_is_not_repeated() -> None:
    class Narrow(Failing):
        def step(self, action: Any) -> Any:
            obs, *rest = super().step(action)
            return obs[:1], *rest

    for env in (DummyVecEnv([Failing, Narrow]), SyncVectorEnv([Failing, Narrow])):
        assert "environment 1" in str(learn_until_it_fails(env))
    assert r"an observation has shape (1,), and its space (4,)" in str(learn_until_it_fails(DummyVecEnv([Failing, Narrow])))
    with pytest.raises(ValueError, match=r"observation has shape \(2, 1\), which is not 2 times that of its space"):
        ScratchPPO(env=SubprocVecEnv([Narrow, Narrow], start_method="fork"), **SMALL).learn(TOTAL)


def test_a_dummy_vec_env_is_saved_as_what_it_was() -> None:
    env = ScratchPPO(env=DummyVecEnv([InPlace]), **SMALL).get_env()
    assert isinstance(env, DummyVecEnv)
    assert type(pickle.loads(pickle.dumps(env))) is DummyVecEnv


def run(code: str, *arguments: str, **kwargs: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes, **kwargs)


LONG_RUN = """
    import sys
    from pathlib import Path
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import SubprocVecEnv
    from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
    from tests.test_failing_envs import SMALL, three

    class Telling(BaseCallback):
        def _on_step(self):
            if self.n_calls == 40:
                print(*[process.pid for process in env.processes], flush=True)
            return True

    env = SubprocVecEnv(three(), start_method=sys.argv[2])
    ScratchPPO(env=env, **SMALL).learn(1e9, [ResumableCheckpoint(1, Path(sys.argv[1])), Telling()])
"""


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for counts."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def wait_for(condition: Any, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


IDLE = """
    import sys
    import time
    from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
    from stable_baselines3.common.vec_env import SubprocVecEnv
    from sb3_ppo_from_scratch import ScratchPPO
    from sb3_ppo_from_scratch.vec_env.failures import WatchedSubprocVecEnv
    from tests.test_failing_envs import SMALL, three

    class Telling(BaseCallback):
        def _on_step(self):
            if self.n_calls == 5:
                tell()
                time.sleep(60)
            return True

    def tell():
        print(*[process.pid for env in envs for process in env.processes], flush=True)

    stage = sys.argv[1]
    make = WatchedSubprocVecEnv if stage == "made" else SubprocVecEnv
    envs = [make(three(), start_method="fork")]
    if stage == "made":
        tell()
    model = None if stage == "made" else ScratchPPO(env=envs[0], **SMALL)
    if stage == "before learn":
        tell()
    elif stage == "evaluation":
        envs.append(SubprocVecEnv(three(), start_method="fork"))
        model.learn(1e9, [EvalCallback(envs[1]), Telling()])
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("stage", ["made", "before learn", "evaluation"])
def test_no_process_outlives_a_killed_program(stage: str) -> None:
    process = run(IDLE, stage)
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == (6 if stage == "evaluation" else 3)
        process.kill()
        assert wait_for(lambda: all(gone(pid) for pid in workers))
    finally:
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("method", "number", "whole_group", "status"),
    [
        ("fork", signal.SIGKILL, False, -signal.SIGKILL),
        ("fork", signal.SIGTERM, False, 143),
        pytest.param("forkserver", signal.SIGINT, True, 130, marks=pytest.mark.slow),
    ],
    ids=["killed", "terminated", "Ctrl-C"],
)
def test_no_process_is_left_behind(method: str, number: int, whole_group: bool, status: int, tmp_path: Path) -> None:
    process = run(LONG_RUN, str(tmp_path / "checkpoints"), method)
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 3
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert wait_for(lambda: all(gone(pid) for pid in workers))
        assert has_checkpoint(tmp_path / "checkpoints")
        if number != signal.SIGKILL:
            assert "Traceback" not in errors
            assert "the run continues from" in errors
    finally:
        process.kill()
