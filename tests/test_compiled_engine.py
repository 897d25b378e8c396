"""The compiled engine computes what the reference computes, on every instruction set, and steps aside where it cannot."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

from sb3_ppo_from_scratch import MlpPolicy, NonFiniteError, ScratchPPO
from sb3_ppo_from_scratch.buffer import RolloutData, ScratchRolloutBuffer
from sb3_ppo_from_scratch.distributions import choices, distribution_parameters, exact_kl
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.compiled import CompiledEngine, learning, library
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import UpdateConfig, UpdateStats
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES
from tests.helpers import FASTEST, is_built, make_engine, update_config
from tests.test_numpy_engine import (
    ACTIVATIONS,
    action_spaces,
    after_one_update,
    autograd,
    cartpole,
    compare_update,
    make_policy,
    outputs_of,
    random_batch,
    widths,
)

ROOT = Path(__file__).parent.parent


def instruction_sets() -> list[str]:
    """Those that this machine has."""
    with pytest.MonkeyPatch.context() as patch:

        def runs_on(name: str) -> bool:
            patch.setenv(library.VARIABLE, name)
            return library.kernel_reason() is None

        return [name for name in library.INSTRUCTION_SETS if runs_on(name)]


AVAILABLE = instruction_sets()


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in AVAILABLE:
        pytest.skip(f"no {request.param} here, or no kernel")
    monkeypatch.setenv(library.VARIABLE, request.param)
    return request.param


class Samples(RolloutBuffer):
    """A class of the user's that hands out minibatches of its own."""

    def __init__(self, policy: ActorCriticPolicy, *batches: Batch):
        super().__init__(1, policy.observation_space, policy.action_space)
        self.batches = batches

    def get(self, batch_size: int | None = None) -> Iterator[RolloutData]:
        return (
            RolloutData(*(None if field is None else th.as_tensor(field) for field in batch[:7])) for batch in self.batches
        )  # type: ignore[arg-type]


def in_double(batch: Batch) -> Batch:
    return Batch(*(None if field is None else field.astype(np.float64) for field in batch))  # type: ignore[arg-type]


def learned_by(engine: CompiledEngine, *batches: Batch, **config: Any) -> UpdateStats:
    """One epoch of these minibatches."""
    options = {"n_epochs": 1, "batch_size": 64, **config}
    return engine.update(Samples(engine.policy, *batches), update_config(**options))


def learned(policy: ActorCriticPolicy, *batches: Batch, **config: Any) -> UpdateStats:
    return learned_by(CompiledEngine(policy), *batches, **config)


# ------------------------------------------------------------------- the gradient


def distance_to_kinks(policy: ActorCriticPolicy, batch: Batch, config: UpdateConfig) -> float:
    """How near something lies to where the loss has no derivative: on which side of it, rounding decides."""
    distances = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: distances.append(inputs[0].abs()))
        for module in policy.modules()
        if isinstance(module, nn.ReLU | nn.LeakyReLU | nn.ELU)
    ]
    with th.no_grad():
        distribution, values = outputs_of(policy, th.from_numpy(batch.observations))
        actions = th.from_numpy(batch.actions)
        actions = actions.long().flatten() if isinstance(policy.action_space, spaces.Discrete) else actions
        ratio = th.exp(distribution.log_prob(actions) - th.from_numpy(batch.old_log_prob))
    for handle in handles:
        handle.remove()
    distances.append(((ratio - 1).abs() - config.clip_range).abs())
    if config.clip_range_vf is not None:
        distances.append(((values - th.from_numpy(batch.old_values)).abs() - config.clip_range_vf).abs())
    return min(float(each.min()) for each in distances)


