"""Whatever a callback does to the policy or to the model counts from that moment on, as with SB3's PPO."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.rollout import holds_users_code
from tests.envs import OBSERVATION_SPACES
from tests.helpers import ToyEnv

FRAMES = spaces.Box(0, 255, (1, 36, 36), np.uint8)
SIZES: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 1, "device": "cpu", "learning_rate": 1e-3}
TASKS: dict[str, tuple[str, spaces.Space, spaces.Space]] = {
    "discrete": ("MlpPolicy", OBSERVATION_SPACES["box"], spaces.Discrete(3)),
    "box": ("MlpPolicy", OBSERVATION_SPACES["box"], spaces.Box(-1.0, 1.0, (2,), np.float32)),
    "images": ("CnnPolicy", FRAMES, spaces.Discrete(3)),
}


def toy(task: str) -> VecEnv:
    _, observations, actions = TASKS[task]
    return make_vec_env(lambda: ToyEnv(observations, actions), 2, seed=5)


# ------------------------------------------------------------------------ the policy


def in_place(model: Any) -> None:
    with th.no_grad():
        model.policy.action_net.weight.mul_(20.0)


def by_data(model: Any) -> None:
    model.policy.action_net.bias.data.add_(th.arange(len(model.policy.action_net.bias)))


def new_data(model: Any) -> None:
    model.policy.action_net.bias.data = th.linspace(-1.0, 1.0, len(model.policy.action_net.bias))


def from_vector(model: Any) -> None:
    model.policy.load_from_vector(1.1 * model.policy.parameters_to_vector())


def assigned(model: Any) -> None:
    state = {key: 1.1 * value for key, value in model.policy.state_dict().items()}
    model.policy.load_state_dict(state, assign=True)
    model.policy.optimizer.param_groups[0]["params"] = list(model.policy.parameters())


def new_layer(model: Any) -> None:
    old = model.policy.action_net
    generator = th.Generator().manual_seed(3)
    model.policy.action_net = nn.Linear(old.in_features, old.out_features)
    for parameter in model.policy.action_net.parameters():
        parameter.data = th.randn(parameter.shape, generator=generator)
    model.policy.optimizer.add_param_group({"params": list(model.policy.action_net.parameters())})


def hook(model: Any) -> None:
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output.flip(-1))


def method(model: Any) -> None:
    forward = model.policy.action_net.forward
    model.policy.action_net.forward = lambda latent: forward(-latent)


def other_policy(model: Any) -> None:
    with th.no_grad():  # torch copies no tensor that has a graph
        model.policy.get_distribution(model.policy.obs_to_tensor(model.env.observation_space.sample())[0])
    model.policy = copy.deepcopy(model.policy)
    in_place(model)


def subset(model: Any) -> None:
    """What an optimizer does not have is frozen."""
    model.policy.optimizer = th.optim.Adam(model.policy.action_net.parameters(), lr=1e-3, eps=1e-5)


def taken_out(model: Any) -> None:
    model.policy.optimizer.param_groups[0]["params"].pop()


def forgotten(model: Any) -> None:
    state = model.policy.optimizer.state
    state.clear()
    assert state[model.policy.value_net.weight] == {}, "to look it up makes it"


def other_class(model: Any) -> None:
    class Louder(type(model.policy)):  # type: ignore[misc]
        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return 2 * values, log_prob, entropy

    model.policy.__class__ = Louder


def hook_on_the_policy(model: Any) -> None:
    model.policy.register_forward_hook(lambda module, inputs, output: (0 * output[0], *output[1:]))


def method_of_the_distribution(model: Any) -> None:
    log_prob = model.policy.action_dist.log_prob
    model.policy.action_dist.log_prob = lambda actions: 0.5 * log_prob(actions)


def one_memory(model: Any) -> None:
    towers = model.policy.mlp_extractor
    if len(towers.value_net) > 0:
        towers.value_net[2].weight.data = towers.policy_net[2].weight.data


def unscaled(model: Any) -> None:
    model.policy.normalize_images = False


def std(model: Any) -> None:
    if hasattr(model.policy, "log_std"):
        model.policy.log_std.data.fill_(-2.0)


CHANGES = [
    *(in_place, by_data, new_data, from_vector, assigned, new_layer, hook, method, other_policy, std),
    *(subset, taken_out, forgotten, other_class, hook_on_the_policy, unscaled),
    *(method_of_the_distribution, one_memory),
]


class Change(BaseCallback):
    """Does ``change`` once: at the second rollout's start, or in its middle."""

    def __init__(self, change: Callable[[Any], None], in_the_middle: bool):
        super().__init__()
        self.change, self.in_the_middle = change, in_the_middle
        self.actions: list[np.ndarray] = []

    def _on_rollout_start(self) -> None:
        if self.num_timesteps == 32 and not self.in_the_middle:
            self.change(self.model)

    def _on_step(self) -> bool:
        if self.num_timesteps == 48 and self.in_the_middle:
            self.change(self.model)
        self.actions.append(np.array(self.locals["actions"]))
        return True


