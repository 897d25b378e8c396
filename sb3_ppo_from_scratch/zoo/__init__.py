"""rl-zoo3 with ``--algo scratch_ppo``; see :mod:`sb3_ppo_from_scratch.zoo.command_line`."""

from __future__ import annotations

from sb3_ppo_from_scratch.zoo.command_line import ALGO, SCRIPTS, hyperparams_file, main, register, sample_params

__all__ = ["ALGO", "SCRIPTS", "hyperparams_file", "main", "register", "sample_params"]
