"""Adam in one pass, for the engines that leave the step to torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

__all__ = ["fused_adam"]


@contextmanager
def fused_adam(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """
    Within it, Adam's steps are torch's fused ones: one pass over parameters, gradients and moments instead of a dozen.

    Their rounding differs from the default's.

    :param optimizer: of a policy that :func:`~sb3_ppo_from_scratch.engines.inspection.adam_reason` has nothing against
    """
    (group,) = optimizer.param_groups
    before = {key: group[key] for key in ("fused", "foreach")}
    group.update(fused=True, foreach=False)
    try:
        yield
    finally:
        group.update(before)