@is_built
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(AVAILABLE or ["generic"]),
    action_space=action_spaces,
    pi=widths,
    vf=st.one_of(st.none(), widths),
    shared=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    size=st.sampled_from([1, 2, 33, 64, 100]),
    policy_change=st.sampled_from([0.01, 0.1, 1.0]),
    clip_range=st.sampled_from([-1e-4, 0.1, 0.2]),
    clip_range_vf=st.sampled_from([None, 0.1]),
    normalize_advantage=st.booleans(),
    ent_coef=st.sampled_from([0.0, 0.01, -0.1]),
    vf_coef=st.sampled_from([0.0, 0.5, 1.3]),
)
def test_gradient_is_autograds(
    seed: int,
    name: str,
    action_space: spaces.Space,
    pi: list[int],
    vf: list[int] | None,
    shared: bool,
    activation: type[nn.Module],
    size: int,
    policy_change: float,
    **coefficients: Any,
) -> None:
    """In float32, to 1e-5 of the largest entry of what float64 yields."""
    th.manual_seed(seed)
    net_arch: Any = pi if shared else {"pi": pi, "vf": pi if vf is None else vf}
    policy = make_policy(action_space, shared, net_arch=net_arch, activation_fn=activation)
    batch = random_batch(policy, size, policy_change, th.float32)
    exact, exact_batch = copy.deepcopy(policy).double(), in_double(batch)
    config = UpdateConfig(batch_size=size, n_epochs=1, max_grad_norm=1e9, target_kl=None, **coefficients)
    assume(distance_to_kinks(exact, exact_batch, config) > 2e-6)
    expected_loss, expected = autograd(exact, exact_batch, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.VARIABLE, name)
        stats = learned(policy, batch, **{**vars(config), "batch_size": 7})
    loss = PPOLoss(*stats._rows[0][:6])
    np.testing.assert_allclose(loss, [part.item() for part in expected_loss], rtol=2e-5, atol=2e-6)
    rounding = 1e-7 * abs(config.ent_coef) + 1e-12  # where the entropy is largest, its gradient is a difference of equals
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for (key, parameter), b in zip(policy.named_parameters(), expected, strict=True):
        difference = float((parameter.grad - (0 if b is None else b)).abs().max())
        assert difference <= 1e-5 * largest + rounding, f"{key}: differs by {difference}, of {largest}"


@is_built
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_exact_kl(action_space: spaces.Space, instruction_set: str) -> None:
    """Of a rollout by an older policy, whose distributions are known."""
    policy = make_policy(action_space)
    engine, batch = CompiledEngine(policy), random_batch(policy, 70, 0.1, th.float32)
    assert engine._kernel.instruction_set == instruction_set
    with th.no_grad():
        new = distribution_parameters(outputs_of(policy, th.from_numpy(batch.observations))[0])
        old = new + 0.1 * th.randn_like(new)
        if isinstance(policy.action_dist, CategoricalDistribution):
            old = old.log_softmax(1)
        elif isinstance(policy.action_dist, MultiCategoricalDistribution):
            old = th.cat([part.log_softmax(1) for part in old.split(list(policy.action_dist.action_dims), 1)], 1)
    expected = exact_kl(policy.action_dist, old.double(), new.double()).mean().item()
    samples = Samples(policy, batch._replace(dist_params=old.numpy()))
    stats = engine.update(samples, update_config(n_epochs=1))
    assert stats.metrics()["kl"] == pytest.approx(expected, rel=1e-4)
    assert "kl" not in CompiledEngine(policy).update(Samples(policy, batch), update_config(n_epochs=1)).metrics()


# ------------------------------------------------------------- against the reference


@is_built
@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_an_update_of_20_epochs_is_the_references(action_space: str, instruction_set: str) -> None:
    compare_update(OBSERVATION_SPACES["box"], ACTION_SPACES[action_space], ["compiled"], ent_coef=0.01, batch_size=40)


@is_built
@pytest.mark.parametrize("changes", [{"target_kl": 0.004}, {"target_kl": 1e-9}, {}], ids=["stops", "stops at once", "goes on"])
def test_stops_where_the_reference_does(changes: dict[str, Any]) -> None:
    """In the same epoch, with the same rows in the log, and with the same random numbers drawn."""
    seen = []
    for engine in ("torch", "compiled"):
        model = cartpole(engine=engine, learning_rate=3e-3, **changes)
        model.n_epochs = 8
        model.learn(64)
        seen.append((model._n_updates, np.random.get_state()[1:3], model.logger.name_to_value))
    (n_updates, (keys, position), metrics), (their_updates, (their_keys, their_position), expected) = seen
    assert (n_updates, position) == (their_updates, their_position)
    assert n_updates < 32 or "target_kl" not in changes
    np.testing.assert_array_equal(keys, their_keys)
    for key in ("train/approx_kl", "train/kl", "train/loss", "train/grad_norm", "train/clip_fraction"):
        assert (key in metrics) == (key in expected)
        if key in expected:
            np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-3, atol=1e-6)


