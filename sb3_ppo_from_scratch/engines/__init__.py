"""Engines, fastest first, and the choice among them."""

from __future__ import annotations

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_from_scratch.engines.base import Engine, PolicyStep, UpdateConfig
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from sb3_ppo_from_scratch.engines.torch_engine import TorchEngine

__all__ = ["ENGINE_NAMES", "Engine", "PolicyStep", "UpdateConfig", "engine_class"]

_ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (NumpyEngine, TorchEngine)}

ENGINE_NAMES = ("auto", *_ENGINES)


def engine_class(name: str, policy: ActorCriticPolicy) -> type[Engine]:
    """
    The engine of that name, or with ``"auto"`` the fastest that supports ``policy``, its optimizer and its device.

    :raises ValueError: for an unknown name, or an engine that cannot serve ``policy`` (the message says why)
    """
    if name not in ENGINE_NAMES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINE_NAMES))}, not {name!r}")
    if name == "auto":
        return next(engine for engine in _ENGINES.values() if engine.unsupported_reason(policy) is None)
    engine = _ENGINES[name]
    reason = engine.unsupported_reason(policy)
    if reason is not None:
        raise ValueError(f"engine={name!r} cannot serve this model: {reason}")
    return engine
