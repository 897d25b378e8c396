"""The leaner steps of ``DummyVecEnv`` and ``VecNormalize`` hand out what SB3's do, to the last bit, and memory of its own."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_ppo_from_scratch import ScratchPPO, load_vec_normalize
from sb3_ppo_from_scratch.checkpoint.env_state import level_names
from sb3_ppo_from_scratch.vec_env import LeanDummyVecEnv, LeanVecNormalize, make_lean
from sb3_ppo_from_scratch.vec_env.lean import copy_infos, update_statistics
from tests.envs import OBSERVATION_SPACES
from tests.helpers import ToyEnv

SHARED = {"of all environments": np.arange(3.0)}


class Talkative(ToyEnv):
    """Says this and that in its infos, some of it its own and written over, some of it everybody's."""

    def __init__(self, observation_space: spaces.Space, says: str = "plain"):
        super().__init__(observation_space, spaces.Discrete(3), length=9)
        self.says = says
        self.own: dict[str, Any] = {"nested": {"array": np.zeros(2)}, "list": [1, [2]]}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        self.own["nested"]["array"] += 1
        infos: dict[str, Any] = {
            "nothing": {},
            "plain": {"speed": reward, "count": np.int64(self.steps), "name": "toy", "missing": None, "on": np.True_},
            "arrays": {"array": np.full(2, reward), "nested": {"deep": [np.float32(1.0), {"x": (1, 2)}]}},
            "own": self.own,
            "shared": SHARED,
            "shared within": {"ours": SHARED},
        }
        return obs, reward, terminated, truncated, infos[self.says]


def talkative(base: type[DummyVecEnv], observations: spaces.Space, says: list[str]) -> VecEnv:
    env = base([lambda each=each: Monitor(Talkative(copy.deepcopy(observations), each)) for each in says])  # type: ignore[misc]
    env.seed(3)
    return env


