"""
Benchmarks, each a module to run from the repository's root: ``python -m benchmarks.cartpole --help``.

OpenBLAS chooses its kernels itself, for everybody and as it does for a user, whatever it is told on the machine that measures:
a variable of the shell takes AVX-512 from NumPy but not from torch. OpenBLAS reads it when NumPy is imported, which is later.
"""

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)
