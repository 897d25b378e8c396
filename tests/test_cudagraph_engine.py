"""
The engine of CUDA graphs, on a CPU: its functions called, or replayed by an emulation, against the reference engine.

What needs a GPU is in ``test_cuda.py``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from benchmarks.gpu.material import exact_loss, fill, observe
from sb3_ppo_from_scratch import NonFiniteError, ScratchPPO, ScratchRolloutBuffer, SharedMlpPolicy
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine, acting, learning, support
from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.engines.replayed import MEASURED
from sb3_ppo_from_scratch.update import UpdateConfig
from tests.emulated_graph import EmulatedCapture
from tests.envs import ACTION_SPACES, BOX, OBSERVATION_SPACES
from tests.helpers import ToyEnv, make_engine, train, update_config

FRAMES = spaces.Box(0, 255, (2, 36, 36), np.uint8)
SIZES: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2}
# Of a parameter's change over an update, relative to its norm, as in test_cnn_engine.py; bfloat16 has 8 bits.
UPDATE = {"fp32": 1e-3, "bf16": 0.6}

POLICIES: dict[str, tuple[type[ActorCriticPolicy], spaces.Space, dict[str, Any]]] = {
    "mlp": (ActorCriticPolicy, BOX, {}),
    "relu": (ActorCriticPolicy, BOX, {"activation_fn": nn.ReLU, "net_arch": [8]}),
    "shared mlp": (SharedMlpPolicy, BOX, {}),
    "cnn": (ActorCriticCnnPolicy, FRAMES, {}),
    "two cnns": (ActorCriticCnnPolicy, FRAMES, {"share_features_extractor": False}),
    "dict": (MultiInputActorCriticPolicy, OBSERVATION_SPACES["dict"], {}),
    "choices": (ActorCriticPolicy, OBSERVATION_SPACES["multidiscrete"], {}),
}


def make_policy(kind: str = "mlp", actions: str = "discrete", **kwargs: Any) -> ActorCriticPolicy:
    policy, observations, more = POLICIES[kind]
    th.manual_seed(5)
    return policy(observations, ACTION_SPACES[actions], ConstantSchedule(1e-3), **more, **kwargs)


def make_buffer(policy: ActorCriticPolicy, kind: type[ScratchRolloutBuffer], n_steps: int = 10) -> ScratchRolloutBuffer:
    return kind(n_steps, policy.observation_space, policy.action_space, "cpu", n_envs=3)


class Updated:
    """A policy after several updates on given data: the reference's, or this engine's."""

    def __init__(
        self,
        reference: bool,
        configs: list[UpdateConfig],
        precision: str = "fp32",
        share_valid: float = 1.0,
        learning_rates: tuple[float, ...] = (1e-3,),
        **policy: Any,
    ):
        self.policy = make_policy(**policy)
        self.start = [parameter.detach().clone() for parameter in self.policy.parameters()]
        buffer = make_buffer(self.policy, ScratchRolloutBuffer if reference else DeviceRolloutBuffer)
        engine = (TorchEngine if reference else CudaGraphEngine)(self.policy, precision)
        self.engine = engine
        self.stats = []
        np.random.seed(11)
        for index, each in enumerate(configs):
            fill(make_policy(**policy), buffer, seed=index, share_valid=share_valid)  # the same for both
            self.policy.optimizer.param_groups[0]["lr"] = learning_rates[index % len(learning_rates)]
            self.stats.append(engine.update(buffer, each))
        self.next_draw = np.random.random()

    @property
    def changes(self) -> dict[str, th.Tensor]:
        pairs = zip(self.policy.named_parameters(), self.start, strict=True)
        return {name: (parameter - start).detach() for (name, parameter), start in pairs}


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"{what} is off by {error:.1e}"


def assert_same_updates(ours: Updated, theirs: Updated, precision: str = "fp32") -> None:
    for name, change in ours.changes.items():
        assert_close(change, theirs.changes[name], UPDATE[precision], f"the change of {name}")
    assert ours.next_draw == theirs.next_draw, "a random number more or less was drawn"
    for mine, reference in zip(ours.stats, theirs.stats, strict=True):
        assert (mine.epochs, mine.stopped_early) == (reference.epochs, reference.stopped_early)
        expected, actual = reference.metrics(), mine.metrics()
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            absolute = 0.1 if key == "clip_fraction" else 1e-5 if precision == "fp32" else 0.05
            assert actual[key] == pytest.approx(value, rel=UPDATE[precision], abs=absolute), key
    for a, b in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        state, other = ours.policy.optimizer.state[a], theirs.policy.optimizer.state[b]
        assert list(state) == list(other)
        assert (state["step"], state["step"].device.type) == (other["step"], "cpu")
        for key in state.keys() - {"step"}:
            assert (state[key].dtype, state[key].stride()) == (other[key].dtype, other[key].stride())
            if precision == "fp32":
                assert_close(state[key], other[key], UPDATE[precision], key)
    assert ours.policy.optimizer.state_dict()["param_groups"] == theirs.policy.optimizer.state_dict()["param_groups"]


@pytest.fixture(params=["called", "replayed"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The functions called as they are, or by an emulation of graphs."""
    if request.param == "replayed":
        monkeypatch.setattr(learning, "Captured", EmulatedCapture)
        monkeypatch.setattr(acting, "Captured", EmulatedCapture)
        monkeypatch.setattr(EmulatedCapture, "made", 0)
    return request.param


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine serve on a CPU."""
    monkeypatch.setattr(support, "device_reason", lambda policy: None)


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("share_valid", [1.0, 0.7])
def test_updates_are_the_references(kind: str, share_valid: float) -> None:
    """Truncated last minibatches, of one size or of another one each time."""
    options: dict[str, Any] = {"configs": [update_config(), update_config()], "share_valid": share_valid, "kind": kind}
    assert_same_updates(Updated(False, **options), Updated(True, **options))


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_updates_of_all_action_spaces(actions: str, how: str) -> None:
    options: dict[str, Any] = {"configs": [update_config()] * 2, "actions": actions, "share_valid": 0.8}
    assert_same_updates(Updated(False, **options), Updated(True, **options))


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        pytest.param({"batch_size": 30}, {}, id="one minibatch"),
        pytest.param({"batch_size": 100}, {}, id="one minibatch, smaller than asked for"),
        pytest.param({"batch_size": 29}, {}, id="a last minibatch of one, whose advantage stays"),
        pytest.param({"batch_size": 1, "normalize_advantage": False}, {}, id="one by one"),
        pytest.param({"normalize_advantage": False}, {}, id="plain advantages"),
        pytest.param({"clip_range_vf": 0.01}, {}, id="clipped values"),
        pytest.param({"max_grad_norm": 1e-3, "ent_coef": 0.0}, {}, id="clipped gradient"),
        pytest.param({"max_grad_norm": float("inf")}, {}, id="any gradient"),
        pytest.param({}, {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"amsgrad": True}}, id="AdamW"),
        pytest.param({}, {"optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.8, 0.9)}}, id="weight decay"),
    ],
)
def test_updates_over_the_arguments(options: dict[str, Any], optimizer: dict[str, Any], how: str) -> None:
    run: dict[str, Any] = {"configs": [update_config(**options)] * 2, **optimizer}
    assert_same_updates(Updated(False, **run), Updated(True, **run))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frames(precision: str, how: str) -> None:
    options: dict[str, Any] = {"configs": [update_config()] * 2, "kind": "cnn", "share_valid": 0.8}
    assert_same_updates(Updated(False, precision=precision, **options), Updated(True, **options), precision)


def test_a_graph_serves_all_updates_whatever_the_schedules(how: str) -> None:
    """Coefficients change from update to update, the graph does not: they are numbers on the device."""
    configs = [
        update_config(clip_range=c, ent_coef=e, vf_coef=v) for c, e, v in ((0.2, 0.0, 0.5), (0.1, 0.1, 0.2), (0.01, 0.05, 1.0))
    ]
    options: dict[str, Any] = {"configs": configs, "learning_rates": (1e-3, 1e-2, 3e-3), "share_valid": 0.8}
    assert_same_updates(Updated(False, **options), Updated(True, **options))
    assert EmulatedCapture.made == (how == "replayed")


def test_what_a_graph_holds_by_value_makes_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "Captured", EmulatedCapture)
    monkeypatch.setattr(EmulatedCapture, "made", 0)
    configs = [
        update_config(),
        update_config(normalize_advantage=False),
        update_config(clip_range_vf=0.1),
        update_config(batch_size=5),
        update_config(n_epochs=3),
    ]
    options: dict[str, Any] = {"configs": configs}
    assert_same_updates(Updated(False, **options), Updated(True, **options))
    assert EmulatedCapture.made == len(configs)


def test_a_loaded_optimizer_is_noticed(how: str) -> None:
    """``load_state_dict`` puts other tensors in the place of the moments."""
    runs = [Updated(reference, [update_config()]) for reference in (False, True)]
    for run in runs:
        buffer = run.engine._learner.buffer if run is runs[0] else make_buffer(run.policy, ScratchRolloutBuffer)
        fill(make_policy(), buffer)
        states = run.policy.optimizer.state_dict()
        for state in states["state"].values():
            state["exp_avg"] = state["exp_avg"] * 3.0
            state["step"] = state["step"] + 2
        run.policy.optimizer.load_state_dict(states)
        np.random.seed(1)
        run.engine.update(buffer, update_config())
    for name, change in runs[0].changes.items():
        assert_close(change, runs[1].changes[name], UPDATE["fp32"], name)
    steps = [run.policy.optimizer.state[run.policy.value_net.bias]["step"] for run in runs]
    assert steps[0] == steps[1] == 8 + 2 + 8


def test_gradients_in_double_precision() -> None:
    """Of a truncated minibatch, against autograd on the rows that count alone, by ``ppo_loss`` itself."""
    policy = make_policy(actions="box-2d").double()
    buffer = make_buffer(policy, DeviceRolloutBuffer)
    assert isinstance(buffer, DeviceRolloutBuffer)
    fill(make_policy(actions="box-2d"), buffer)
    options = update_config(batch_size=20, n_epochs=1, clip_range=0.05, max_grad_norm=1e9, clip_range_vf=0.3)
    rows = np.random.RandomState(0).permutation(30)[:13]

    def heads(obs: Any) -> Any:  # the policy's own would make the observations float32
        latent_pi, latent_vf = policy.mlp_extractor(obs.double())
        return policy.value_net(latent_vf), policy._get_action_dist_from_latent(latent_pi)

    learner = learning.GraphLearner(policy, heads, buffer, options)
    learner._upload(np.array([[*rows, *[rows[0]] * 7, 13]]), options)
    with th.no_grad():
        policy.action_net.bias += 0.1  # so that ratios are not 1
    expected_batch = buffer.rows().take(th.from_numpy(rows))
    expected = exact_loss(policy, expected_batch, options)
    gradients = th.autograd.grad(expected.total, list(policy.parameters()))
    learner.stopped.fill_(True)
    learner.step()
    for (name, _), ours, theirs in zip(policy.named_parameters(), learner.gradients, gradients, strict=True):
        assert_close(ours, theirs, 1e-12, name)
    assert 0 < expected.clip_fraction < 1
    for name, value in expected._asdict().items():
        assert learner.log[0, MEASURED.index(name)].item() == pytest.approx(value.item(), rel=1e-6), name


def test_a_gradient_shares_no_node_with_graphs_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node remembers the stream that it was made on; on a GPU the default stream's would end a recording."""
    policy = make_policy()
    buffer = make_buffer(policy, DeviceRolloutBuffer)
    fill(make_policy(), buffer)
    kept = policy.evaluate_actions(th.zeros(2, 3), th.zeros(2))[0].sum()  # by somebody's callback
    before, within = leaves_of(kept), set[Any]()
    grad = th.autograd.grad

    def watched(loss: th.Tensor, *arguments: Any) -> Any:
        within.update(leaves_of(loss))
        return grad(loss, *arguments)

    monkeypatch.setattr(learning.th.autograd, "grad", watched)
    CudaGraphEngine(policy).update(buffer, update_config())
    assert len(before) > 5
    assert within
    assert not before & within
    monkeypatch.undo()
    again = leaves_of(policy.evaluate_actions(th.zeros(2, 3), th.zeros(2))[0].sum())
    assert again == before, "the parameters themselves are back, with their nodes"


