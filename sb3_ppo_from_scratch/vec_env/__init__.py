"""
Native vector environments as SB3's ``VecEnv``: any ``gymnasium.vector.VectorEnv``, ALE's and EnvPool's. Environments that
fail, or write over what they have shown, made harmless. SB3's ``DummyVecEnv`` and ``VecNormalize`` with leaner steps, and two
halves that are stepped in turn.
"""

from sb3_ppo_from_scratch.vec_env.atari import ATARI_BACKENDS, NativeAtariEnv, make_native_atari_env
from sb3_ppo_from_scratch.vec_env.failures import WatchedSubprocVecEnv
from sb3_ppo_from_scratch.vec_env.halves import TwoHalves
from sb3_ppo_from_scratch.vec_env.lean import LeanDummyVecEnv, LeanVecNormalize, make_lean
from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv
from sb3_ppo_from_scratch.vec_env.wrappers import mask_reset_rows, with_reset_rows

__all__ = [
    "ATARI_BACKENDS",
    "LeanDummyVecEnv",
    "LeanVecNormalize",
    "NativeAtariEnv",
    "NativeVecEnv",
    "TwoHalves",
    "WatchedSubprocVecEnv",
    "make_lean",
    "make_native_atari_env",
    "mask_reset_rows",
    "with_reset_rows",
]
