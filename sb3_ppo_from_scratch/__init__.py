"""ScratchPPO: Proximal Policy Optimization written from scratch, a drop-in for Stable-Baselines3's PPO."""

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer
from sb3_ppo_from_scratch.checkpoint import ResumableCheckpoint, has_checkpoint
from sb3_ppo_from_scratch.errors import NonFiniteError, RankFailedError, UnsafeFileError
from sb3_ppo_from_scratch.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SharedMlpPolicy
from sb3_ppo_from_scratch.ppo import ScratchPPO
from sb3_ppo_from_scratch.safe_files.models import load_vec_normalize
from sb3_ppo_from_scratch.vec_env.failures import EnvFailedError

__version__ = "1.0.0rc1"

__all__ = [
    "CnnPolicy",
    "EnvFailedError",
    "MlpPolicy",
    "MultiInputPolicy",
    "NonFiniteError",
    "RankFailedError",
    "ResumableCheckpoint",
    "ScratchPPO",
    "ScratchRolloutBuffer",
    "SharedMlpPolicy",
    "UnsafeFileError",
    "__version__",
    "has_checkpoint",
    "load_vec_normalize",
]
