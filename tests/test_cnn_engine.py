"""The engine of ``CnnPolicy`` on CPU: the reference's numbers up to stated rounding, and frames that are never transposed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn
from torch.nn import functional as F

from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer, engines
from sb3_ppo_from_scratch.engines.channels_last import engine as module
from sb3_ppo_from_scratch.engines.channels_last.engine import ChannelsLastEngine, FrameLoader, OneDnnLinear, nature_features
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from tests.helpers import ToyEnv, make_engine, train, update_config

FRAMES = spaces.Box(0, 255, (2, 36, 36), np.uint8)  # NatureCNN takes nothing smaller
SIZES: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2}
# Of what is computed forwards and backwards, relative to its norm. Products are rounded to 24 bits or 8. The gradient of so
# small a batch, a sum that mostly cancels, comes out within 4e-6 and 0.12 of the reference's on an AMD EPYC with AVX-512.
FORWARD = {"fp32": 1e-5, "bf16": 0.03}
GRADIENT = {"fp32": 1e-4, "bf16": 0.3}
# Adam divides each gradient by its own size, and each step starts from where the last one led: 1e-5 and 0.3.
UPDATE = {"fp32": 1e-3, "bf16": 0.6}
ACTIONS = {
    "discrete": spaces.Discrete(4),
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
}


def make_policy(actions: spaces.Space = ACTIONS["discrete"], frames: spaces.Box = FRAMES, **kwargs: Any) -> ActorCriticPolicy:
    th.manual_seed(5)
    return ActorCriticCnnPolicy(frames, actions, ConstantSchedule(1e-3), **kwargs)


def make_env(actions: spaces.Space = ACTIONS["discrete"], shape: tuple[int, ...] = (36, 36, 2)) -> VecEnv:
    return DummyVecEnv([lambda: ToyEnv(spaces.Box(0, 255, shape, np.uint8), actions)] * 2)


def full_buffer(policy: ActorCriticPolicy, n_steps: int = 10, n_envs: int = 3) -> ScratchRolloutBuffer:
    """Random frames and rewards, and what ``policy`` says of them."""
    buffer = ScratchRolloutBuffer(n_steps, policy.observation_space, policy.action_space, "cpu", n_envs=n_envs)
    rng = np.random.default_rng(7)
    for _ in range(n_steps):
        obs = rng.integers(0, 256, (n_envs, *policy.observation_space.shape)).astype(policy.observation_space.dtype)
        step = TorchEngine(policy).act(th.as_tensor(obs))
        starts = rng.random(n_envs) < 0.1
        buffer.add(obs, step.actions, rng.normal(size=n_envs), starts, step.values, step.log_probs, step.dist_params)
    buffer.compute_returns_and_advantage(th.zeros(n_envs), np.zeros(n_envs, bool))
    return buffer


def updated(engine: str, precision: str, options: dict[str, Any], **policy_kwargs: Any) -> tuple[ActorCriticPolicy, Any]:
    """One update on the same data in the same order by the given engine: the policy, and what was measured."""
    policy = make_policy(**policy_kwargs)
    buffer = full_buffer(policy)
    np.random.seed(11)
    stats = make_engine(engine, policy, precision).update(buffer, update_config(**options))
    return policy, stats


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"{what} is off by {error:.1e}"


# ------------------------------------------------------------------- numbers


@pytest.mark.parametrize("divisor", [1.0, 255.0])
def test_features_and_their_gradients_in_double_precision(divisor: float) -> None:
    extractor = NatureCNN(FRAMES, features_dim=16).double()
    frames = th.randint(0, 256, (3, 2, 36, 36)).double()
    expected = extractor(frames / divisor)
    weight = th.randn_like(expected)
    (expected * weight).sum().backward()
    gradients = [parameter.grad.clone() for parameter in extractor.parameters()]
    extractor.zero_grad()
    actual = nature_features(extractor, frames.contiguous(memory_format=th.channels_last), divisor)
    (actual * weight).sum().backward()
    assert_close(actual, expected, 1e-12, "features")
    for (name, parameter), gradient in zip(extractor.named_parameters(), gradients, strict=True):
        assert parameter.grad.dtype == th.float64
        assert_close(parameter.grad, gradient, 1e-12, name)


@pytest.mark.skipif(not OneDnnLinear.is_available(), reason="this build of torch has no such product")
@pytest.mark.parametrize("batch_size", [1, 2, 30])
def test_onednn_linear_is_torchs(batch_size: int) -> None:
    x, weight, bias = inputs = [th.randn(*shape, requires_grad=True) for shape in ((batch_size, 40), (7, 40), (7,))]
    expected, actual = F.linear(x, weight, bias), OneDnnLinear.apply(x, weight, bias)
    assert_close(actual, expected, 1e-6, "output")
    upstream = th.randn(batch_size, 7)
    gradients = [th.autograd.grad(output, inputs, upstream) for output in (actual, expected)]
    for name, ours, theirs in zip(("x", "weight", "bias"), *gradients, strict=True):
        assert ours.is_contiguous()
        assert_close(ours, theirs, 1e-6, name)


def test_without_onednns_product_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, frames = NatureCNN(FRAMES, features_dim=16), th.rand(3, 2, 36, 36)
    with_it = nature_features(extractor, frames)
    monkeypatch.setattr(OneDnnLinear, "is_available", lambda: False)
    assert_close(nature_features(extractor, frames), with_it, 1e-5, "features")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("actions", ACTIONS)
def test_gradient_is_the_references(actions: str, precision: str) -> None:
    gradients = []
    for name in ("torch", "channels_last"):
        policy = make_policy(ACTIONS[actions])
        batch = next(full_buffer(policy).get(30))
        engine = make_engine(name, policy, "fp32" if name == "torch" else precision)
        with engine.learning(full_buffer(policy), update_config(normalize_advantage=False)) as learner:
            gradient = learner.gradient(batch)
            gradient.backward()
        gradients.append({"loss": gradient.loss.total.detach(), **{key: p.grad for key, p in policy.named_parameters()}})
    for key, expected in gradients[0].items():
        assert gradients[1][key].dtype == th.float32
        assert_close(gradients[1][key], expected, GRADIENT[precision], key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("options", "policy_kwargs"),
    [
        pytest.param({}, {}, id="truncated last minibatch"),
        pytest.param({"clip_range_vf": 0.01}, {}, id="clipped values"),
        pytest.param({"batch_size": 30, "max_grad_norm": 1e-3}, {}, id="one minibatch, clipped gradient"),
        pytest.param({}, {"net_arch": [8], "activation_fn": nn.ReLU}, id="layers after the features"),
        pytest.param({}, {"actions": ACTIONS["box"], "use_sde": True}, id="gSDE"),
        pytest.param({}, {"optimizer_kwargs": {"foreach": True}}, id="foreach"),
        pytest.param({}, {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"amsgrad": True}}, id="AdamW"),
    ],
)
def test_update_is_the_references(precision: str, options: dict[str, Any], policy_kwargs: dict[str, Any]) -> None:
    expected, expected_stats = updated("torch", "fp32", options, **policy_kwargs)
    actual, stats = updated("channels_last", precision, options, **policy_kwargs)
    start = make_policy(**policy_kwargs)
    for (name, a), b, before in zip(actual.named_parameters(), expected.parameters(), start.parameters(), strict=True):
        assert_close((a - before).detach(), (b - before).detach(), UPDATE[precision], f"the change of {name}")
        state, other = actual.optimizer.state[a], expected.optimizer.state[b]
        assert state.keys() == other.keys()
        assert state["step"] == other["step"]
        for key in state.keys() - {"step"}:
            assert (state[key].dtype, state[key].stride()) == (th.float32, a.stride())
            if precision == "fp32":
                assert_close(state[key], other[key], UPDATE[precision], f"{key} of {name}")
    metrics = stats.metrics()
    for key, value in expected_stats.metrics().items():
        absolute = 0.1 if key == "clip_fraction" else GRADIENT[precision] / 10  # a whole row is in or out of the clip range
        assert metrics[key] == pytest.approx(value, rel=UPDATE[precision], abs=absolute), key
    assert actual.optimizer.state_dict()["param_groups"] == expected.optimizer.state_dict()["param_groups"]
    assert expected_stats.epochs == stats.epochs == 2


def test_update_stops_at_the_kl() -> None:
    expected, expected_stats = updated("torch", "fp32", {"target_kl": 1e-5, "n_epochs": 5})
    actual, stats = updated("channels_last", "fp32", {"target_kl": 1e-5, "n_epochs": 5})
    assert stats.stopped_early
    assert expected_stats.stopped_early
    assert stats.epochs == expected_stats.epochs
    steps = [policy.optimizer.state[policy.value_net.bias]["step"] for policy in (actual, expected)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_acts_as_the_policy_does(precision: str) -> None:
    policy = make_policy()
    engine = make_engine("channels_last", policy, precision)
    obs = th.randint(0, 256, (4, 2, 36, 36), dtype=th.uint8)
    with th.no_grad():
        _, values, _ = policy(obs)
        logits = policy.get_distribution(obs).distribution.logits
    step = engine.act(obs)
    log_prob = step.dist_params.gather(1, th.as_tensor(step.actions)[:, None]).flatten()
    assert th.equal(step.log_probs, log_prob)
    for name, actual, expected in (("values", step.values, values), ("logits", step.dist_params, logits)):
        assert actual.dtype == th.float32
        assert_close(actual, expected, FORWARD[precision], name)
    assert th.equal(engine.predict_values(obs), step.values)


def test_images_that_are_already_normalized() -> None:
    frames = spaces.Box(0.0, 1.0, (2, 36, 36))
    policy = make_policy(frames=frames, normalize_images=False, features_extractor_kwargs={"normalized_image": True})
    engine = make_engine("channels_last", policy)
    obs = th.rand(4, 2, 36, 36)
    assert_close(engine.predict_values(obs), policy.predict_values(obs).detach(), FORWARD["fp32"], "values")
    engine.update(full_buffer(policy), update_config())


def test_trains_as_the_reference_does() -> None:
    """Through rollouts and several updates; the random numbers drawn are the same, so the first rollouts are."""
    runs = [train(ScratchPPO, "CnnPolicy", make_env, 64, engine=engine, **SIZES) for engine in ("torch", "channels_last")]
    assert runs[0].random_states == runs[1].random_states
    assert runs[0].metrics[0].keys() == runs[1].metrics[0].keys()
    for key, value in runs[0].metrics[0].items():
        assert runs[1].metrics[0][key] == pytest.approx(value, rel=1e-2, abs=1e-4), key


# -------------------------------------------------------------------- memory


def test_frames_lie_in_memory_as_environments_make_them() -> None:
    buffer = full_buffer(make_policy(), n_steps=4)
    assert buffer.observations.shape == (4, 3, 2, 36, 36)
    assert buffer.observations[0].strides == (4 * 2 * 36 * 36, 1, 36 * 2, 2)
    data = buffer.dataset().observations
    assert data.is_contiguous(memory_format=th.channels_last)
    assert data.data_ptr() == buffer.observations.ctypes.data, "a copy"


def test_a_selection_can_keep_the_layout() -> None:
    data, rows = full_buffer(make_policy()).dataset(), th.tensor([7, 3, 20])
    kept, plain = data.take(rows, channels_last=True).observations, data.take(rows).observations
    assert kept.is_contiguous(memory_format=th.channels_last)
    assert plain.is_contiguous(), "SB3's kernels give SB3's bits for channels-first frames only"
    assert th.equal(kept, plain)
    assert th.equal(kept, data.observations[rows])


def test_minibatches_pass_through_the_same_memory() -> None:
    buffer = full_buffer(make_policy())
    data, loader = buffer.dataset(), FrameLoader(buffer, th.bfloat16)
    np.random.seed(1)
    expected = [batch.observations for batch in data.minibatches(8)]
    np.random.seed(1)
    addresses, sizes = set(), []
    for batch, frames in zip(loader.minibatches(8), expected, strict=True):
        assert batch.observations.is_contiguous(memory_format=th.channels_last)
        assert batch.observations.dtype == th.bfloat16
        assert th.equal(batch.observations.to(th.uint8), frames), "every byte is exact in bfloat16"
        addresses.add(batch.observations.data_ptr())
        sizes.append(len(frames))
    assert sizes == [8, 8, 8, 6]
    assert len(addresses) == 1


def test_minibatches_leave_out_what_is_no_transition() -> None:
    """And need no copy of the frames for it."""
    buffer = full_buffer(make_policy())
    buffer.valid = np.random.default_rng(0).random(buffer.values.shape) < 0.7
    loader = FrameLoader(buffer, th.float32)
    assert loader._frames.data_ptr() == buffer.observations.ctypes.data
    np.random.seed(1)
    expected = list(buffer.dataset().minibatches(8))
    np.random.seed(1)
    for batch, other in zip(loader.minibatches(8), expected, strict=True):
        assert th.equal(batch.observations, other.observations.float())
        assert th.equal(batch.advantages, other.advantages)


def test_features_see_the_loaders_frames_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No conversion and no transposition between the loader and the first convolution; products in the right dtype."""
    seen: list[th.Tensor] = []
    made: list[th.Tensor] = []

    def spy(extractor: NatureCNN, frames: th.Tensor, divisor: float) -> th.Tensor:
        seen.append(frames)
        return nature_features(extractor, frames, divisor)

    class Spy(FrameLoader):
        def _gather(self, rows: th.Tensor) -> th.Tensor:
            made.append(super()._gather(rows))
            return made[-1]

    monkeypatch.setattr(module, "nature_features", spy)
    monkeypatch.setattr(module, "FrameLoader", Spy)
    updated("channels_last", "bf16", {})
    assert len(seen) == len(made) == 2 * 4
    assert all(frames.data_ptr() == gathered.data_ptr() for frames, gathered in zip(seen, made, strict=True))
    assert {frames.dtype for frames in seen} == {th.bfloat16}