def leaves_of(tensor: th.Tensor) -> set[Any]:
    """Autograd's nodes of the parameters below ``tensor``."""
    found, open_nodes = set[Any](), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None:
            found |= {node} if hasattr(node, "variable") else set()
            open_nodes += [parent for parent, _ in node.next_functions]
    return found


# ------------------------------------------------------ what the device decides


@pytest.mark.parametrize("target_kl", [1e-6, 1e-4, 1e-3, 3e-3, 1.0])
def test_stops_where_the_reference_stops(target_kl: float, how: str) -> None:
    """And draws no more permutations than it."""
    options: dict[str, Any] = {"configs": [update_config(target_kl=target_kl, n_epochs=5)] * 2, "learning_rates": (3e-3,)}
    ours, theirs = Updated(False, **options), Updated(True, **options)
    assert_same_updates(ours, theirs)
    assert theirs.stats[0].stopped_early == (target_kl < 1.0)


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float, what: str) -> None:
    """Multiplies the loss, or only its gradient, in those calls of the minibatch step, rehearsals not counted."""
    loss_of, grad = learning.GraphLearner._loss, th.autograd.grad
    count = iter(range(-1, 1000))
    spoils = [False]

    def spoiled_loss(self: Any, *arguments: Any) -> Any:
        spoils[0] = next(count) in calls
        loss, kl = loss_of(self, *arguments)
        return (loss._replace(total=loss.total * factor) if spoils[0] and what == "loss" else loss), kl

    def spoiled_grad(*arguments: Any, **options: Any) -> Any:
        gradients = grad(*arguments, **options)
        return [g * factor for g in gradients] if spoils[0] and what == "gradient" else gradients

    monkeypatch.setattr(learning.GraphLearner, "_loss", spoiled_loss)
    monkeypatch.setattr(learning.th.autograd, "grad", spoiled_grad)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_first_accident_ends_an_update(factor: float, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is as it was before that minibatch, and the optimizer has counted the steps before it."""
    policy = make_policy()
    buffer = make_buffer(policy, DeviceRolloutBuffer)
    fill(policy, buffer)
    spoil(monkeypatch, {5}, factor, what)
    np.random.seed(1)
    with pytest.raises(NonFiniteError, match=f"the {what} of a minibatch is not finite"):
        CudaGraphEngine(policy).update(buffer, update_config(nan_policy="raise"))
    assert {float(state["step"]) for state in policy.optimizer.state.values()} == {5.0}
    sound = make_policy()
    np.random.seed(1)
    monkeypatch.undo()
    reference = make_buffer(sound, ScratchRolloutBuffer)
    fill(sound, reference)
    five = [batch for _ in range(2) for batch in reference.get(8)][:5]
    with TorchEngine(sound).learning(reference, update_config()) as learner:
        for batch in five:
            learner.gradient(batch).backward()
            learner.clip_gradient()
            learner.step()
    for a, b in zip(policy.parameters(), sound.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accidents_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    buffer = make_buffer(policy, DeviceRolloutBuffer)
    fill(policy, buffer)
    spoil(monkeypatch, {2, 6}, float("nan"), "gradient")
    stats = CudaGraphEngine(policy).update(buffer, update_config(nan_policy="skip"))
    metrics = stats.metrics()
    assert (stats.skipped, stats.epochs) == (2, 2)
    assert all(np.isfinite(value) for value in metrics.values())
    assert {float(state["step"]) for state in policy.optimizer.state.values()} == {6.0}
    moments = [value for state in policy.optimizer.state.values() for value in state.values()]
    assert all(value.isfinite().all() for value in (*policy.parameters(), *moments))


def test_an_update_without_a_step_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    buffer = make_buffer(policy, DeviceRolloutBuffer)
    fill(policy, buffer)
    spoil(monkeypatch, set(range(100)), float("nan"), "loss")
    stats = CudaGraphEngine(policy).update(buffer, update_config(nan_policy="skip"))
    assert stats.skipped == 8
    assert stats.metrics() == {}
    assert not policy.optimizer.state
    assert all(th.equal(a, b) for a, b in zip(policy.parameters(), before, strict=True))
    monkeypatch.undo()
    CudaGraphEngine(policy).update(buffer, update_config())
    assert {float(state["step"]) for state in policy.optimizer.state.values()} == {8.0}


# ------------------------------------------------------------------------- acting


@pytest.mark.parametrize("kind", POLICIES)
def test_acts_as_the_reference_does(kind: str) -> None:
    """The same random numbers for the same actions."""
    policy, space = make_policy(kind), POLICIES[kind][1]
    reference, engine = TorchEngine(policy), CudaGraphEngine(policy)
    space.seed(1)
    th.manual_seed(1)
    states = []
    for _ in range(3):
        obs = observe(space, 4)
        before = th.get_rng_state()
        expected = reference.act(obs)
        states.append(th.get_rng_state())
        th.set_rng_state(before)
        step = engine.act(obs)
        assert th.equal(th.get_rng_state(), states[-1]), "also when it rehearsed first"
        assert np.array_equal(step.actions, expected.actions)
        for ours, theirs in zip(step[1:4], expected[1:4], strict=True):
            assert ours.shape == theirs.shape
            th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        th.testing.assert_close(engine.predict_values(obs), expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_acts_in_all_action_spaces(actions: str, how: str) -> None:
    policy = make_policy(actions=actions)
    reference, engine = TorchEngine(policy), CudaGraphEngine(policy)
    for index in range(3):
        obs = th.randn(4, 3)
        steps = []
        for each in (reference, engine):
            th.manual_seed(index)
            steps.append(each.act(obs))
        assert (steps[1].actions.shape, steps[1].actions.dtype) == (steps[0].actions.shape, steps[0].actions.dtype)
        assert np.array_equal(steps[1].actions, steps[0].actions) or actions.startswith("box")
        np.testing.assert_allclose(steps[1].actions, steps[0].actions, rtol=1e-5, atol=1e-6)


def test_what_it_returned_stays_as_it_is(how: str) -> None:
    engine = CudaGraphEngine(make_policy(actions="box-2d"))
    first = engine.act(th.zeros(4, 3))
    copies = [first.actions.copy(), *(each.clone() for each in first[1:4])]
    engine.act(th.ones(4, 3))
    assert np.array_equal(first.actions, copies[0])
    assert all(th.equal(a, b) for a, b in zip(first[1:4], copies[1:], strict=True))


def test_sees_the_policy_as_it_is_now(how: str) -> None:
    """In place, and where parameters lie somewhere else since the last rollout."""
    policy = make_policy()
    engine = CudaGraphEngine(policy)
    obs = th.randn(4, 3)
    engine.begin_rollout()
    engine.act(obs)
    with th.no_grad():
        policy.value_net.bias += 3.0
    th.testing.assert_close(engine.act(obs).values, policy.predict_values(obs).detach())
    policy.value_net.bias.data = policy.value_net.bias.data.clone() + 2.0
    engine.begin_rollout()
    th.testing.assert_close(engine.act(obs).values, policy.predict_values(obs).detach())
    assert engine.act(th.randn(2, 3)).actions.shape == (2,)


def test_a_policy_that_is_lost() -> None:
    policy = make_policy()
    with th.no_grad():
        policy.action_net.bias.fill_(th.nan)
    with pytest.raises(NonFiniteError, match="probabilities are NaN"):
        CudaGraphEngine(policy).act(th.zeros(2, 3))


def test_draws_each_action_as_often_as_it_should() -> None:
    policy = make_policy()
    with th.no_grad():
        policy.action_net.bias.copy_(th.linspace(-1, 1, len(policy.action_net.bias)))
    engine = CudaGraphEngine(policy)
    th.manual_seed(0)
    step = engine.act(th.zeros(50_000, 3))
    counts = np.bincount(step.actions, minlength=len(policy.action_net.bias)) / 50_000
    np.testing.assert_allclose(counts, step.dist_params[0].exp().numpy(), atol=0.01)


# ----------------------------------------------------------------------- training


def make_env(observation: str = "box", action: str = "discrete") -> VecEnv:
    space = FRAMES if observation == "frames" else OBSERVATION_SPACES[observation]
    if observation == "frames":
        space = spaces.Box(0, 255, (36, 36, 2), np.uint8)
    return DummyVecEnv([lambda: ToyEnv(space, ACTION_SPACES[action])] * 2)


@pytest.mark.parametrize(
    ("policy", "observation", "action"),
    [
        ("MlpPolicy", "box", "discrete"),
        ("MlpPolicy", "box", "box-2d"),
        ("SharedMlpPolicy", "box", "multidiscrete"),
        ("MultiInputPolicy", "dict", "multibinary"),
        ("CnnPolicy", "frames", "discrete"),
    ],
)
def test_trains_as_the_reference_does(policy: str, observation: str, action: str, on_cpu: None) -> None:
    """Through rollouts, schedules and several updates; with the same random numbers."""
    schedules = {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "clip_range": LinearSchedule(0.2, 0.1, 1.0)}
    options: dict[str, Any] = {**SIZES, **schedules, "ent_coef": LinearSchedule(0.1, 0.0, 1.0), "target_kl": 0.5}
    runs = [
        train(
            ScratchPPO, policy, lambda: make_env(observation, action), 96, engine=engine, rollout_buffer_class=kind, **options
        )
        for engine, kind in (("torch", ScratchRolloutBuffer), ("cudagraph", DeviceRolloutBuffer))
    ]
    assert type(runs[1].model._engine) is CudaGraphEngine
    assert runs[0].random_states == runs[1].random_states
    for expected, actual in zip(runs[0].metrics, runs[1].metrics, strict=True):
        assert actual.keys() == expected.keys()
    for key, value in runs[0].metrics[0].items():
        assert runs[1].metrics[0][key] == pytest.approx(value, rel=1e-2, abs=1e-4), key


def test_trains_by_replays(on_cpu: None, how: str) -> None:
    options: dict[str, Any] = {**SIZES, "learning_rate": LinearSchedule(1e-2, 0.0, 1.0)}
    runs = [
        train(ScratchPPO, "MlpPolicy", make_env, 160, engine=engine, rollout_buffer_class=kind, **options)
        for engine, kind in (("torch", ScratchRolloutBuffer), ("cudagraph", DeviceRolloutBuffer))
    ]
    assert runs[0].random_states == runs[1].random_states
    for a, b in zip(runs[1].model.policy.parameters(), runs[0].model.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert EmulatedCapture.made == 2 * (how == "replayed"), "one for acting, one for learning, for the whole run"


def test_a_foreign_buffer_will_do(on_cpu: None) -> None:
    options: dict[str, Any] = {"rollout_buffer_class": ScratchRolloutBuffer, "device": "cpu", **SIZES}
    model = ScratchPPO("MlpPolicy", make_env(), engine="cudagraph", **options)
    with pytest.warns(UserWarning, match="updates from a ScratchRolloutBuffer are the reference engine's"):
        model.learn(64)
    assert model._n_updates == 2 * 2


def test_saves_what_everybody_can_load(on_cpu: None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"engine": "cudagraph", "precision": "bf16", "device": "cpu", "seed": 1, **SIZES}
    model = ScratchPPO("CnnPolicy", make_env("frames"), **options).learn(32)
    assert type(model.rollout_buffer) is DeviceRolloutBuffer
    model.save(tmp_path / "model")
    fresh = PPO("CnnPolicy", make_env("frames"), **SIZES)
    assert model.policy.state_dict().keys() == fresh.policy.state_dict().keys()
    for key, value in model.policy.state_dict().items():
        other = fresh.policy.state_dict()[key]
        assert (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride()), key
    obs = model.env.reset()
    expected, _ = model.predict(obs, deterministic=True)
    for algorithm in (ScratchPPO, PPO):
        loaded = algorithm.load(tmp_path / "model", env=make_env("frames"))
        assert np.array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        group = loaded.policy.optimizer.param_groups[0]
        assert not group["fused"]
        assert not group["capturable"]
        state = loaded.policy.optimizer.state_dict()["state"]
        for index, mine in model.policy.optimizer.state_dict()["state"].items():
            assert all(th.equal(state[index][key], mine[key]) for key in mine)
        loaded.learn(32)


# ------------------------------------------------------------------------- choice


def with_hook(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.value_net.register_forward_hook(lambda *_: None)
    return policy


def frozen(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.value_net.bias.requires_grad_(False)
    return policy


def with_own_layer(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.mlp_extractor.policy_net[1] = nn.Dropout()
    return policy


def with_own_step(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.optimizer.register_step_post_hook(lambda *_: None)
    return policy


class OwnPolicy(ActorCriticPolicy):
    pass


class OwnExtractor(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Space):
        super().__init__(space, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations


UNSUPPORTED: dict[str, tuple[Callable[[], ActorCriticPolicy], str]] = {
    "gSDE": (lambda: make_policy(actions="box-2d", use_sde=True), "gSDE"),
    "hook": (lambda: with_hook(make_policy()), "hooks"),
    "subclass": (lambda: OwnPolicy(BOX, spaces.Discrete(2), ConstantSchedule(1e-3)), "OwnPolicy"),
    "extractor": (lambda: make_policy(features_extractor_class=OwnExtractor), "OwnExtractor"),
    "layer": (lambda: with_own_layer(make_policy()), "Dropout"),
    "SGD": (lambda: make_policy(optimizer_class=th.optim.SGD, optimizer_kwargs={}), "Adam"),
    "capturable": (lambda: make_policy(optimizer_kwargs={"capturable": True}), "capturable"),
    "optimizer's hook": (lambda: with_own_step(make_policy()), "hooks on the optimizer"),
    "frozen": (lambda: frozen(make_policy()), "trainable"),
    "double": (lambda: make_policy().double(), "float32"),
}


@pytest.mark.parametrize(("policy", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_says_what_it_cannot_serve(policy: Callable[[], ActorCriticPolicy], why: str, on_cpu: None) -> None:
    with pytest.raises(ValueError, match=f"cannot serve this model.*{why}"):
        make_engine("cudagraph", policy())


@pytest.mark.skipif(th.cuda.is_available(), reason="what is asked is what happens without CUDA")
def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match=r"engine='cudagraph'.*cannot serve this model.*it needs a CUDA device, not cpu"):
        ScratchPPO("MlpPolicy", make_env(), engine="cudagraph", device="cpu")


def test_auto_leaves_it_out(on_cpu: None) -> None:
    """It has never been run on a GPU."""
    assert type(make_engine("cudagraph", make_policy("two cnns"))) is CudaGraphEngine
    assert type(make_engine("auto", make_policy("two cnns"))) is TorchEngine


@pytest.mark.skipif(th.cuda.is_available(), reason="what is asked is what happens without CUDA")
@pytest.mark.parametrize(("precision", "there"), [("bf16", "bf16"), ("tf32", "fp32")])
def test_what_was_trained_on_a_gpu_may_be_watched_on_a_cpu(
    precision: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(support, "device_reason", lambda policy: None)
        ScratchPPO("CnnPolicy", make_env("frames"), engine="cudagraph", precision=precision, device="cpu", **SIZES).save(
            tmp_path / "model"
        )
    with pytest.warns(UserWarning, match="goes on with 'auto': engine='cudagraph' .*it needs a CUDA device, not cpu"):
        model = ScratchPPO.load(tmp_path / "model", env=make_env("frames"))
    assert (model.engine, model.precision) == ("auto", there)
    assert model.learn(32)._engine.name == "channels_last"
    with pytest.raises(ValueError, match="it needs a CUDA device, not cpu"):
        ScratchPPO.load(tmp_path / "model", engine="cudagraph")
    with pytest.raises(ValueError, match="its precision must be 'fp32'"):
        ScratchPPO.load(tmp_path / "model", engine="torch")


def test_bfloat16_is_for_frames(on_cpu: None) -> None:
    with pytest.raises(ValueError, match="precision='bf16' is for CnnPolicy"):
        make_engine("cudagraph", make_policy(), "bf16")
    with pytest.raises(ValueError, match="precision='bf16' is for CnnPolicy"):
        make_engine("cudagraph", make_policy("two cnns"), "bf16")
    assert make_engine("cudagraph", make_policy("cnn"), "bf16").precision == "bf16"


def test_tensor_float_32_is_for_all_of_its_products_and_for_nobody_elses(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the switches change nothing, so the numbers are those of float32."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)

    def switches() -> tuple[str, bool]:
        return th.get_float32_matmul_precision(), th.backends.cudnn.allow_tf32

    before, seen = switches(), list[tuple[str, tuple[str, bool]]]()
    heads, grad = CudaGraphEngine.heads, th.autograd.grad
    monkeypatch.setattr(CudaGraphEngine, "heads", lambda self, obs: (seen.append(("heads", switches())), heads(self, obs))[1])
    monkeypatch.setattr(learning.th.autograd, "grad", lambda *a: (seen.append(("gradient", switches())), grad(*a))[1])
    options: dict[str, Any] = {"configs": [update_config()]}
    for precision, inside in (("tf32", ("high", True)), ("fp32", before)):
        seen.clear()
        ours = Updated(False, precision=precision, **options)
        ours.engine.act(th.zeros(2, 3))
        ours.engine.predict_values(th.zeros(2, 3))
        assert {what for what, _ in seen} == {"heads", "gradient"}
        assert {how for _, how in seen} == {inside}
        assert switches() == before
        assert_same_updates(ours, Updated(True, **options))
    with pytest.raises(ValueError, match="its precision must be 'fp32'"):
        make_engine("torch", make_policy(), "tf32")


def test_what_becomes_unsupported_goes_to_another_engine(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_ppo_from_scratch.engines._FOR_AUTO", {"cudagraph": CudaGraphEngine, "torch": TorchEngine})
    model = ScratchPPO("MlpPolicy", make_env(), device="cpu", **SIZES).learn(32)
    assert type(model._engine) is CudaGraphEngine
    calls: list[int] = []
    model.policy.value_net.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    model.learn(32)
    assert type(model._engine) is TorchEngine
    assert calls


# ------------------------------------------------------------------ the loss as one kernel

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@pytest.mark.parametrize(
    ("kind", "actions", "backend"),
    [
        ("mlp", "discrete", "aot_eager"),
        ("mlp", "multidiscrete", "aot_eager"),
        ("mlp", "multibinary", "aot_eager"),
        ("mlp", "box", "aot_eager"),
        pytest.param(
            "cnn",
            "discrete",
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")],
        ),
    ],
)
def test_a_compiled_loss_is_the_same(kind: str, actions: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four are traced by ``torch.compile`` and differentiated as it does; the last one is compiled, too."""
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function.__name__)
        return real(function, **options, backend=backend)

    real = th.compile
    configs = [update_config(clip_range_vf=0.2, ent_coef=0.01), update_config(clip_range_vf=0.3, clip_range=0.1)]
    theirs = Updated(reference=True, configs=configs, kind=kind, actions=actions)
    monkeypatch.setattr(CudaGraphEngine, "fuses_loss", True)
    monkeypatch.setattr(th, "compile", compile_)
    ours = Updated(reference=False, configs=configs, kind=kind, actions=actions)
    assert_same_updates(ours, theirs)
    assert compiled == ["_measure_by_parameters"], "once for both updates"
    assert th.distributions.Distribution._validate_args, "torch's compiler turns it off for everybody"


