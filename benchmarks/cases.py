"""What the speed benchmarks compare: cases (what is trained), and contestants (by what, on which environments)."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from benchmarks.tasks import Task, load_task
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.engines import ENGINE_NAMES
from sb3_ppo_from_scratch.engines.compiled.library import kernel_reason
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, TwoHalves, make_native_atari_env

__all__ = ["CASES", "Case", "Contestant", "build", "contestants", "make_env", "missing", "scaled"]


@dataclass(frozen=True)
class Contestant:
    """Somebody who trains a case."""

    engine: str
    """ScratchPPO's engine; ``"sb3"`` or ``"sbx"`` for these packages' PPO; ``"none"`` for the environments alone"""
    envs: str
    """``"dummy"`` and ``"subproc"`` are SB3's; ``"native"`` Gymnasium's own vector environment; ``"ale"``, ``"envpool"``"""
    threads: int = 1
    """torch's and the matrix library's"""
    precision: str = "fp32"
    halves: bool = False
    """whether the native games are two halves, which are stepped in turn"""
    compiled_loss: bool = False
    """whether ``torch.compile`` takes the loss of the engine ``"cudagraph"``"""

    @property
    def title(self) -> str:
        """For tables and figures."""
        return self._who + ", halves in turn" * self.halves + ", compiled loss" * self.compiled_loss

    @property
    def _who(self) -> str:
        who = {"sb3": "SB3 PPO", "sbx": "SBX PPO", "none": "environments alone"}.get(self.engine, f"ScratchPPO {self.engine}")
        return who if self.precision == "fp32" else f"{who} {self.precision}"


@dataclass(frozen=True)
class Case:
    """A task of a size that can be timed."""

    title: str
    env_id: str
    timesteps: int
    task: Callable[[], Task]
    envs: tuple[str, ...] = ("dummy",)
    """kinds of environments, ``"dummy"`` first"""
    engines: tuple[tuple[str, str], ...] = ()
    """ScratchPPO's, with their precision, and ``"sbx"``"""
    parallel: bool = False
    """whether more than one thread pays; tiny networks are slower with two"""
    needs: str | None = None
    """the module that its environments come from, if it is one that need not be there"""


def _defaults(n_envs: int = 1) -> Callable[[], Task]:
    """SB3's defaults, the settings for MuJoCo: ``n_steps=2048``, ``batch_size=64``, ``n_epochs=10``."""
    return lambda: Task(0, "MlpPolicy", n_envs, {"n_steps": 2048, "batch_size": 64, "n_epochs": 10})


_SMALL = (("compiled", "fp32"), ("numpy", "fp32"), ("torch", "fp32"), ("sbx", "fp32"))
_MUJOCO = (("compiled", "fp32"), ("numpy", "fp32"), ("torch", "fp32"))  # SBX takes no torch module for an activation function
_LARGE = (("channels_last", "bf16"), ("channels_last", "fp32"), ("torch", "fp32"))

CASES: dict[str, Case] = {
    "cartpole_zoo": Case(
        "CartPole-v1, rl-zoo3's settings",
        "CartPole-v1",
        100_000,
        lambda: load_task("CartPole-v1"),
        ("dummy", "native"),
        _SMALL,
    ),
    "cartpole_default": Case(
        "CartPole-v1, SB3's defaults, 1 environment", "CartPole-v1", 20_480, _defaults(), ("dummy",), _SMALL
    ),
    # of all continuous tasks the one with the cheapest steps, so that it is the algorithm that is timed
    "continuous": Case("Pendulum-v1, the zoo's settings for MuJoCo", "Pendulum-v1", 20_480, _defaults(), ("dummy",), _SMALL),
    "half_cheetah": Case(
        "HalfCheetah-v5, rl-zoo3's settings",
        "HalfCheetah-v5",
        8_192,
        lambda: load_task("HalfCheetah-v4"),
        ("dummy",),
        _MUJOCO,
        needs="mujoco",
    ),
    "hopper": Case(
        "Hopper-v5, rl-zoo3's settings",
        "Hopper-v5",
        16_384,
        lambda: load_task("Hopper-v4"),
        ("dummy",),
        _MUJOCO,
        needs="mujoco",
    ),
    "breakout": Case(
        "Breakout, rl-zoo3's settings",
        "BreakoutNoFrameskip-v4",
        6_144,  # six rollouts, of which the first has everybody's first calls, as a training of 1e7 steps has but once
        lambda: load_task("atari"),
        ("dummy", "ale", "envpool"),
        _LARGE,
        parallel=True,
    ),
}


