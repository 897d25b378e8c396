"""Engines, fastest first, and the choice among them."""

from __future__ import annotations

from typing import NamedTuple

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_from_scratch.engines.base import Engine, PolicyStep
from sb3_ppo_from_scratch.engines.channels_last import ChannelsLastEngine, has_bf16_instructions
from sb3_ppo_from_scratch.engines.compiled import CompiledEngine
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine
from sb3_ppo_from_scratch.engines.lstm import LstmEngine
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from sb3_ppo_from_scratch.engines.reference import TorchEngine
from sb3_ppo_from_scratch.update import Loss, minibatch_loss

__all__ = [
    "ENGINE_NAMES",
    "PRECISIONS",
    "Choice",
    "Engine",
    "PolicyStep",
    "choose_engine",
    "has_bf16_instructions",
]

_ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (CompiledEngine, NumpyEngine, ChannelsLastEngine, LstmEngine, CudaGraphEngine, TorchEngine)
}

_FOR_AUTO = {name: engine for name, engine in _ENGINES.items() if engine is not CudaGraphEngine}
"""``"auto"`` chooses among these: what has never run on a GPU is for those who ask for it by name."""

ENGINE_NAMES = ("auto", *_ENGINES)
PRECISIONS = ("fp32", "tf32", "bf16")


class Choice(NamedTuple):
    """An engine, and why no faster one."""

    engine: type[Engine]
    refusals: dict[str, str]
    """by engine, the reasons of those that come before it"""

    def __str__(self) -> str:
        return self.engine.name + (f" ({_told(self.refusals)})" if self.refusals else "")


def choose_engine(
    name: str,
    policy: ActorCriticPolicy,
    precision: str = "fp32",
    loss: Loss = minibatch_loss,
    is_shared: bool = False,
) -> Choice:
    """
    The engine of that name, or with ``"auto"`` the fastest that can do what is asked for.

    :param name: one of :data:`ENGINE_NAMES`
    :param policy: with its optimizer
    :param precision: one of :data:`PRECISIONS`
    :param loss: of a minibatch
    :param is_shared: whether several processes share each minibatch
    :raises ValueError: for an unknown name or precision, or if no such engine can do it (the message says why)
    """
    if name not in ENGINE_NAMES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINE_NAMES))}, not {name!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, not {precision!r}")
    refusals: dict[str, str] = {}
    for each, engine in (_FOR_AUTO if name == "auto" else {name: _ENGINES[name]}).items():
        reason = engine.refusal(policy, precision, loss)
        if is_shared and not engine.shares_minibatches:
            reason = "it cannot share its minibatches with other processes (data_parallel=True)"
        if reason is None:
            return Choice(engine, refusals)
        refusals[each] = reason
    raise ValueError(f"engine={name!r} with precision={precision!r} cannot serve this model ({_told(refusals)})")


def _told(refusals: dict[str, str]) -> str:
    """Engines that have the same reason say it together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in refusals.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
