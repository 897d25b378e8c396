"""
Does the NumPy engine learn as the reference engine does? Ten seeds of each on CartPole-v1 and Pendulum-v1.

The hyperparameters are rl-zoo3's; Pendulum's without gSDE, which the NumPy engine does not compute. The two engines draw the
same random numbers but round differently, so runs of one seed part after a while and only their statistics agree::

    python -m benchmarks.engines_learn --out benchmarks/results/engines_learn.json
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch as th
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.cartpole import EVALUATION_SEED
from benchmarks.record import provenance, write_json
from benchmarks.tasks import load_task
from sb3_ppo_from_scratch import ScratchPPO

ENGINES = ("numpy", "torch")
MARGINS = {"CartPole-v1": 25.0, "Pendulum-v1": 50.0}
"""Differences of mean return that do not matter, set beforehand: 5% of CartPole's 500, and of the 1000 between a random and a
trained agent on Pendulum."""


def final_return(env_id: str, engine: str, seed: int, episodes: int) -> float:
    """
    Train one agent and evaluate it.

    :param env_id: a key of :data:`MARGINS`
    :param engine: ScratchPPO's
    :param seed: of the model and its environments
    :param episodes: to evaluate it on, the same ones for every agent
    :return: mean return
    """
    th.set_num_threads(1)
    task = load_task(env_id)
    arguments = {key: value for key, value in task.arguments.items() if "sde" not in key}
    env = make_vec_env(env_id, n_envs=task.n_envs, seed=seed)
    model = ScratchPPO(task.policy, env, seed=seed, device="cpu", engine=engine, **arguments).learn(task.n_timesteps)
    mean, _ = evaluate_policy(model, make_vec_env(env_id, n_envs=8, seed=EVALUATION_SEED), n_eval_episodes=episodes)
    assert isinstance(mean, float)  # a list only if asked for
    return mean


def compare(returns: dict[str, list[float]], margin: float) -> dict[str, Any]:
    """
    Welch's 95% confidence interval of the difference of the means, against the margin.

    :param returns: one number per seed and engine
    :param margin: the difference that does not matter
    :return: what the record holds about an environment
    """
    numpy, torch = (returns[engine] for engine in ENGINES)
    difference = statistics.mean(numpy) - statistics.mean(torch)
    if statistics.pstdev(numpy) == statistics.pstdev(torch) == 0:  # nothing to estimate a variance from
        low = high = difference
    else:
        low, high = stats.ttest_ind(numpy, torch, equal_var=False).confidence_interval(0.95)
    return {
        "returns": returns,
        "mean": {engine: statistics.mean(returns[engine]) for engine in ENGINES},
        "difference": difference,
        "confidence_interval_95": [low, high],
        "margin": margin,
        "within_margin": bool(-margin < low and high < margin),
    }


def main() -> None:
    """Train all agents, print the comparison, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="agents per engine and environment (%(default)s)")
    parser.add_argument("--episodes", type=int, default=100, help="evaluation episodes per agent (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="agents trained at a time (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    runs = list(product(MARGINS, range(args.seeds), ENGINES))
    returns: dict[str, dict[str, list[float]]] = {env_id: {engine: [] for engine in ENGINES} for env_id in MARGINS}
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(final_return, env_id, engine, seed, args.episodes) for env_id, seed, engine in runs]
        for (env_id, seed, engine), future in zip(runs, futures, strict=True):
            returns[env_id][engine].append(future.result())
            print(f"{env_id} seed {seed} {engine}: {future.result():.1f}", flush=True)
    environments = {env_id: compare(returns[env_id], margin) for env_id, margin in MARGINS.items()}
    for env_id, result in environments.items():
        low, high = result["confidence_interval_95"]
        print(
            f"{env_id}: numpy - torch = {result['difference']:.1f}, 95% CI [{low:.1f}, {high:.1f}], margin {result['margin']}"
        )
    if args.out:
        write_json(
            args.out,
            {**provenance("benchmarks.engines_learn"), "evaluation_episodes": args.episodes, "environments": environments},
        )
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
