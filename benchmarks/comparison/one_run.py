"""
One agent of the comparison: trained, evaluated on the way and at the end, and written down.

:mod:`benchmarks.compare` starts one process per run, with one thread each; by hand::

    python -m benchmarks.comparison.one_run --entry CartPole-v1 --side fast --seed 3 --out runs/compare

Prints a line per evaluation. The record is written at the end, at once: a run is either finished or not there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, sync_envs_normalization

from benchmarks.cases import build
from benchmarks.comparison.protocol import EVALUATION_ENVS, PROTOCOL, Entry
from benchmarks.comparison.records import model_path, record_path, write_record
from benchmarks.evaluation import EVALUATION_SEED, evaluate
from benchmarks.options import command_line, number
from benchmarks.record import provenance
from sb3_ppo_from_scratch import ScratchPPO

__all__ = ["PROGRESS", "Evaluations", "evaluation_env", "main", "print_progress", "train", "weights_digest"]

PROGRESS = "progress: "
"""What a line about an evaluation begins with; libraries may print others."""


def evaluation_env(entry: Entry, n_envs: int = EVALUATION_ENVS, render_mode: str | None = None) -> VecEnv:
    """
    The environments that every side is evaluated in, SB3's own: whole games and raw rewards on Atari.

    :param entry: of the protocol
    :param n_envs: how many
    :param render_mode: Gymnasium's; ``None`` for no pictures
    """
    # without a seed, SB3 would draw one from the generator that training draws from
    kwargs: dict[str, Any] = {"seed": EVALUATION_SEED, "env_kwargs": {"render_mode": render_mode}}
    if "NoFrameskip" in entry.env_id:
        return VecFrameStack(make_atari_env(f"ale_py:{entry.env_id}", n_envs, **kwargs), n_stack=4)
    env: VecEnv = make_vec_env(entry.env_id, n_envs, **kwargs)
    normalize = entry.task().normalize
    return env if normalize is None else VecNormalize(env, **normalize, training=False, norm_reward=False)


class Evaluations(BaseCallback):
    """
    Evaluates the policy, before training and then each time another share of the steps is done.

    Every side plays from the same initial states. Training does not notice: its random generators are left as they are, and
    the time does not count.

    :param entry: of the protocol
    :param timesteps: of the whole training
    :param tell: is called with the timesteps and the mean return of each evaluation
    """

    is_bystander = True

    def __init__(self, entry: Entry, timesteps: int, tell: Callable[[int, float], None]):
        super().__init__()
        self.tell = tell
        self.rows: list[dict[str, Any]] = []
        self._entry, self._timesteps = entry, timesteps
        self._env = evaluation_env(entry)

    def _on_training_start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.evaluate(self._entry.episodes)

    def _on_step(self) -> bool:
        if self.num_timesteps * self._entry.evaluations >= self._timesteps * len(self.rows) and not self._is_last():
            self.evaluate(self._entry.episodes)
        return True

    def _is_last(self) -> bool:
        return len(self.rows) >= self._entry.evaluations

    def evaluate(self, episodes: int) -> None:
        """
        Append a row, and tell of it.

        :param episodes: how many
        """
        wall, cpu = time.perf_counter(), time.process_time()
        returns = self._returns(episodes)
        trained = [float(info["r"]) for info in self.model.ep_info_buffer or []]
        row = {
            "timesteps": self.num_timesteps,
            "seconds": round(wall - self._wall, 3),
            "cpu_seconds": round(cpu - self._cpu, 3),
            "training_return": round(sum(trained) / len(trained), 3) if trained else None,
            "returns": returns,
        }
        self.rows.append(row)
        self.tell(self.num_timesteps, sum(returns) / len(returns))
        self._wall += time.perf_counter() - wall
        self._cpu += time.process_time() - cpu

    def _returns(self, episodes: int) -> list[float]:
        assert self.model.env is not None, "it is training"
        if isinstance(self._env, VecNormalize):
            sync_envs_normalization(self.model.env, self._env)
        seed = EVALUATION_SEED + EVALUATION_ENVS * len(self.rows)
        return evaluate(self.model, self._env, episodes, self._entry.deterministic, seed).returns


def print_progress(timesteps: int, mean: float) -> None:
    """A line that :mod:`benchmarks.compare` reads."""
    print(PROGRESS + json.dumps({"timesteps": timesteps, "return": mean}), flush=True)


def train(
    entry: Entry, side: str, seed: int, timesteps: int, tell: Callable[[int, float], None] = print_progress
) -> tuple[OnPolicyAlgorithm, dict[str, Any]]:
    """
    One run.

    :param entry: of the protocol
    :param side: key of its ``sides``
    :param seed: of the model and its environments
    :param timesteps: over all environments; learning goes on to the end of a rollout
    :param tell: see :class:`Evaluations`
    :return: the trained model, and what was measured
    """
    contestant = entry.sides[side]
    model = build(entry.case(), contestant, seed)
    callback = Evaluations(entry, timesteps, tell)
    model.learn(timesteps, callback=callback)
    last_100 = [round(float(info["r"]), 3) for info in model.ep_info_buffer or []]
    callback.evaluate(entry.final_episodes)
    return model, {
        "engine": contestant.engine,
        "engine_used": model._current_engine().name if isinstance(model, ScratchPPO) else contestant.engine,
        "envs": contestant.envs,
        "precision": contestant.precision,
        "evaluations": callback.rows,
        "last_training_returns": last_100,
        "weights_sha256": weights_digest(model),
    }


def weights_digest(model: OnPolicyAlgorithm) -> str:
    """SHA-256 of the policy's parameters: equal for models with the same bits."""
    parameters = (parameter.numpy(force=True) for parameter in model.policy.parameters())
    return hashlib.sha256(b"".join(parameter.tobytes() for parameter in parameters)).hexdigest()


def main() -> None:
    """Do what the command line says."""
    parser = command_line("benchmarks.comparison.one_run", __doc__ or "", seed=0, out=Path("runs/compare"))
    parser.add_argument("--entry", choices=PROTOCOL, required=True, help="of the protocol")
    parser.add_argument("--side", required=True, help="one of the entry's")
    parser.add_argument("--timesteps", type=number(int, 1), help="fewer than the protocol's, for a quick look")
    options = parser.parse_args()
    entry = PROTOCOL[options.entry]
    if options.side not in entry.sides:
        parser.error(f"--side must be one of {', '.join(entry.sides)} for {options.entry}, not {options.side}")
    th.set_num_threads(1)
    timesteps = options.timesteps or entry.timesteps
    origin = {
        **provenance("benchmarks.comparison.one_run"),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    model, measured = train(entry, options.side, options.seed, timesteps)
    where = (options.out, options.entry, options.side, options.seed)
    saved = model_path(*where)
    saved.parent.mkdir(parents=True, exist_ok=True)
    model.save(saved)
    plan = {"entry": options.entry, "side": options.side, "seed": options.seed, "timesteps": timesteps, "margin": entry.margin}
    write_record(record_path(*where), {**plan, "hyperparameters": entry.task().described(), **measured, **origin})


if __name__ == "__main__":
    main()
