"""
Thousands of files that are wrong in some way: the answer is the model, or an error of ours that says what is wrong.

The mutator is seeded, so that a failure can be found again. What is read here is small, so that CI has time for many.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO, load_vec_normalize
from sb3_ppo_from_scratch.checkpoint.env_state import capture, restore
from sb3_ppo_from_scratch.checkpoint.files import read_checkpoint, write_checkpoint
from sb3_ppo_from_scratch.checkpoint.plain_data import pack, unpack
from sb3_ppo_from_scratch.checkpoint.run_state import load_run
from sb3_ppo_from_scratch.safe_files.archive import read_archive
from sb3_ppo_from_scratch.safe_files.models import read_fields
from sb3_ppo_from_scratch.safe_files.torch_files import load_torch
from sb3_ppo_from_scratch.safe_files.unpickler import safe_loads
from tests.helpers import ToyEnv

SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "policy_kwargs": {"net_arch": [4]}}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    stream = io.BytesIO()
    ScratchPPO("MlpPolicy", "CartPole-v1", seed=1, **SMALL).learn(8).save(stream)
    return read_archive(stream)


def archive(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return stream.getvalue()


def outcome(read: Callable[[], Any], *names: str) -> str:
    """
    What came of reading: ``"read"`` or ``"refused"``; any other error fails the test.

    :param names: one of them is in the message
    """
    said = ""
    try:
        read()
    except ValueError as error:
        said = str(error)
    assert not said or not names or any(name in said for name in names), said
    assert len(said) < 5000
    return "refused" if said else "read"


def mutated(data: bytes, rng: random.Random, others: list[bytes] | None = None) -> bytes:
    """``data`` with a few bytes flipped, cut, doubled, moved, or taken from elsewhere."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(result) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        piece = result[at : at + length]
        how = rng.randrange(7)
        if how == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            result[at : at + length] = rng.randbytes(len(piece))
        elif how == 2:
            del result[at : at + length]
        elif how == 3:
            result[at:at] = piece
        elif how == 4:
            target = rng.randrange(len(result) + 1)
            result[target : target + length] = piece
        elif how == 5 and others:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            result[at : at + length] = other[start : start + rng.choice((1, 3, 10, 60))]
        else:
            del result[rng.randrange(len(result) + 1) :]
        if not result:
            return b""
    return bytes(result)


# ------------------------------------------------------------------ fields


def hollow(kind: type) -> Any:
    return kind.__new__(kind)


def plain_values() -> list[Any]:
    """Of JSON."""
    numbers = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("inf"), float("nan")]
    texts = ["", "x", "auto", "MlpPolicy", "a" * 5000, "\0", "../../x", "CartPole-v1"]
    rest = [
        None,
        True,
        [],
        [[]],
        [1, "a"],
        {},
        {"a": 1},
        {"pi": ["x"], "vf": [1e9]},
        {":serialized:": 3},
        {":serialized:": "%"},
    ]
    nested: Any = 1
    for _ in range(200):
        nested = [nested]
    return [*numbers, *texts, *rest, nested]


def pickled_values() -> list[Any]:
    """What the table builds, whole or not."""
    return [
        *(10**400, -1, 2.5, "x", b"x", (), (1,), [1], {1: 2}, {"a"}, frozenset({1}), None, range(3), 1j),
        *(np.float32(1), np.int64(-1), np.zeros(0), np.zeros((3, 2)), np.array("x"), np.array([None]), np.array([1j])),
        *(np.random.default_rng(0), np.random.RandomState(0), th.zeros(2), th.nn.Parameter(th.zeros(1)), th.float32),
        *(deque([1]), OrderedDict(a=1), Counter("aa"), defaultdict(int), Path("x"), random.Random(0)),
        *(np.float64, np.ndarray, th.nn.ReLU, th.optim.Adam, hollow(FloatSchedule), hollow(ConstantSchedule)),
        *(hollow(LinearSchedule), FloatSchedule(0.1), LinearSchedule(1, 0, 1), LinearSchedule(1, 0, 0)),
        *(hollow(spaces.Box), hollow(spaces.Discrete), hollow(spaces.MultiDiscrete), hollow(spaces.Dict)),
        *(spaces.Discrete(2), spaces.Discrete(10**12), spaces.Box(-1, 1, (3,)), spaces.Dict(a=spaces.Discrete(2))),
        *(spaces.MultiBinary(3), spaces.MultiDiscrete([2, 2]), spaces.Tuple([spaces.Discrete(2)])),
    ]


