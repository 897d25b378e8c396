"""
The fastest engine for small networks on a CPU: an update's epochs in C, on the memory that the NumPy engine lays out.

- ``kernel/``: the C code. ``epoch.h`` is the update; below it lie ``heads.h``, ``products.h`` and ``vectors.h``
- :mod:`~sb3_ppo_from_scratch.engines.compiled.library`: finds the library, checks it, calls it
- :mod:`~sb3_ppo_from_scratch.engines.compiled.learning`: an update, of which the loop reads what was measured
- :mod:`~sb3_ppo_from_scratch.engines.compiled.engine`: describes a policy to the library

``pip install`` builds the library if there is a C compiler; without one the NumPy engine serves. It has code for AVX-512, for
AVX2 with FMA, and for everything else, and chooses when it is loaded. ``SCRATCH_PPO_KERNEL=avx512``, ``avx2`` or ``generic``
in the environment chooses another, ``none`` switches it off.
"""

from sb3_ppo_from_scratch.engines.compiled.engine import CompiledEngine

__all__ = ["CompiledEngine"]
