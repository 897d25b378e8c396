"""
rl-zoo3 with ``--algo scratch_ppo``: ``scratch-zoo SCRIPT ...``, or ``python -m sb3_ppo_from_scratch.zoo SCRIPT ...``.

The scripts, their parsers and all they do are the zoo's own. The zoo has no plugin mechanism: ``registration`` adds ScratchPPO
to its tables, ``manager`` is ``train``'s, ``mends`` serves scripts that would lose sight of an algorithm that is not built in,
and ``safe_yaml`` reads the files of a run. Importing this package imports nothing of rl-zoo3; ``command_line`` does.
"""

from __future__ import annotations

from sb3_ppo_from_scratch.zoo.command_line import SCRIPTS, main
from sb3_ppo_from_scratch.zoo.registration import ALGO, hyperparams_file, register, sample_params

__all__ = ["ALGO", "SCRIPTS", "hyperparams_file", "main", "register", "sample_params"]