@is_built
def test_rows_left_out_and_truncated_minibatches() -> None:
    """Of a native environment, whose reset rows are no transitions; and batches larger than the rollout."""
    for batch_size in (7, 9, 500):
        ends = []
        for engine in ("torch", "compiled"):
            env = gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the size of the last minibatch
                model = ScratchPPO("MlpPolicy", env, n_steps=64, batch_size=batch_size, n_epochs=3, seed=1, engine=engine)
            ends.append(nn.utils.parameters_to_vector(model.learn(64 * 3).policy.parameters()).detach())
            assert model.rollout_buffer.valid is not None
        th.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-5)


@is_built
def test_integers_are_prepared_at_once_or_minibatch_by_minibatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits, for the order is the same."""
    ends = []
    for few_bytes in (learning._FEW_BYTES, 0):
        monkeypatch.setattr(learning, "_FEW_BYTES", few_bytes)
        _, _, end, _ = after_one_update("compiled", OBSERVATION_SPACES["image"], ACTION_SPACES["box"], n_epochs=3)
        ends.append(end)
    th.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------- numbers


@is_built
@pytest.mark.parametrize("nan_policy", ["raise", "skip"])
def test_no_step_is_taken_on_what_is_not_finite(nan_policy: str, instruction_set: str) -> None:
    """The second of three minibatches, once in each field."""
    for field in ("observations", "old_values", "old_log_prob", "advantages", "returns", "actions"):
        policy = make_policy(ACTION_SPACES["box"])
        batches = [random_batch(policy, 20, 0.1, th.float32) for _ in range(3)]
        getattr(batches[1], field)[13] = np.nan
        config = {"nan_policy": nan_policy, "clip_range_vf": 0.2}
        engine = CompiledEngine(policy)
        if nan_policy == "raise":
            with pytest.raises(NonFiniteError, match="of a minibatch is not finite"):
                learned_by(engine, *batches, **config)
        else:
            assert learned_by(engine, *batches, **config).skipped == 1
        assert engine.optimizer.n_steps == (1 if nan_policy == "raise" else 2)
        assert np.isfinite(engine.flat.vector).all()


@is_built
def test_a_gradient_beyond_float32_is_not_finite() -> None:
    policy = make_policy(ACTION_SPACES["box"])
    batch = random_batch(policy, 20, 0.1, th.float32)
    batch.returns[:] = 1e15
    engine = CompiledEngine(policy)
    with pytest.raises(NonFiniteError, match="the gradient of a minibatch is not finite"):
        learned_by(engine, batch, vf_coef=1e7)
    assert engine.optimizer.n_steps == 0


@is_built
def test_functions_of_vectors_over_their_whole_range(instruction_set: str) -> None:
    """Tanh, SiLU and ELU of one number, read from the gradient by the weight behind them, as torch computes them in double."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, 1e-20, -1e-20, 1e-4, 90.0, -90.0, 300.0, -300.0, 3e38]])
    x = x.astype(np.float32)
    for activation in (nn.Tanh, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.ReLU):
        policy = MlpPolicy(
            spaces.Box(-np.inf, np.inf, (1,)),
            spaces.Discrete(2),
            ConstantSchedule(0.0),
            net_arch={"pi": [], "vf": [1]},
            activation_fn=activation,
        )
        for parameter in (policy.mlp_extractor.value_net[0].weight, policy.value_net.weight):
            nn.init.ones_(parameter)
        zeros, returns = np.zeros(1, np.float32), np.full(1, -0.5, np.float32)
        batches = [Batch(x[i : i + 1, None], zeros[:, None], zeros, zeros, zeros, returns) for i in range(len(x))]
        y = activation()(th.from_numpy(x).double()).numpy()
        engine = CompiledEngine(policy)
        stats = learned_by(engine, *batches, vf_coef=1.0, normalize_advantage=False, nan_policy="skip")
        rows = np.array([row[2] for row in stats._rows])  # (y + 0.5)^2
        finite = (y + 0.5) ** 2 <= np.finfo(np.float32).max
        assert stats.skipped == np.count_nonzero(~finite)
        np.testing.assert_allclose(rows, (y[finite] + 0.5) ** 2, rtol=2e-6, atol=1e-7)


