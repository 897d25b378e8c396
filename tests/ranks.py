"""
Several processes that train one agent, and what they leave behind.

As a program, ``python -m tests.ranks FOLDER TASK ...``: runs tasks one after the other, or side by side as TASK+TASK, each in
forked processes (which cost no imports) as torchrun would start them, and writes what each rank returns or raises to
FOLDER/TASK-RANK.pt. ``python -m tests.ranks FOLDER kills N SEED`` kills one of two ranks at N random moments, and says
what became of it; ``python -m tests.ranks FOLDER hashes`` compares the ranks' parameters over two long runs.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_ppo_from_scratch import MlpPolicy, ResumableCheckpoint, ScratchPPO, has_checkpoint
from sb3_ppo_from_scratch.distributed import group, group_of, health, rank
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import UpdateConfig, minibatch_loss
from tests.runs import rows

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 2, "seed": 7, "device": "cpu", "data_parallel": True}


class DoubleExtractor(FlattenExtractor):
    """To float64."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


class DoublePolicy(MlpPolicy):
    """In float64, from float32 observations."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, features_extractor_class=DoubleExtractor, **kwargs)
        self.double()


class Recording(ScratchPPO):
    """Keeps what every update began with, and what it ended with."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.updates: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        begun = {
            "policy": copy.deepcopy(self.policy.state_dict()),
            "optimizer": copy.deepcopy(self.policy.optimizer.state_dict()),
            "data": tuple(field.clone() for field in self.rollout_buffer.dataset()[:7]),
            "order": np.random.get_state()[1:3],
        }
        super().train()
        metrics = {name: float(value) for name, value in self.logger.name_to_value.items() if name.startswith("train/")}
        self.updates.append({**begun, "after": copy.deepcopy(self.policy.state_dict()), "metrics": metrics})

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "updates"]


def recorded(model: Recording) -> dict[str, Any]:
    episodes = [(float(each["r"]), int(each["l"])) for each in model.ep_info_buffer]
    return {"updates": model.updates, "num_timesteps": model.num_timesteps, "episodes": episodes}


# ---------------------------------------------------------------- tasks


def learn(folder: Path, policy: Any = "MlpPolicy", engine: str = "torch", n: int = 3 * 128, **kwargs: Any) -> Any:
    model = Recording(policy, make_vec_env("CartPole-v1", 4), engine=engine, **{**SMALL, **kwargs})
    return recorded(model.learn(n))


def reset_rows(folder: Path) -> Any:
    """Unequal numbers of transitions."""
    env = gym.make_vec("CartPole-v1", 4)
    return recorded(Recording("MlpPolicy", env, engine="torch", **SMALL).learn(4 * 128))


def images(folder: Path) -> Any:
    from stable_baselines3.common.envs import FakeImageEnv

    env = make_vec_env(lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True), 2)
    kwargs = {**SMALL, "n_steps": 8, "batch_size": 16, "n_epochs": 1}
    return recorded(Recording("CnnPolicy", env, engine="channels_last", **kwargs).learn(64))


def masked_lstm(folder: Path) -> Any:
    """Masks, a memory, and minibatches of sequences."""
    from tests.test_masks import make

    kwargs = {**SMALL, "policy_kwargs": {"lstm_hidden_size": 8}}
    return recorded(Recording("MaskableMlpLstmPolicy", make(4), engine="lstm", **kwargs).learn(3 * 128))


class KeepObservations(BaseCallback):
    """What the environments send, before it is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []
        self.statistics: list[tuple[np.ndarray, np.ndarray, float, float, float, float]] = []

    def _on_training_start(self) -> None:
        self._on_step()

    def _on_step(self) -> bool:
        self.seen.append(self.training_env.get_original_obs().copy())
        return True

    def _on_rollout_start(self) -> None:
        env = self.training_env
        self.statistics.append(
            (env.obs_rms.mean, env.obs_rms.var, env.obs_rms.count, env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count)
        )


def normalized(folder: Path) -> Any:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    kept = KeepObservations()
    model = Recording("MlpPolicy", env, **{**SMALL, "batch_size": 16}).learn(6 * 64, callback=kept)
    return {**recorded(model), "seen": np.stack(kept.seen), "statistics": kept.statistics}


class LossOfRank1(ScratchPPO):
    """Not a number in one rank's first minibatch."""

    n_losses = 0

    @staticmethod
    def loss(outputs: Any, batch: Any, config: UpdateConfig) -> PPOLoss:
        LossOfRank1.n_losses += 1
        loss = minibatch_loss(outputs, batch, config)
        return loss._replace(total=loss.total * float("nan")) if rank() == 1 and LossOfRank1.n_losses == 1 else loss


