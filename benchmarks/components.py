"""
What each part of an iteration costs: acting, storing, advantages, drawing minibatches, a minibatch's step, the optimizer.

ScratchPPO's engines beside SB3's PPO, all in one process and in turns, on real rollouts of a case of
:mod:`benchmarks.cases`. ``make components`` runs it; ``python -m benchmarks.components --help`` lists the options. What the
exact KL costs, by updates with and without the behaviour policy's distribution in the data set::

    python -m benchmarks.components --only kl --rounds 41 --out benchmarks/results/kl_cost.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from benchmarks.cases import CASES, Case, Contestant, build, missing, scaled
from benchmarks.markdown import markdown_table
from benchmarks.options import command_line
from benchmarks.record import provenance, write_json
from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.engines.adam import fused_adam

Timings = dict[str, dict[str, float]]
"""Per part, per contestant: microseconds."""


def models(case: Case, threads: int) -> dict[str, OnPolicyAlgorithm]:
    """
    SB3's PPO and one model per engine that is installed, each after one rollout and one update.

    :param case: what they train
    :param threads: as the contestants have them
    """
    everybody = [Contestant("sb3", "dummy", threads)]
    everybody += [Contestant(engine, "dummy", threads, precision) for engine, precision in case.engines if engine != "sbx"]
    made = {each.title: build(case, each, seed=0) for each in everybody if missing(each) is None}
    for model in made.values():
        model.learn(scaled(case, 1e-9).timesteps)
    return made


def parts(model: OnPolicyAlgorithm) -> dict[str, tuple[Callable[[], object], int]]:
    """
    What is timed.

    :param model: after a rollout
    :return: per part, the call and how many units of work it does
    """
    buffer, policy = model.rollout_buffer, model.policy
    obs = obs_as_tensor(model._last_obs, model.device)  # type: ignore[arg-type]  # set since the rollout
    with th.no_grad():
        actions, values, log_probs = policy(obs)
    step = (model._last_obs, actions.numpy(), np.zeros(model.n_envs), np.zeros(model.n_envs), values, log_probs)
    batch_size: int = model.batch_size  # type: ignore[attr-defined]  # any PPO's
    n_minibatches = -(-model.n_steps * model.n_envs // batch_size)

    def act() -> None:
        if isinstance(model, ScratchPPO):
            model._current_engine().act(obs)
        else:
            with th.no_grad():
                policy(obs)

    storage = _another(buffer)

    def add() -> None:
        storage.reset()
        for _ in range(model.n_steps):
            storage.add(*step)  # type: ignore[arg-type]  # the types of SB3's own call

    def draw() -> None:
        for _ in buffer.get(batch_size):
            pass

    last, dones = values.flatten(), np.zeros(model.n_envs)
    return {
        "act": (act, 1),
        "buffer: add a step": (add, model.n_steps),
        "GAE": (lambda: storage.compute_returns_and_advantage(last, dones), 1),
        "buffer: draw a minibatch": (draw, n_minibatches),
        "minibatch step, optimizer included": (model.train, n_minibatches * model.n_epochs),  # type: ignore[attr-defined]
    }


def _another(buffer: RolloutBuffer) -> RolloutBuffer:
    """An empty buffer like ``buffer``, for adding to."""
    spaces = buffer.observation_space, buffer.action_space
    kwargs: dict[str, Any] = {"gamma": buffer.gamma, "gae_lambda": buffer.gae_lambda, "n_envs": buffer.n_envs}
    return type(buffer)(buffer.buffer_size, *spaces, device="cpu", **kwargs)


def optimizers(policy: ActorCriticPolicy, n_steps: int) -> dict[str, Callable[[], object]]:
    """
    One update's steps of the optimizer, the gradient's clipping included, on random gradients.

    :param policy: with Adam, as SB3 makes it; its parameters change
    :param n_steps: per call
    """
    parameters = list(policy.parameters())
    for parameter in parameters:
        parameter.grad = th.randn_like(parameter)

    def steps() -> None:
        for _ in range(n_steps):
            th.nn.utils.clip_grad_norm_(parameters, 0.5)
            policy.optimizer.step()

    def fused() -> None:
        with fused_adam(policy.optimizer):
            steps()

    return {"SB3 PPO": steps, "channels_last": fused}


def measure(case: Case, threads: int, rounds: int) -> Timings:
    """
    :param case: what is trained
    :param threads: torch's
    :param rounds: calls of each part by everybody, in turns; their median counts
    """
    th.set_num_threads(threads)
    everybody = models(case, threads)
    calls: dict[str, dict[str, tuple[Callable[[], object], int]]] = {}
    for who, model in everybody.items():
        for part, call in parts(model).items():
            calls.setdefault(part, {})[who] = call
    timings = {part: _in_turns(by_whom, rounds) for part, by_whom in calls.items()}
    n_steps = case.task().n_envs * case.task().arguments["n_steps"] // case.task().arguments["batch_size"]
    steps = optimizers(everybody["SB3 PPO"].policy, n_steps)
    timings["optimizer step"] = _in_turns({who: (call, n_steps) for who, call in steps.items()}, rounds)
    for model in everybody.values():
        model.get_env().close()  # type: ignore[union-attr]  # it has one
    return timings


def _in_turns(calls: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, float]:
    microseconds: dict[str, list[float]] = {who: [] for who in calls}
    for index in range(rounds + 1):
        for who, (call, units) in calls.items():
            start = time.perf_counter()
            call()
            if index > 0:  # the first round warms up
                microseconds[who].append(1e6 * (time.perf_counter() - start) / units)
    return {who: statistics.median(values) for who, values in microseconds.items()}


def table(title: str, timings: Timings) -> str:
    """
    The timings as a table in Markdown.

    :param title: of the case
    :param timings: from :func:`measure`
    """
    rows = [
        (part, who, f"{value:,.1f}", f"{by_whom['SB3 PPO'] / value:.2f}")
        for part, by_whom in timings.items()
        for who, value in by_whom.items()
    ]
    return f"**{title}**\n\n{markdown_table(('part', 'by', 'µs', 'times SB3'), rows)}"


KL_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "CartPole-v1, the zoo's sizes": ("CartPole-v1", {"n_steps": 32, "batch_size": 256, "n_epochs": 20}),
    "CartPole-v1, one epoch": ("CartPole-v1", {"n_steps": 256, "batch_size": 256, "n_epochs": 1}),
    "Pendulum-v1, the default sizes": ("Pendulum-v1", {"n_steps": 256, "batch_size": 64, "n_epochs": 10}),
}
"""Environments and sizes of rollouts and minibatches for :func:`kl_cost`."""


def kl_cost(env_id: str, sizes: dict[str, int], rounds: int) -> dict[str, float]:
    """
    :param env_id: registered environment, eight copies of it
    :param sizes: of the rollout and the minibatch
    :param rounds: updates timed with the KL, and as many without
    :return: median, minimum and maximum of the ratio of the two times
    """
    th.set_num_threads(1)
    model = ScratchPPO("MlpPolicy", make_vec_env(env_id, 8, seed=0), seed=0, device="cpu", engine="torch", **sizes)  # type: ignore[arg-type]
    model.learn(2 * sizes["n_steps"] * 8)
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    kept, ratios = buffer.dist_params, []
    for _ in range(rounds):
        seconds = []
        for dist_params in (kept, None):
            buffer.dist_params = dist_params
            start = time.perf_counter()
            model.train()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def kl_table(ratios: dict[str, dict[str, float]]) -> str:
    """As a table in Markdown."""
    rows = [(name, f"{each['median']:.3f} ({each['min']:.3f} to {each['max']:.3f})") for name, each in ratios.items()]
    return f"**The exact KL**\n\n{markdown_table(('update', 'time with it, without it = 1'), rows)}"


def main() -> None:
    """Measure what the command line asks for, print it, and save it if asked to."""
    shared: dict[str, Any] = {"rounds": 9, "threads": 2, "out": None}
    parser = command_line("benchmarks.components", "what each part of PPO costs", **shared)
    parser.add_argument("--only", action="append", choices=[*CASES, "kl"], help="this case (may be given several times)")
    options = parser.parse_args()
    wanted, record = options.only or [*CASES, "kl"], {**provenance("benchmarks.components"), "rounds": options.rounds}
    for name in [name for name in CASES if name in wanted]:
        case = CASES[name]
        timings = measure(case, options.threads if case.parallel else 1, options.rounds)
        record.setdefault("microseconds", {})[name] = timings
        print(f"{table(case.title, timings)}\n", flush=True)
    if "kl" in wanted:
        record["update_time_ratio"] = {name: kl_cost(*case, options.rounds) for name, case in KL_SIZES.items()}
        print(f"{kl_table(record['update_time_ratio'])}\n", flush=True)
    if options.out is not None:
        write_json(options.out, record)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
