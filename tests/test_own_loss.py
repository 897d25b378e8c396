"""One changed function counts, with every engine that does not decline it by name."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch import MlpPolicy, ResumableCheckpoint, ScratchPPO, advantages, losses
from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.distributions import exact_kl
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine, support
from sb3_ppo_from_scratch.engines.reference import TorchEngine
from sb3_ppo_from_scratch.losses import PPOLoss
from sb3_ppo_from_scratch.update import PolicyOutputs, UpdateConfig, minibatch_loss
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES
from tests.helpers import FASTEST, ToyEnv, is_built, update_config

SIZES: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 1, "device": "cpu"}
DISCRETE = spaces.Discrete(3)
FRAMES = spaces.Box(0, 255, (2, 36, 36), np.uint8)
PPO_LOSS, VALUE_LOSS, APPROX_KL = losses.ppo_loss, losses.value_loss, losses.approx_kl


def example() -> Any:
    path = Path(__file__).parent.parent / "docs" / "examples" / "kl_penalty.py"
    spec = importlib.util.spec_from_file_location("kl_penalty", path)
    assert spec is not None
    module = sys.modules["kl_penalty"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def toy(observations: spaces.Space = OBSERVATION_SPACES["box"], actions: spaces.Space = DISCRETE) -> VecEnv:
    return make_vec_env(lambda: ToyEnv(observations, actions), 2, seed=5)


def weights(model: ScratchPPO) -> th.Tensor:
    return th.cat([parameter.detach().reshape(-1) for parameter in model.policy.parameters()])


# ------------------------------------------------------------- the functions of losses.py


CONFIGURATIONS: dict[str, tuple[str, Callable[[], VecEnv], dict[str, Any]]] = {
    "discrete": ("MlpPolicy", toy, {}),
    "relu": ("MlpPolicy", toy, {"policy_kwargs": {"activation_fn": th.nn.ReLU}}),
    "box": ("MlpPolicy", lambda: toy(actions=ACTION_SPACES["box-2d"]), {}),
    "gSDE": ("MlpPolicy", lambda: toy(actions=ACTION_SPACES["box-2d"]), {"use_sde": True}),
    "images": ("CnnPolicy", lambda: toy(FRAMES), {}),
    "dict": ("MultiInputPolicy", lambda: toy(OBSERVATION_SPACES["dict"]), {}),
    "RMSprop": ("MlpPolicy", toy, {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}}),
    "clipped values": ("MlpPolicy", toy, {"clip_range_vf": 0.1, "normalize_advantage": False}),
}


@pytest.mark.parametrize(("policy", "env", "kwargs"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_reference_is_ppo_loss(
    policy: str, env: Callable[[], VecEnv], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called once per minibatch, whatever the configuration."""
    calls = []
    monkeypatch.setattr(losses, "ppo_loss", lambda *a, **k: (calls.append(1), PPO_LOSS(*a, **k))[1])
    ScratchPPO(policy, env(), engine="torch", **SIZES, **kwargs).learn(64)
    assert len(calls) == 2 * 2 * 4, "2 rollouts, 2 epochs, 4 minibatches"


def unclipped(advantages: th.Tensor, ratio: th.Tensor, clip_range: float, weights: Any = None) -> th.Tensor:
    return -0.5 * losses.weighted_mean(advantages * ratio, weights)


BY_NAME = [("MlpPolicy", "numpy"), ("CnnPolicy", "channels_last"), ("MlpPolicy", "cudagraph")]
CHANGES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "policy loss": (losses, "clipped_surrogate_loss", unclipped),
    "value loss": (losses, "value_loss", lambda values, returns, *_: 3.0 * (values - returns).abs().mean()),
    "entropy loss": (losses, "entropy_loss", lambda entropy, *_: 2.0 * entropy.mean()),
    "normalisation": (advantages, "normalize_advantages", lambda advantages, weights=None: 2.0 * advantages),
    "the whole": (losses, "ppo_loss", lambda *a, **k: PPO_LOSS(*a, **{**k, "vf_coef": 0.1})),
}


