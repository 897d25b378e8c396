"""
sb3-contrib's own tests, with ``MaskablePPO`` and ``RecurrentPPO`` replaced by ``ScratchPPO``: what a drop-in must pass.

    git clone https://github.com/Stable-Baselines-Team/stable-baselines3-contrib CHECKOUT
    python tests/contrib_suite.py CHECKOUT [pytest's arguments]

As ``sb3_suite.py`` does with SB3's, ``--plain`` included. There ``"MlpPolicy"`` is the maskable one, so it is here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import sb3_contrib
from sb3_contrib.ppo_mask import CnnPolicy, MlpPolicy, MultiInputPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

sys.path.insert(0, str(Path(__file__).parent.parent))

from sb3_ppo_from_scratch import ScratchPPO
from tests.sb3_suite import run_suite


class MaskedScratchPPO(ScratchPPO):
    """Names as in ``MaskablePPO``."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy] | str]] = {  # type: ignore[assignment]  # see ScratchPPO's
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }


REPLACED: dict[str, tuple[type[BaseAlgorithm], type[BaseAlgorithm]]] = {
    "MaskablePPO": (sb3_contrib.MaskablePPO, MaskedScratchPPO),
    "RecurrentPPO": (sb3_contrib.RecurrentPPO, ScratchPPO),
}
"""By name, contrib's class and what stands for it."""
DESELECTED: dict[str, str] = {
    "tests/test_invalid_actions.py::test_maskable_policy_required": "expects a refusal; one class takes every policy",
    "tests/test_lstm.py::test_ppo_lstm_performance": "one seed and a threshold: rounding decides; engine='torch' passes",
    "tests/test_invalid_actions.py::test_discrete_action_space_required": "expects SB3's words for it; here they are others",
}
"""Tests that ScratchPPO cannot pass, by the start of their id, and why."""


def replace() -> None:
    """Every name that contrib's tests import the classes by. It must happen before they are imported."""
    for name, (_, ours) in REPLACED.items():
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("sb3_contrib") and hasattr(module, name):
                setattr(module, name, ours)


if __name__ == "__main__":
    sys.exit(run_suite(sys.argv[1:], "|".join(REPLACED), list(REPLACED.values()), replace, DESELECTED))
