"""The reference engine: any SB3 policy on any device, and on CPU the same bits as SB3's PPO."""

from __future__ import annotations

from sb3_ppo_from_scratch.engines.reference.engine import HeadsEngine, TorchEngine

__all__ = ["HeadsEngine", "TorchEngine"]
