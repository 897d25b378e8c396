"""
Native vector environments as SB3's ``VecEnv``: any ``gymnasium.vector.VectorEnv``, ALE's and EnvPool's. And environments that
fail, or write over what they have shown, made harmless.
"""

from sb3_ppo_from_scratch.vec_env.atari import ATARI_BACKENDS, NativeAtariEnv, make_native_atari_env
from sb3_ppo_from_scratch.vec_env.failures import WatchedSubprocVecEnv
from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv
from sb3_ppo_from_scratch.vec_env.wrappers import mask_reset_rows, with_reset_rows

__all__ = [
    "ATARI_BACKENDS",
    "NativeAtariEnv",
    "NativeVecEnv",
    "WatchedSubprocVecEnv",
    "make_native_atari_env",
    "mask_reset_rows",
    "with_reset_rows",
]
