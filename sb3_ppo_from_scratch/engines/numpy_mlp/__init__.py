"""
The fast engine for small networks on a CPU, one file per idea.

:mod:`.engine` is the loop; :mod:`.network` the layers, with their :mod:`.activations`; :mod:`.heads` the action distributions;
:mod:`.loss` PPO's objective; :mod:`.flat` parameters and Adam as single vectors; :mod:`.threads` keeps BLAS on one thread.
"""

from sb3_ppo_from_scratch.engines.numpy_mlp.engine import NumpyEngine

__all__ = ["NumpyEngine"]
