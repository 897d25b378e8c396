"""The NumPy engine computes what the reference engine computes, up to rounding, and knows what it cannot compute."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from sb3_ppo_from_scratch import MlpPolicy, MultiInputPolicy, ScratchPPO, SharedMlpPolicy
from sb3_ppo_from_scratch.advantages import normalize_advantages
from sb3_ppo_from_scratch.distributions import apply_masks, distribution_parameters, exact_kl
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.numpy_mlp import NumpyEngine
from sb3_ppo_from_scratch.engines.numpy_mlp.flat import FlatParameters
from sb3_ppo_from_scratch.engines.numpy_mlp.learning import NumpyLearner
from sb3_ppo_from_scratch.engines.numpy_mlp.loss import Batch
from sb3_ppo_from_scratch.engines.numpy_mlp.optimizers import FlatOptimizer, flat_optimizer
from sb3_ppo_from_scratch.engines.reference.engine import TorchEngine
from sb3_ppo_from_scratch.losses import PPOLoss, ppo_loss
from sb3_ppo_from_scratch.update import UpdateConfig
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES
from tests.helpers import BY_HAND, FASTEST, KERNEL_REASON, ToyEnv

VECTOR = spaces.Box(-1.0, 1.0, (5,), np.float32)
ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU]
NO_CHANGE = 1e-3
"""Two engines' updates may differ by this share of how far an update moves the parameters (float32 rounding)."""

NOISE: dict[str, dict[str, Any]] = {
    "plain": {},
    "one for all dimensions": {"full_std": False},
    "expln": {"use_expln": True, "log_std_init": -0.3},
    "expln above 0": {"use_expln": True, "log_std_init": 0.3, "full_std": False},
}
"""Arguments of policies with gSDE"""

widths = st.lists(st.sampled_from([1, 2, 7, 16, 33]), max_size=3)
action_spaces = st.one_of(
    st.integers(1, 9).map(spaces.Discrete),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(spaces.MultiDiscrete),
    st.integers(1, 5).map(spaces.MultiBinary),
    st.sampled_from([(1,), (3,), (2, 2)]).map(lambda shape: spaces.Box(-1.0, 1.0, shape, np.float32)),
)


def make_policy(action_space: spaces.Space, shared: bool = False, **kwargs: Any) -> ActorCriticPolicy:
    return (SharedMlpPolicy if shared else MlpPolicy)(VECTOR, action_space, ConstantSchedule(1e-3), **kwargs)


def random_batch(policy: ActorCriticPolicy, size: int, policy_change: float, dtype: th.dtype) -> Batch:
    """Transitions as an older policy might have left them: ratios on both sides of the clip range."""
    observations = th.randn(size, *VECTOR.shape)
    with th.no_grad():
        distribution, values = outputs_of(policy, observations)
        actions = distribution.get_actions()
        noise = policy_change * th.randn(3, size, dtype=dtype)
        old_log_prob = distribution.log_prob(actions) + noise[1]
    flat = actions.reshape(size, -1).to(dtype)
    advantages = th.randn(size, dtype=dtype)
    fields = (observations, flat, values + noise[0], old_log_prob, advantages, values + noise[2] + 1)
    return Batch(*(field.numpy() for field in fields))


def outputs_of(policy: ActorCriticPolicy, observations: th.Tensor) -> Any:
    """The distribution and the values, in the dtype of the policy's parameters."""
    features = observations.to(policy.value_net.weight.dtype)
    latent_pi, latent_vf = policy.mlp_extractor(features)
    return policy._get_action_dist_from_latent(latent_pi), policy.value_net(latent_vf).flatten()


