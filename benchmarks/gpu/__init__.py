"""
The engine of CUDA graphs on one GPU: ``python -m benchmarks.gpu`` checks and measures it.

:mod:`~benchmarks.gpu.checks` asks whether it is right, on what :mod:`~benchmarks.gpu.material` makes;
:mod:`~benchmarks.gpu.measure` times it; :mod:`~benchmarks.gpu.profile` says what the GPU was doing.
"""
