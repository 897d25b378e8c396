"""``scratch-zoo SCRIPT ...``: one of rl-zoo3's scripts, made ready and run."""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.zoo.mends import INSTALL, mend, register_in_children, trust_files
from sb3_ppo_from_scratch.zoo.registration import ALGO, hyperparams_file, register

__all__ = ["SCRIPTS", "main"]

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
        sys.exit(f"{_PROG}: {error}; {INSTALL}")
    sys.argv = [f"{_PROG} {script}", *_complete(script, arguments)]
    register_in_children([_ALLOW_PICKLE] if trusting else [])
    if trusting:
        trust_files()
    else:
        from sb3_ppo_from_scratch.zoo.safe_yaml import read_safely  # it imports the zoo, which is there

        read_safely()
    mend(script)
    try:
        _run(script)
    except UnsafeFileError as error:
        sys.exit(f"{_PROG} {script}: {error} (here: {_ALLOW_PICKLE})")


def _run(script: str) -> None:
    if script == "train":
        from sb3_ppo_from_scratch.zoo.manager import train  # likewise

        train()
    else:
        # rl_zoo3.plots has imported its scripts by the time one of them is run; that is harmless, and runpy warns of it
        warnings.filterwarnings("ignore", "'rl_zoo3.plots", RuntimeWarning, "runpy")
        runpy.run_module(f"rl_zoo3.plots.{script}" if "plot" in script else f"rl_zoo3.{script}", run_name="__main__")


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

    if script == "plot_from_file":
        return _with_format(arguments)
    if "plot" in script:  # these take the name of any folder
        return arguments
    parser = _OneLineParser(prog=f"{_PROG} {script}", add_help=False)
    parser.add_argument("--algo", choices=ALGOS)
    parser.add_argument("-conf", "--conf-file")
    known, _ = parser.parse_known_args(arguments)
    if script == "train" and known.algo == ALGO and known.conf_file is None:
        return [*arguments, "--conf-file", str(hyperparams_file())]
    return arguments


def _with_format(arguments: list[str]) -> list[str]:
    """The zoo writes SVG whatever the file is called; here the name says what is written."""
    parser = _OneLineParser(add_help=False)
    parser.add_argument("-o", "--output")
    parser.add_argument("--format")
    known, _ = parser.parse_known_args(arguments)
    suffix = Path(known.output or "").suffix[1:]
    return [*arguments, "--format", suffix] if suffix and known.format is None else arguments