def autograd(policy: ActorCriticPolicy, batch: Batch, config: UpdateConfig) -> tuple[PPOLoss, list[th.Tensor]]:
    observations, actions, old_values, old_log_prob, advantages, returns = map(th.from_numpy, batch[:6])
    if isinstance(policy.action_space, spaces.Discrete):
        actions = actions.long().flatten()
    distribution, values = outputs_of(policy, observations)
    apply_masks(distribution, batch.action_masks)
    loss = ppo_loss(
        values,
        distribution.log_prob(actions),
        distribution.entropy(),
        advantages=normalize_advantages(advantages) if config.normalize_advantage else advantages,
        returns=returns,
        old_values=old_values,
        old_log_prob=old_log_prob,
        clip_range=config.clip_range,
        clip_range_vf=config.clip_range_vf,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
    )
    return loss, list(th.autograd.grad(loss.total, list(policy.parameters()), allow_unused=True))


def closed_form(policy: ActorCriticPolicy, batch: Batch, config: UpdateConfig) -> tuple[PPOLoss, list[th.Tensor]]:
    engine = NumpyEngine(policy)
    engine.flat.gradient[:] = np.nan  # whatever is not filled in shows
    buffer = RolloutBuffer(1, policy.observation_space, policy.action_space)
    learner = NumpyLearner(buffer, config, engine.network, engine.head, engine.optimizer, engine.features)
    gradient = learner.gradient(learner.prepared(batch))
    gradient.backward()
    engine.flat.publish_gradient()
    return gradient.loss, [parameter.grad for parameter in policy.parameters()]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    action_space=action_spaces,
    pi=widths,
    vf=st.one_of(st.none(), widths),
    shared=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    size=st.sampled_from([1, 2, 33, 64]),
    policy_change=st.sampled_from([0.01, 0.1, 1.0]),
    clip_range=st.sampled_from([-1e-4, 0.1, 0.2]),
    clip_range_vf=st.sampled_from([None, 0.1]),
    normalize_advantage=st.booleans(),
    ent_coef=st.sampled_from([0.0, 0.01, -0.1]),
    vf_coef=st.sampled_from([0.0, 0.5, 1.3]),
    noise=st.sampled_from([None, *NOISE.values()]),
)
def test_gradient_is_autograds(
    seed: int,
    action_space: spaces.Space,
    pi: list[int],
    vf: list[int] | None,
    shared: bool,
    activation: type[nn.Module],
    size: int,
    policy_change: float,
    noise: dict[str, Any] | None,
    **coefficients: Any,
) -> None:
    """In float64, to 1e-10 of the largest entry."""
    th.manual_seed(seed)
    np.random.seed(seed)
    net_arch: Any = pi if shared else {"pi": pi, "vf": pi if vf is None else vf}
    sde = {} if noise is None or not isinstance(action_space, spaces.Box) else {"use_sde": True, **noise}
    policy = make_policy(action_space, shared, net_arch=net_arch, activation_fn=activation, **sde).double()
    if sde:
        policy.reset_noise(size)  # of doubles
    batch = random_batch(policy, size, policy_change, th.float64)
    config = UpdateConfig(batch_size=size, n_epochs=1, max_grad_norm=0.5, target_kl=None, **coefficients)
    expected_loss, expected = autograd(policy, batch, config)
    loss, actual = closed_form(policy, batch, config)
    np.testing.assert_allclose(loss[:5], [part.item() for part in expected_loss[:5]], rtol=1e-10, atol=1e-12)
    assert loss.clip_fraction == pytest.approx(expected_loss.clip_fraction.item(), rel=1e-6)  # float32 in torch
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for (name, _), a, b in zip(policy.named_parameters(), actual, expected, strict=True):
        difference = float((a - (0 if b is None else b)).abs().max())
        assert difference <= 1e-10 * largest + 1e-15, f"{name}: differs by {difference}, of {largest}"


@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_exact_kl(action_space: spaces.Space) -> None:
    policy = make_policy(action_space)
    head = NumpyEngine(policy).head
    old, new = (distribution_parameters(outputs_of(policy, th.randn(64, 5))[0]).detach() + shift for shift in (0.0, 0.1))
    if isinstance(action_space, spaces.Discrete):
        old, new = old.log_softmax(1), new.log_softmax(1)
    expected = exact_kl(policy.action_dist, old, new).mean().item()
    assert head.mean_kl(old.numpy(), new.numpy()) == pytest.approx(expected, rel=1e-3, abs=1e-6)


