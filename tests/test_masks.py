"""Masks of invalid actions: MaskablePPO's bits, the three ways, evaluation, checkpoints, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.distributions import MaskableCategorical
from sb3_contrib.common.maskable.evaluation import evaluate_policy as contribs_evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import ConvertCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy as sb3_evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from sb3_ppo_from_scratch.distributions import distribution_parameters, exact_kl
from sb3_ppo_from_scratch.evaluation import evaluate_policy
from sb3_ppo_from_scratch.vec_env import NativeVecEnv
from tests.helpers import FASTEST, assert_same_model

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 24, "n_epochs": 2, "ent_coef": 0.01, "seed": 1, "device": "cpu"}
ACTIONS: dict[str, spaces.Space] = {
    "Discrete": spaces.Discrete(6),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2, 4]),
    "MultiBinary": spaces.MultiBinary(4),
}


class MaskedEnv(gym.Env):
    """
    Half of the choices are forbidden, others in every step; an action that is counts. Rewards depend on the action.

    :param action_space: of the actions
    :param way: how it says what it allows: "method", "observation", "info", or "none"
    :param observes: whether observations are a Dict for the other ways too
    """

    def __init__(self, action_space: spaces.Space = ACTIONS["Discrete"], way: str = "method", observes: bool = False):
        self.action_space = action_space
        self.sizes = {
            spaces.Discrete: lambda space: [int(space.n)],
            spaces.MultiDiscrete: lambda space: space.nvec.tolist(),
            spaces.MultiBinary: lambda space: [2] * space.n,
        }[type(action_space)](action_space)
        vector = spaces.Box(-10, 10, (3,), np.float32)
        self.way, self.is_dict = way, observes or way == "observation"
        keys: dict[str, spaces.Space] = {"vector": vector}
        if way == "observation":
            keys["action_mask"] = spaces.Box(0, 1, (sum(self.sizes),), np.int8)
        self.observation_space = spaces.Dict(keys) if self.is_dict else vector
        self.forbidden_taken = 0
        if way == "method":
            self.action_masks = self._mask

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        starts = np.cumsum([0, *self.sizes[:-1]])
        self.forbidden_taken += int(not self.mask[np.atleast_1d(action) + starts].all())
        reward = float(np.sum(action * self.vector[0])) + float(self.np_random.normal())
        self.steps += 1
        obs, info = self._show()
        return obs, reward, bool(self.np_random.random() < 0.1), self.steps >= 12, info

    def _mask(self) -> np.ndarray:
        return self.mask.copy()

    def _show(self) -> tuple[Any, dict[str, Any]]:
        self.mask = self.np_random.random(sum(self.sizes)) < 0.5
        for start, size in zip(np.cumsum([0, *self.sizes[:-1]]), self.sizes, strict=True):
            self.mask[start + self.np_random.integers(size)] = True
        self.vector = self.np_random.normal(size=3).astype(np.float32)
        keys = {"vector": self.vector}
        if self.way == "observation":
            keys["action_mask"] = self.mask.astype(np.int8)
        return (keys if self.is_dict else self.vector), ({"action_mask": self.mask} if self.way == "info" else {})


def make(n_envs: int = 1, normalized: bool = False, vec_env: type[VecEnv] = DummyVecEnv, **kwargs: Any) -> VecEnv:
    env = make_vec_env(partial(MaskedEnv, **kwargs), n_envs, vec_env_cls=vec_env)
    return (
        VecNormalize(env, norm_obs_keys=["vector"] if isinstance(env.observation_space, spaces.Dict) else None)
        if normalized
        else env
    )


def forbidden(env: VecEnv) -> int:
    return sum(env.get_attr("forbidden_taken"))


# ---------------------------------------------------------------- MaskablePPO's bits


@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize(
    ("kind", "env"),
    [
        ("Discrete", {}),
        ("MultiDiscrete", {"normalized": True}),
        ("MultiBinary", {}),
        ("Discrete", {"observes": True, "normalized": True}),
    ],
)
def test_bits_of_maskable_ppo_and_fast_engines_equal(kind: str, env: dict[str, Any], n_envs: int) -> None:
    """Weights, optimizer and every metric after several iterations, with truncated last minibatches, then unmasked ones."""
    policy = "MultiInputPolicy" if env.get("observes") else "MlpPolicy"

    def trained(algorithm: type, name: str, callback: Any = None, **kwargs: Any) -> tuple[Any, list[Any]]:
        metrics: list[Any] = []

        class Recording(algorithm):  # type: ignore[misc, valid-type]
            def train(self) -> None:
                super().train()
                metrics.append({k: v for k, v in self.logger.name_to_value.items() if k.startswith("train/")})

        model = Recording(name, make(n_envs, action_space=ACTIONS[kind], **env), **SMALL, **kwargs)
        model.learn(64 * n_envs, callback=callback)
        assert forbidden(model.env) == 0
        model.learn(32 * n_envs, use_masking=False, reset_num_timesteps=False)
        assert forbidden(model.env) > 0
        return model, metrics

    theirs, their_metrics = trained(MaskablePPO, policy)
    ours, our_metrics = trained(ScratchPPO, f"Maskable{policy}", engine="torch")
    assert_same_model(ours, theirs)
    for mine, reference in zip(our_metrics, their_metrics, strict=True):
        assert {key: mine[key] for key in reference} == reference
        assert 0 <= mine["train/kl"] < 1
    for callback in (None, lambda *_: True):  # without one, log-probabilities come after the rollout
        for engine in ("numpy", "auto"):
            fast, _ = trained(ScratchPPO, f"Maskable{policy}", callback, engine=engine)
            assert fast._engine.name == (FASTEST if engine == "auto" else engine)
            for mine, reference in zip(fast.policy.parameters(), theirs.policy.parameters(), strict=True):
                np.testing.assert_allclose(mine.detach(), reference.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_images(shared: bool) -> None:
    """``MaskableCnnPolicy``, with masks that draw random numbers: as many calls as contrib makes, at the same moments."""
    from stable_baselines3.common.envs import FakeImageEnv

    def make_env() -> gym.Env:
        env = FakeImageEnv(discrete=True, channel_first=True)
        env.observation_space.seed(0)
        return ActionMasker(env, lambda env: np.arange(env.action_space.n) != np.random.randint(env.action_space.n))

    kwargs = {
        **SMALL,
        "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 16}, "share_features_extractor": shared},
    }
    theirs = MaskablePPO("CnnPolicy", make_env(), **kwargs).learn(32)
    ours = ScratchPPO("MaskableCnnPolicy", make_env(), engine="torch", **kwargs).learn(32)
    assert_same_model(ours, theirs)
    if shared:
        fast = ScratchPPO("MaskableCnnPolicy", make_env(), **kwargs).learn(32)
        assert fast._engine.name == "channels_last"
        for mine, reference in zip(fast.policy.parameters(), theirs.policy.parameters(), strict=True):
            np.testing.assert_allclose(mine.detach(), reference.detach(), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- where masks come from


class NativeMasked(gym.vector.SyncVectorEnv):
    """One method for all environments, ``[n_envs, n]``; the masks of resets allow nothing."""

    calls = 0

    def action_masks(self) -> np.ndarray:
        type(self).calls += 1
        masks = np.array([env.unwrapped.mask for env in self.envs])
        return masks & ~self._autoreset_envs[:, None]


@pytest.mark.parametrize("way", ["method", "observation", "info"])
@pytest.mark.parametrize("kind", ["dummy", "subproc", "next-step", "same-step"])
def test_all_ways_give_the_same_masks(way: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No forbidden action is taken, over many episodes' ends: neither while learning, nor while evaluating."""
    policy = "MaskableMultiInputPolicy" if way == "observation" else "MaskableMlpPolicy"
    if kind.endswith("step"):
        mode = gym.vector.AutoresetMode.NEXT_STEP if kind == "next-step" else gym.vector.AutoresetMode.SAME_STEP
        inner = gym.vector.SyncVectorEnv([partial(MaskedEnv, way=way)] * 2, autoreset_mode=mode)
        env: VecEnv = NativeVecEnv(inner)
    else:
        env = make(2, way=way, vec_env=SubprocVecEnv if kind == "subproc" else DummyVecEnv)
    model = ScratchPPO(policy, env, verbose=1, **SMALL)
    model.learn(64)
    model.learn(64, reset_num_timesteps=False)
    assert {"method": "method", "observation": "observation", "info": "infos"}[way] in capsys.readouterr().out
    evaluate_policy(model, env, n_eval_episodes=6, warn=False)
    assert forbidden(env) == 0
    env.close()