def test_the_loss_is_compiled_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "compile", None)
    Updated(reference=False, configs=[update_config()])


def test_observations_go_straight_into_the_graphs_input() -> None:
    """What the buffer brings to the device lies where the policy reads it; what lies elsewhere is copied there."""
    policy = make_policy("cnn")
    buffer, engine = make_buffer(policy, DeviceRolloutBuffer), CudaGraphEngine(policy)
    assert isinstance(buffer, DeviceRolloutBuffer)
    frames = [np.stack([FRAMES.sample() for _ in range(3)]) for _ in range(3)]
    for index, each in enumerate(frames):
        brought = buffer.observe(each)
        step = engine.act(brought if index < 2 else th.as_tensor(each))
        assert engine._player is not None
        assert engine._player.obs is brought
        expected = policy.predict_values(th.as_tensor(each))
        th.testing.assert_close(step.values, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_loss_is_compiled_for_as_many_sizes_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles one function eight times, and then no more."""
    real = th.compile
    monkeypatch.setattr(CudaGraphEngine, "fuses_loss", True)
    monkeypatch.setattr(th, "compile", lambda function, **options: real(function, **options, backend="aot_eager"))
    for batch_size in range(4, 14):
        Updated(reference=False, configs=[update_config(batch_size=batch_size)])


ALONE = """
import torch as th
import gymnasium as gym
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.engines.cudagraph import CudaGraphEngine, support
support.device_reason, CudaGraphEngine.fuses_loss, compiled = (lambda policy: None), True, th.compile
th.compile = lambda function, **options: compiled(function, **options, backend="aot_eager")
ScratchPPO("MlpPolicy", gym.make("Pendulum-v1"), engine="cudagraph", n_steps=8, batch_size=8, device="cpu").learn(16)
"""


def test_a_gaussians_loss_is_compiled_by_a_process_that_has_never_taken_its_kl() -> None:
    """Torch's ``kl_divergence`` looks for the right function at the first call, in a way that cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