# ------------------------------------------------------------- against the reference engine


def vec_env(observation_space: spaces.Space, action_space: spaces.Space, n_envs: int = 4) -> DummyVecEnv:
    return DummyVecEnv([lambda: ToyEnv(observation_space, action_space) for _ in range(n_envs)])


def after_one_update(engine: str, observation_space: spaces.Space, action_space: spaces.Space, **kwargs: Any) -> Any:
    """Start, end, metrics, and the rollout that the one update learned from."""
    arguments: dict[str, Any] = {"policy": "MlpPolicy", "n_steps": 32, "batch_size": 32, "n_epochs": 20, **kwargs}
    model = ScratchPPO(env=vec_env(observation_space, action_space), engine=engine, seed=5, device="cpu", **arguments)
    start = nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    metrics: dict[str, Any] = {}

    class Recording(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            metrics.update(self.logger.name_to_value)

    model.dump_logs = lambda *_: None  # keeps name_to_value
    model.learn(32 * 4, callback=Recording())
    return model, start, nn.utils.parameters_to_vector(model.policy.parameters()).detach(), metrics


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": {"policy": "SharedMlpPolicy"},
    "relu, three layers": {"policy_kwargs": {"activation_fn": nn.ReLU, "net_arch": [32, 32, 32]}},
    "silu, unlike towers": {"policy_kwargs": {"activation_fn": nn.SiLU, "net_arch": {"pi": [16], "vf": [64, 32]}}},
    "elu, no layers for the actor": {"policy_kwargs": {"activation_fn": nn.ELU, "net_arch": {"pi": [], "vf": [64]}}},
    "leaky relu, no layers": {"policy_kwargs": {"activation_fn": nn.LeakyReLU, "net_arch": []}},
    "value clipping, entropy": {"clip_range_vf": 0.2, "ent_coef": 0.02, "vf_coef": 0.7},
    "no normalisation": {"normalize_advantage": False, "max_grad_norm": 0.05},
    "schedules": {"learning_rate": lambda p: 1e-3 + p, "clip_range": lambda p: 0.2 + p, "ent_coef": lambda p: 0.01 + p},
    "KL stop": {"target_kl": 0.003, "learning_rate": 1e-3},
    "truncated minibatch": {"batch_size": 30},
    "AdamW": {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}},
    "weight decay": {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-3}}},
    "AMSGrad": {"policy_kwargs": {"optimizer_kwargs": {"amsgrad": True}}},
    "SB3's buffer": {"rollout_buffer_class": type("Theirs", (RolloutBuffer,), {})},
    "log_std_init": {"policy_kwargs": {"log_std_init": -1.0, "ortho_init": False}},
}


