"""
What the exact KL costs: updates with and without the behaviour policy's distribution in the data set, alternated.

    python -m benchmarks.kl_cost --out benchmarks/results/kl_cost.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.record import provenance, write_json
from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "CartPole-v1, the zoo's sizes": ("CartPole-v1", {"n_steps": 32, "batch_size": 256, "n_epochs": 20}),
    "CartPole-v1, one epoch": ("CartPole-v1", {"n_steps": 256, "batch_size": 256, "n_epochs": 1}),
    "Pendulum-v1, the default sizes": ("Pendulum-v1", {"n_steps": 256, "batch_size": 64, "n_epochs": 10}),
}


def measure(env_id: str, sizes: dict[str, int], pairs: int) -> dict[str, float]:
    """
    :param env_id: registered environment, eight copies of it
    :param sizes: of the rollout and the minibatch
    :param pairs: updates timed with, and as many without
    :return: median, minimum and maximum of the ratio of the two times
    """
    model = ScratchPPO("MlpPolicy", make_vec_env(env_id, 8, seed=0), seed=0, device="cpu", engine="torch", **sizes)  # type: ignore[arg-type]
    model.learn(2 * sizes["n_steps"] * 8)
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    kept, ratios = buffer.dist_params, []
    for _ in range(pairs):
        seconds = []
        for dist_params in (kept, None):
            buffer.dist_params = dist_params
            start = time.perf_counter()
            model.train()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main() -> None:
    """Measure every case, print it, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=41, help="pairs of updates per case")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    th.set_num_threads(1)
    ratios = {}
    for name, (env_id, sizes) in CASES.items():
        ratios[name] = measure(env_id, sizes, args.pairs)
        print(f"{name}: with / without = {ratios[name]['median']:.3f} ({ratios[name]['min']:.3f}-{ratios[name]['max']:.3f})")
    if args.out:
        write_json(args.out, {**provenance("benchmarks.kl_cost"), "pairs": args.pairs, "seed": 0, "update_time_ratio": ratios})
        print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
