"""
The main job: ScratchPPO beside SB3's PPO on CartPole-v1, with rl-zoo3's hyperparameters.

Both learn from the same seed, one after the other, and are evaluated on the same episodes. Prints a table; writes a learning
curve, both models and a record of all figures. ``make cartpole`` runs it; ``python -m benchmarks.cartpole --help`` lists the
options. The figures in the README come from::

    python -m benchmarks.cartpole --engine torch --pairs 5 --no-progress --save-result cartpole_reference
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch as th
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from benchmarks.evaluation import EVALUATION_SEED
from benchmarks.record import RESULTS, ROOT, provenance, write_json
from benchmarks.tasks import HYPERPARAMETERS, Task, load_task
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.engines import ENGINE_NAMES

ENV_ID = "CartPole-v1"
SMOOTHING = 30  # episodes per point of the learning curve

Record = dict[str, Any]


class Episode(NamedTuple):
    """The end of one training episode."""

    steps: int
    """environment steps so far, over all environments"""
    seconds: float
    """since ``learn`` was called"""
    episode_return: float


@dataclass
class Run:
    """One algorithm, trained and evaluated."""

    model: OnPolicyAlgorithm
    seconds: float
    """what ``learn`` took"""
    episodes: list[Episode]
    evaluation: list[float]
    """returns of the evaluation episodes"""


@dataclass
class EpisodeLog(BaseCallback):
    """Notes every episode that ends while training."""

    start: float
    """``time.perf_counter()`` at the call of ``learn``"""
    episodes: list[Episode] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                seconds = time.perf_counter() - self.start
                self.episodes.append(Episode(self.num_timesteps, seconds, float(info["episode"]["r"])))
        return True


def build(algorithm: type[OnPolicyAlgorithm], task: Task, seed: int, engine: str) -> OnPolicyAlgorithm:
    """
    A fresh model with environments of its own.

    :param algorithm: ``ScratchPPO`` or SB3's ``PPO``
    :param task: see :func:`benchmarks.tasks.load_task`
    :param seed: of the model and its environments
    :param engine: ScratchPPO's engine
    """
    extra: dict[str, Any] = {"engine": engine} if algorithm is ScratchPPO else {}
    env = make_vec_env(ENV_ID, n_envs=task.n_envs, seed=seed)
    return algorithm(task.policy, env, seed=seed, device="cpu", **task.arguments, **extra)


def train_and_evaluate(algorithm: type[OnPolicyAlgorithm], task: Task, seed: int, options: argparse.Namespace) -> Run:
    """
    One run. Only ``learn`` is timed: neither the set-up nor the evaluation is.

    :param algorithm: ``ScratchPPO`` or SB3's ``PPO``
    :param task: see :func:`benchmarks.tasks.load_task`
    :param seed: of the model and its environments
    :param options: see :func:`parse_options`
    """
    model = build(algorithm, task, seed, options.engine)
    log = EpisodeLog(start=time.perf_counter())
    model.learn(options.timesteps, callback=log, progress_bar=options.progress)
    seconds = time.perf_counter() - log.start
    env = make_vec_env(ENV_ID, n_envs=task.n_envs, seed=EVALUATION_SEED)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=options.eval_episodes, return_episode_rewards=True)
    assert isinstance(returns, list)  # a mean only without return_episode_rewards
    return Run(model, seconds, log.episodes, [float(value) for value in returns])


def max_parameter_difference(left: OnPolicyAlgorithm, right: OnPolicyAlgorithm) -> float:
    """The largest absolute difference between two models' parameters; 0.0 if they are identical."""
    pairs = zip(left.policy.parameters(), right.policy.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def run_pairs(options: argparse.Namespace) -> list[tuple[Run, Run]]:
    """
    Train ScratchPPO and SB3's PPO in turns, after a short warm-up that takes the cost of first calls.

    :param options: see :func:`parse_options`
    :return: per pair, ScratchPPO's run and SB3's; pair i has the seed ``options.seed + i``
    """
    task = load_task(ENV_ID)
    for algorithm in (ScratchPPO, PPO):
        model = build(algorithm, task, options.seed, options.engine)
        model.learn(2 * task.n_envs * task.arguments["n_steps"])
    pairs = []
    for index in range(options.pairs):
        runs = []
        for algorithm in (ScratchPPO, PPO):
            seed = options.seed + index
            print(f"{_name(algorithm)}: seed {seed}, {options.timesteps:,.0f} steps ({index + 1}/{options.pairs})", flush=True)
            runs.append(train_and_evaluate(algorithm, task, seed, options))
        pairs.append((runs[0], runs[1]))
    return pairs


def _name(algorithm: type[OnPolicyAlgorithm]) -> str:
    return "ScratchPPO" if algorithm is ScratchPPO else "SB3 PPO"


def make_record(pairs: list[tuple[Run, Run]], options: argparse.Namespace) -> Record:
    """
    All figures of :func:`run_pairs` in a form that JSON can hold, with where they come from.

    :param pairs: what :func:`run_pairs` returned
    :param options: see :func:`parse_options`
    """
    rows = [
        {
            "seed": options.seed + index,
            "scratch_seconds": round(scratch.seconds, 3),
            "sb3_seconds": round(sb3.seconds, 3),
            "ratio": round(sb3.seconds / scratch.seconds, 3),
            "max_parameter_difference": max_parameter_difference(scratch.model, sb3.model),
        }
        for index, (scratch, sb3) in enumerate(pairs)
    ]
    ratios = [float(row["ratio"]) for row in rows]
    return {
        **provenance("benchmarks.cartpole"),
        "env": ENV_ID,
        "hyperparameters": HYPERPARAMETERS.relative_to(ROOT).as_posix(),
        "timesteps": options.timesteps,
        "engine": options.engine,
        "seed": options.seed,
        "pairs": rows,
        "ratio": {"median": round(statistics.median(ratios), 3), "min": min(ratios), "max": max(ratios)},
        "max_parameter_difference": max(float(row["max_parameter_difference"]) for row in rows),
        "evaluation": {
            "episodes_per_run": options.eval_episodes,
            "scratch": _mean_and_std([value for scratch, _ in pairs for value in scratch.evaluation]),
            "sb3": _mean_and_std([value for _, sb3 in pairs for value in sb3.evaluation]),
        },
    }


def _mean_and_std(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 2), "std": round(float(np.std(values)), 2)}