def compare_update(
    observation_space: spaces.Space, action_space: spaces.Space, engines: Sequence[str] = ("numpy", FASTEST), **kwargs: Any
) -> None:
    theirs, start, expected, their_metrics = after_one_update("torch", observation_space, action_space, **kwargs)
    for engine in engines:
        ours, _, actual, our_metrics = after_one_update(engine, observation_space, action_space, **kwargs)
        # the same random numbers yield the same actions
        np.testing.assert_allclose(ours.rollout_buffer.actions, theirs.rollout_buffer.actions, rtol=1e-4, atol=1e-5)
        assert float((actual - expected).norm()) < NO_CHANGE * float((expected - start).norm())
        trained = {key for key in their_metrics if key.startswith("train/")}
        assert {key for key in our_metrics if key.startswith("train/")} == trained
        for key in trained:
            np.testing.assert_allclose(our_metrics[key], their_metrics[key], rtol=2e-2, atol=2e-5, err_msg=key)
        ours_state, theirs_state = (model.policy.optimizer.state_dict() for model in (ours, theirs))
        assert ours_state["param_groups"] == theirs_state["param_groups"]
        for index, state in theirs_state["state"].items():
            assert ours_state["state"][index].keys() == state.keys()
            assert ours_state["state"][index]["step"] == state["step"]
            np.testing.assert_allclose(ours_state["state"][index]["exp_avg"], state["exp_avg"], rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("action_space", ["discrete", "box"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_update_of_20_epochs_is_the_references(options: dict[str, Any], action_space: str) -> None:
    compare_update(OBSERVATION_SPACES["box"], ACTION_SPACES[action_space], **options)


@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_on_every_action_space(action_space: spaces.Space) -> None:
    compare_update(OBSERVATION_SPACES["box"], action_space, ent_coef=0.01)


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("policy", ["MlpPolicy", "SharedMlpPolicy"])
def test_gsde(policy: str, noise: dict[str, Any]) -> None:
    options = {"policy": policy, "policy_kwargs": noise, "use_sde": True, "sde_sample_freq": 4, "ent_coef": 0.01}
    compare_update(OBSERVATION_SPACES["box"], ACTION_SPACES["box-2d"], ["numpy", "auto"], **options)


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_on_every_observation_space(name: str) -> None:
    policy = "MultiInputPolicy" if name == "dict" else "MlpPolicy"
    compare_update(OBSERVATION_SPACES[name], ACTION_SPACES["discrete"], policy=policy)


def test_dict_observations_in_minibatches_of_sb3s() -> None:
    options = {"policy": "MultiInputPolicy", "rollout_buffer_class": type("Theirs", (DictRolloutBuffer,), {})}
    compare_update(OBSERVATION_SPACES["dict"], ACTION_SPACES["box"], **options)


def test_images_in_dicts_are_left_to_the_reference() -> None:
    images = spaces.Dict({"vector": VECTOR, "image": spaces.Box(0, 255, (1, 36, 36), np.uint8)})
    policy = MultiInputPolicy(images, spaces.Discrete(2), ConstantSchedule(1e-3))
    assert choose_engine("auto", policy).refusals["numpy"] == "features_extractor.extractors.image is of type NatureCNN"


@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize(
    ("action_space", "kwargs"),
    [*((name, {}) for name in ACTION_SPACES), ("box", {"use_sde": True}), ("box-2d", {"use_sde": True})],
)
def test_acts_as_the_reference_does(action_space: str, kwargs: dict[str, Any], n_envs: int) -> None:
    policy = make_policy(ACTION_SPACES[action_space], **kwargs)
    if kwargs:
        policy.reset_noise(8)
    obs = th.randn(n_envs, 5)
    th.manual_seed(3)
    expected = TorchEngine(policy).act(obs)
    after = th.get_rng_state()
    th.manual_seed(3)
    step = NumpyEngine(policy).act(obs)
    assert th.equal(th.get_rng_state(), after)
    assert step.actions.shape == expected.actions.shape
    np.testing.assert_allclose(step.actions, expected.actions, rtol=1e-4, atol=1e-6)
    assert step.actions.dtype == expected.actions.dtype
    assert step.memory is expected.memory is None
    for ours, theirs in zip(step[1:4], expected[1:4], strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    th.testing.assert_close(NumpyEngine(policy).predict_values(obs), policy.predict_values(obs), rtol=1e-4, atol=1e-5)


def test_what_it_returns_stays_as_it_is() -> None:
    engine = NumpyEngine(make_policy(spaces.Discrete(3)))
    step = engine.act(th.randn(4, 5))
    before = copy.deepcopy(step)
    engine.act(th.randn(4, 5))
    assert all(th.equal(th.as_tensor(a), th.as_tensor(b)) for a, b in zip(step[:4], before[:4], strict=True))


# --------------------------------------------------------------------------------- memory


def cartpole(**kwargs: Any) -> ScratchPPO:
    return ScratchPPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), n_steps=16, batch_size=8, n_epochs=2, seed=0, **kwargs
    )


def addresses(model: ScratchPPO) -> list[int]:
    return [parameter.data_ptr() for parameter in model.policy.parameters()]


def assert_learns(model: ScratchPPO) -> None:
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(64)
    assert model._engine.name in ("numpy", "compiled")
    assert not any(th.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))
    # the modules see what the engine computes with
    obs = th.randn(3, 4)
    th.testing.assert_close(model._engine.predict_values(obs), model.policy.predict_values(obs))


class Addresses(BaseCallback):
    """Where the parameters lie in each step of training."""

    def _on_training_start(self) -> None:
        self.seen: list[list[int]] = []

    def _on_step(self) -> bool:
        self.seen.append(addresses(self.model))  # type: ignore[arg-type]
        return True


@pytest.mark.parametrize("engine", BY_HAND)
def test_parameters_gradients_and_moments_are_the_policys_own(engine: str) -> None:
    model = cartpole(engine=engine)
    home, held = addresses(model), model.policy.state_dict()
    while_training = Addresses()
    model.learn(128, callback=while_training)
    optimizer = model.policy.optimizer
    assert len({tuple(seen) for seen in while_training.seen}) == 1, "nothing is copied"
    assert min(while_training.seen[0]) == model._engine.flat.vector.ctypes.data
    assert addresses(model) == home, "afterwards they lie where they lay"
    for name, parameter in model.policy.named_parameters():
        assert th.equal(held[name], parameter), "whoever held the tensors sees what was learned"
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert optimizer.state[parameter]["exp_avg"].untyped_storage().nbytes() == parameter.nbytes
    for parameter in model.policy.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 32  # 4 rollouts, 2 epochs, 4 minibatches
        assert parameter.grad.shape == parameter.shape
        assert parameter.is_contiguous()
        assert parameter.is_leaf
    norm = th.nn.utils.get_total_norm([parameter.grad for parameter in model.policy.parameters()])
    assert 0 < norm <= 0.5 * (1 + 1e-5)


def test_torch_may_take_over_at_any_time() -> None:
    """Somebody else's step, on the policy's own optimizer, then ours again."""
    model = cartpole().learn(64)
    model.policy.optimizer.zero_grad()
    model.policy.predict_values(th.randn(3, 4)).sum().backward()
    model.policy.optimizer.step()
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} != {8.0}
    model.engine = "torch"
    model.learn(64)
    assert model._engine.name == "torch"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.policy.load_state_dict({k: v + 0.1 for k, v in m.policy.state_dict().items()}), id="load"),
        pytest.param(lambda m: m.set_parameters(copy.deepcopy(m.get_parameters())), id="set_parameters"),
        pytest.param(lambda m: m.policy.optimizer.load_state_dict(m.policy.optimizer.state_dict()), id="optimizer"),
        pytest.param(lambda m: setattr(m.policy.value_net.weight, "data", th.ones(1, 64)), id="data"),
        pytest.param(lambda m: m.policy.double().float(), id="moved"),
        pytest.param(lambda m: m.policy.optimizer.state.clear(), id="forgotten"),
        pytest.param(lambda m: setattr(m, "policy", copy.deepcopy(m.policy)), id="copied"),
        pytest.param(lambda m: setattr(m.policy, "optimizer", th.optim.Adam(m.policy.parameters())), id="new optimizer"),
        pytest.param(lambda m: m.policy.zero_grad(), id="zero_grad"),
    ],
)
def test_changes_from_outside_are_seen(change: Callable[[ScratchPPO], Any]) -> None:
    """The run after the change is the reference engine's after the same change."""
    ends = []
    for engine in ("numpy", FASTEST, "torch"):
        model = cartpole(engine=engine).learn(64)
        change(model)
        model.learn(32, reset_num_timesteps=False)
        ends.append(nn.utils.parameters_to_vector(model.policy.parameters()).detach())
        if engine != "torch":
            assert_learns(model)
    for end in ends[:-1]:
        th.testing.assert_close(end, ends[-1], rtol=1e-3, atol=1e-5)