def changed_run(algorithm: Any, task: str, change: Callable[[Any], None], in_the_middle: bool, **kwargs: Any) -> Any:
    callback = Change(change, in_the_middle)
    model = algorithm(TASKS[task][0], toy(task), **SIZES, **kwargs)
    return model.learn(96, callback=callback), np.array(callback.actions)


def vector(model: Any) -> th.Tensor:
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("in_the_middle", [False, True], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_policy_counts_at_once(change: Callable[[Any], None], task: str, in_the_middle: bool) -> None:
    """The reference ends with SB3's bits, the engines of ``"auto"`` with theirs up to rounding; all act alike."""
    theirs, actions = changed_run(PPO, task, change, in_the_middle)
    reference, reference_actions = changed_run(ScratchPPO, task, change, in_the_middle, engine="torch")
    assert np.array_equal(reference_actions, actions)
    assert th.equal(vector(reference), vector(theirs))
    auto, auto_actions = changed_run(ScratchPPO, task, change, in_the_middle)
    np.testing.assert_allclose(auto_actions, actions, rtol=1e-3, atol=1e-3)
    th.testing.assert_close(vector(auto), vector(theirs), rtol=1e-3, atol=1e-4)


def test_an_activations_slope_may_change() -> None:
    def steeper(model: Any) -> None:
        model.policy.mlp_extractor.policy_net[1].negative_slope = 0.9

    ends = []
    for algorithm in (PPO, ScratchPPO):
        model = algorithm("MlpPolicy", toy("discrete"), policy_kwargs={"activation_fn": nn.LeakyReLU}, **SIZES)
        ends.append(vector(model.learn(96, callback=Change(steeper, True))))
    th.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)


class OwnList(CallbackList):
    """Of the user's, which does more than call its members."""

    def _on_step(self) -> bool:
        with th.no_grad():
            for parameter in self.model.policy.parameters():
                parameter.mul_(0.9)
        return super()._on_step()


def test_a_list_may_change_the_policy() -> None:
    ends = []
    for algorithm in (PPO, ScratchPPO):
        ends.append(vector(algorithm("MlpPolicy", toy("discrete"), **SIZES).learn(96, callback=OwnList([]))))
    th.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)


def test_only_users_callbacks_are_watched() -> None:
    """The check after each step costs some microseconds, which SB3's own callbacks need not pay."""
    own = [CheckpointCallback(100, "."), EvalCallback(toy("discrete"))]
    assert not holds_users_code(CallbackList(own))
    assert holds_users_code(CallbackList([*own, Change(std, True)]))
    assert holds_users_code(CallbackList([OwnList([])])), "a list of the user's may do more than call its members"
    bystander = Change(std, True)
    bystander.is_bystander = True  # type: ignore[attr-defined]  # it says so
    assert not holds_users_code(CallbackList([*own, bystander]))
    assert holds_users_code(CallbackList([*own, bystander, Change(std, True)]))
    assert holds_users_code(EvalCallback(toy("discrete"), callback_after_eval=Change(std, True)))
    model = ScratchPPO("MlpPolicy", toy("discrete"), **SIZES)
    assert holds_users_code(model._init_callback(lambda local_variables, global_variables: True))