def test_one_call_for_all_environments_and_reset_rows_may_allow_nothing() -> None:
    env = NativeVecEnv(NativeMasked([MaskedEnv] * 3, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP))
    NativeMasked.calls = 0
    model = ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(96)
    assert NativeMasked.calls == 32
    assert model.rollout_buffer.valid is not None
    assert not model.rollout_buffer.valid.all()
    assert forbidden(env) == 0
    masks = model.rollout_buffer.extras["action_masks"]
    assert masks.shape == (16, 3, 6)
    assert masks.dtype == bool


def test_processes_are_asked_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(2, vec_env=SubprocVecEnv)
    calls = []
    ask = env.env_method
    monkeypatch.setattr(env, "env_method", lambda name, *args, **kwargs: calls.append(kwargs) or ask(name, *args, **kwargs))
    ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(32)
    assert calls == [{}] * 16
    env.close()


def test_the_method_comes_first_and_normalization_leaves_masks_alone() -> None:
    """``VecNormalize`` would make reals of a key in Dict observations; unless it is only an observation."""
    env = VecNormalize(make(2, way="observation"))
    model = ScratchPPO("MaskableMultiInputPolicy", env, **SMALL).learn(64)
    assert forbidden(env) == 0
    assert set(np.unique(model._last_obs["action_mask"])) <= {0, 1}
    assert abs(model._last_obs["vector"]).max() <= 10
    plain = VecNormalize(make(2, way="observation"))
    assert "action_mask" in ScratchPPO("MultiInputPolicy", plain, **SMALL).learn(32).env.norm_obs_keys