def skipped(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LossOfRank1("MlpPolicy", make_vec_env("CartPole-v1", 4), nan_policy="skip", **SMALL).learn(128)
    return model.logger.name_to_value["train/skipped_minibatches"], model.policy.state_dict()


class At(BaseCallback):
    """Does something on rank 1 in a step of the second iteration."""

    def __init__(self, deed: Callable[[], Any], of_rank: int = 1):
        super().__init__()
        self.deed, self.of_rank = deed, of_rank

    def _on_step(self) -> bool:
        return self.deed() is not False if self.n_calls == 21 and rank() == self.of_rank else True


def with_deed(deed: Callable[[], Any], of_rank: int = 1) -> Any:
    model = ScratchPPO("MlpPolicy", make_vec_env("CartPole-v1", 4), **SMALL)
    return model.learn(4 * 128, callback=At(deed, of_rank)).num_timesteps


def raising() -> None:
    raise LookupError("a fault of the user's")


class Stuck(gym.Wrapper):
    """Its 21st step has no end."""

    steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        while self.steps == 21 and rank() == 1:
            time.sleep(0.1)
        return super().step(action)


def stuck(folder: Path) -> Any:
    env = make_vec_env("CartPole-v1", 4, wrapper_class=Stuck)
    return ScratchPPO("MlpPolicy", env, **SMALL).learn(4 * 128).num_timesteps


class Hashing(ScratchPPO):
    """Keeps a hash of the parameters after every update."""

    hashes: ClassVar[list[str]] = []

    def train(self) -> None:
        super().train()
        bits = b"".join(parameter.detach().numpy().tobytes() for parameter in self.policy.parameters())
        self.hashes.append(hashlib.sha256(bits).hexdigest())


def trained(env: VecEnv, test_env: VecEnv, n: int, **kwargs: Any) -> Any:
    """Hashes after all updates, and the return of the agent."""
    model = Hashing("MlpPolicy", env, seed=1, device="cpu", data_parallel=True, **kwargs).learn(n)
    if isinstance(env, VecNormalize):
        test_env = VecNormalize(test_env, training=False, norm_reward=False)
        sync_envs_normalization(env, test_env)
    return Hashing.hashes, evaluate_policy(model, test_env, n_eval_episodes=20)


def long_cartpole(folder: Path) -> Any:
    """The zoo's settings."""
    kwargs = {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "clip_range": LinearSchedule(0.2, 0.0, 1.0), "n_steps": 32}
    kwargs |= {"batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
    return trained(make_vec_env("CartPole-v1", 4), make_vec_env("CartPole-v1"), 100_000, **kwargs)


def long_pendulum(folder: Path) -> Any:
    """The zoo's settings, with statistics."""
    kwargs = {"n_steps": 1024, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.9, "learning_rate": 1e-3, "use_sde": True}
    kwargs |= {"sde_sample_freq": 4}
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), gamma=0.9)
    return trained(env, make_vec_env("Pendulum-v1"), 100_000, **kwargs)


def hashes(folder: Path) -> None:
    """Print whether all ranks have had the same parameters after every update of two long runs, and their agents' returns."""
    for task in ("long_cartpole", "long_pendulum"):
        assert wait(start(task, folder)) == [0, 0]
        (ours, score), (theirs, _) = (th.load(folder / f"{task}-{i}.pt", weights_only=False)["result"] for i in (0, 1))
        print(task, len(ours), "updates, the same hashes on both ranks:", ours == theirs, "different ones:", len(set(ours)))
        print("return of 20 episodes: {:.1f} +- {:.1f}".format(*score), flush=True)


def refused(folder: Path) -> list[str]:
    """What it says of a batch that cannot be shared, of environments that are not as many, and of other engines."""
    said = []
    for n_envs, kwargs in (
        (4, {"batch_size": 33}),
        (4 + rank(), {}),
        (4, {"engine": "cudagraph"}),
        (4, {"data_parallel": False}),
    ):
        try:
            ScratchPPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs), **{**SMALL, **kwargs}).learn(128)
        except ValueError as error:
            said.append(str(error))
    return said


def sums(folder: Path) -> list[th.Tensor]:
    """Of vectors that need more and more memory, less what they should be; at last there is none, and they are sent."""
    ranks: Any = group_of(data_parallel=True)
    found = []
    for n, dtype in (
        (1, th.float64),
        (3, th.float32),
        (3000, th.float32),
        (300_000, th.float32),
        (20, th.float64),
        (400_000, th.float64),
    ):
        if n == 400_000:
            no_shared_memory()
        rows = th.randn(2, n, dtype=dtype, generator=th.Generator().manual_seed(n))
        vector = rows[ranks.rank].clone()
        ranks.sum(vector)
        assert (ranks._room is not None) == (n < 400_000)
        found.append(vector - (rows[0] + rows[1]))
    return found


def no_shared_memory() -> None:
    """From now on, as on two machines."""
    group.make_memory = lambda n_bytes: None


def by_connection(task: Callable[[], Any]) -> Any:
    no_shared_memory()
    return task()