def test_every_field_with_every_value(files: dict[str, bytes]) -> None:
    fields = json.loads(files["data"])
    encoded = [{":serialized:": base64.b64encode(pickle.dumps(value)).decode()} for value in pickled_values()]
    rng = random.Random(1)
    count: Counter[str] = Counter()
    for name in fields:
        for value in (*plain_values(), *encoded):
            data = json.dumps({**fields, name: value}).encode()
            count[outcome(partial(read_fields, data, owner=ScratchPPO), name)] += 1
            if rng.random() < 0.06:
                changed = io.BytesIO(archive({**files, "data": data}))
                load = partial(ScratchPPO.load, changed, device="cpu")
                count[outcome(load, name, "the file")] += 1
    assert sum(count.values()) > 3500
    assert min(count.values()) > 500


@pytest.mark.parametrize(
    "kwargs",
    [
        {"net_arch": 3},
        {"net_arch": ["x"]},
        {"net_arch": [-1]},
        {"net_arch": [10**9]},
        {"net_arch": [[4]]},
        {"net_arch": {"pi": [4]}, "activation_fn": 3},
        {"net_arch": [4] * 10_000},
        {"net_arch": [4, 10**5, 10**5, 10**5]},
        {"features_extractor_kwargs": {"features_dim": 10**9}},
        {"features_extractor_kwargs": [1]},
        {"optimizer_kwargs": {"lr": "x"}},
        {"optimizer_kwargs": {"unknown": 1}},
        {"unknown": 1},
        {"log_std_init": "x"},
        {"ortho_init": [1]},
        {"share_features_extractor": False, "normalize_images": "x"},
    ],
    ids=str,
)
def test_policy_kwargs_that_make_no_policy_of_these_weights(kwargs: dict[str, Any], files: dict[str, bytes]) -> None:
    fields = json.loads(files["data"])
    hostile = archive({**files, "data": json.dumps({**fields, "policy_kwargs": kwargs}).encode()})
    outcome(lambda: ScratchPPO.load(io.BytesIO(hostile), device="cpu"), "policy_kwargs", "the file", "weights")


# ------------------------------------------------------------------ bytes


def test_mutated_pickles() -> None:
    rng = random.Random(2)
    whole = [pickle.dumps(value, protocol) for value in pickled_values() for protocol in (2, 4, 5)]
    count = Counter(
        outcome(lambda: safe_loads(mutated(rng.choice(whole), rng, whole), "a field"), "a field") for _ in range(3000)
    )
    assert min(count["read"], count["refused"]) > 100