def test_contribs_class_as_policy() -> None:
    by_name, by_class = (
        ScratchPPO(policy, make(2), **SMALL).learn(32) for policy in ("MaskableMlpPolicy", MaskableActorCriticPolicy)
    )
    assert_same_model(by_name, by_class)


def test_without_masks() -> None:
    """All is as if every action were allowed; no mask is asked for."""
    env = make(2, way="none")
    model = ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(32, use_masking=False)
    assert "action_masks" not in model.rollout_buffer.extras
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(env.reset())


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("kind", list(ACTIONS))
def test_the_gradient_by_hand_is_autograds_in_float64(kind: str) -> None:
    """The entropy's too; masked logits get none."""
    from sb3_ppo_from_scratch.distributions import choices
    from sb3_ppo_from_scratch.engines.numpy_mlp.heads import CategoricalHead, forbidden, mask_out

    sizes = choices(ACTIONS[kind])
    rng = np.random.default_rng(0)
    env = MaskedEnv(ACTIONS[kind])
    masks = np.array([(env.reset(seed=seed), env.mask)[1] for seed in range(20)])
    outputs = th.tensor(rng.normal(size=(20, sum(sizes))), requires_grad=True)
    parts = [
        MaskableCategorical(logits=part, masks=mask)
        for part, mask in zip(outputs.split(sizes, 1), th.tensor(masks).split(sizes, 1), strict=True)
    ]
    actions = th.stack([part.sample() for part in parts], 1)
    log_prob = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(1), strict=True))
    entropy = sum(part.entropy() for part in parts)
    weight = th.tensor(rng.normal(size=20))
    (log_prob * weight - 0.3 * entropy).sum().backward()

    head = CategoricalHead(sizes)
    rows = np.ascontiguousarray(outputs.detach().numpy().T)
    mask_out(rows, forbidden(masks))
    dist = head.forward(rows, np.empty((0, 0)))
    encoded = head.encode(actions.numpy())
    gradient = head.gradient(dist, encoded, weight.numpy(), -0.3)
    np.testing.assert_allclose(head.log_prob(dist, encoded), log_prob.detach(), atol=1e-12)
    np.testing.assert_allclose(head.entropy(dist), entropy.detach(), atol=1e-12)
    np.testing.assert_allclose(gradient.T, outputs.grad, atol=1e-12)
    assert (gradient.T[~masks] == 0).all()


