"""Where the zoo's scripts would lose sight of an algorithm that is not built in, or fall behind the libraries they need."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.evaluation import WithMasks
from sb3_ppo_from_scratch.policies import takes_masks
from sb3_ppo_from_scratch.ppo import ScratchPPO
from sb3_ppo_from_scratch.vec_env.failures import WatchedSubprocVecEnv
from sb3_ppo_from_scratch.vec_env.masks import keep_infos
from sb3_ppo_from_scratch.zoo.registration import ALGO

__all__ = ["INSTALL", "mend", "register_in_children", "trust_files"]

INSTALL = "pip install 'sb3-ppo-from-scratch[zoo]'"
_COMMAND = [sys.executable, "-m", "sb3_ppo_from_scratch.zoo"]


def mend(script: str) -> None:
    """Whatever one of the zoo's scripts needs; to be called before it is run."""
    _watch_processes()
    if script in ("enjoy", "record_video", "push_to_hub"):
        _play_with_masks()
    if script in ("enjoy", "load_from_hub"):
        _expect_missing_hub_files()
    if "plot" in script:
        _write_what_no_display_shows(script)
    if script == "push_to_hub":
        _provide_model_metadata()
        _name_us_on_model_cards()


def _watch_processes() -> None:
    """SB3's ``SubprocVecEnv`` waits for ever for an environment whose constructor fails, with ``--vec-env subproc``, too."""
    from rl_zoo3 import exp_manager, utils

    exp_manager.SubprocVecEnv = utils.SubprocVecEnv = WatchedSubprocVecEnv  # type: ignore[attr-defined]  # both import it by name


def _write_what_no_display_shows(script: str) -> None:
    """Without a display, matplotlib's ``show`` does nothing; the pictures go to files then, and their names are printed."""
    from matplotlib import get_backend
    from matplotlib import pyplot as plt
    from matplotlib.backends.registry import BackendFilter, backend_registry

    show = plt.show

    def show_or_write(*args: Any, **kwargs: Any) -> None:
        if get_backend().lower() in map(str.lower, backend_registry.list_builtin(BackendFilter.INTERACTIVE)):
            show(*args, **kwargs)
            return
        for number in plt.get_fignums():
            path = Path(f"{script}_{number}.png")
            plt.figure(number).savefig(path)
            print(f"no display: wrote {path}")

    plt.show = show_or_write


def trust_files() -> None:
    """Models and checkpoints are unpickled as SB3 does; YAML files and statistics are left to the zoo."""
    ScratchPPO.load = partial(ScratchPPO.load, allow_pickle=True)  # type: ignore[method-assign]  # the zoo does not ask
    ScratchPPO.resume = partial(ScratchPPO.resume, allow_pickle=True)  # type: ignore[method-assign]  # likewise


def register_in_children(flags: list[str]) -> None:
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


def _play_with_masks() -> None:
    """These scripts make the environments, load the model, and show it nothing but observations."""
    import rl_zoo3
    from rl_zoo3 import utils

    create, load = utils.create_test_env, ScratchPPO.load
    made: list[VecEnv] = []

    def create_test_env(*args: Any, **kwargs: Any) -> VecEnv:
        made.append(keep_infos(create(*args, **kwargs)))
        return made[-1]

    def load_to_play(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        return WithMasks(model, made[-1]) if takes_masks(type(model.policy)) and model.use_masking else model

    utils.create_test_env = rl_zoo3.create_test_env = create_test_env
    ScratchPPO.load = load_to_play  # type: ignore[method-assign]  # the zoo's scripts call nothing else


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
    hub = importlib.import_module("huggingface_sb3.push_to_hub")  # by name: the package has a function called so, too
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
            text = card.read_text(encoding="utf-8").replace("python -m rl_zoo3.", "scratch-zoo ")
            card.write_text(text.replace("pip install rl_zoo3", INSTALL), encoding="utf-8")
        save(card, data)

    repocard.metadata_save = save_with_our_name
