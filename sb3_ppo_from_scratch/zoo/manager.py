"""``scratch-zoo train``: rl-zoo3's experiments, also on native vector environments and resumable. This imports rl_zoo3."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import optuna
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import ALGOS, exp_manager
from rl_zoo3 import train as zoo_train
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.checkpoint import ResumableCheckpoint, has_checkpoint
from sb3_ppo_from_scratch.distributed import group_of, n_processes
from sb3_ppo_from_scratch.ppo import ScratchPPO
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, make_native_atari_env
from sb3_ppo_from_scratch.vec_env.failures import EnvFailedError

__all__ = ["OPTIONS", "ScratchExperimentManager", "train"]

_NATIVE = {"native": "ale", "envpool": "envpool"}
"""What ``--vec-env`` takes besides the zoo's own, and where Atari games come from then."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--vec-env": {
        "default": "dummy",
        "choices": ["dummy", "subproc", *_NATIVE],
        "help": f"VecEnv type; for ScratchPPO also {' or '.join(_NATIVE)}, all environments in one",
    },
    "--checkpoint-freq": {
        "type": int,
        "default": -1,
        "help": "for ScratchPPO: write a checkpoint for exact resume every n timesteps; 0 for as often as is cheap",
    },
    "--resume": {
        "default": "",
        "help": "for ScratchPPO: folder of an interrupted run, to go on with the same bits; repeat the command that began it",
    },
    "--data-parallel": {
        "action": "store_true",
        "help": "for ScratchPPO: one agent in all processes that torchrun has started, which share n_envs and batch_size",
    },
}
"""``train``'s options that are ours, or more than the zoo's of that name."""

_ATARI_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"
_CHECKPOINTS = "checkpoints"
"""The checkpoints' folder within a run's."""
_DECISIVE = {
    "n_timesteps": "-n",
    "seed": "--seed",
    "hyperparams": "-params",
    "vec_env": "--vec-env",
    "env_kwargs": "--env-kwargs",
    "eval_env_kwargs": "--eval-env-kwargs",
    "eval_freq": "--eval-freq",
    "eval_episodes": "--eval-episodes",
    "n_eval_envs": "--n-eval-envs",
    "save_freq": "--save-freq",
    "log_interval": "--log-interval",
    "data_parallel": "--data-parallel",
}
"""Options that must be those of the command that began a run, or be left out of one that resumes it."""


def train() -> None:
    """The zoo's ``train``, which finds its parser and its manager in its own module: here these are ours."""
    vars(zoo_train).update(argparse=SimpleNamespace(ArgumentParser=_TrainParser), ExperimentManager=ScratchExperimentManager)
    zoo_train.train()


class _TrainParser(argparse.ArgumentParser):
    """The zoo's, with :data:`OPTIONS`; what a resuming command leaves out is what the run was begun with."""

    def __init__(self) -> None:
        super().__init__(conflict_handler="resolve")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for flag, settings in OPTIONS.items():
            self.add_argument(flag, **settings)
        parsed = super().parse_args(args, namespace)
        if parsed.resume:
            unset = object()
            given = super().parse_args(args, argparse.Namespace(**dict.fromkeys(_DECISIVE, unset)))
            options = {name: value for name, value in vars(given).items() if name in _DECISIVE and value is not unset}
            vars(parsed).update(_begun_with(parsed, options))
        if parsed.data_parallel:
            _agree(parsed)
        return parsed


def _agree(args: argparse.Namespace) -> None:
    """Of several processes, all have the seed of rank 0, if that is to be a random one, and only rank 0 prints."""
    group = group_of(data_parallel=True)
    if args.seed < 0:
        args.seed = group.gather(int(np.random.randint(2**32 - 1, dtype="int64")))[0]
    if group.rank > 0:
        args.verbose, args.progress, args.track = 0, False, False
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as there is the process


