"""
Is the engine of CUDA graphs right? Against the reference engine on the CPU, on the same rollouts and minibatches.

Each check returns errors beside what they may be. They run on any device; on a CPU the graphs are plain calls.
:func:`check_all` is for a GPU.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule

from benchmarks.gpu.child import answer_of, start
from benchmarks.gpu.material import config, exact_gradient, exact_products, fill, flat_parameters, relative
from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.engines import Engine
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import sync_debug_mode
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.cudagraph.learning import GraphLearner
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.update import update

__all__ = ["CHECKS", "SUBJECTS", "Check", "Subject", "check_all", "count_waits", "run_checks"]


class Subject(NamedTuple):
    """What is checked: a policy with a kind of actions, and a precision."""

    kind: str
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.kind}, {self.precision}"


class Check(NamedTuple):
    """An error, and what it may be."""

    name: str
    error: float
    tolerance: float
    subject: Subject
    is_about_speed: bool = False

    @property
    def passed(self) -> bool:
        """Not if the error is NaN."""
        return self.error <= self.tolerance

    def concerns(self, kind: str, precision: str) -> bool:
        """Whether figures of that policy in that precision would be worth nothing if this has failed."""
        return not self.is_about_speed and self.subject == (kind, precision)


_VECTOR, _FRAMES = spaces.Box(-1.0, 1.0, (3,)), spaces.Box(0, 255, (4, 84, 84), np.uint8)
_KINDS: dict[str, tuple[type[ActorCriticPolicy], spaces.Box, spaces.Space]] = {
    "MlpPolicy, Discrete": (ActorCriticPolicy, _VECTOR, spaces.Discrete(4)),
    "MlpPolicy, Box": (ActorCriticPolicy, _VECTOR, spaces.Box(-1.0, 1.0, (2,))),
    "MlpPolicy, MultiDiscrete": (ActorCriticPolicy, _VECTOR, spaces.MultiDiscrete([2, 3])),
    "MlpPolicy, MultiBinary": (ActorCriticPolicy, _VECTOR, spaces.MultiBinary(3)),
    "CnnPolicy": (ActorCriticCnnPolicy, _FRAMES, spaces.Discrete(4)),
}
SUBJECTS = (*map(Subject, _KINDS), Subject("CnnPolicy", "tf32"), Subject("CnnPolicy", "bf16"))
_N_STEPS, _N_ENVS = 16, 8
# Relative to the norm of what is compared. Sums in another order differ in the last bits of float32; Adam divides gradients by
# their own size, which makes small ones' errors large, and one update starts from where the last one led: on a CPU an error of
# 1e-7 in the first weights of the CnnPolicy grows to 2e-5 in the first update, and 8e-3 in the third.
# bfloat16 has 8 bits, TensorFloat-32 has 11.
_GRADIENT = {"fp32": 1e-4, "tf32": 0.1, "bf16": 0.3}
_FIRST_UPDATE, _SMALL_UPDATES = {"fp32": 1e-3, "tf32": 0.3, "bf16": 0.6}, 1e-3
_ACTING = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
_CNN_UPDATES = {"fp32": 5e-2, "tf32": 0.3, "bf16": 0.6}


# ---------------------------------------------------------------------- material


def make_policy(kind: str, device: th.device) -> ActorCriticPolicy:
    """The same weights on every device."""
    policy, observations, actions = _KINDS[kind]
    th.manual_seed(5)
    return policy(observations, actions, ConstantSchedule(1e-3)).to(device)


def make_buffers(kind: str, device: th.device, share_valid: float, seed: int) -> tuple[Any, Any]:
    """The same rollout on the CPU and on ``device``, made by the reference engine."""
    policy = make_policy(kind, th.device("cpu"))
    arguments = (_N_STEPS, policy.observation_space, policy.action_space)
    buffers = (
        ScratchRolloutBuffer(*arguments, "cpu", n_envs=_N_ENVS),
        DeviceRolloutBuffer(*arguments, device, n_envs=_N_ENVS),
    )
    fill(policy, *buffers, seed=seed, share_valid=share_valid)
    return buffers


# ------------------------------------------------------------------------ checks


def check_advantages(device: th.device, subject: Subject) -> Iterator[Check]:
    """Of a rollout."""
    on_host, on_device = make_buffers(subject.kind, device, 1.0, seed=1)
    for name in ("advantages", "returns"):
        error = relative(th.tensor(getattr(on_device, name)), th.tensor(getattr(on_host, name)))
        yield Check(name, error, 1e-5, subject)


def check_gradients(device: th.device, subject: Subject) -> Iterator[Check]:
    """Of a minibatch of which some rows do not count, against autograd in float64 on the CPU."""
    kind, precision = subject
    on_host, on_device = make_buffers(kind, device, 1.0, seed=2)
    policy, options = make_policy(kind, device), config(n_epochs=1, max_grad_norm=1e9, clip_range_vf=0.3)
    learner = GraphLearner(policy, CudaGraphEngine(policy, precision).heads, on_device, options)
    rows = np.random.RandomState(0).permutation(_N_STEPS * _N_ENVS)[:33]
    learner._upload(np.array([[*rows, *[rows[0]] * 15, 33]]), options)
    learner.stopped.fill_(True)  # measure, but take no step
    learner.step()
    batch = on_host.dataset().take(th.from_numpy(rows))
    expected = exact_gradient(make_policy(kind, th.device("cpu")), batch, options)
    yield Check("gradient", relative(learner.gradient, expected), _GRADIENT[precision], subject)


def check_updates(device: th.device, subject: Subject) -> Iterator[Check]:
    """Three updates, with other rows left out and other coefficients each time, against the reference engine on the CPU."""
    kind, precision = subject
    on_host, on_device = make_buffers(kind, device, 1.0, seed=3)
    reference = TorchEngine(make_policy(kind, th.device("cpu")))
    expected = parameters_over_updates(kind, reference, on_host)
    actual = parameters_over_updates(kind, CudaGraphEngine(make_policy(kind, device), precision), on_device)
    start = actual[0]
    tolerance = _CNN_UPDATES[precision] if kind == "CnnPolicy" else _SMALL_UPDATES
    for number, what, bound in ((1, "first update", _FIRST_UPDATE[precision]), (3, "three updates", tolerance)):
        yield Check(what, relative(actual[number] - start, expected[number] - start), bound, subject)


def parameters_over_updates(kind: str, engine: Engine, buffer: ScratchRolloutBuffer) -> list[th.Tensor]:
    """Before the first of three updates, and after each; flat."""
    parameters = [flat_parameters(engine.policy)]
    np.random.seed(11)
    for index, options in enumerate((config(), config(ent_coef=0.1), config(clip_range=0.02, target_kl=1.0))):
        fill(make_policy(kind, th.device("cpu")), buffer, seed=index, share_valid=1.0 - 0.2 * index)
        engine.policy.optimizer.param_groups[0]["lr"] = 1e-3 / (index + 1)
        engine.update(buffer, options)
        parameters.append(flat_parameters(engine.policy))
    return parameters


def check_acting(device: th.device, subject: Subject) -> Iterator[Check]:
    """Values and log-probabilities against the policy on the CPU; actions as frequent as they should be, and new each time."""
    kind, precision = subject
    space = _KINDS[kind][1]
    policy, engine = make_policy(kind, th.device("cpu")), CudaGraphEngine(make_policy(kind, device), precision)
    obs = th.as_tensor(np.stack([space.sample() for _ in range(_N_ENVS)]))
    for _ in range(3):  # the last are replays
        step = engine.act(obs.to(device))
    with th.no_grad():
        actions = th.from_numpy(step.actions)
        values, log_probs, _ = policy.evaluate_actions(obs, actions)
    yield Check("values", relative(step.values, values), _ACTING[precision], subject)
    yield Check("log-probabilities", relative(step.log_probs, log_probs), _ACTING[precision], subject)
    if subject == SUBJECTS[0]:
        yield from check_shares(device, subject)


def check_shares(device: th.device, subject: Subject) -> Iterator[Check]:
    """Each action as often as its probability says, and not the same ones in each replay."""
    policy = make_policy(subject.kind, device)
    with th.no_grad():
        action_net: Any = policy.action_net
        action_net.bias.copy_(th.linspace(-1, 1, 4))
    engine, obs = CudaGraphEngine(policy), th.zeros(20_000, 3, device=device)
    first, second = engine.act(obs), engine.act(obs)
    shares, expected = np.bincount(second.actions, minlength=4) / len(second.actions), second.dist_params
    yield Check("shares of actions", np.abs(shares - expected[0].exp().cpu().numpy()).max().item(), 0.02, subject)  # type: ignore[index]  # known
    yield Check("actions repeated by a replay", float(np.array_equal(first.actions, second.actions)), 0.0, subject)


def check_replays(device: th.device, subject: Subject) -> Iterator[Check]:
    """An update by replays against one by calls on the same device: the same kernels, so almost the same bits."""
    kind, precision = subject
    policies = []
    for replayed in (True, False):
        policy = make_policy(kind, device)
        _, buffer = make_buffers(kind, device, 0.8, seed=4)
        learner = GraphLearner(policy, CudaGraphEngine(policy, precision).heads, buffer, config())
        np.random.seed(1)
        if not replayed:
            learner._is_ready = True  # so that nothing is recorded
        updated(learner)
        if learner._minibatch.reason is not None:
            yield Check(f"recorded: {learner._minibatch.reason}", 1.0, 0.0, subject)
        policies.append(flat_parameters(policy))
    yield Check("replays against calls", relative(policies[0], policies[1]), 1e-5, subject)


def check_waits(device: th.device, subject: Subject) -> Iterator[Check]:
    """How often the host waits for the device from an update's start to the reading of its log, and in a policy step."""
    if device.type != "cuda":
        return
    kind, precision = subject
    policy = make_policy(kind, device)
    _, buffer = make_buffers(kind, device, 0.8, seed=5)
    learner = GraphLearner(policy, CudaGraphEngine(policy, precision).heads, buffer, config())
    updated(learner)  # records
    yield Check("waits in a minibatch step", count_waits(learner._minibatch), 0, subject, is_about_speed=True)
    yield Check("waits in an update", count_waits(partial(updated, learner)), 1, subject, is_about_speed=True)


