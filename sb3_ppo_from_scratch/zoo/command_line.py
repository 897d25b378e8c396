"""
rl-zoo3 with ``--algo scratch_ppo``: ``scratch-zoo SCRIPT ...``, or ``python -m sb3_ppo_from_scratch.zoo SCRIPT ...``.

The scripts, their parsers and all they do are the zoo's own. The zoo has no plugin mechanism, so this module adds ScratchPPO
to its tables, passes our hyperparameters to ``train``, and mends the few places where the zoo would lose sight of an algorithm
that is not built in, or falls behind the libraries that it needs.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.ppo import ScratchPPO

if TYPE_CHECKING:
    import optuna

__all__ = ["ALGO", "SCRIPTS", "hyperparams_file", "main", "register", "sample_params"]

ALGO = "scratch_ppo"
"""The algorithm's name in the zoo: ``--algo``, the folder of its runs, and the beginning of its models' names on the Hub."""

SCRIPTS = {
    "train": "train an agent, resume training, or search for hyperparameters",
    "enjoy": "run a trained agent and report its episodes",
    "record_video": "record a trained agent",
    "record_training": "record every checkpoint of a run, and join the videos",
    "plot_train": "plot training: reward, episode length or success",
    "plot_from_file": "plot what all_plots has gathered",
    "all_plots": "gather the evaluations of several runs: plot, table and file",
    "load_from_hub": "download an agent from the Hugging Face Hub",
    "push_to_hub": "evaluate, record and upload an agent to the Hugging Face Hub",
    "benchmark": "evaluate every trained agent and write the table",
}
"""The zoo's scripts, and what each does."""

_ALLOW_PICKLE = "--allow-pickle"
_PROG = "scratch-zoo"
_INSTALL = "pip install 'sb3-ppo-from-scratch[zoo]'"
_COMMAND = [sys.executable, "-m", "sb3_ppo_from_scratch.zoo"]


# ---------------------------------------------------------------- registration


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


# ---------------------------------------------------------------- command line


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong without the usage, which for the zoo's scripts is longer than a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> None:
    """
    Run one of the zoo's scripts.

    :param argv: the script's name and its arguments; ``None`` for the command line's
    :raises SystemExit: with status 2 for an unknown script or algorithm, with 1 if rl_zoo3 is missing or a file could not be
        read without running something in it, or as the script does
    """
    script, arguments = _read_script(sys.argv[1:] if argv is None else argv)
    trusting = _ALLOW_PICKLE in arguments
    arguments = [argument for argument in arguments if argument != _ALLOW_PICKLE]
    try:
        register()
    except ModuleNotFoundError as error:
        sys.exit(f"{_PROG}: {error}; {_INSTALL}")
    sys.argv = [f"{_PROG} {script}", *_complete(script, arguments)]
    _register_in_children([_ALLOW_PICKLE] if trusting else [])
    if trusting:
        _trust_files()
    else:
        importlib.import_module("sb3_ppo_from_scratch.zoo.safe_yaml").read_safely()  # it needs the extra
    if script == "train":
        importlib.import_module("sb3_ppo_from_scratch.zoo.native").offer_native_environments()  # it imports the zoo
        importlib.import_module("sb3_ppo_from_scratch.zoo.resume").offer_resuming()  # so does it
    if script in ("enjoy", "load_from_hub"):
        _expect_missing_hub_files()
    if script == "push_to_hub":
        _provide_model_metadata()
        _name_us_on_model_cards()
    module = f"rl_zoo3.plots.{script}" if "plot" in script else f"rl_zoo3.{script}"
    # rl_zoo3.plots has imported its scripts by the time one of them is run; that is harmless, and runpy warns of it
    warnings.filterwarnings("ignore", "'rl_zoo3.plots", RuntimeWarning, "runpy")
    try:
        runpy.run_module(module, run_name="__main__")
    except UnsafeFileError as error:
        sys.exit(f"{_PROG} {script}: {error} (here: {_ALLOW_PICKLE})")