def summary(record: Record) -> str:
    """
    The sentence of the README about a record's figures (``tests/test_readme.py`` compares them).

    :param record: from :func:`make_record`
    """
    ratio, evaluation, rows = record["ratio"], record["evaluation"]["scratch"], record["pairs"]
    same = "the same bits" if record["max_parameter_difference"] == 0.0 else "other bits"
    return (
        f"**{ratio['median']:.2f} times as fast as SB3's PPO** (median of {len(rows)} pairs of runs, {ratio['min']:.2f} to "
        f"{ratio['max']:.2f}), with {same}, and a return of {evaluation['mean']:.1f} ± {evaluation['std']:.1f} over "
        f"{len(rows) * record['evaluation']['episodes_per_run']} evaluation episodes"
    )


def table(record: Record) -> str:
    """
    The figures side by side.

    :param record: from :func:`make_record`
    """
    evaluation, rows, ratio = record["evaluation"], record["pairs"], record["ratio"]
    n_pairs, difference = len(rows), record["max_parameter_difference"]
    median = {who: statistics.median(row[f"{who}_seconds"] for row in rows) for who in ("scratch", "sb3")}
    score = {who: f"{evaluation[who]['mean']:.1f} ± {evaluation[who]['std']:.1f}" for who in ("scratch", "sb3")}
    spread = f" (median of {n_pairs}, {ratio['min']:.2f} to {ratio['max']:.2f})" if n_pairs > 1 else ""
    verdict = "identical parameters" if difference == 0.0 else "not identical"
    if difference > 0.0 and record["engine"] != "torch":
        verdict += "; only the engine 'torch' promises that"
    lines = [
        ("", f"ScratchPPO ({record['engine']})", "SB3 PPO"),
        (f"return, {n_pairs * evaluation['episodes_per_run']} episodes", score["scratch"], score["sb3"]),
        ("wall time of training", f"{median['scratch']:.1f} s", f"{median['sb3']:.1f} s"),
    ]
    text = [f"{label:<26}{left:>20}{right:>18}" for label, left, right in lines]
    text.insert(1, "-" * len(text[0]))
    text.append(f"{'speed, SB3 = 1':<26}{ratio['median']:>20.2f}{1:>18.2f}{spread}")
    text.append(f"{'max parameter difference':<26}{difference:>20g}  ({verdict})")
    return "\n".join(text)