def test_loss_is_computed_in_float32() -> None:
    policy = make_policy()
    engine = make_engine("channels_last", policy, "bf16")
    buffer = full_buffer(policy)
    with engine.learning(buffer, update_config()) as learner:
        gradient = learner.gradient(next(buffer.get(8)))
    assert {part.dtype for part in (*gradient.loss, *gradient.kl_term)} == {th.float32}


def test_a_foreign_buffer_will_do() -> None:
    class Strange(ScratchRolloutBuffer):
        def get(self, batch_size: int | None = None) -> Any:
            yield from super().get(batch_size)

    model = ScratchPPO("CnnPolicy", make_env(), engine="channels_last", rollout_buffer_class=Strange, **SIZES)
    assert model.learn(32)._n_updates == 2


# -------------------------------------------------------------------- choice


def with_hook(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.features_extractor.cnn[0].register_forward_hook(lambda *_: None)
    return policy


def with_another_layer(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy.features_extractor.cnn[1] = nn.Tanh()
    return policy


class OwnExtractor(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Space):
        super().__init__(space, 4)
        self.linear = nn.Linear(2 * 36 * 36, 4)

    def forward(self, frames: th.Tensor) -> th.Tensor:
        return self.linear(frames.flatten(1))


class OwnPolicy(ActorCriticCnnPolicy):
    pass


UNSUPPORTED: dict[str, tuple[Callable[[], ActorCriticPolicy], str]] = {
    "hook": (lambda: with_hook(make_policy()), "hooks"),
    "another layer": (lambda: with_another_layer(make_policy()), "NatureCNN"),
    "another extractor": (lambda: make_policy(features_extractor_class=OwnExtractor), "NatureCNN"),
    "two extractors": (lambda: make_policy(share_features_extractor=False), "shared"),
    "subclass": (lambda: OwnPolicy(FRAMES, ACTIONS["discrete"], ConstantSchedule(1e-3)), "OwnPolicy"),
    "SGD": (lambda: make_policy(optimizer_class=th.optim.SGD, optimizer_kwargs={}), "Adam"),
    "capturable": (lambda: make_policy(optimizer_kwargs={"capturable": True}), "capturable"),
    "double": (lambda: make_policy().double(), "float32"),
}


@pytest.mark.parametrize(("policy", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_says_what_it_cannot_serve(policy: Callable[[], ActorCriticPolicy], why: str) -> None:
    model = policy()
    with pytest.raises(ValueError, match=f"cannot serve this model.*{why}"):
        make_engine("channels_last", model)
    with pytest.raises(ValueError, match=why):
        make_engine("auto", model, "bf16")
    assert type(make_engine("auto", model)) is not ChannelsLastEngine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_takes_it(precision: str) -> None:
    engine = make_engine("auto", make_policy(), precision)
    assert type(engine) is ChannelsLastEngine
    assert engine.precision == precision


def test_the_reference_has_one_precision() -> None:
    with pytest.raises(ValueError, match=r"precision='bf16'.*torch: its precision must be 'fp32'"):
        ScratchPPO("CnnPolicy", make_env(), engine="torch", precision="bf16")


def test_what_becomes_unsupported_goes_to_the_reference() -> None:
    model = ScratchPPO("CnnPolicy", make_env(), **SIZES).learn(32)
    assert type(model._engine) is ChannelsLastEngine
    calls: list[int] = []
    model.policy.features_extractor.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    model.learn(32)
    assert type(model._engine) is TorchEngine
    assert calls


@pytest.mark.parametrize("has_instructions", [True, False])
def test_warns_where_bf16_is_slow(has_instructions: bool, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(th.cpu, name, lambda: has_instructions)
    assert engines.has_bf16_instructions() == has_instructions
    ScratchPPO("CnnPolicy", make_env(), precision="bf16", **SIZES)
    messages = [str(warning.message) for warning in recwarn]
    assert any("has no bfloat16 instructions" in message for message in messages) != has_instructions


# -------------------------------------------------------------------- saving


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saves_what_everybody_can_load(precision: str, tmp_path: Path) -> None:
    model = ScratchPPO("CnnPolicy", make_env(), precision=precision, seed=1, **SIZES).learn(32)
    model.save(tmp_path / "model")
    obs = model.env.reset()
    expected, _ = model.predict(obs, deterministic=True)
    fresh = make_policy().state_dict()
    for key, value in model.policy.state_dict().items():
        assert (value.shape, value.dtype, value.stride()) == (fresh[key].shape, th.float32, fresh[key].stride()), key
    for algorithm in (ScratchPPO, PPO):
        loaded = algorithm.load(tmp_path / "model", env=make_env())
        for key, value in model.get_parameters()["policy"].items():
            assert th.equal(loaded.policy.state_dict()[key], value), key
        assert np.array_equal(loaded.predict(obs, deterministic=True)[0], expected)
        assert not any(group["fused"] for group in loaded.policy.optimizer.param_groups)
        loaded.learn(32)
    reloaded = ScratchPPO.load(tmp_path / "model")
    assert (reloaded.precision, reloaded.engine) == (precision, "auto")
    assert ScratchPPO.load(tmp_path / "model", precision="fp32").precision == "fp32"


def test_says_which_engine_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    ScratchPPO("CnnPolicy", make_env(), verbose=1, **SIZES).learn(32)
    assert "Using the engine channels_last" in capsys.readouterr().out