def test_a_model_saved_and_loaded_goes_on(tmp_path: Path) -> None:
    model = cartpole().learn(64)
    model.save(tmp_path / "model")
    loaded = ScratchPPO.load(tmp_path / "model", env=model.env)
    theirs = PPO.load(tmp_path / "model", env=model.env)
    for ours, a, b in zip(*(m.policy.parameters() for m in (model, loaded, theirs)), strict=True):
        assert th.equal(ours, a)
        assert th.equal(ours, b)
    theirs.learn(32)
    assert_learns(loaded)
    assert_learns(model)


def test_a_saved_model_is_no_larger_than_the_references(tmp_path: Path) -> None:
    sizes = []
    for engine in ("numpy", "torch"):
        cartpole(engine=engine).learn(64).save(tmp_path / engine)
        sizes.append((tmp_path / f"{engine}.zip").stat().st_size)
    assert sizes[0] < 1.05 * sizes[1]


def test_policies_can_be_pickled_and_copied() -> None:
    policy = cartpole().learn(64).policy
    for other in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert all(th.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
        NumpyEngine(other)
        with th.no_grad():
            other.value_net.weight.zero_()
        assert policy.value_net.weight.abs().sum() > 0
    file = io.BytesIO()
    th.save(policy.state_dict(), file)
    file.seek(0)
    assert th.load(file, weights_only=True).keys() == policy.state_dict().keys()


ADAM = [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.5, 0.9)}]
RMSPROP = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"centered": True},
    {"momentum": 0.5, "centered": True, "alpha": 0.9, "eps": 1e-3},
]
STEPS = [
    *((kind, kwargs) for kind in (th.optim.Adam, th.optim.AdamW) for kwargs in ADAM),
    *((kind, kwargs) for kind in (th.optim.RMSprop, RMSpropTFLike) for kwargs in RMSPROP),
    (th.optim.RMSprop, {"maximize": True, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(("optimizer_class", "kwargs"), STEPS)
def test_a_step_is_the_optimizers_own(optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], before: int) -> None:
    """From the start on, or after some steps that it took itself; and it goes on by itself afterwards."""
    th.manual_seed(0)
    start = [th.randn(3, 4, dtype=th.float64), th.randn(7, dtype=th.float64)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine, reference = (optimizer_class(parameters, lr=0.01, **kwargs) for parameters in (ours, theirs))

    def step(parameters: list[nn.Parameter], optimizer: th.optim.Optimizer, gradients: list[th.Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    flat: FlatOptimizer | None = None
    for index in range(8):
        gradients = [th.randn_like(x) for x in start]
        step(theirs, reference, [gradient.clone() for gradient in gradients])
        if index == before:
            flat = flat_optimizer(mine, FlatParameters(ours))
        if index == 6:
            assert flat is not None
            assert flat.is_current()
            assert flat.n_steps == 6
            flat.flat.release()
            flat.release()
            flat = None
        if flat is None:
            step(ours, mine, gradients)
        else:
            flat.flat.gradient[:] = th.cat([gradient.flatten() for gradient in gradients]).numpy()
            flat.step()
    for a, b in zip(ours, theirs, strict=True):
        th.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert mine.state[a].keys() == reference.state[b].keys()
        for key, value in reference.state[b].items():
            assert type(mine.state[a][key]) is type(value)
            th.testing.assert_close(mine.state[a][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", BY_HAND)
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.RMSprop, RMSpropTFLike])
def test_before_its_first_step_an_optimizer_remembers_nothing(
    engine: str, optimizer_class: type[th.optim.Optimizer], tmp_path: Path
) -> None:
    """As with SB3: what it then needs to remember depends on its settings."""
    if engine == "compiled" and optimizer_class is not th.optim.Adam:
        pytest.skip("that is numpy's")
    model = cartpole(policy_kwargs={"optimizer_class": optimizer_class}, engine=engine)
    model.learn(10**6, StopTrainingOnMaxEpisodes(0))
    assert model.policy.optimizer.state_dict()["state"] == {}
    model.save(tmp_path / "model")
    theirs = PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    if optimizer_class is not th.optim.Adam:
        theirs.policy.optimizer.param_groups[0]["momentum"] = 0.9
    theirs.learn(32)
    model.learn(64)
    assert len(model.policy.optimizer.state) == len(list(model.policy.parameters()))


@pytest.mark.parametrize("optimizer_class", [th.optim.RMSprop, RMSpropTFLike])
@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_an_update_by_rmsprop(optimizer_class: type[th.optim.Optimizer], action_space: str) -> None:
    options: dict[str, Any] = {"optimizer_class": optimizer_class, "optimizer_kwargs": {"eps": 1e-5, "momentum": 0.5}}
    found = [
        after_one_update(engine, VECTOR, ACTION_SPACES[action_space], policy_kwargs=options) for engine in ("torch", "numpy")
    ]
    (theirs, start, expected, _), (ours, _, actual, _) = found
    assert float((actual - expected).norm()) < NO_CHANGE * float((expected - start).norm())
    states = [list(model.policy.optimizer.state_dict()["state"].values()) for model in (ours, theirs)]
    for mine, reference in zip(*states, strict=True):
        assert mine.keys() == reference.keys()
        assert mine["step"] == reference["step"]


def test_rmsprop_is_numpys_and_not_compileds() -> None:
    model = cartpole(policy_kwargs={"optimizer_class": RMSpropTFLike}, engine="auto")
    assert type(model._current_engine()) is NumpyEngine
    if KERNEL_REASON is None:
        with pytest.raises(ValueError, match="the optimizer must be Adam or AdamW, not RMSpropTFLike"):
            cartpole(policy_kwargs={"optimizer_class": RMSpropTFLike}, engine="compiled")
        changed = cartpole(engine="auto").learn(64)
        changed.policy.optimizer = th.optim.RMSprop(changed.policy.parameters(), lr=1e-3)
        changed.learn(64)
        assert type(changed._current_engine()) is NumpyEngine


# --------------------------------------------------------------------------------- choice


def changed(change: Callable[[ActorCriticPolicy], Any], **kwargs: Any) -> ActorCriticPolicy:
    policy = make_policy(spaces.Discrete(3), **kwargs)
    change(policy)
    return policy


class Overriding(ActorCriticPolicy):
    pass


UNSUPPORTED = {
    "custom policy": (lambda: Overriding(VECTOR, spaces.Discrete(2), ConstantSchedule(1e-3)), "type Overriding"),
    "squashed gSDE": (
        lambda: make_policy(spaces.Box(-1.0, 1.0, (2,)), use_sde=True, squash_output=True),
        "gSDE without squash_output",
    ),
    "activation": (lambda: make_policy(spaces.Discrete(2), activation_fn=nn.GELU), "type GELU"),
    "optimizer": (lambda: make_policy(spaces.Discrete(2), optimizer_class=th.optim.SGD), "not SGD"),
    "float64": (lambda: make_policy(spaces.Discrete(2)).double(), "float32"),
    "hook": (lambda: changed(lambda p: p.action_net.register_forward_hook(lambda *_: None)), "action_net has hooks"),
    "parameter hook": (lambda: changed(lambda p: p.value_net.weight.register_hook(lambda g: g)), "hooks on value_net.weight"),
    "forward": (lambda: changed(lambda p: setattr(p, "forward", p.forward)), "policy's forward was replaced"),
    "inner forward": (lambda: changed(lambda p: setattr(p.action_net, "forward", p.action_net.forward)), "replaced"),
    "shared": (lambda: changed(lambda p: setattr(p.value_net, "bias", p.mlp_extractor.value_net[0].bias)), "share"),
    "frozen": (lambda: changed(lambda p: p.value_net.bias.requires_grad_(False)), "unlike value_net.bias"),
    "no bias": (lambda: changed(lambda p: setattr(p, "value_net", nn.Linear(64, 1, bias=False))), "no bias"),
    "dropout": (lambda: changed(lambda p: p.mlp_extractor.policy_net.append(nn.Dropout())), "type Dropout"),
    "two heads": (lambda: changed(lambda p: setattr(p, "action_net", nn.Sequential(nn.Linear(64, 3)))), "optimizer"),
    "order": (lambda: changed(lambda p: p.mlp_extractor.policy_net.append(nn.Tanh())), "after each"),
    "groups": (
        lambda: changed(lambda p: setattr(p, "optimizer", th.optim.Adam([{"params": [x]} for x in p.parameters()]))),
        "14 parameter groups|12 parameter groups",
    ),
    "optimizer hook": (lambda: changed(lambda p: p.optimizer.register_step_pre_hook(lambda *_: None)), "on the optimizer"),
    "other parameters": (
        lambda: changed(lambda p: setattr(p, "optimizer", th.optim.Adam([*p.parameters(), nn.Parameter(th.ones(1))]))),
        "other parameters",
    ),
    "tensor rate": (lambda: changed(lambda p: p.optimizer.param_groups[0].update(lr=th.tensor(0.1))), "tensor"),
}


@pytest.mark.parametrize(("make", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_it_cannot_do_exactly_it_refuses(make: Callable[[], ActorCriticPolicy], reason: str) -> None:
    policy = make()
    assert choose_engine("auto", policy).engine is TorchEngine
    for engine in ("numpy", "compiled"):
        with pytest.raises(ValueError, match=f"cannot serve this model.*({reason})"):
            choose_engine(engine, policy)


def test_auto_takes_it_where_it_applies() -> None:
    for shared in (False, True):
        for action_space in ACTION_SPACES.values():
            assert choose_engine("auto", make_policy(action_space, shared)).engine.name == FASTEST


def test_auto_falls_back_when_the_policy_is_changed_while_training(capsys: pytest.CaptureFixture[str]) -> None:
    model = cartpole(verbose=1).learn(32)
    assert f"Using the engine {FASTEST}" in capsys.readouterr().out
    calls = []
    model.policy.action_net.register_forward_hook(lambda *_: calls.append(1))
    model.learn(32)
    assert "Using the engine torch" in capsys.readouterr().out
    assert calls


def test_not_a_number_is_an_error() -> None:
    engine = NumpyEngine(make_policy(spaces.Discrete(3)))
    with pytest.raises(ValueError, match="NaN"):
        engine.act(th.full((2, 5), th.nan))


# --------------------------------------------------------------------------------- threads


def threads() -> list[int]:
    return [th.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]


def test_the_processs_threads_are_left_alone() -> None:
    seen = []

    class Watching(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(threads())
            return True

    with threadpool_limits(limits=2):
        before = threads()
        # 128 * 64 * 64 is large enough for BLAS to take another thread
        model = ScratchPPO("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=64, batch_size=128, n_epochs=1, engine="numpy")
        model.learn(128, callback=Watching())
        assert threads() == before
    assert seen.count(before) == len(seen) == 64


def test_small_products_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScratchPPO("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=64, batch_size=128, n_epochs=1, engine="numpy")
    seen = []
    gradient = NumpyLearner.gradient

    def watching(self: NumpyLearner, batch: Batch) -> Any:
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return gradient(self, batch)

    monkeypatch.setattr(NumpyLearner, "gradient", watching)
    with threadpool_limits(limits=2):
        model.learn(128)
    assert set(seen) == {1}
