"""
The side-by-side comparison with SB3's PPO, in the order in which it happens.

:mod:`~benchmarks.comparison.protocol` says what is compared, and was fixed before the runs;
:mod:`~benchmarks.comparison.one_run` trains one agent; :mod:`~benchmarks.comparison.records` keeps what came out;
:mod:`~benchmarks.comparison.inference`, :mod:`~benchmarks.comparison.tables` and :mod:`~benchmarks.comparison.figures` say
what it means.
The two commands are :mod:`benchmarks.compare` and :mod:`benchmarks.report`.
"""
