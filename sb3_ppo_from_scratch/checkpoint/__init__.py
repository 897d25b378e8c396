"""
Exact resume: checkpoints from which a training run goes on with the same bits.

``callback`` decides when to take and write one, and ``ownership`` who may; ``run_state`` knows what a run depends on;
``env_state``, ``vec_env_state``, ``callback_state`` and ``log_state`` read and put back what lives outside the model,
``own_objects`` what it holds of the user's classes, and ``replay`` tries out whether that is all; ``plain_data`` makes bytes
of it all, and ``files`` keeps them whole.
"""

from sb3_ppo_from_scratch.checkpoint.callback import ResumableCheckpoint, guarded_training, has_checkpoint
from sb3_ppo_from_scratch.checkpoint.callback_state import all_callbacks
from sb3_ppo_from_scratch.checkpoint.run_state import Resumed, load_run

__all__ = ["ResumableCheckpoint", "Resumed", "all_callbacks", "guarded_training", "has_checkpoint", "load_run"]
