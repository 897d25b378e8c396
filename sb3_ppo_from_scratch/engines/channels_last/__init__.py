"""The engine of ``CnnPolicy`` on a CPU."""

from __future__ import annotations

from sb3_ppo_from_scratch.engines.channels_last.engine import ChannelsLastEngine, has_bf16_instructions

__all__ = ["ChannelsLastEngine", "has_bf16_instructions"]
