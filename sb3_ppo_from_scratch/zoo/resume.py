"""``scratch-zoo train --checkpoint-freq N`` and ``--resume FOLDER``: exact resume of rl-zoo3's runs. This imports rl_zoo3."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3 import ALGOS, exp_manager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_ppo_from_scratch.checkpoint import ResumableCheckpoint, has_checkpoint
from sb3_ppo_from_scratch.ppo import ScratchPPO
from sb3_ppo_from_scratch.vec_env.failures import EnvFailedError
from sb3_ppo_from_scratch.zoo.native import NativeExperimentManager

__all__ = ["ResumableExperimentManager", "offer_resuming"]

_CHECKPOINTS = "checkpoints"
"""The checkpoints' folder within a run's."""


def offer_resuming() -> None:
    """Let the zoo's ``train`` take ``--checkpoint-freq`` and ``--resume``; to be called before it is run."""
    exp_manager.ExperimentManager = ResumableExperimentManager  # type: ignore[misc]  # train asks this module for it
    add_argument = argparse.ArgumentParser.add_argument

    def add_with_ours(parser: Any, *flags: str, **options: Any) -> Any:
        if "--trained-agent" in flags:
            add_argument(
                parser,
                "--checkpoint-freq",
                type=int,
                default=-1,
                help="for ScratchPPO: write a checkpoint for exact resume every n timesteps; 0 for as often as is cheap",
            )
            add_argument(
                parser,
                "--resume",
                default="",
                help="for ScratchPPO: folder of an interrupted run, to go on with the same bits",
            )
        return add_argument(parser, *flags, **options)

    argparse.ArgumentParser.add_argument = add_with_ours  # type: ignore[assignment, method-assign]  # the same, and two more


class ResumableExperimentManager(NativeExperimentManager):
    """The zoo's, which also writes checkpoints for exact resume, and goes on from them in the run's own folder."""

    def __init__(self, args: argparse.Namespace, *more: Any, **kwargs: Any):
        super().__init__(args, *more, **kwargs)
        self._resume = bool(args.resume)
        self._checkpoint_freq = args.checkpoint_freq
        if (self._resume or self._checkpoint_freq >= 0) and not issubclass(ALGOS[self.algo], ScratchPPO):
            raise ValueError(f"--resume and --checkpoint-freq are for --algo scratch_ppo, not {self.algo}")
        if self._resume:
            if self.optimize_hyperparameters or self.continue_training:
                raise ValueError("--resume goes with neither -optimize nor -i")
            self._go_on_in(Path(args.resume))

    def _go_on_in(self, folder: Path) -> None:
        if not has_checkpoint(folder / _CHECKPOINTS):
            raise FileNotFoundError(f"--resume {folder}: no checkpoints in {folder / _CHECKPOINTS}")
        self.save_path = str(folder)
        self.params_path = f"{folder}/{self.env_name}"

    def create_callbacks(self) -> None:
        """The zoo's, and one for checkpoints if they are asked for."""
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
        return ScratchPPO.resume(Path(self.save_path) / _CHECKPOINTS, model.env, device=self.device), hyperparams

    def learn(self, model: BaseAlgorithm) -> None:
        """As the zoo does, or what is left of it."""
        super().learn(_Continued(model) if self._resume else model)  # type: ignore[arg-type]  # it has what is used

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
