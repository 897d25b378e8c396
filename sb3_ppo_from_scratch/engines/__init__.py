"""Engines, fastest first, and the choice among them."""

from __future__ import annotations

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_from_scratch.engines.base import Engine, PolicyStep
from sb3_ppo_from_scratch.engines.channels_last.engine import ChannelsLastEngine, has_bf16_instructions
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.update import UpdateConfig

__all__ = [
    "ENGINE_NAMES",
    "PRECISIONS",
    "Engine",
    "PolicyStep",
    "UpdateConfig",
    "engine_class",
    "has_bf16_instructions",
    "make_engine",
]

_ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (NumpyEngine, ChannelsLastEngine, CudaGraphEngine, TorchEngine)
}

_FOR_AUTO = {name: engine for name, engine in _ENGINES.items() if engine is not CudaGraphEngine}
"""``"auto"`` chooses among these: what has never run on a GPU is for those who ask for it by name."""

ENGINE_NAMES = ("auto", *_ENGINES)
PRECISIONS = ("fp32", "bf16")


def engine_class(name: str, policy: ActorCriticPolicy, precision: str = "fp32") -> type[Engine]:
    """
    The engine of that name, or with ``"auto"`` the fastest that supports ``policy`` with its optimizer, and ``precision``.

    :raises ValueError: for an unknown name, or if no such engine can serve ``policy`` (the message says why)
    """
    if name not in ENGINE_NAMES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINE_NAMES))}, not {name!r}")
    candidates = _FOR_AUTO if name == "auto" else {name: _ENGINES[name]}
    reasons = []
    for each, engine in candidates.items():
        reason = engine.precision_reason(policy, precision) or engine.unsupported_reason(policy)
        if reason is None:
            return engine
        reasons.append(f"{each}: {reason}")
    raise ValueError(f"engine={name!r} with precision={precision!r} cannot serve this model ({'; '.join(reasons)})")


def make_engine(name: str, policy: ActorCriticPolicy, precision: str = "fp32") -> Engine:
    """
    An engine of :func:`engine_class` for ``policy``.

    :raises ValueError: as there
    """
    return engine_class(name, policy, precision)(policy, precision)