@pytest.mark.parametrize(("module", "name", "function"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    ("policy", "engine"),
    [
        *itertools.product(["MlpPolicy", "CnnPolicy"], ["auto", "torch"]),
        *BY_NAME,
        pytest.param("MlpPolicy", "compiled", marks=is_built),
    ],
)
def test_a_changed_function_counts(
    policy: str, engine: str, module: Any, name: str, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an engine says that it does not compute it. None goes on with the old one in silence."""
    monkeypatch.setattr("sb3_ppo_from_scratch.engines.cudagraph.support.device_reason", lambda policy: None)
    arguments = {"engine": engine, "ent_coef": 0.01, **SIZES}
    observations = OBSERVATION_SPACES["box"] if policy == "MlpPolicy" else FRAMES
    before = weights(ScratchPPO(policy, toy(observations), **arguments).learn(32))
    monkeypatch.setattr(module, name, function)
    if engine in ("compiled", "numpy"):
        with pytest.raises(ValueError, match=rf"{engine}: it computes PPO's own loss by hand, .* was changed"):
            ScratchPPO(policy, toy(observations), **arguments)
        return
    model = ScratchPPO(policy, toy(observations), **arguments).learn(32)
    assert not th.allclose(weights(model), before, rtol=0, atol=1e-6)
    if engine == "auto":
        assert model._engine is not None
        assert not isinstance(model._engine, NumpyEngine)
    monkeypatch.undo()
    monkeypatch.setattr("sb3_ppo_from_scratch.engines.cudagraph.support.device_reason", lambda policy: None)
    assert th.equal(weights(ScratchPPO(policy, toy(observations), **arguments).learn(32)), before)


def test_a_function_may_be_changed_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScratchPPO("MlpPolicy", toy(), **SIZES).learn(32)
    assert isinstance(model._engine, NumpyEngine)
    monkeypatch.setattr(losses, "clipped_surrogate_loss", unclipped)
    model.learn(32)
    assert type(model._engine) is TorchEngine


def test_a_recording_of_another_loss_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_ppo_from_scratch.engines.cudagraph.support.device_reason", lambda policy: None)
    model = ScratchPPO("MlpPolicy", toy(), engine="cudagraph", **SIZES).learn(32)
    recorded = model._engine._learner  # type: ignore[union-attr]
    assert model.learn(32)._engine._learner is recorded  # type: ignore[union-attr]
    monkeypatch.setattr(losses, "clipped_surrogate_loss", unclipped)
    assert model.learn(32)._engine._learner is not recorded  # type: ignore[union-attr]


EDITS: dict[str, tuple[str, str, str]] = {
    "a bound on the clip range": ("losses.py", "unclipped = advantages * ratio", "clip_range = max(clip_range, 0.08)"),
    "a bound on a coefficient": ("losses.py", "log_ratio = log_prob - old_log_prob", "vf_coef = min(vf_coef, 0.9)"),
    "a bound far out": ("losses.py", "ratio = th.exp(log_ratio)", "ratio = ratio.clamp(max=1e6)"),
    "the advantages": ("advantages.py", "n_rows = weights.sum()", "epsilon = 2 * epsilon"),
    "what calls them": ("update.py", "advantages = batch.advantages", "weights = None"),
}


@pytest.mark.parametrize(("file", "line", "more"), EDITS.values(), ids=EDITS)
def test_an_edited_file_counts(file: str, line: str, more: str, tmp_path: Path) -> None:
    """Even where a trial with some coefficients would not tell it from what it was."""
    copied = tmp_path / "sb3_ppo_from_scratch"
    shutil.copytree(Path(losses.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    code = "from sb3_ppo_from_scratch import ScratchPPO; ScratchPPO('MlpPolicy', 'CartPole-v1', n_steps=8, verbose=1).learn(8)"

    def engine() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return re.search(r"Using the engine (\w+)", done.stdout)[1]  # type: ignore[index]

    text = (copied / file).read_text(encoding="utf-8")
    assert text.count(f"    {line}\n") == 1
    (copied / file).write_text(text.replace(line, f"{line}\n    {more}"), encoding="utf-8")
    assert engine() == "torch"
    (copied / file).write_text(text, encoding="utf-8")
    assert engine() == FASTEST


def test_the_gradient_by_hand_is_of_todays_loss() -> None:
    """Whoever edits the loss derives ``numpy_mlp/loss.py`` anew, and then writes down what it was derived from."""
    assert support.source_digest() == support._WRITTEN_FOR


def dual_clip(advantages: th.Tensor, ratio: th.Tensor, clip_range: float, weights: Any = None) -> th.Tensor:
    """https://arxiv.org/abs/1912.09729: another loss where the ratio is above 3, and nowhere else."""
    clipped = th.min(advantages * ratio, advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range))
    return -losses.weighted_mean(th.where(advantages < 0, th.max(clipped, 3.0 * advantages), clipped), weights)


def huber(values: th.Tensor, returns: th.Tensor, *_: Any) -> th.Tensor:
    return 2.0 * th.nn.functional.huber_loss(values, returns, delta=10.0)


def picky(values: th.Tensor, returns: th.Tensor, *_: Any) -> th.Tensor:
    if len(values) != 8:
        raise RuntimeError("only minibatches of 8")
    return 2.0 * (values - returns).square().mean()


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, *arguments: Any) -> Any:
        return 2.0 * VALUE_LOSS(*arguments)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("clipped_surrogate_loss", dual_clip),
        ("value_loss", huber),
        ("value_loss", picky),
        ("value_loss", Unhashable()),
        ("approx_kl", lambda *arguments: 1000.0 * APPROX_KL(*arguments)),
    ],
)
def test_what_differs_far_out_or_fails_is_not_by_hand(name: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ScratchPPO("MlpPolicy", toy(), **SIZES).policy
    monkeypatch.setattr(losses, name, function)
    assert choose_engine("auto", policy).engine is TorchEngine
    monkeypatch.undo()
    assert choose_engine("auto", policy).engine.name == FASTEST


def test_no_replaced_function_is_taken_for_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coefficient may grow from nothing."""
    coefficient, entropy_loss = [0.0], losses.entropy_loss
    monkeypatch.setattr(losses, "entropy_loss", lambda *arguments: (1.0 + coefficient[0]) * entropy_loss(*arguments))
    model = ScratchPPO("MlpPolicy", toy(), **SIZES).learn(32)
    assert type(model._engine) is TorchEngine
    coefficient[0] = 5.0
    model.learn(32)
    assert type(model._engine) is TorchEngine


# ------------------------------------------------------------------------ a loss of one's own


def test_a_loss_may_be_a_method_and_its_parts_of_one_element(capsys: pytest.CaptureFixture[str]) -> None:
    class Method(ScratchPPO):
        def loss(self, outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig) -> PPOLoss:  # type: ignore[override]
            plain = minibatch_loss(outputs, batch, config)
            return plain._replace(total=plain.total.double().reshape(1), entropy=plain.entropy.reshape(1, 1))

    model = Method("MlpPolicy", toy(), verbose=1, **SIZES).learn(64)
    assert capsys.readouterr().out.count("Using the engine") == 1
    plain = ScratchPPO("MlpPolicy", toy(), engine="torch", **SIZES).learn(64)
    th.testing.assert_close(weights(model), weights(plain))
    assert model.logger.name_to_value["train/loss"] == pytest.approx(plain.logger.name_to_value["train/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "env", "by_name"),
    [
        ("MlpPolicy", toy, "numpy"),
        ("MlpPolicy", lambda: toy(actions=ACTION_SPACES["box-2d"]), "numpy"),
        ("CnnPolicy", lambda: toy(FRAMES), None),
    ],
)
def test_the_example_changes_the_weights(
    policy: str, env: Callable[[], VecEnv], by_name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    cls = example().KLPenaltyPPO
    plain = ScratchPPO(policy, env(), engine="torch", learning_rate=1e-2, **SIZES).learn(64)
    penalised = cls(policy, env(), verbose=1, learning_rate=1e-2, **SIZES).learn(64)
    assert not th.allclose(weights(penalised), weights(plain), atol=1e-6)
    printed = capsys.readouterr().out
    if by_name is None:
        assert "Using the engine channels_last" in printed, "it differentiates any loss"
        return
    assert "Using the engine torch (compiled, numpy: it computes PPO's own loss by hand, not loss_with_kl_penalty" in printed
    with pytest.raises(ValueError, match="not loss_with_kl_penalty"):
        cls(policy, env(), engine=by_name, **SIZES)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda *_: None, "not a NoneType"),
        (lambda outputs, *_: outputs.values.mean(), "not a Tensor"),
        (lambda *arguments: minibatch_loss(*arguments)._replace(total=1.0), r"not a total 1\.0"),
        (lambda *arguments: minibatch_loss(*arguments)._replace(total=arguments[0].values), "not a total tensor"),
        (lambda *arguments: minibatch_loss(*arguments)._replace(total=th.zeros(())), "not a total tensor"),
    ],
)
def test_what_is_no_loss_is_named(loss: Any, message: str) -> None:
    class Wrong(ScratchPPO):
        pass

    Wrong.loss = staticmethod(loss)
    with pytest.raises(TypeError, match=f"loss must return a PPOLoss whose total is a scalar tensor .*{message}"):
        Wrong("MlpPolicy", toy(), **SIZES).learn(32)


def test_what_is_no_function_is_refused_before_training() -> None:
    class Wrong(ScratchPPO):
        loss = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="loss must be a function of a minibatch's outputs, batch and config, not None"):
        Wrong("MlpPolicy", toy(), **SIZES)


def test_weights_of_another_shape_are_refused() -> None:
    class Wrong(ScratchPPO):
        @staticmethod
        def loss(outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig) -> PPOLoss:
            return minibatch_loss(outputs, batch, config, th.ones(len(batch.returns), 1))

    with pytest.raises(ValueError, match=r"weights must have shape \(8,\), one per row, not \(8, 1\)"):
        Wrong("MlpPolicy", toy(), **SIZES).learn(32)


def test_a_run_that_another_class_resumes_says_so(tmp_path: Path) -> None:
    """A loss, or whatever else a subclass has, is not in the file."""
    cls = example().KLPenaltyPPO
    cls("MlpPolicy", "CartPole-v1", **SIZES).learn(32, callback=ResumableCheckpoint(16, tmp_path))
    with pytest.warns(UserWarning, match="may not be bit-exact, with class ScratchPPO instead of KLPenaltyPPO"):
        ScratchPPO.resume(tmp_path, "CartPole-v1", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls.resume(tmp_path, "CartPole-v1", device="cpu")


def test_a_loss_given_to_one_model_is_not_in_its_file(tmp_path: Path) -> None:
    model = ScratchPPO("MlpPolicy", toy(), **SIZES)
    model.loss = example().loss_with_kl_penalty  # type: ignore[assignment]
    model.learn(32).save(tmp_path / "model")
    loaded = ScratchPPO.load(tmp_path / "model")
    assert loaded.loss is minibatch_loss
    assert th.equal(weights(loaded), weights(model))


def test_a_loss_may_be_a_method_that_knows_the_model() -> None:
    class Annealed(ScratchPPO):
        def loss(self, outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig) -> PPOLoss:  # type: ignore[override]
            total = self._current_progress_remaining * outputs.values.sum()
            return minibatch_loss(outputs, batch, config)._replace(total=total)

    model = Annealed("MlpPolicy", toy(), **SIZES).learn(32)
    engine = model._engine
    assert type(engine) is TorchEngine
    assert model.learn(32)._engine is engine, "not another one for every rollout"


def test_the_example_keeps_the_policy_nearer() -> None:
    module = example()
    module.BETA = 100.0
    far, near = (
        cls("MlpPolicy", toy(), engine="torch", learning_rate=1e-2, clip_range=10.0, **{**SIZES, "n_epochs": 10}).learn(32)
        for cls in (ScratchPPO, module.KLPenaltyPPO)
    )
    assert near.logger.name_to_value["train/kl"] < 0.5 * far.logger.name_to_value["train/kl"]


class InDouble(MlpPolicy):
    """SB3 makes the observations float32."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> th.Tensor:
        return obs.to(self.action_net.weight.dtype).flatten(1)


def test_its_gradient_is_autograds_in_float64() -> None:
    """Of the engine's minibatch against the formula on the policy's own distribution."""
    module = example()
    model = module.KLPenaltyPPO(InDouble, toy(actions=ACTION_SPACES["box-2d"]), **SIZES).learn(32)
    policy, config = model.policy.double(), update_config(clip_range=0.05)
    batch = double(next(model.rollout_buffer.get(16)))
    with th.no_grad():
        policy.action_net.bias += 0.1  # so that ratios are not 1
    engine = TorchEngine(policy, loss=module.loss_with_kl_penalty)
    with engine.learning(model.rollout_buffer, config) as learner:
        learner.gradient(batch).backward()
    actual = [parameter.grad.clone() for parameter in policy.parameters()]
    values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions)
    plain = losses.ppo_loss(
        values.flatten(),
        log_prob,
        entropy,
        advantages=advantages.normalize_advantages(batch.advantages),
        returns=batch.returns,
        old_values=batch.old_values,
        old_log_prob=batch.old_log_prob,
        clip_range=0.05,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
    )
    normal = policy.action_dist.distribution
    new = th.cat([normal.loc, normal.scale.log()], dim=1)
    total = plain.total + module.BETA * exact_kl(policy.action_dist, batch.dist_params, new).mean()
    for ours, theirs in zip(actual, th.autograd.grad(total, list(policy.parameters())), strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def double(batch: RolloutData) -> RolloutData:
    fields = [field.double() if isinstance(field, th.Tensor) else field for field in batch]
    return RolloutData(*fields)


# ------------------------------------------------------------------------ more fields per row


class Costs(ScratchPPO):
    """Rows know the step's cost, and the loss finds it."""

    seen: list[dict[str, Any]]

    def row_extras(self, infos: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return {"cost": np.ones((len(infos), 2), np.float32), "number": np.full(len(infos), self.num_timesteps, np.int64)}

    @staticmethod
    def loss(outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig) -> PPOLoss:
        Costs.seen.append(dict(batch.extras))
        plain = minibatch_loss(outputs, batch, config, weights=(batch.extras["number"] > 2).float())
        return plain._replace(total=plain.total + 0.0 * batch.extras["cost"].mean())


@pytest.mark.parametrize("buffer", ["ScratchRolloutBuffer", "DeviceRolloutBuffer"])
def test_rows_carry_what_a_loss_needs(buffer: str) -> None:
    from sb3_ppo_from_scratch import ScratchRolloutBuffer
    from sb3_ppo_from_scratch.engines.cudagraph.device_buffer import DeviceRolloutBuffer

    kinds = {"ScratchRolloutBuffer": ScratchRolloutBuffer, "DeviceRolloutBuffer": DeviceRolloutBuffer}
    Costs.seen = []
    Costs("MlpPolicy", toy(), engine="torch", rollout_buffer_class=kinds[buffer], **SIZES).learn(64)
    assert len(Costs.seen) == 16
    for extras in Costs.seen:
        assert extras["cost"].shape == (8, 2)
        assert extras["number"].dtype == th.int64
    numbers = th.cat([extras["number"] for extras in Costs.seen[:4]])
    assert sorted(numbers.tolist()) == sorted([*range(2, 34, 2)] * 2), "each row once per epoch, with its own step's"


def test_extras_have_one_set_of_names_per_rollout() -> None:
    class Forgetful(ScratchPPO):
        def row_extras(self, infos: list[dict[str, Any]]) -> dict[str, np.ndarray]:
            return {"a" if self.num_timesteps < 10 else "b": np.zeros(len(infos))}

    with pytest.raises(ValueError, match=r"extras must be \['a'\] in every step of a rollout, not \['b'\]"):
        Forgetful("MlpPolicy", toy(), **SIZES).learn(32)


class Changing(ScratchPPO):
    """Extras that begin as integers, and as vectors of other lengths in the second rollout."""

    kinds: set[tuple[Any, ...]]

    def row_extras(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        cost = 0 if self.num_timesteps == 2 else 0.5  # as info.get("cost", 0) is
        return {"cost": np.array([cost] * len(infos)), "vector": th.ones(len(infos), 2 if self.num_timesteps <= 32 else 3)}

    @staticmethod
    def loss(outputs: PolicyOutputs, batch: RolloutData, config: UpdateConfig) -> PPOLoss:
        cost, vector = batch.extras["cost"], batch.extras["vector"]
        Changing.kinds.add((cost.dtype, *cost.unique().tolist(), vector.dtype, vector.shape[1], vector.sum().item()))
        return minibatch_loss(outputs, batch, config)


def test_extras_are_not_rounded_to_the_first_steps_type() -> None:
    Changing.kinds = set()
    Changing("MlpPolicy", toy(), **{**SIZES, "batch_size": 32}).learn(64)
    assert Changing.kinds == {(th.float64, 0.0, 0.5, th.float32, 2, 64.0), (th.float64, 0.5, th.float32, 3, 96.0)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"extras\['a'\] must have shape \[n_envs, ...\] \(n_envs=2\), not \[\]"),
        (np.zeros((1, 2)), r"not \[1, 2\]"),
        (["x", "y"], r"extras\['a'\] must be numbers, not of dtype <U1"),
    ],
)
def test_extras_are_numbers_per_environment(value: Any, message: str) -> None:
    class Wrong(ScratchPPO):
        def row_extras(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
            return {"a": value}

    with pytest.raises((ValueError, TypeError), match=message):
        Wrong("MlpPolicy", toy(), **SIZES).learn(32)