def contestants(case: Case, threads: int) -> tuple[list[Contestant], list[Contestant]]:
    """
    :param case: one of :data:`CASES`
    :param threads: for a case that is ``parallel``
    :return: the settings of SB3's PPO of which the fastest counts, and everybody else
    """
    if not case.parallel:
        candidates = [Contestant("sb3", "dummy")]
        threads = 1
    else:
        candidates = [Contestant("sb3", envs, n) for envs in ("dummy", "subproc") for n in sorted({1, threads})]
    others = [
        Contestant(engine, envs, threads, precision)
        for engine, precision in case.engines
        for envs in case.envs
        if envs == "dummy" or engine not in ("sbx", "torch")
    ]
    return candidates, others


def missing(contestant: Contestant) -> str | None:
    """What would have to be installed first; ``None`` if nothing."""
    if contestant.engine not in ("sb3", "sbx", *ENGINE_NAMES):
        return f"engine {contestant.engine!r}"
    if contestant.engine == "compiled" and (reason := kernel_reason()):
        return f"engine 'compiled': {reason}"
    needed = {"sbx": ["sbx"], "ale": ["ale_py"], "envpool": ["envpool"]}
    modules = [*needed.get(contestant.engine, []), *needed.get(contestant.envs, [])]
    if contestant.envs in ("native", "ale", "envpool"):
        modules.append("sb3_ppo_from_scratch.vec_env")
    return next((f"module {module!r}" for module in modules if importlib.util.find_spec(module) is None), None)


def make_env(case: Case, contestant: Contestant, seed: int) -> Any:
    """
    The environments: an SB3 ``VecEnv``, or what ScratchPPO makes one of.

    :param case: one of :data:`CASES`
    :param contestant: for its ``envs``
    :param seed: of the environments
    """
    task, kind = case.task(), contestant.envs
    n_envs = task.n_envs
    if kind == "native":
        vector_env = gym.make_vec(case.env_id, num_envs=n_envs, vectorization_mode="vector_entry_point")
        return vector_env if task.normalize is None else VecNormalize(NativeVecEnv(vector_env), **task.normalize)
    if kind in ("ale", "envpool"):
        return native_games(case.env_id, n_envs, seed, kind, contestant.halves)
    vec_env_cls = SubprocVecEnv if kind == "subproc" else DummyVecEnv
    if "NoFrameskip" in case.env_id:
        env_id = f"ale_py:{case.env_id}"  # registers the games in subprocesses, too
        return VecFrameStack(make_atari_env(env_id, n_envs, seed=seed, vec_env_cls=vec_env_cls), n_stack=4)
    env: VecEnv = make_vec_env(case.env_id, n_envs, seed=seed, vec_env_cls=vec_env_cls)
    return env if task.normalize is None else VecNormalize(env, **task.normalize)


def native_games(env_id: str, n_envs: int, seed: int, backend: str, halves: bool, **options: Any) -> VecEnv:
    """
    Atari games of :func:`make_native_atari_env`, whose arguments these are.

    :param halves: whether they are two halves, which ``ScratchPPO`` steps in turn; the same games with the same seeds
    """
    sizes = [n_envs // 2, n_envs // 2] if halves else [n_envs]
    groups = [make_native_atari_env(env_id, size, seed + index * size, backend, **options) for index, size in enumerate(sizes)]
    return TwoHalves(*groups) if halves else groups[0]


def build(case: Case, contestant: Contestant, seed: int, device: str = "cpu") -> OnPolicyAlgorithm:
    """
    A fresh model with environments of its own.

    :param case: one of :data:`CASES`
    :param contestant: who trains it
    :param seed: of the model and the environments
    :param device: of the networks
    """
    task, env = case.task(), make_env(case, contestant, seed)
    if contestant.engine == "sbx":
        from sbx import PPO as SBX

        return SBX(task.policy, env, seed=seed, **task.arguments)
    if contestant.engine == "sb3":
        return PPO(task.policy, env, seed=seed, device=device, **task.arguments)
    CudaGraphEngine.fuses_loss = contestant.compiled_loss
    options: dict[str, Any] = {"engine": contestant.engine, "precision": contestant.precision}
    return ScratchPPO(task.policy, env, seed=seed, device=device, **task.arguments, **options)


def scaled(case: Case, scale: float) -> Case:
    """
    The same case with fewer or more steps, but whole rollouts, and at least one.

    :param case: one of :data:`CASES`
    :param scale: factor
    """
    task = case.task()
    rollout = task.arguments["n_steps"] * task.n_envs
    return dataclasses.replace(case, timesteps=max(1, round(scale * case.timesteps / rollout)) * rollout)
