"""Native vector environments as SB3's ``VecEnv``: any ``gymnasium.vector.VectorEnv``, ALE's and EnvPool's."""

from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv
from sb3_ppo_from_scratch.vec_env.wrappers import mind_reset_rows, with_reset_rows

__all__ = ["NativeVecEnv", "mind_reset_rows", "with_reset_rows"]