def plot_learning_curve(pair: tuple[Run, Run], path: Path) -> None:
    """
    Episode return against environment steps and against wall-clock time.

    :param pair: ScratchPPO's run and SB3's
    :param path: the PNG to write
    """
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    # Okabe and Ito's blue and vermilion; SB3's line is wide, so that ScratchPPO's shows on top where the two coincide
    styles = ((pair[1], "SB3 PPO", "#D55E00", 5.0, 0.55), (pair[0], "ScratchPPO", "#0072B2", 1.8, 1.0))
    for run, label, color, width, alpha in styles:
        steps, seconds, returns = (np.array(column) for column in zip(*run.episodes, strict=True))
        smooth = _running_mean(returns)
        for axis, x in ((axes[0], steps / 1000), (axes[1], seconds)):
            axis.plot(x, returns, ".", color=color, markersize=5, alpha=0.3, markeredgewidth=0)
            axis.plot(x, smooth, color=color, linewidth=width, alpha=alpha, label=label)
    _label(axes[0], "environment steps (thousands)")
    _label(axes[1], "wall-clock time (s)")
    axes[0].set_ylabel(f"return of training episodes\n(points; lines: mean of {SMOOTHING})")
    axes[1].legend(loc="lower right", frameon=True)
    figure.suptitle(f"{ENV_ID}, rl-zoo3's hyperparameters, seed {pair[0].model.seed}", fontsize=13)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _label(axis: Axes, xlabel: str) -> None:
    axis.set_xlabel(xlabel)
    axis.set_xlim(left=0)
    axis.set_ylim(0, 515)
    axis.grid(alpha=0.25)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to ``SMOOTHING - 1`` before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - SMOOTHING, 0)
    return (total[last] - total[first]) / (last - first)


def write_results(pairs: list[tuple[Run, Run]], record: Record, options: argparse.Namespace) -> list[Path]:
    """
    Write the first pair's learning curve and models, and the record of all pairs.

    :param pairs: what :func:`run_pairs` returned
    :param record: from :func:`make_record`
    :param options: see :func:`parse_options`
    :return: the files written
    """
    options.out.mkdir(parents=True, exist_ok=True)
    curve, figures = options.out / "learning_curve.png", options.out / "record.json"
    models = options.out / "scratch_ppo.zip", options.out / "sb3_ppo.zip"
    plot_learning_curve(pairs[0], curve)
    write_json(figures, record)
    for path, run in zip(models, pairs[0], strict=True):
        run.model.save(path)
    written = [curve, figures, *models]
    if options.save_result is not None:
        for source in (curve, figures):
            target = RESULTS / f"{options.save_result}{source.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copyfile(source, target)))
    return written


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cartpole", description="ScratchPPO beside SB3's PPO on CartPole-v1"
    )
    parser.add_argument(
        "--timesteps", type=float, default=load_task(ENV_ID).n_timesteps, help="environment steps (%(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first pair; the next ones count on (%(default)s)")
    parser.add_argument("--engine", choices=ENGINE_NAMES, default="torch", help="ScratchPPO's engine (%(default)s)")
    parser.add_argument("--pairs", type=int, default=1, help="how often to train both, in turns (%(default)s)")
    parser.add_argument("--eval-episodes", type=int, default=100, help="per trained model (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/cartpole"), help="folder for what is written (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, for both (%(default)s)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    parser.add_argument("--save-result", metavar="NAME", help="write record and curve to benchmarks/results/NAME.* as well")
    options = parser.parse_args(arguments)
    for name in ("timesteps", "pairs", "eval_episodes", "threads"):
        if not getattr(options, name) >= 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    return options


def main() -> None:
    """Run the benchmark of the command line."""
    options = parse_options()
    th.set_num_threads(options.threads)
    pairs = run_pairs(options)
    record = make_record(pairs, options)
    print(f"\n{table(record)}\n")
    for path in write_results(pairs, record, options):
        print(f"wrote {path}")
    if options.save_result is not None:
        print(f"\nfor the README: {summary(record)}")


if __name__ == "__main__":
    main()
