"""What no implementation can do without: the environments' own steps, and the bare matrix products of the networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from benchmarks.cases import Case, Contestant, make_env
from benchmarks.tasks import Task

__all__ = ["Product", "environment_seconds", "forward_products", "product_seconds"]

_REPEATS = 31  # of each product; their median is what one takes


class Product(NamedTuple):
    """A matrix product ``[rows, inner] @ [inner, columns]``: one layer, one pass forwards."""

    rows: int
    inner: int
    columns: int
    is_first: bool
    """whether its input is the observation, which needs no gradient"""


def environment_seconds(case: Case, contestant: Contestant, seed: int = 0) -> float:
    """
    What the environments alone take for the case's steps, with random actions.

    :param case: for its steps
    :param contestant: for its kind of environments
    :param seed: of the environments
    """
    env: Any = make_env(case, contestant, seed)
    n_envs = case.task().n_envs
    n_steps = case.timesteps // n_envs
    space = env.single_action_space if isinstance(env, VectorEnv) else env.action_space
    space.seed(seed)
    actions = np.array([[space.sample() for _ in range(n_envs)] for _ in range(n_steps)])
    env.reset()
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    seconds = time.perf_counter() - start
    env.close()
    return seconds


def forward_products(policy: ActorCriticPolicy, batch_size: int) -> list[Product]:
    """
    The products of one pass forwards; a convolution is that of its input's patches by its filters.

    :param policy: any of SB3's
    :param batch_size: observations in the pass
    """
    products: list[Product] = []

    def note(module: nn.Module, inputs: tuple[th.Tensor], output: th.Tensor) -> None:
        weight = module.weight.flatten(1)  # type: ignore[operator]  # both kinds of layer have one
        rows = batch_size * output[0].numel() // len(weight)
        products.append(Product(rows, weight.shape[1], len(weight), not inputs[0].requires_grad))

    layers = [module for module in policy.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    space = policy.observation_space
    policy(th.as_tensor(np.zeros((1, *space.shape), space.dtype)))  # type: ignore[misc]  # no Dict spaces here
    for hook in hooks:
        hook.remove()
    return products


def product_seconds(policy: ActorCriticPolicy, task: Task, timesteps: int, precision: str = "fp32") -> float:
    """
    What the products of a whole training take: one pass forwards per step and per minibatch, and one backwards.

    Each product is timed by NumPy and by torch, and the faster one counts.

    :param policy: whose layers they are
    :param task: sizes of rollouts and minibatches
    :param timesteps: of the training
    :param precision: ``"bf16"`` where that is the layers'; by torch alone
    """
    sizes = task.arguments
    passes = timesteps / sizes["batch_size"] * sizes["n_epochs"]
    acting = sum(_seconds(p.rows, p.inner, p.columns, precision) for p in forward_products(policy, task.n_envs))
    learning = 0.0
    for rows, inner, columns, is_first in forward_products(policy, sizes["batch_size"]):
        learning += _seconds(rows, inner, columns, precision) + _seconds(columns, rows, inner, precision)
        if not is_first:
            learning += _seconds(rows, columns, inner, precision)
    return acting * timesteps / task.n_envs + learning * passes


def _seconds(rows: int, inner: int, columns: int, precision: str) -> float:
    left, right = th.randn(rows, inner), th.randn(inner, columns)
    if precision == "bf16":
        left, right, out = left.bfloat16(), right.bfloat16(), th.empty(rows, columns, dtype=th.bfloat16)
        return _median(lambda: th.mm(left, right, out=out))
    out, a, b, c = th.empty(rows, columns), left.numpy(), right.numpy(), np.empty((rows, columns), np.float32)
    return min(_median(lambda: th.mm(left, right, out=out)), _median(lambda: np.matmul(a, b, out=c)))


def _median(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