def _read_script(argv: list[str]) -> tuple[str, list[str]]:
    width = max(map(len, SCRIPTS))
    parser = _OneLineParser(
        prog=_PROG,
        usage="%(prog)s SCRIPT [ARGUMENTS]",
        description=f"rl-zoo3's scripts, with --algo {ALGO}. Each explains its arguments: {_PROG} SCRIPT --help",
        epilog="\n".join(
            [
                f"Every script takes {_ALLOW_PICKLE}: run what model files hold, for those that you trust.",
                "",
                "scripts:",
                *(f"  {name:{width}}  {what}" for name, what in SCRIPTS.items()),
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", choices=SCRIPTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv[:1]).script, argv[1:]


def _complete(script: str, arguments: list[str]) -> list[str]:
    """The arguments for the zoo's parser: checked for the algorithm, and with our hyperparameters if there are no others."""
    from rl_zoo3.utils import ALGOS

    if "plot" in script:  # these take the name of any folder
        return arguments
    parser = _OneLineParser(prog=f"{_PROG} {script}", add_help=False)
    parser.add_argument("--algo", choices=ALGOS)
    parser.add_argument("-conf", "--conf-file")
    known, _ = parser.parse_known_args(arguments)
    if script == "train" and known.algo == ALGO and known.conf_file is None:
        return [*arguments, "--conf-file", str(hyperparams_file())]
    return arguments


# ------------------------------------------------------- mending the zoo's scripts


def _trust_files() -> None:
    """Models are unpickled as SB3 does; YAML files and statistics are left to the zoo."""
    ScratchPPO.load = partial(ScratchPPO.load, allow_pickle=True)  # type: ignore[method-assign]  # the zoo does not ask


def _register_in_children(flags: list[str]) -> None:
    """``record_training`` and ``benchmark`` start other scripts of the zoo as processes; these must know us too."""
    call = subprocess.call
    ours = {
        ("python", "-m", "rl_zoo3.record_video"): [*_COMMAND, "record_video"],
        ("python", "enjoy.py"): [*_COMMAND, "enjoy"],
    }

    def call_ours(command: Any, *args: Any, **kwargs: Any) -> int:
        for theirs, replacement in ours.items():
            if isinstance(command, list) and tuple(command[: len(theirs)]) == theirs:
                command = [*replacement, *command[len(theirs) :], *flags]
        return call(command, *args, **kwargs)

    subprocess.call = call_ours  # type: ignore[assignment]  # the zoo passes a list, and nothing else


def _expect_missing_hub_files() -> None:
    """
    A model without VecNormalize has no statistics on the Hub, which the zoo learns from an error of ``requests``.

    Since its version 1.0, huggingface_hub raises another one.
    """
    import huggingface_sb3
    from huggingface_hub.errors import EntryNotFoundError
    from requests.exceptions import HTTPError

    load = huggingface_sb3.load_from_hub

    def load_from_hub(repo_id: str, filename: str) -> str:
        try:
            return load(repo_id, filename)
        except EntryNotFoundError as error:
            raise HTTPError(f"{repo_id} has no file {filename}") from error

    huggingface_sb3.load_from_hub = load_from_hub


def _provide_model_metadata() -> None:
    """
    The zoo asks huggingface_sb3 for ``generate_metadata``, and for a dict.

    sb3-team-hf-integration 3.2 has it under a private name, and returns an object.
    """
    hub = importlib.import_module("huggingface_sb3.push_to_hub")  # the package has a function of that name too
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *args: hub._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]


def _name_us_on_model_cards() -> None:
    """The zoo reads an algorithm's name back from the model card, and readers copy its commands: both must name us."""
    from huggingface_hub import repocard

    save = repocard.metadata_save

    def save_with_our_name(local_path: Path | str, data: dict[Any, Any]) -> None:
        card, models = Path(local_path), data["model-index"]
        if models[0]["name"] == ScratchPPO.__name__:
            models[0]["name"] = ALGO
            text = card.read_text(encoding="utf-8").replace("python -m rl_zoo3.", f"{_PROG} ")
            card.write_text(text.replace("pip install rl_zoo3", _INSTALL), encoding="utf-8")
        save(card, data)

    repocard.metadata_save = save_with_our_name