def test_mutated_archives(files: dict[str, bytes]) -> None:
    rng = random.Random(3)
    stored, deflated = archive(files), archive(files, zipfile.ZIP_DEFLATED)
    for _ in range(400):
        data = mutated(rng.choice((stored, deflated)), rng)
        outcome(partial(ScratchPPO.load, io.BytesIO(data), device="cpu"))
    for _ in range(200):  # sound outside, not inside
        name = rng.choice(["data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
        data = archive({**files, name: mutated(files[name], rng)})
        outcome(partial(ScratchPPO.load, io.BytesIO(data), device="cpu"))


def test_mutated_weights(files: dict[str, bytes]) -> None:
    rng = random.Random(4)
    legacy = io.BytesIO()
    th.save({"a": th.zeros(3), "b": [th.ones(2, 2)[1]]}, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(io.BytesIO(files["policy.pth"])) as source:
        inside = {name: source.read(name) for name in source.namelist()}
    for _ in range(400):
        data = mutated(rng.choice((files["policy.optimizer.pth"], legacy.getvalue())), rng)
        outcome(partial(load_torch, data, "weights"), "weights")
        (name,) = (name for name in inside if name.endswith("data.pkl"))
        data = archive({**inside, name: mutated(inside[name], rng)})
        outcome(partial(load_torch, data, "weights"), "weights")


def test_mutated_statistics(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "statistics.pkl"
    VecNormalize(make_vec_env("CartPole-v1")).save(str(path))
    whole = path.read_bytes()
    env = make_vec_env("CartPole-v1")
    for _ in range(300):
        path.write_bytes(mutated(whole, rng))
        outcome(partial(load_and_use, path, env), "statistics.pkl")
    attributes = VecNormalize(env).__getstate__()
    values = [value for value in pickled_values() if not isinstance(value, type)]
    for name in attributes:
        for value in rng.sample(values, 12):
            with path.open("wb") as file:
                pickle.dump(WithState(VecNormalize(env), {**attributes, name: value}), file)
            outcome(partial(load_and_use, path, env), "statistics.pkl")


class WithState:
    """Pickles as ``target`` with another state."""

    def __init__(self, target: Any, state: Any):
        self.target, self.state = target, state

    __class__ = property(lambda self: type(self.target))  # type: ignore[assignment]  # pickle asks

    def __reduce__(self) -> Any:
        return (*self.target.__reduce_ex__(2)[:2], self.state)


def load_and_use(path: Path, env: VecEnv) -> None:
    normalized = load_vec_normalize(path, env)
    normalized.reset()
    normalized.step(np.zeros(1, int))


# ------------------------------------------------------------------ checkpoints


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in nested plain data, but for long lists."""
    yield above
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*above, key))
    elif isinstance(value, list | tuple) and len(value) < 20:
        for index, inner in enumerate(value):
            yield from places(inner, (*above, index))


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Nested plain data with another value at a place."""
    if not place:
        return new
    if isinstance(value, dict):
        return {**value, place[0]: replaced(value[place[0]], place[1:], new)}
    changed = [replaced(inner, place[1:], new) if index == place[0] else inner for index, inner in enumerate(value)]
    return type(value)(changed)


def test_mutated_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # nothing here need outlive a power cut
    rng = random.Random(6)
    folder = tmp_path / "run"
    model = ScratchPPO("MlpPolicy", cartpole(), **SMALL)
    model.set_logger(configure(str(folder), ["csv", "json", "log"]))
    model.learn(8, [ResumableCheckpoint(8, folder / "checkpoints"), *callbacks()])
    state = read_checkpoint(folder / "checkpoints")
    whole = pack(state)
    count: Counter[str] = Counter()
    for _ in range(300):
        content = mutated(whole[:4000], rng) + whole[4000:]
        file = write_checkpoint(folder / "changed", content, 8, keep=1)
        count[outcome(partial(load_run, file), file.name)] += 1
    values: list[Any] = [None, -1, "x", b"x", [1], {"a": 1}, (), {1: 2}, np.zeros(3), 10**30]
    all_places = [place for place in places(state) if place and place[:2] != ("learn", "total_timesteps")]
    for _ in range(400):
        content = pack(replaced(state, rng.choice(all_places), rng.choice(values)))
        file = write_checkpoint(folder / "changed", content, 8, keep=1)
        count[outcome(partial(go_on, file))] += 1
    assert min(count.values()) > 50


def cartpole() -> VecEnv:
    return VecNormalize(make_vec_env("CartPole-v1"))


def callbacks() -> list[BaseCallback]:
    return [EvalCallback(cartpole(), eval_freq=8, n_eval_episodes=1, verbose=0), StopTrainingOnMaxEpisodes(1000)]


def go_on(file: Path) -> None:
    ScratchPPO.resume(file, cartpole(), device="cpu").continue_learning(callbacks())


def test_mutated_plain_data() -> None:
    rng = random.Random(7)
    value = {"a": [1, 2.5, None, "x"], (1, 2): {3}, "b": np.arange(5), "c": np.random.default_rng(3), "d": deque([b"x"], 2)}
    whole = pack(value)
    count = Counter(outcome(lambda: unpack(mutated(whole, rng), "a file"), "a file") for _ in range(500))
    assert min(count.values()) > 10


def test_mutated_states_of_environments() -> None:
    rng = random.Random(8)
    env = ToyEnv(spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2,))), spaces.Discrete(2))
    env.reset(seed=3)
    names, content = (unpack(capture(env), "x")[part] for part in ("levels", "state"))
    for _ in range(600):
        data = pack({"levels": names, "state": mutated(content, rng)})
        outcome(partial(restore, env, data), "environments")
        assert callable(env.step)
        assert callable(env.reset)