def test_the_exact_kl_of_masked_distributions_is_finite() -> None:
    """Between distributions of different masks too."""
    env = MaskedEnv(ACTIONS["MultiDiscrete"])
    policy = ScratchPPO("MaskableMlpPolicy", env, **SMALL).policy
    obs, rows = th.randn(2, 5, 3), []
    for seed in range(2):
        env.reset(seed=seed)
        distribution = policy.get_distribution(obs[seed], np.repeat(env.mask[None], 5, 0))
        rows.append(distribution_parameters(distribution).detach())
    assert (exact_kl(policy.action_dist, rows[0], rows[0]) == 0).all()
    assert th.isfinite(exact_kl(policy.action_dist, *rows)).all()
    assert distribution_parameters(type(policy.action_dist)([2, 3])) is None


# ---------------------------------------------------------------- where contrib is wrong


def test_a_last_minibatch_of_one_spoils_no_weights() -> None:
    """In MaskablePPO the standard deviation of one advantage makes all weights NaN."""
    kwargs = {**SMALL, "batch_size": 15}
    theirs = MaskablePPO("MlpPolicy", make(), **kwargs)
    with pytest.raises(ValueError, match="nan"):
        theirs.learn(64)
    for engine in dict.fromkeys(("torch", "numpy", FASTEST)):
        model = ScratchPPO("MaskableMlpPolicy", make(), engine=engine, **kwargs).learn(64)
        assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_a_mask_that_allows_nothing_is_an_error() -> None:
    """MaskablePPO chooses among all actions then, without a word."""

    def none_after(env: gym.Env) -> np.ndarray:
        return np.full(4, env.unwrapped.steps < 3)

    def make_env() -> gym.Env:
        env = MaskedEnv(spaces.MultiBinary(2), way="none")
        return ActionMasker(env, none_after)

    MaskablePPO("MlpPolicy", DummyVecEnv([make_env] * 2), **SMALL).learn(32)
    model = ScratchPPO("MaskableMlpPolicy", DummyVecEnv([make_env] * 2), **SMALL)
    with pytest.raises(ValueError, match=r"environment 0 allows no action in dimension 0 \(at step 3 of the rollout"):
        model.learn(32)
    with pytest.raises(ValueError, match=r"environment 1 allows no action in dimension 1"):
        model.predict(np.zeros((2, 3)), action_masks=np.array([[1, 1, 1, 1], [0, 1, 0, 0]]))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("policy", ["MaskableMlpPolicy", "MaskableMultiInputPolicy"])
def test_files_of_either_train_on_in_the_other(policy: str, tmp_path: Path) -> None:
    """The safe reader reads MaskablePPO's; all ways give the bits of MaskablePPO to MaskablePPO."""
    name = policy.removeprefix("Maskable")
    make_env = partial(make, 2, observes=policy.endswith("InputPolicy"))

    def go_on(saver: type, loader: type) -> Any:
        path = tmp_path / f"{saver.__name__}-{loader.__name__}.zip"
        kwargs = {cls: {"engine": "torch"} if cls is ScratchPPO else {} for cls in (saver, loader)}
        saver(policy if saver is ScratchPPO else name, make_env(), **SMALL, **kwargs[saver]).learn(64).save(path)
        return loader.load(path, make_env(), device="cpu", **kwargs[loader]).learn(64)

    reference = go_on(MaskablePPO, MaskablePPO)
    for saver, loader in ((MaskablePPO, ScratchPPO), (ScratchPPO, MaskablePPO), (ScratchPPO, ScratchPPO)):
        assert_same_model(go_on(saver, loader), reference)


def test_models_are_copied_and_pickled_with_their_masks() -> None:
    import copy
    import pickle

    model = ScratchPPO("MaskableMlpPolicy", make(2, way="info"), **SMALL).learn(32)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        th.manual_seed(0)
        np.random.seed(0)
        twin.learn(32, reset_num_timesteps=False)
        assert forbidden(twin.env) == 0
    assert_same_model(*twins)


_RUN = """
import os, signal, sys
from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from stable_baselines3.common.callbacks import ConvertCallback
from tests.test_masks import SMALL, make

def kill(locals, globals):
    if locals["self"].num_timesteps >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return True

env = make(2, way=sys.argv[2], normalized=sys.argv[2] == "info")
callbacks = [ResumableCheckpoint(64, sys.argv[1]), ConvertCallback(kill)]
ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(320, callback=callbacks)
"""


