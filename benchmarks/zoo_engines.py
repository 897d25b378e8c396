"""
Which entry of the hyperparameter file gets which engine with ``engine="auto"`` on a CPU, and why no faster one.

The table is what this prints::

    python -m benchmarks.zoo_engines

The environments themselves need not be there: engines look at kinds of spaces and not at their sizes.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np
import yaml
from gymnasium import spaces

from benchmarks.markdown import markdown_table
from benchmarks.tasks import HYPERPARAMETERS, Task, load_task
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.engines import Choice, choose_engine
from sb3_ppo_from_scratch.policies import import_policy

__all__ = ["choices", "main", "table"]

_DISCRETE = ("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "LunarLander-v3", "Taxi-v4", "atari", "default")
_IMAGES = {"atari": (4, 84, 84), "CarRacing-v3": (2, 64, 64)}
_MINIGRID = "MiniGrid-"


def _spaces(name: str) -> tuple[spaces.Space, spaces.Space]:
    """Kinds of observations and actions of an entry's environment, under the entry's wrappers."""
    if name in _IMAGES:
        observations: spaces.Space = spaces.Box(0, 255, _IMAGES[name], np.uint8)
    elif name.startswith(_MINIGRID):  # pixels and a text's one-hot letters, flat
        observations = spaces.Box(0, 255, (64,), np.uint8)
    else:
        observations = spaces.Box(-np.inf, np.inf, (8,), np.float32)
    is_discrete = name.replace("NoVel", "") in _DISCRETE or name.startswith(_MINIGRID)
    return observations, spaces.Discrete(4) if is_discrete else spaces.Box(-1, 1, (2,), np.float32)


@cache
def choices() -> dict[str, Choice]:
    """By entry of the hyperparameter file, what ``engine="auto"`` chooses on a CPU."""
    entries = yaml.safe_load(HYPERPARAMETERS.read_text(encoding="utf-8"))
    return {name: _choice(load_task(name), *_spaces(name)) for name in entries}


def _choice(task: Task, observations: spaces.Space, actions: spaces.Space) -> Choice:
    kind = ScratchPPO.policy_aliases[task.policy]
    policy = (import_policy(kind) if isinstance(kind, str) else kind)(
        observations,
        actions,
        lambda progress: 1e-3,
        **({"use_sde": True} if task.arguments.get("use_sde") else {}),
        **{**task.arguments.get("policy_kwargs", {}), "ortho_init": False},  # slow, and no engine's business
    )
    return choose_engine("auto", policy)  # type: ignore[arg-type]  # ScratchPPO's are actor-critics


def table() -> str:
    """In Markdown: entries that get the same engine, for the same reasons, in one row."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, choice in choices().items():
        reasons = "; ".join(f"`{engine}`: {reason}" for engine, reason in choice.refusals.items())
        rows[choice.engine.name, reasons].append(name)
    cells = ((f"`{engine}`", str(len(names)), _short(names), reasons or "-") for (engine, reasons), names in rows.items())
    return markdown_table(("engine", "entries", "which", "why no faster one"), cells)


def _short(names: list[str]) -> str:
    """The names, those of one family as one."""
    others = [name for name in names if not name.startswith(_MINIGRID)]
    n_grids = len(names) - len(others)
    return ", ".join([*others, *([f"{_MINIGRID}... ({n_grids})"] if n_grids else [])])


def main() -> None:
    """Print the table."""
    print(table())


if __name__ == "__main__":
    main()