def assert_same(ours: Any, theirs: Any) -> None:
    """In value, type and order in memory."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs.keys() - {"t"}:  # seconds
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(theirs, np.ndarray | np.generic):
        assert ours.dtype == theirs.dtype
        assert getattr(ours, "strides", ()) == getattr(theirs, "strides", ())
        assert ours.tobytes() == theirs.tobytes()
    else:
        assert ours == theirs


def assert_same_steps(ours: VecEnv, theirs: VecEnv, n_steps: int = 40) -> int:
    """What has been handed out stays as it was; returns the number of episodes that ended."""
    assert_same(ours.reset(), theirs.reset())
    rng = np.random.default_rng(0)
    handed_out, ends = [], 0
    for _ in range(n_steps):
        actions = rng.integers(3, size=ours.num_envs)
        mine, reference = ours.step(actions), theirs.step(actions)
        assert_same(mine, reference)
        assert_same(ours.reset_infos, theirs.reset_infos)
        handed_out.append((mine, reference))
        ends += reference[2].sum()
    for mine, reference in handed_out:
        assert_same(mine, reference)
    return ends


SAYS = [
    ["plain"],
    ["nothing", "plain", "arrays"],
    ["own", "plain"],
    ["shared", "shared"],
    ["shared", "plain", "shared within"],
]


@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize("observations", [*OBSERVATION_SPACES])
def test_steps_of_dummy(observations: str, says: list[str]) -> None:
    space = OBSERVATION_SPACES[observations]
    ours, theirs = (talkative(base, space, says) for base in (LeanDummyVecEnv, DummyVecEnv))
    assert assert_same_steps(ours, theirs) >= 4


def test_infos_that_are_one_stay_one() -> None:
    """As in ``copy.deepcopy`` of the whole list."""
    plain, array = {"a": 1}, np.zeros(2)
    for infos in (
        [plain, plain],
        [{"x": array}, {"x": array}],
        [plain, {"other": plain}],
        [{"other": plain}, plain],
        [OrderedDict(a=1), {"b": {"c": plain}}, plain],
        [{("a", "tuple"): 1}, {1: "x", None: 2.0}, {"f": len, "e": ValueError}],
    ):
        ours, theirs = copy_infos(infos), copy.deepcopy(infos)
        assert_same(ours[:2], theirs[:2])
        for i in range(len(infos)):
            assert ours[i] is not infos[i]
            for j in range(len(infos)):
                assert (ours[i] is ours[j]) == (theirs[i] is theirs[j])
                for key in infos[i].keys() & infos[j].keys():
                    assert (ours[i][key] is ours[j][key]) == (theirs[i][key] is theirs[j][key])
        for mine, reference in zip(ours, theirs, strict=True):
            if "other" in reference:
                assert [mine["other"] is each for each in ours] == [reference["other"] is each for each in theirs]


BOXES = {name: space for name, space in OBSERVATION_SPACES.items() if isinstance(space, spaces.Box)}
NORMALIZED: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    **{name: (space, {}) for name, space in BOXES.items()},
    "scalars": (spaces.Box(-1.0, 1.0, ()), {}),
    "dict": (spaces.Dict(a=BOXES["box"], b=BOXES["box-float64"], c=BOXES["image"]), {}),
    "some keys": (OBSERVATION_SPACES["dict"], {"norm_obs_keys": ["vector"]}),
    "not in training": (BOXES["box"], {"training": False}),
    "rewards alone": (BOXES["box"], {"norm_obs": False}),
    "observations alone": (BOXES["box"], {"norm_reward": False}),
    "clipped": (BOXES["box"], {"clip_obs": 0.5, "clip_reward": 0.1, "gamma": 0.5, "epsilon": 1e-2}),
}


def statistics(env: VecNormalize) -> Any:
    by_key = getattr(env, "obs_rms", {})
    return [vars(each) for each in (*(by_key.values() if isinstance(by_key, dict) else [by_key]), env.ret_rms)]


@pytest.mark.parametrize("n_envs", [1, 3, 9])
@pytest.mark.parametrize(("space", "kwargs"), NORMALIZED.values(), ids=NORMALIZED)
def test_steps_of_vec_normalize(space: spaces.Space, kwargs: dict[str, Any], n_envs: int) -> None:
    """Outputs, statistics and returns; originals and normalizing by hand as well."""
    ours, theirs = (
        base(talkative(DummyVecEnv, space, ["plain"] * n_envs), **kwargs) for base in (LeanVecNormalize, VecNormalize)
    )
    assert_same_steps(ours, theirs)
    assert_same(statistics(ours), statistics(theirs))
    assert_same(ours.returns, theirs.returns)
    assert_same(ours.get_original_obs(), theirs.get_original_obs())
    assert_same(ours.get_original_reward(), theirs.get_original_reward())
    assert_same(ours.normalize_obs(ours.get_original_obs()), theirs.normalize_obs(theirs.get_original_obs()))
    ours.training = theirs.training = not theirs.training
    assert_same_steps(ours, theirs)
    assert_same(statistics(ours), statistics(theirs))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(), (1,), (17,), (2, 3)]),
    n=st.sampled_from([1, 2, 7, 8, 9, 130]),
    dtype=st.sampled_from(["float16", "float32", "float64", "int64", "uint8"]),
    scale=st.floats(-30.0, 30.0),
    strange=st.sampled_from([None, np.inf, np.nan]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_statistics(shape: tuple[int, ...], n: int, dtype: str, scale: float, strange: float | None, seed: int) -> None:
    """Over random batches, denormal and infinite ones included; arrays that others have kept are not written to."""
    ours, theirs = RunningMeanStd(shape=shape), RunningMeanStd(shape=shape)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        before = [ours.mean, ours.var]
        kept = copy.deepcopy(before)
        with np.errstate(all="ignore"):
            batch = (rng.normal(size=(n, *shape)) * 10.0**scale).astype(dtype)
            if strange is not None and batch.dtype.kind == "f":
                batch[0] = strange
            update_statistics(ours, batch)
            theirs.update(batch)
        assert_same(vars(ours), vars(theirs))
        assert_same(before, kept)


# ------------------------------------------------------------- which environments it is done to


def toy_vec(base: type[DummyVecEnv] = DummyVecEnv) -> DummyVecEnv:
    return base([lambda: ToyEnv(BOXES["box"], spaces.Discrete(3)) for _ in range(2)])


def classes(env: VecEnv) -> list[type]:
    found: list[type] = []
    level: Any = env
    while level is not None:
        found.append(type(level))
        level = getattr(level, "venv", None)
    return found


def test_a_models_environments_are_lean_beneath_their_wrappers(tmp_path: Path) -> None:
    env = VecFrameStack(VecNormalize(VecMonitor(toy_vec())), 2)
    model = ScratchPPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    assert model.env is env
    assert classes(env) == [VecFrameStack, LeanVecNormalize, VecMonitor, LeanDummyVecEnv]
    names = level_names([env.venv, env.venv.venv.venv])
    assert [name.rpartition(".")[2] for name in names] == ["VecNormalize", "DummyVecEnv"], "as in checkpoints of before"
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    normalizer.save(str(tmp_path / "statistics.pkl"))
    loaded = VecNormalize.load(str(tmp_path / "statistics.pkl"), VecMonitor(toy_vec()))
    assert type(loaded) is VecNormalize
    assert type(load_vec_normalize(str(tmp_path / "statistics.pkl"), VecMonitor(toy_vec()))) is VecNormalize
    assert type(normalizer) is LeanVecNormalize
    assert b"sb3_ppo_from_scratch" not in (tmp_path / "statistics.pkl").read_bytes()
    assert type(pickle.loads(pickle.dumps(normalizer))) is VecNormalize


def test_the_rest_of_a_vec_env_is_sb3s() -> None:
    env = make_lean(VecNormalize(toy_vec()))
    env.set_attr("length", 5, indices=[1])
    assert env.get_attr("length") == [17, 5]
    assert env.env_method("get_wrapper_attr", "length") == [17, 5]
    assert env.env_is_wrapped(Monitor) == [False, False]
    env.unwrapped.envs = []  # type: ignore[attr-defined]  # what is left can be pickled
    assert type(pickle.loads(pickle.dumps(env.unwrapped))) is DummyVecEnv


class SubclassOfDummy(DummyVecEnv):
    pass


class SubclassOfNormalize(VecNormalize):
    pass


def replace_step(env: VecEnv) -> VecEnv:
    env.step_wait = env.step_wait  # type: ignore[method-assign]  # a function of the object's own
    return env


def replace_helper(env: VecEnv) -> VecEnv:
    env._normalize_obs = lambda obs, rms: obs  # type: ignore[attr-defined]  # likewise
    return env


@pytest.mark.parametrize(
    ("make", "unchanged"),
    [
        (lambda: toy_vec(SubclassOfDummy), [SubclassOfDummy]),
        (lambda: replace_step(toy_vec()), [DummyVecEnv]),
        (lambda: SubclassOfNormalize(toy_vec()), [SubclassOfNormalize, LeanDummyVecEnv]),
        (lambda: replace_step(VecNormalize(toy_vec())), [VecNormalize, LeanDummyVecEnv]),
        (lambda: replace_helper(VecNormalize(toy_vec())), [VecNormalize, LeanDummyVecEnv]),
        (lambda: LeanVecNormalize(toy_vec(LeanDummyVecEnv)), [LeanVecNormalize, LeanDummyVecEnv]),
    ],
)
def test_what_is_subclassed_or_replaced_stays(make: Callable[[], VecEnv], unchanged: list[type]) -> None:
    env = make()
    assert make_lean(env) is env
    assert classes(env) == unchanged


@pytest.mark.parametrize(
    ("kind", "name"), [(DummyVecEnv, "step_wait"), (VecNormalize, "_update_reward"), (RunningMeanStd, "update")]
)
def test_what_is_replaced_in_sb3s_classes_counts(kind: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *arguments: method(*arguments))
    env = make_lean(VecNormalize(toy_vec()))
    assert (kind is DummyVecEnv) == (type(env.unwrapped) is DummyVecEnv)
    assert (kind is not DummyVecEnv) == (type(env) is VecNormalize)


def test_environments_in_processes_are_left_alone() -> None:
    env = SubprocVecEnv([lambda: gym.make("CartPole-v1")], start_method="fork")
    try:
        assert classes(make_lean(env)) == [SubprocVecEnv]
    finally:
        env.close()
