"""Environments that raise, and processes that die: training ends with an error that says which, after a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_ppo_from_scratch import EnvFailedError, ResumableCheckpoint, ScratchPPO, has_checkpoint
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