def updated(learner: GraphLearner) -> None:
    """Let it do an update, and read what it measured."""
    with learner.replayed(config()) as replayed:
        update(replayed, config())


def count_waits(function: Callable[[], object]) -> int:
    """How often ``function`` makes the host wait, as far as torch reports it: not where it waits for an event."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sync_debug_mode("warn"):
            function()
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def check_training(device: th.device, subject: Subject) -> Iterator[Check]:
    """A whole run learns: CartPole's episodes get longer."""
    if device.type != "cuda" or subject != SUBJECTS[0]:
        return  # on a CPU the engine does not serve; its tests make it
    env = make_vec_env("CartPole-v1", 8, seed=1)
    model = ScratchPPO("MlpPolicy", env, n_steps=64, batch_size=128, seed=1, device=device, engine="cudagraph")
    model.learn(40_000)
    lengths = [episode["l"] for episode in model.ep_info_buffer]  # type: ignore[union-attr]  # learn has made it
    yield Check("100 steps per CartPole episode, over those reached", 100.0 / float(np.mean(lengths)), 1.0, subject)


CHECKS: dict[str, Callable[[th.device, Subject], Iterator[Check]]] = {
    "advantages": check_advantages,
    "gradients": check_gradients,
    "updates": check_updates,
    "acting": check_acting,
    "replays": check_replays,
    "waits": check_waits,
    "training": check_training,
}


