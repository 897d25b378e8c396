"""The engine of policies with an LSTM on a CPU."""

from __future__ import annotations

from sb3_ppo_from_scratch.engines.lstm.engine import LstmEngine

__all__ = ["LstmEngine"]