@pytest.mark.parametrize("way", ["method", "info"])
def test_a_killed_run_goes_on_with_the_same_bits(way: str, tmp_path: Path) -> None:
    """The masks of the next step are known again, though infos are gone."""
    command = [sys.executable, "-c", _RUN, str(tmp_path / "run"), way, "200"]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    make_env = partial(make, 2, way=way, normalized=way == "info")
    looking = ConvertCallback(lambda *_: True)  # as the one that has killed: where nobody looks, steps round differently
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = ScratchPPO.resume(tmp_path / "run", make_env(), device="cpu")
        assert resumed.num_timesteps == 192
        resumed.continue_learning([ResumableCheckpoint(64, tmp_path / "run"), looking])
    callbacks = [ResumableCheckpoint(64, tmp_path / "other"), looking]
    whole = ScratchPPO("MaskableMlpPolicy", make_env(), **SMALL).learn(320, callback=callbacks)
    assert_same_model(resumed, whole)
    assert forbidden(resumed.env) == 0


# ---------------------------------------------------------------- evaluation


class Watching(EvalCallback):
    """A user's own."""


@pytest.mark.parametrize("callback", [EvalCallback, Watching, MaskableEvalCallback])
@pytest.mark.parametrize("way", ["method", "observation", "info"])
def test_evaluations_while_learning_have_masks(callback: type[EvalCallback], way: str, tmp_path: Path) -> None:
    if callback is MaskableEvalCallback and way != "method":
        pytest.skip("contrib's knows the method only")
    policy = "MaskableMultiInputPolicy" if way == "observation" else "MaskableMlpPolicy"
    keys = {"norm_obs_keys": ["vector"]} if way == "observation" else {}
    env, eval_env = (VecNormalize(make(2, way=way), **keys) for _ in range(2))
    evaluating = callback(eval_env, eval_freq=16, n_eval_episodes=4, best_model_save_path=str(tmp_path), verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ScratchPPO(policy, env, **{**SMALL, "batch_size": 16}).learn(64, callback=evaluating)
        model.learn(64, callback=evaluating, reset_num_timesteps=False)
    assert evaluating.n_calls == 64
    assert forbidden(evaluating.eval_env) == 0
    assert isinstance(evaluating.model, ScratchPPO)
    assert_same_model(evaluating.model, model)
    ScratchPPO.load(tmp_path / "best_model")


def test_evaluating_a_model() -> None:
    """Ours and contrib's with masks; SB3's where they are in the observations, and elsewhere with one warning."""
    env = make(2)
    model = ScratchPPO("MaskableMlpPolicy", env, **{**SMALL, "batch_size": 16}).learn(32)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=4)
    assert isinstance(mean, float)
    contribs_evaluate_policy(model, env, n_eval_episodes=4)
    evaluate_policy(model, Monitor(MaskedEnv()), n_eval_episodes=4)
    assert forbidden(env) == 0
    with pytest.warns(UserWarning, match="no action_masks") as caught:
        sb3_evaluate_policy(model, env, n_eval_episodes=4)
    assert len(caught) == 1
    assert forbidden(env) > 0
    plain = PPO("MlpPolicy", make(way="none"), **{**SMALL, "batch_size": 16})
    evaluate_policy(plain, plain.env, n_eval_episodes=2)

    env = make(2, way="observation")
    model = ScratchPPO("MaskableMultiInputPolicy", env, **{**SMALL, "batch_size": 16})
    sb3_evaluate_policy(model, env, n_eval_episodes=4)
    assert forbidden(env) == 0
    obs = env.reset()
    action, _ = model.predict({key: value[0] for key, value in obs.items()})
    assert obs["action_mask"][0, action]
    obs["action_mask"] = obs["action_mask"] * 0.3
    with pytest.raises(ValueError, match="norm_obs_keys"):
        model.predict(obs)


# ---------------------------------------------------------------- what is refused


def masked_by(masks: Callable[[gym.Env], Any]) -> gym.Env:
    return ActionMasker(MaskedEnv(way="none"), masks)


@pytest.mark.parametrize(
    ("make_env", "error", "message"),
    [
        (partial(MaskedEnv, way="none"), ValueError, "action_masks.*ActionMasker.*Dict observation.*infos"),
        (partial(masked_by, lambda env: np.ones(5, bool)), ValueError, r"shape \(1, 6\).*\(1, 5\).*step 0"),
        (partial(masked_by, lambda env: np.full(6, 0.5)), ValueError, "of bool, or of 0 and 1"),
        (partial(masked_by, lambda env: ["yes"] * 6), TypeError, "of bool, not of dtype"),
        (partial(masked_by, lambda env: [[True], [True, True]]), ValueError, "one array"),
    ],
)
def test_bad_masks(make_env: Callable[[], gym.Env], error: type[Exception], message: str) -> None:
    model = ScratchPPO("MaskableMlpPolicy", make_env(), **{**SMALL, "batch_size": 16})
    before = [parameter.clone() for parameter in model.policy.parameters()]
    with pytest.raises(error, match=message):
        model.learn(16)
    assert all(map(th.equal, before, model.policy.parameters()))