def run_checks(device: th.device, subject: Subject) -> list[Check]:
    """
    All of them; one that raises has failed, and the others still run.

    :param device: of the engine of CUDA graphs
    :param subject: what is checked
    """
    results: list[Check] = []
    with exact_products():
        for name, check in CHECKS.items():
            try:
                results += check(device, subject)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is the result
                results.append(Check(f"{name}: {type(error).__name__}: {error}", float("nan"), 0.0, subject))
    return results


def check_all(seconds: float) -> list[Check]:
    """
    Every subject in a process of its own, all at once: a recording that fails takes CUDA's random generator with it.

    :param seconds: after which what is not done has failed
    """
    deadline, checks = time.monotonic() + seconds, list[Check]()
    for subject, child in [(subject, start("benchmarks.gpu.checks", subject)) for subject in SUBJECTS]:
        answer = answer_of(child, deadline - time.monotonic())
        if isinstance(answer, str):
            answer = [Check(answer, float("nan"), 0.0, subject)._asdict()]
        for values in answer:
            check = Check(**{**values, "subject": subject})
            verdict = "ok    " if check.passed else "FAILED"
            print(f"{verdict} {subject}: {check.name}: {check.error:.2g} <= {check.tolerance:g}", flush=True)
            checks.append(check)
    return checks


def main() -> None:
    """Check the subject that the first argument names, and print the results as JSON."""
    subject = Subject(*json.loads(sys.argv[1]))
    print(json.dumps([check._asdict() for check in run_checks(th.device("cuda"), subject)]))


if __name__ == "__main__":
    main()
