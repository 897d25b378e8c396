"""
The engine of one GPU: policy step and minibatch step as plain functions over static tensors, held by CUDA graphs.

- :mod:`~sb3_ppo_from_scratch.engines.cudagraph.support`: which policies it can serve, and why not others
- :mod:`~sb3_ppo_from_scratch.engines.cudagraph.acting`: the policy step
- :mod:`~sb3_ppo_from_scratch.engines.cudagraph.learning`: the minibatch step
- :mod:`~sb3_ppo_from_scratch.engines.cudagraph.engine`: the engine, which puts them together

Advantages are the third such function, in :mod:`~sb3_ppo_from_scratch.engines.cudagraph.device_buffer`. All of them run on a
CPU as well, called instead of replayed; that is how they are tested.
"""

from __future__ import annotations

from sb3_ppo_from_scratch.engines.cudagraph.engine import CudaGraphEngine

__all__ = ["CudaGraphEngine"]