def test_an_info_without_a_mask_is_named() -> None:
    class Forgetful(MaskedEnv):
        def step(self, action: Any) -> Any:
            *rest, info = super().step(action)
            return (*rest, info if self.steps < 3 else {})

    env = DummyVecEnv([partial(MaskedEnv, way="info"), partial(Forgetful, way="info")])
    with pytest.raises(ValueError, match=r"info of environment 1 has no 'action_mask'.*reset"):
        ScratchPPO("MaskableMlpPolicy", env, **SMALL).learn(32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env": "Pendulum-v1"}, "Discrete, MultiDiscrete or MultiBinary"),
        ({"env": "Pendulum-v1", "use_sde": True}, "use_sde must be False for MaskableMlpPolicy"),
        ({"use_sde": True}, "gSDE"),
        ({"rollout_buffer_class": type("Own", (RolloutBuffer,), {})}, "subclass of ScratchRolloutBuffer for MaskableMlp"),
        ({"engine": "channels_last"}, "features extractor"),
        ({"policy": "MaskablePolicy"}, "'MaskableMlpPolicy'"),
        ({"policy": "MaskableMultiInputPolicy"}, "'MaskableMlpPolicy'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchPPO(**{"policy": "MaskableMlpPolicy", "env": MaskedEnv(), **SMALL, **kwargs})


def test_bad_calls() -> None:
    model = ScratchPPO("MaskableMlpPolicy", MaskedEnv(), **{**SMALL, "batch_size": 16})
    with pytest.raises(TypeError, match="use_masking"):
        model.learn(16, use_masking=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 6\).*\(5,\).*predict"):
        model.predict(np.zeros(3), action_masks=np.ones(5))
    plain = ScratchPPO("MlpPolicy", MaskedEnv(), **{**SMALL, "batch_size": 16})
    with pytest.raises(ValueError, match="action_masks must be None for MlpPolicy"):
        plain.predict(np.zeros(3), action_masks=np.ones(6))


def test_contrib_is_imported_for_those_who_ask() -> None:
    """And who asks in vain is told what to install."""
    code = """
import sys
sys.modules["sb3_contrib"] = None
from sb3_ppo_from_scratch import ScratchPPO
ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16).learn(16)
try:
    ScratchPPO("MaskableMlpPolicy", "CartPole-v1")
except ModuleNotFoundError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "sb3-ppo-from-scratch[contrib]" in printed


# ---------------------------------------------------------------- the zoo

_ZOO = """
import sys
from sb3_contrib.common.maskable.distributions import MaskableCategorical
from sb3_ppo_from_scratch.zoo import main

masked, apply = [], MaskableCategorical.apply_masking

def watched(self, masks):
    masked.extend([] if masks is None else [True])
    return apply(self, masks)

MaskableCategorical.apply_masking = watched
taxi = ["--algo", "scratch_ppo", "--env", "Taxi-v4", "-f", "logs"]
small = ["-params", "n_steps:16", "n_envs:2", "batch_size:16", "n_epochs:1"]
main(["train", *taxi, "-n", "128", "--eval-freq", "64", "--eval-episodes", "1", "--checkpoint-freq", "32", *small])
assert masked, "EvalCallback has not masked"
main(["train", *taxi, "--resume", "logs/scratch_ppo/Taxi-v4_1", *small])
once = ["--n-trials", "1", "--n-jobs", "1", "--n-evaluations", "1", "--eval-episodes", "1"]
main(["train", *taxi, "-n", "64", "-optimize", *once, *small])
masked.clear()
main(["enjoy", *taxi, "--exp-id", "1", "-n", "32", "--no-render"])
assert len(masked) == 32
"""


def test_the_zoo_trains_resumes_searches_and_enjoys_with_masks(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error:predict:UserWarning", "-c", _ZOO],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "no action_masks" not in done.stdout
