"""ScratchPPO in the zoo's tables: its name, its hyperparameters, and how a search draws them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_ppo_from_scratch.ppo import ScratchPPO

if TYPE_CHECKING:
    import optuna

__all__ = ["ALGO", "hyperparams_file", "register", "sample_params"]

ALGO = "scratch_ppo"
"""The algorithm's name in the zoo: ``--algo``, the folder of its runs, and the beginning of its models' names on the Hub."""


def register() -> None:
    """
    Add ``scratch_ppo`` to the zoo's tables of algorithms, hyperparameter samplers and converters.

    The zoo's own entries stay as they are, and a second call changes nothing.

    :raises ModuleNotFoundError: if rl_zoo3 is not installed
    """
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER, convert_onpolicy_params
    from rl_zoo3.utils import ALGOS

    ALGOS[ALGO] = ScratchPPO
    HYPERPARAMS_SAMPLER[ALGO] = sample_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_onpolicy_params


def sample_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw hyperparameters for a trial: what the zoo draws for PPO, and what it leaves at PPO's defaults.

    ``clip_range_vf`` stays at its default: its scale is that of the rewards, so no range of it fits every environment.

    :param trial: where the values are drawn from and noted
    :param n_actions: as the zoo's samplers take it
    :param n_envs: as the zoo's samplers take it
    :param additional_args: as the zoo's samplers take it
    :return: arguments of :class:`ScratchPPO`
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params, sample_ppo_params

    sample_ppo_params(trial, n_actions, n_envs, additional_args)
    trial.suggest_float("vf_coef", 0.1, 1.0)
    trial.suggest_categorical("target_kl", [None, 0.01, 0.03, 0.1])
    trial.suggest_categorical("normalize_advantage", [True, False])
    return convert_onpolicy_params(trial.params)  # as --trial-id does with the values in storage


def hyperparams_file() -> Path:
    """Our hyperparameters: inside the package once it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "hyperparams"
    return (installed if installed.is_dir() else package.parent / "hyperparams") / f"{ALGO}.yml"