def run(run_folder: Path, is_killed: bool = False, total_timesteps: int = 6 * 128) -> Any:
    """Begin or resume, with everything that a checkpoint holds."""
    env: VecEnv = VecNormalize(make_vec_env("CartPole-v1", 4, monitor_dir=str(run_folder), start_index=4 * rank()))
    checkpoint = ResumableCheckpoint(1, run_folder / "checkpoints")
    callbacks = [checkpoint, At(lambda: os.kill(os.getpid(), signal.SIGKILL) if is_killed else None)]
    if has_checkpoint(run_folder / "checkpoints"):
        model = ScratchPPO.resume(run_folder / "checkpoints", env).continue_learning(callbacks)
    else:
        model = ScratchPPO("MlpPolicy", env, **SMALL)
        model.set_logger(configure(str(run_folder), ["csv"]))
        model.learn(total_timesteps, callbacks)
    return model.policy.state_dict(), model.policy.optimizer.state_dict(), env.obs_rms.mean, model.num_timesteps


TASKS: dict[str, Callable[[Path], Any]] = {
    "float32": learn,
    "float64": lambda folder: learn(folder, DoublePolicy),
    "numpy": lambda folder: learn(folder, engine="numpy", batch_size=48, target_kl=0.02),
    "one_minibatch": lambda folder: learn(folder, engine="numpy", batch_size=128),
    "reset_rows": reset_rows,
    "images": images,
    "masked_lstm": masked_lstm,
    "normalized": normalized,
    "skipped": skipped,
    "stopped": lambda folder: with_deed(lambda: False),
    "raised": lambda folder: with_deed(raising),
    "killed": lambda folder: with_deed(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "frozen": lambda folder: with_deed(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "evaluating": lambda folder: with_deed(lambda: time.sleep(2 * health.PATIENCE), of_rank=0),
    "stuck": stuck,
    "refused": refused,
    "sums": sums,
    "connected": lambda folder: by_connection(lambda: learn(folder)),
    "killed_elsewhere": lambda folder: by_connection(lambda: with_deed(lambda: os.kill(os.getpid(), signal.SIGKILL))),
    "whole": lambda folder: run(folder / "whole"),
    "begun": lambda folder: run(folder / "begun", is_killed=True),
    "resumed": lambda folder: run(folder / "begun"),
    "long": lambda folder: run(folder / "long", total_timesteps=300 * 128),
    "long_cartpole": long_cartpole,
    "long_pendulum": long_pendulum,
    "killed_again": lambda folder: run(folder / "killed_again", total_timesteps=300 * 128),
}


# ---------------------------------------------------------------- processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(task: str, folder: Path, size: int = 2) -> list[int]:
    """The process ids, by rank."""
    port = str(free_port())
    pids = []
    for number in range(size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                status = work(task, folder, number)
            finally:  # a fork must never go on as its parent would
                os._exit(status)
        pids.append(pid)
    return pids


def work(task: str, folder: Path, number: int) -> int:
    began = time.monotonic()
    try:
        found, status = {"result": TASKS[task](folder)}, 0
    except BaseException as error:  # noqa: BLE001  # to be looked at by the test
        found = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        status = 1
    th.save({**found, "seconds": time.monotonic() - began}, folder / f"{task}-{number}.pt")
    from sb3_ppo_from_scratch.distributed import group_of

    group_of(data_parallel=True).close(ours=True)  # type: ignore[attr-defined]  # a fork has no atexit of its own
    return status


def wait(pids: list[int]) -> list[int]:
    """Their exit statuses, by rank."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kills(folder: Path, n: int, seed: int) -> None:
    """Print, for each kill, which rank, after how long, how long the other lived on, and what it said."""
    moments = random.Random(seed)
    for _ in range(n):
        pids, number, moment = start("killed_again", folder), moments.randrange(2), moments.uniform(0.3, 6.0)
        time.sleep(moment)
        os.kill(pids[number], signal.SIGKILL)
        killed = time.monotonic()
        statuses = wait([pids[1 - number]]) + wait([pids[number]])
        left = th.load(folder / f"killed_again-{1 - number}.pt", weights_only=False)
        files = sorted(file.name for file in (folder / "killed_again" / "checkpoints").glob("*.ckpt"))
        print(
            number,
            f"{moment:.2f} s",
            f"{time.monotonic() - killed:.2f} s",
            statuses,
            left.get("message"),
            files[-1:],
            flush=True,
        )
    for task in ("killed_again", "long"):
        assert wait(start(task, folder)) == [0, 0]
    for rank_ in (0, 1):
        a, b = (th.load(folder / f"{task}-{rank_}.pt", weights_only=False)["result"] for task in ("killed_again", "long"))
        print("rank", rank_, "ends with the same bits:", all(th.equal(a[0][name], b[0][name]) for name in a[0]), a[3], b[3])
    print("same rows in all files:", rows(folder / "killed_again") == rows(folder / "long"))


def main(folder: Path, tasks: list[str]) -> None:
    th.set_num_threads(1)
    th.optim.Adam([th.zeros(1)])  # imports what every child would import for a second or two
    if tasks[0] == "kills":
        kills(folder, int(tasks[1]), int(tasks[2]))
        return
    if tasks[0] == "hashes":
        hashes(folder)
        return
    health._SILENCE, health.PATIENCE = 4.0, 3.0
    for each in tasks:
        started = {task: start(task, folder) for task in each.split("+")}
        for task, pids in started.items():
            (folder / f"{task}.txt").write_text(str(wait(pids)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
