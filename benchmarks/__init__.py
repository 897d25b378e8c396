"""
Benchmarks, each a module to run from the repository's root: ``python -m benchmarks.cartpole --help``.

OpenBLAS chooses its kernels itself, for everybody and as it does for a user, whatever it is told on the machine that measures:
a variable of the shell takes AVX-512 from NumPy but not from torch. OpenBLAS reads it when NumPy is imported, which is later.

``BENCHMARK_AVX2=1 python -m benchmarks.throughput`` takes AVX-512 from everybody: from torch, its oneDNN and MKL, NumPy, its
OpenBLAS, and the engine ``compiled``.
"""

import os

for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

AVX2_ONLY = "BENCHMARK_AVX2"
"""Environment variable: 1 for measuring as on a CPU without AVX-512"""

if os.environ.get(AVX2_ONLY) == "1":
    os.environ |= {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "SCRATCH_PPO_KERNEL": "avx2",
    }
