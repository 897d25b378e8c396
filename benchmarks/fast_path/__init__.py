"""
Is the fast path equal? The three things that differ from SB3's PPO on Atari, each by itself: data, reset rows, products.

- :mod:`~benchmarks.fast_path.data`: one agent plays as many games through SB3's wrappers and through the native environments
- :mod:`~benchmarks.fast_path.reset_rows`: what share of the steps only begins a life, and whether that could be spared
- :mod:`~benchmarks.fast_path.products`: the same updates on the same minibatches with each engine
- :mod:`~benchmarks.fast_path.report`: what came of it

The committed records are of an agent of the run of :mod:`benchmarks.breakout`::

    python -m benchmarks.fast_path data --agent runs/breakout/model.zip
    python -m benchmarks.fast_path reset-rows --agent runs/breakout/model.zip --run runs/breakout/record.json
    python -m benchmarks.fast_path products --agent runs/breakout/model.zip
    python -m benchmarks.fast_path report

Whether agents learn the same is :mod:`benchmarks.compare`'s question, on the entry ``Catch``.
"""