# ------------------------------------------------------------------------ the model


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_hyperparameters_may_be_assigned_while_training(engine: str) -> None:
    used: list[tuple[float, float, float]] = []

    class Assign(BaseCallback):
        def _on_rollout_start(self) -> None:
            group, buffer = self.model.policy.optimizer.param_groups[0], self.model.rollout_buffer
            used.append((group["lr"], buffer.gamma, buffer.gae_lambda))
            self.model.learning_rate, self.model.gamma, self.model.gae_lambda = 1e-5, 0.5, 0.1

        def _on_step(self) -> bool:
            return True

    ScratchPPO("MlpPolicy", toy("discrete"), engine=engine, **SIZES).learn(96, callback=Assign())
    assert used == [(1e-3, 0.99, 0.95), (1e-5, 0.5, 0.1), (1e-5, 0.5, 0.1)]


def test_an_assigned_schedule_counts_and_a_wrong_one_is_refused() -> None:
    model = ScratchPPO("MlpPolicy", toy("discrete"), **SIZES).learn(32)
    model.learning_rate = lambda progress: 1e-2 * progress
    model.learn(64)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    model.learning_rate = -1.0
    with pytest.raises(ValueError, match=r"learning_rate must be .*, not -1.0"):
        model.learn(32)


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_metrics_of_the_last_update_can_be_read(engine: str) -> None:
    """SB3 issue 784."""
    seen: list[list[float]] = []

    class Read(BaseCallback):
        def _on_rollout_start(self) -> None:
            values = self.logger.name_to_value
            seen.append([values[f"train/{name}"] for name in ("value_loss", "n_updates", "explained_variance")])

        def _on_step(self) -> bool:
            return True

    model = ScratchPPO("MlpPolicy", toy("discrete"), engine=engine, **SIZES).learn(96, callback=Read())
    assert seen[0] == [0, 0, 0]
    assert [row[1] for row in seen] == [0, 2, 4]
    assert all(row[0] > 0 for row in seen[1:])
    assert model.logger.name_to_value["train/n_updates"] == 6


# ------------------------------------------------------------------------ copies and memory


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, {"use_sde": True, "policy_kwargs": {"squash_output": True}}])
@pytest.mark.parametrize("task", TASKS)
def test_a_trained_model_can_be_pickled(task: str, kwargs: dict[str, Any], engine: str) -> None:
    """And its policy copied, which torch does to no tensor that has a graph."""
    kwargs = kwargs if task == "box" else {}
    model = ScratchPPO(TASKS[task][0], toy(task), engine=engine, **SIZES, **kwargs).learn(32)
    assert th.equal(nn.utils.parameters_to_vector(copy.deepcopy(model.policy).parameters()), vector(model))
    model.env = None  # SB3's environments hold functions
    model._logger = None
    copied = pickle.loads(pickle.dumps(model))
    assert th.equal(vector(copied), vector(model))
    assert copied._current_engine().policy is copied.policy


def set_parameters(model: Any) -> None:
    model.set_parameters(copy.deepcopy(model.get_parameters()))


def torchs_engine(model: Any) -> None:
    model.engine = "torch"


@pytest.mark.parametrize("change", [in_place, set_parameters, torchs_engine, hook, forgotten])
def test_parameters_go_home_whatever_a_callback_did(change: Callable[[Any], None]) -> None:
    """Another layout in memory, or another engine, is no reason to leave them where the first one had put them."""
    model = ScratchPPO("MlpPolicy", toy("discrete"), **SIZES)
    held, homes = model.policy.state_dict(), [parameter.data_ptr() for parameter in model.policy.parameters()]
    model.learn(96, callback=Change(change, True))
    model.train()  # by hand, on the last rollout
    assert [parameter.data_ptr() for parameter in model.policy.parameters()] == homes
    assert all(th.equal(held[name], parameter) for name, parameter in model.policy.named_parameters())


@pytest.mark.parametrize("task", ["discrete", "images"])
def test_an_update_that_fails_leaves_no_graph(task: str) -> None:
    class Failing(ScratchPPO):
        @staticmethod
        def loss(*arguments: Any) -> Any:
            raise KeyboardInterrupt

    model = Failing(TASKS[task][0], toy(task), **SIZES)
    with pytest.raises(KeyboardInterrupt):
        model.learn(32)
    assert th.equal(nn.utils.parameters_to_vector(copy.deepcopy(model.policy).parameters()), vector(model))