def _begun_with(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """
    The options of the run that ``--resume`` names.

    :param args: the resuming command's
    :param given: those of :data:`_DECISIVE` that it names
    :raises FileNotFoundError: if it holds no checkpoint
    :raises ValueError: if they are not the run's
    """
    if not has_checkpoint(Path(args.resume) / _CHECKPOINTS):
        raise FileNotFoundError(f"--resume {args.resume}: no checkpoints in {Path(args.resume) / _CHECKPOINTS}")
    recorded = _read_yaml(Path(args.resume), args.env, "args.yml")
    recorded = {name: recorded[name] for name in _DECISIVE if name in recorded}
    for name, value in given.items():
        if name in recorded and recorded[name] != value:
            raise ValueError(
                f"{_DECISIVE[name]} must be {recorded[name]!r}, as --resume {args.resume} was begun with, or be left out, "
                f"not {value!r}"
            )
    return recorded


def _read_yaml(run: Path, env_id: str, name: str) -> dict[str, Any]:
    """What the zoo wrote of a run; read as one of anybody's."""
    path = run / EnvironmentName(env_id) / name
    if not path.is_file():
        raise FileNotFoundError(f"--resume {run}: it is no folder of a run on {env_id}, for there is no {path}")
    with path.open() as file:
        return yaml.load(file, Loader=yaml.UnsafeLoader)  # ours, unless --allow-pickle trusts the file


class ScratchExperimentManager(exp_manager.ExperimentManager):
    """
    The zoo's, which also makes native vector environments, writes checkpoints for exact resume, and goes on from them.

    Native are those that Gymnasium has under ``gym.make_vec``, and Atari games. Everything around the environments
    (normalization, evaluation, search) stays the zoo's. A resumed run goes on in its own folder.
    """

    def __init__(self, args: argparse.Namespace, *more: Any, **kwargs: Any):
        kind = kwargs.get("vec_env_type")
        self._native = kind if kind in _NATIVE else None
        self._data_parallel, self._group = args.data_parallel, group_of(args.data_parallel)
        super().__init__(args, *more, **(kwargs | {"vec_env_type": "dummy"} if self._native else kwargs))
        self._atari_options: dict[str, Any] = {}
        self._lock = threading.RLock()  # --n-jobs searches in threads
        self._resume = bool(args.resume)
        self._checkpoint_freq = args.checkpoint_freq
        self._check_is_ours(args)
        if self._resume:
            self._go_on_in(Path(args.resume))
        self.save_path, self.params_path = self._group.gather((self.save_path, self.params_path))[0]

    def _check_is_ours(self, args: argparse.Namespace) -> None:
        if not issubclass(ALGOS[self.algo], ScratchPPO):
            if self._native is not None:
                raise ValueError(
                    f"--vec-env {self._native} is for --algo scratch_ppo, not {self.algo}, which would take the steps that "
                    "begin an episode for transitions"
                )
            if self._resume or self._checkpoint_freq >= 0:
                raise ValueError(f"--resume and --checkpoint-freq are for --algo scratch_ppo, not {self.algo}")
            if self._data_parallel:
                raise ValueError(f"--data-parallel is for --algo scratch_ppo, not {self.algo}")
        if self._resume and (self.optimize_hyperparameters or args.trained_agent):
            raise ValueError("--resume goes with neither -optimize nor -i")
        if self._data_parallel and self.optimize_hyperparameters:
            raise ValueError("--data-parallel does not go with -optimize")
        if n_processes() > 1 and not self._data_parallel:
            raise ValueError(
                f"--data-parallel is missing: without it, the {n_processes()} processes would overwrite each other's files"
            )

    # ------------------------------------------------------- native environments

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> tuple[Any, ...]:
        wrappers = hyperparams.get("env_wrapper") or []
        processed, env_wrapper, callbacks, vec_env_wrapper = super()._preprocess_hyperparams(hyperparams)
        if self._native is not None:
            self._check_is_served(wrappers if isinstance(wrappers, list) else [wrappers])
            if self._is_atari:
                self._atari_options["n_stack"] = self.frame_stack or 1
                self.frame_stack = None
            env_wrapper = None
        if self._data_parallel:
            processed["data_parallel"] = True
            if self.n_envs % self._group.size != 0:
                raise ValueError(
                    f"n_envs must be a multiple of the number of processes, {self._group.size}, not {self.n_envs}"
                )
        return processed, env_wrapper, callbacks, vec_env_wrapper

    def _check_is_served(self, wrappers: list[Any]) -> None:
        """Whether a native environment can be what the hyperparameters ask for; it cannot be wrapped one by one."""
        where = f"{self.env_name.gym_id} with --vec-env {self._native}"
        if self._is_atari:
            given = wrappers[0] if len(wrappers) == 1 else None
            if isinstance(given, dict) and list(given) == [_ATARI_WRAPPER]:
                self._atari_options |= given[_ATARI_WRAPPER]
            elif given != _ATARI_WRAPPER:
                raise ValueError(f"env_wrapper must be {_ATARI_WRAPPER} for {where}, not {wrappers}")
            if self.env_kwargs or self.eval_env_kwargs:
                raise ValueError(f"{where} takes no env_kwargs, not {self.env_kwargs or self.eval_env_kwargs}")
        elif self._native != "native":
            raise ValueError(f"--vec-env {self._native} is for Atari games, not {self.env_name.gym_id}")
        elif wrappers:
            raise ValueError(f"{where} takes no env_wrapper, not {wrappers}; --vec-env dummy does")
        elif gym.spec(self.env_name.gym_id).vector_entry_point is None:
            raise ValueError(f"Gymnasium has no native vector environment for {self.env_name.gym_id}; use --vec-env dummy")

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """As the zoo does, from native environments if asked for; of several processes, each makes its share."""
        if self._group.size == 1 or eval_env:
            return self._create_envs(n_envs, eval_env, no_log)
        n_envs //= self._group.size
        ours = partial(make_vec_env, start_index=self._group.rank * n_envs)  # in the names of monitors' files
        with patch.object(exp_manager, "make_vec_env", ours):
            return self._create_envs(n_envs, eval_env, no_log)

    def _create_envs(self, n_envs: int, eval_env: bool, no_log: bool) -> VecEnv:
        if self._native is None:
            return super().create_envs(n_envs, eval_env, no_log)
        with self._lock:
            # it will be called with one function per environment, as DummyVecEnv would
            self.vec_env_class = partial(self._make_native, eval_env, no_log)  # type: ignore[assignment]  # not a class
            return super().create_envs(n_envs, eval_env, no_log)

    def _make_native(self, eval_env: bool, no_log: bool, env_fns: list[Callable[[], gym.Env]]) -> NativeVecEnv:
        env_id, n_envs = self.env_name.gym_id, len(env_fns)
        filename = None if eval_env or no_log else os.path.join(self.save_path, str(self._group.rank))
        if self._is_atari:
            return make_native_atari_env(
                env_id, n_envs, backend=_NATIVE[str(self._native)], filename=filename, **self._atari_options
            )
        env = gym.make_vec(env_id, n_envs, **(self.eval_env_kwargs if eval_env else self.env_kwargs))
        return NativeVecEnv(env, filename, self.monitor_kwargs.get("info_keywords", ()))

    # ------------------------------------------------------- resuming

    def _go_on_in(self, folder: Path) -> None:
        self.save_path = str(folder)
        self.params_path = f"{folder}/{self.env_name}"
        self.n_timesteps = -1  # the checkpoint knows where its run ends; the zoo would print that it is overwritten

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        As the zoo does.

        :raises ValueError: if they are not those of the run that is resumed
        """
        hyperparams, saved = super().read_hyperparameters()
        if self._resume:
            recorded = _read_yaml(Path(self.save_path), self.env_name.gym_id, "config.yml")
            now = yaml.load(yaml.dump(saved), Loader=yaml.UnsafeLoader)  # the way the others have gone
            for name in sorted({*recorded, *now}):
                if recorded.get(name) != now.get(name):
                    raise ValueError(
                        f"{name} must be {recorded.get(name)!r}, as --resume {self.save_path} was begun with, not "
                        f"{now.get(name)!r}: -params and -conf must be those of that command"
                    )
        return hyperparams, saved

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if not self._resume and self._group.rank == 0:  # what a run was begun with is what it goes on with
            super()._save_config(saved_hyperparams)

    def create_callbacks(self) -> None:
        """The zoo's, and one for checkpoints if they are asked for. Of several processes, the first saves and evaluates."""
        if self._group.rank > 0:
            self.save_freq = self.eval_freq = -1
        super().create_callbacks()
        if self._resume or self._checkpoint_freq >= 0:
            frequency = self._checkpoint_freq if self._checkpoint_freq > 0 else None
            self.callbacks.append(ResumableCheckpoint(frequency, Path(self.save_path) / _CHECKPOINTS))

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """As the zoo does; to resume, then exchange the new model for the checkpoint's."""
        results = super().setup_experiment()
        if results is None or not self._resume:
            return results
        model, hyperparams = results
        assert model.env is not None  # the zoo has just made it
        folder = Path(self.save_path) / _CHECKPOINTS
        return ScratchPPO.resume(folder, model.env, self.device, logs=self.tensorboard_log), hyperparams

    def learn(self, model: BaseAlgorithm) -> None:
        """As the zoo does, or what is left of it."""
        super().learn(_Continued(model) if self._resume else model)  # type: ignore[arg-type]  # it has what is used

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """As the zoo does, by the first of several processes."""
        if self._group.rank == 0:
            super().save_trained_model(model)

    # ------------------------------------------------------- search

    def objective(self, trial: optuna.Trial) -> float:
        """As the zoo does, which prunes a trial for these errors; those of an environment come as another one here."""
        try:
            return super().objective(trial)
        except EnvFailedError as error:
            if isinstance(error.__cause__, (AssertionError, ValueError)):
                raise optuna.exceptions.TrialPruned(str(error)) from error
            raise


class _Continued:
    """A model whose ``learn`` does what is left of an interrupted one."""

    def __init__(self, model: Any):
        self._model = model
        self.env = model.env

    def learn(self, n_timesteps: int, callback: MaybeCallback = None, **kwargs: Any) -> None:
        """The arguments are the new command's; those of the interrupted run hold."""
        self._model.continue_learning(callback)
