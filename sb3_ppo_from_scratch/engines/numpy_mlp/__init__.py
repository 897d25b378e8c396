"""
The fast engine for small networks on a CPU, one file per idea.

:mod:`.engine` is the loop; :mod:`.network` the layers, with their :mod:`.activations`; :mod:`.heads` the action distributions;
:mod:`.loss` PPO's objective; :mod:`.flat` parameters and Adam as single vectors; :mod:`.threads` keeps BLAS on one thread.

Half of a minibatch of 256 through two towers of 64 x 64 is matrix products. Tried and left: the towers on two threads (handing
over takes what it saves), torch's fused Adam (calling it takes as long as the passes here), chunks that fit the first cache
(more calls, no less time), oneDNN's products through torch (calling them takes what they save). Not tried: compilers
such as Numba, whose import and first call every run would wait for.
"""

from sb3_ppo_from_scratch.engines.numpy_mlp.engine import NumpyEngine

__all__ = ["NumpyEngine"]