def test_weights_in_shared_memory_stay_there() -> None:
    model = ScratchPPO("MlpPolicy", toy("discrete"), **SIZES)
    model.policy.share_memory()
    model.engine = "numpy"
    with pytest.raises(ValueError, match="other processes share the memory of"):
        model.learn(32)
    model.engine = "auto"
    model.learn(32)
    assert model._engine is not None
    assert model._engine.name == "torch"
    assert all(parameter.is_shared() for parameter in model.policy.parameters())


# ------------------------------------------------------------------------ policy surgery


def nested(policy: ActorCriticPolicy) -> None:
    tower = policy.mlp_extractor.policy_net
    policy.mlp_extractor.policy_net = nn.Sequential(nn.Sequential(tower[0], tower[1]), tower[2], tower[3])


def widths_of_its_own(policy: ActorCriticPolicy) -> None:
    inputs = policy.mlp_extractor.policy_net[0].in_features
    policy.mlp_extractor.policy_net = nn.Sequential(nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, 64), nn.Tanh())


def deep_value_head(policy: ActorCriticPolicy) -> None:
    policy.value_net = nn.Sequential(nn.Linear(64, 5), nn.Linear(5, 1))


def deep_action_head(policy: ActorCriticPolicy) -> None:
    policy.action_net = nn.Sequential(policy.action_net, nn.Linear(policy.action_net.out_features, 3))


def other_activation(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net[1] = nn.Softplus()


def two_activations(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net.append(nn.Tanh())


def frozen(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net[0].weight.requires_grad_(False)


def shared(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.value_net[0] = policy.mlp_extractor.policy_net[0]


def parametrized(policy: ActorCriticPolicy) -> None:
    nn.utils.parametrizations.weight_norm(policy.mlp_extractor.policy_net[0])


def flattens_elsewhere(policy: ActorCriticPolicy) -> None:
    policy.features_extractor.flatten = nn.Sequential(nn.Flatten(), nn.LayerNorm(policy.features_dim))


def wrapped(policy: ActorCriticPolicy) -> None:
    forward = policy.mlp_extractor.forward_critic
    policy.mlp_extractor.forward_critic = lambda features: 2.0 * forward(features)


SURGERY = [
    *(nested, widths_of_its_own, deep_value_head, deep_action_head, other_activation, two_activations),
    *(frozen, shared, parametrized, flattens_elsewhere, wrapped),
]


def operated(algorithm: Any, surgery: list[Callable[[ActorCriticPolicy], None]], **kwargs: Any) -> Any:
    model = algorithm("MlpPolicy", toy("discrete"), **SIZES, **kwargs)
    th.manual_seed(7)
    for each in surgery:
        each(model.policy)
    parameters = [p for p in model.policy.parameters() if p.requires_grad]
    model.policy.optimizer = th.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    th.manual_seed(8)
    return model.learn(96)


@pytest.mark.parametrize("surgery", SURGERY)
def test_policy_surgery(surgery: Callable[[ActorCriticPolicy], None]) -> None:
    """SB3's bits from the reference; ``"auto"`` computes the same network by hand, or leaves it to an engine that calls it."""
    theirs, reference, auto = (
        operated(algorithm, [surgery], **kwargs)
        for algorithm, kwargs in ((PPO, {}), (ScratchPPO, {"engine": "torch"}), (ScratchPPO, {}))
    )
    assert th.equal(vector(reference), vector(theirs))
    th.testing.assert_close(vector(auto), vector(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_surgery_upon_surgery(seed: int) -> None:
    """Several at once, drawn at random."""
    rng = np.random.default_rng(seed)
    chosen = [SURGERY[index] for index in rng.choice(len(SURGERY), 3, replace=False)]
    try:
        theirs = operated(PPO, chosen)
    except (RuntimeError, TypeError, AttributeError, IndexError):
        pytest.skip("these do not go together")
    assert th.equal(vector(operated(ScratchPPO, chosen, engine="torch")), vector(theirs))
    th.testing.assert_close(vector(operated(ScratchPPO, chosen)), vector(theirs), rtol=1e-4, atol=1e-6)