# ---------------------------------------------------------------------- bad input


@is_built
def test_what_a_buffer_of_the_users_may_hand_out() -> None:
    policy = make_policy(ACTION_SPACES["discrete"])
    good = random_batch(policy, 12, 0.1, th.float32)
    before = nn.utils.parameters_to_vector(policy.parameters()).detach()
    for name, wrong in {
        "observations": good.observations[:, :3],
        "advantages": good.advantages[:5],
        "returns": good.returns[:, None],
        "old_values": np.zeros((12, 2), np.float32),
        "actions": good.actions[:7],
    }.items():
        with pytest.raises(ValueError, match=f"{name} of the rollout must have shape|cannot reshape"):
            learned(policy, good._replace(**{name: wrong}))
    for action in (3.0, -1.0, np.nan, np.inf, 1e30):
        actions = good.actions.copy()
        actions[5] = action
        with pytest.raises(ValueError, match="actions of the rollout must be choices of the action space"):
            learned(policy, good._replace(actions=actions))
    th.testing.assert_close(nn.utils.parameters_to_vector(policy.parameters()).detach(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot reshape array of size 0"):
        learned(policy, Batch(*(None if field is None else field[:0] for field in good)))  # type: ignore[arg-type]


@is_built
def test_other_dtypes_and_strides_are_the_same_numbers(instruction_set: str) -> None:
    ends = []
    for how in ("float32", "float64", "strided", "misaligned"):
        th.manual_seed(2)
        policy = make_policy(ACTION_SPACES["discrete"])
        batch = random_batch(policy, 90, 0.1, th.float32)
        if how == "float64":
            batch = in_double(batch)
        elif how == "strided":
            batch = Batch(*(None if field is None else np.repeat(field, 2, axis=0)[::2] for field in batch))  # type: ignore[arg-type]
        elif how == "misaligned":
            batch = Batch(*(None if field is None else misaligned(field) for field in batch))  # type: ignore[arg-type]
        learned(policy, batch, batch_size=3)
        ends.append(nn.utils.parameters_to_vector(policy.parameters()).detach())
    assert all(th.equal(end, ends[0]) for end in ends)


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same numbers one byte behind where they should begin."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@is_built
def test_parameters_may_lie_anywhere() -> None:
    """They are moved for training, and back into whatever memory they had."""
    model = cartpole(engine="compiled")
    weight = model.policy.value_net.weight
    memory = np.zeros(weight.numel() + 1, np.float32)
    weight.data = th.from_numpy(memory[1:].reshape(tuple(weight.shape))).copy_(weight.data)
    other = model.policy.action_net.weight
    other.data = other.data.t().contiguous().t()
    model.learn(64)
    np.testing.assert_array_equal(memory[1:], weight.detach().numpy().ravel())
    assert not other.is_contiguous()


# ------------------------------------------------------------------------- choice


def test_auto_takes_it_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(ACTION_SPACES["discrete"])
    assert choose_engine("auto", policy).engine.name == FASTEST
    monkeypatch.setenv(library.VARIABLE, "none")
    choice = choose_engine("auto", policy)
    assert choice.engine is NumpyEngine
    assert str(choice) == "numpy (compiled: SCRATCH_PPO_KERNEL=none in the environment)"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda path: path.unlink(missing_ok=True),
            "its kernel was not built; pip install does that where there is a C compiler",
        ),
        (lambda path: path.write_bytes(b"no library"), "its kernel cannot be loaded"),
        (lambda path: path.write_bytes(b""), "its kernel cannot be loaded"),
    ],
)
def test_a_library_that_is_not_one(
    spoil: Callable[[Path], Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The NumPy engine serves, and ``verbose=1`` says why."""
    path = tmp_path / "_kernel.so"
    spoil(path)
    monkeypatch.setattr(library, "_PATH", path)
    cartpole(verbose=1).learn(32)
    assert f"Using the engine numpy (compiled: {reason}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"compiled: {reason}"):
        cartpole(engine="compiled")
    with pytest.raises(RuntimeError, match=reason):
        library.load_kernel()


@is_built
def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stale = tmp_path / "stale.so"  # another name is another entry of the cache
    shutil.copy(library._PATH, stale)
    monkeypatch.setattr(library, "_PATH", stale)
    monkeypatch.setattr(library, "_VERSION", library._VERSION + 1)
    reason = choose_engine("auto", make_policy(ACTION_SPACES["discrete"])).refusals["compiled"]
    assert reason == f"its kernel is of version {library._VERSION - 1}, not {library._VERSION}: install the package again"


@is_built
def test_instruction_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AVAILABLE[0] == "generic"
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert library.load_kernel().instruction_set == AVAILABLE[-1]
    for name in library.INSTRUCTION_SETS:
        monkeypatch.setenv(library.VARIABLE, name)
        if name in AVAILABLE:
            assert library.load_kernel().instruction_set == name
        else:
            assert "names an instruction set that this machine does not have" in str(library.kernel_reason())
    monkeypatch.setenv(library.VARIABLE, "mmx")
    assert library.kernel_reason() == "SCRATCH_PPO_KERNEL=mmx in the environment names no instruction set"


@is_built
def test_more_layers_than_it_takes() -> None:
    policy = make_policy(ACTION_SPACES["discrete"], net_arch={"pi": [2] * 62, "vf": [2]})
    assert choose_engine("auto", policy).refusals == {"compiled": "it takes at most 64 layers"}
    make_engine("compiled", make_policy(ACTION_SPACES["discrete"], net_arch={"pi": [2] * 61, "vf": [2]}))


@is_built
@pytest.mark.parametrize("action_space", ["discrete", "multidiscrete", "multibinary"])
def test_the_gradient_with_masks(action_space: str, instruction_set: str) -> None:
    maskable = pytest.importorskip("sb3_contrib.common.maskable.policies").MaskableActorCriticPolicy
    policy = maskable(OBSERVATION_SPACES["box"], ACTION_SPACES[action_space], ConstantSchedule(1e-3))
    batch, config = masked_rollout(policy, 70), update_config(n_epochs=1, batch_size=70, max_grad_norm=1e9, ent_coef=0.01)
    expected, exact = autograd(copy.deepcopy(policy).double(), in_double(Batch.of(batch.dataset(), np.asarray)), config)
    stats = CompiledEngine(policy).update(batch, config)
    for parameter, gradient in zip(policy.parameters(), exact, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9
    assert stats.metrics()["loss"] == pytest.approx(expected.total.item(), rel=1e-5)
    assert stats.kl == pytest.approx(0, abs=1e-6)


def masked_rollout(policy: ActorCriticPolicy, n_steps: int) -> ScratchRolloutBuffer:
    """By a policy with a little of other probabilities, where some choices were not allowed."""
    rng = np.random.default_rng(0)
    splits = np.cumsum(choices(policy.action_space))[:-1]
    buffer = ScratchRolloutBuffer(n_steps, policy.observation_space, policy.action_space)
    for _ in range(n_steps):
        mask = rng.random(sum(choices(policy.action_space))) < 0.6
        for part in np.split(mask, splits):
            part[rng.integers(len(part))] = True
        observation = rng.normal(size=(1, *policy.observation_space.shape)).astype(np.float32)
        action = np.array([[rng.choice(np.flatnonzero(part)) for part in np.split(mask, splits)]])
        with th.no_grad():
            distribution = policy.get_distribution(th.as_tensor(observation), mask[None])
            log_prob = distribution.log_prob(th.as_tensor(action)) + 0.1 * rng.normal()
        extras = {"action_masks": mask[None]}
        params = distribution_parameters(distribution)
        buffer.add(observation, action, rng.normal(size=1), np.zeros(1), th.zeros(1), log_prob, params, None, extras)
    buffer.compute_returns_and_advantage(th.zeros(1), np.zeros(1))
    return buffer


def test_an_import_does_not_load_it() -> None:
    code = "import sys, sb3_ppo_from_scratch; print('_kernel' in open('/proc/self/maps').read())"
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list what a process has loaded")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "False"


def test_without_a_compiler_there_is_no_library_and_no_error(tmp_path: Path) -> None:
    """What a compiler builds is in the wheel, see ``test_package.py``."""
    pytest.importorskip("setuptools", "70.1")
    copied = tmp_path / "sb3_ppo_from_scratch"
    shutil.copytree(ROOT / "sb3_ppo_from_scratch", copied, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "hyperparams", tmp_path / "hyperparams")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "CC": "/bin/false"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (copied / "engines" / "compiled" / "_kernel.so").exists()
