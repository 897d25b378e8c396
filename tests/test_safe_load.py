"""Loading runs nothing that a file holds. The hostile files are made here; each payload is shown to work where it is run."""

from __future__ import annotations

import ast
import contextlib
import copyreg
import importlib
import io
import json
import os
import pickle
import stat
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule, constant_fn, get_linear_fn, get_schedule_fn
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_from_scratch import ScratchPPO, UnsafeFileError, load_vec_normalize, safe_files
from sb3_ppo_from_scratch.safe_files.archive import read_archive
from sb3_ppo_from_scratch.safe_files.models import read_fields
from sb3_ppo_from_scratch.safe_files.table import ALLOWED, BUILT, NAMED
from sb3_ppo_from_scratch.safe_files.unpickler import safe_loads
from tests.envs import ACTION_SPACES, OBSERVATION_SPACES
from tests.helpers import ToyEnv, assert_same_model
from tests.saved_models import Files, archive, files_of_a_model, with_fields

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def files() -> Files:
    return files_of_a_model(**SMALL)


# ------------------------------------------------------------------- hostile pickles


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class HasState:
    """Pickles as ``target`` with a state of ``state``."""

    def __init__(self, target: Any, state: Any):
        self.target, self.state = target, state

    __class__ = property(lambda self: type(self.target))  # type: ignore[assignment]  # pickle asks

    def __reduce__(self) -> Any:
        return (*self.target.__reduce_ex__(2)[:2], self.state)


def by_value(path: str) -> Callable[[], None]:
    return lambda: os.mkdir(path)


def object_array(content: Any) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = content
    return array


def torch_file(content: Any) -> bytes:
    stream = io.BytesIO()
    th.save(content, stream)
    return stream.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# Each makes the folder ``path`` when it is unpickled the usual way.
RUNNING: dict[str, Callable[[str], bytes]] = {
    "a function": lambda path: pickle.dumps(Calls(os.mkdir, path)),
    "protocol 0": lambda path: pickle.dumps(Calls(os.mkdir, path), 0),
    "an attribute by reference": lambda path: pickle.dumps(Calls(Path.mkdir, Path(path)), 5),
    "through an allowed module": lambda path: (
        b"\x80\x04" + text("pathlib") + text("os.mkdir") + b"\x93" + text(path) + b"\x85R."
    ),
    "INST": lambda path: b"(" + text(path) + b"ios\nmkdir\n.",
    "OBJ": lambda path: b"(cos\nmkdir\n" + text(path) + b"o.",
    "eval": lambda path: pickle.dumps(Calls(eval, f"__import__('os').mkdir({path!r})")),
    "partial": lambda path: pickle.dumps(Calls(partial(os.mkdir, path))),
    "in a dict": lambda path: pickle.dumps({"net_arch": [Calls(os.mkdir, path)]}),
    "in a deque": lambda path: pickle.dumps(deque([{"r": Calls(os.mkdir, path)}])),
    "in a dict's key": lambda path: pickle.dumps(OrderedDict([((1, Calls(os.mkdir, path)), 2)]))[:-1] + b".",
    "in a space": lambda path: pickle.dumps(HasState(spaces.Discrete(3), {"n": Calls(os.mkdir, path)})),
    "in a schedule": lambda path: pickle.dumps(HasState(FloatSchedule(0.1), {"value_schedule": Calls(os.mkdir, path)})),
    "in an object array": lambda path: pickle.dumps(object_array(Calls(os.mkdir, path))),
    "in a tensor's bytes": lambda path: pickle.dumps(Calls(th.storage._load_from_bytes, torch_file(Calls(os.mkdir, path)))),
    "a function by value": lambda path: cloudpickle.dumps(Calls(by_value(path))),
    "a class by value": lambda path: cloudpickle.dumps(Calls(type, "Made", (), {"made": Calls(os.mkdir, path)})),
    "thrown away": lambda path: pickle.dumps(Calls(os.mkdir, path))[:-1] + b"0N.",
}


LEFT_OUT = ("learning_rate", "clip_range", "clip_range_vf", "ent_coef", "ep_info_buffer", "ep_success_buffer")
"""Fields that a model can predict without: what of them cannot be read is left out."""


@pytest.mark.parametrize("payload", RUNNING.values(), ids=RUNNING.keys())
def test_no_payload_runs_in_any_field(payload: Callable[[str], bytes], files: Files, tmp_path: Path) -> None:
    made = tmp_path / "made"
    pickled = payload(str(made))
    pickle.loads(pickled)
    made.rmdir()  # it works where it is run
    for name in json.loads(files["data"]).keys() - {"lr_schedule"}:
        data = read_archive(with_fields(files, **{name: pickled}))["data"]
        if name in LEFT_OUT:
            with contextlib.suppress(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_fields(data)
        else:
            with pytest.raises(UnsafeFileError, match=rf"field '{name}' .*allow_pickle=True.*custom_objects=\{{'{name}'"):
                read_fields(data)
        assert not made.exists()
    with pytest.raises(UnsafeFileError, match=r"field 'policy_kwargs'"):
        ScratchPPO.load(with_fields(files, policy_kwargs=pickled))
    ScratchPPO.load(with_fields(files, lr_schedule=pickled))  # computed anew; what the file says is not read
    assert not made.exists()


def test_the_error_names_the_object() -> None:
    with pytest.raises(UnsafeFileError, match=r"field 'x' holds posix\.mkdir: .* not among .* Nothing of it was run"):
        safe_loads(pickle.dumps(os.mkdir), "field 'x'")


def test_no_module_is_imported_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_a_pickle.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        importlib.import_module("imported_by_a_pickle")
    for name in ("imported_by_a_pickle", "imported_by_a_pickle.more", "gym.spaces.imported_by_a_pickle"):
        with pytest.raises(UnsafeFileError, match="imported_by_a_pickle"):
            safe_loads(f"c{name}\nthing\n.".encode(), "a field")


@pytest.mark.parametrize("how", ["EXT", "PERSID", "NEWOBJ_EX", "class state", "method", "named class"])
def test_other_ways_to_call_or_to_change_something(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    discrete = spaces.Discrete(3)
    pickles = {
        "EXT": b"\x82\x7b.",
        "PERSID": b"Pnumber\n.",
        "NEWOBJ_EX": b"\x80\x04cgymnasium.spaces.discrete\nDiscrete\n)}" + text("n") + b"K\x03s\x92.",
        "class state": b"cgymnasium.spaces.discrete\nDiscrete\n}" + text("sample") + b"Nsb.",
        "method": pickle.dumps(HasState(discrete, {"sample": OrderedDict})),
        "named class": pickle.dumps(Calls(th.nn.ReLU)),
    }
    monkeypatch.setitem(copyreg._inverted_registry, 0x7B, ("os", "mkdir"))  # type: ignore[attr-defined]  # as add_extension does
    with pytest.raises(UnsafeFileError):
        safe_loads(pickles[how], "a field")
    assert spaces.Discrete.sample is type(discrete).sample is not None


@pytest.mark.parametrize("name", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
def test_no_payload_runs_in_the_weights(name: str, files: Files, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = torch_file({"log_std": Calls(os.mkdir, str(made))})
    with pytest.raises(UnsafeFileError, match=name):
        ScratchPPO.load(archive(files, **{name: hostile}))
    with pytest.raises(UnsafeFileError, match=name):
        ScratchPPO.load(archive(files)).set_parameters(archive(files, **{name: hostile}))  # type: ignore[arg-type]  # a stream
    assert not made.exists()
    th.load(io.BytesIO(hostile), weights_only=False)
    assert made.exists()


def test_no_payload_runs_in_the_statistics(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1"))
    path, made = tmp_path / "statistics.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps(HasState(env, {**env.__getstate__(), "gamma": Calls(os.mkdir, str(made))})))
    with pytest.raises(UnsafeFileError, match=rf"{path.name} holds posix\.mkdir.*allow_pickle=True"):
        load_vec_normalize(path, make_vec_env("CartPole-v1"))
    assert not made.exists()
    load_vec_normalize(path, make_vec_env("CartPole-v1"), allow_pickle=True)
    assert made.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("env", "imported_by_a_name:Env-v0"),
        ("policy", 1),
        ("predict", 1),
        ("__class__", 1),
        ("_setup_model", 1),
        ("device", "cpu"),
    ],
)
def test_fields_that_no_save_writes(name: str, value: Any, files: Files) -> None:
    with pytest.raises(UnsafeFileError, match=f"field '{name}' is not one that a save writes"):
        ScratchPPO.load(with_fields(files, **{name: value}))


def test_what_custom_objects_replace_is_not_read(files: Files, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = with_fields(files, clip_range=pickle.dumps(Calls(os.mkdir, str(made))))
    model = ScratchPPO.load(hostile, custom_objects={"clip_range": lambda _: 0.3})
    assert model.clip_range(1.0) == 0.3  # type: ignore[operator]  # a schedule
    assert not made.exists()


def test_allow_pickle_runs_it(files: Files, tmp_path: Path) -> None:
    made = tmp_path / "made"
    ScratchPPO.load(with_fields(files, start_time=pickle.dumps(Calls(os.mkdir, str(made)))), allow_pickle=True)
    assert made.exists()
    with pytest.raises(TypeError, match="allow_pickle must be True or False"):
        ScratchPPO.load(archive(files), allow_pickle="yes")  # type: ignore[arg-type]  # what the test is about


# ----------------------------------------------------------------------- the archive


def member(name: str, **attributes: Any) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../policy.pth"), "leads out"),
        (member("/etc/passwd"), "leads out"),
        (member("a/../../b"), "leads out"),
        (member("..\\b"), "leads out"),
        (member("C:b"), "leads out"),
        (member("link", external_attr=(stat.S_IFLNK | 0o777) << 16), "symbolic link"),
        (member("data"), "two files of the same name"),
        (member("bzip2", compress_type=zipfile.ZIP_BZIP2), "compressed in a way"),
    ],
    ids=lambda value: value.filename if isinstance(value, zipfile.ZipInfo) else "",
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_not_what_they_seem(info: zipfile.ZipInfo, message: str, files: Files) -> None:
    stream = archive(files)
    with zipfile.ZipFile(stream, "a") as target:
        target.writestr(info, b"content")
    with pytest.raises(UnsafeFileError, match=message):
        ScratchPPO.load(stream)


def test_an_encrypted_file(files: Files) -> None:
    content = bytearray(archive(files).getvalue())
    content[zipfile.ZipFile(io.BytesIO(content)).start_dir + 8] |= 1
    with pytest.raises(UnsafeFileError, match="encrypted"):
        ScratchPPO.load(io.BytesIO(content))


def test_zip_bombs(files: Files) -> None:
    stream = archive(files)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as target, target.open("padding", "w") as padding:
        for _ in range(65):
            padding.write(bytes(2**20))
    assert len(stream.getvalue()) < 2**20
    with pytest.raises(UnsafeFileError, match="zip bomb"):
        ScratchPPO.load(stream)
    with pytest.raises(UnsafeFileError, match="more than 64"):
        ScratchPPO.load(archive(files, **{f"file{i}": b"" for i in range(60)}))


def test_a_bomb_inside_the_weights(files: Files) -> None:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(files["policy.pth"])) as source,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(UnsafeFileError, match=r"policy\.pth is compressed inside"):
        ScratchPPO.load(archive(files, **{"policy.pth": stream.getvalue()}))


def test_a_lie_about_the_size_inflates_no_more_than_it_says(files: Files) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)
        target.writestr("padding", bytes(10**6))
    content = stream.getvalue().replace(struct.pack("<I", 10**6), struct.pack("<I", 10))
    with pytest.raises(ValueError, match="damaged or incomplete"):
        ScratchPPO.load(io.BytesIO(content))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_archives(share: float, files: Files) -> None:
    content = archive(files).getvalue()
    with pytest.raises(ValueError, match="not a zip archive, or a damaged or incomplete one"):
        ScratchPPO.load(io.BytesIO(content[: int(share * len(content))]))


@pytest.mark.parametrize("name", ["data", "policy.pth", "policy.optimizer.pth"])
def test_missing_and_truncated_files(name: str, files: Files) -> None:
    with pytest.raises(ValueError, match=f"no {name}"):
        ScratchPPO.load(archive({other: content for other, content in files.items() if other != name}))
    with pytest.raises(ValueError, match=rf"{name}'? is damaged"):
        ScratchPPO.load(archive(files, **{name: files[name][: len(files[name]) // 2]}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy_class", "MlpPolicy"),
        ("policy_kwargs", [1]),
        ("observation_space", None),
        ("policy_class", pickle.dumps(th.nn.ReLU)),
    ],
)
def test_fields_of_the_wrong_kind(name: str, value: Any, files: Files) -> None:
    with pytest.raises((ValueError, TypeError), match=r"policy|observation_space"):
        ScratchPPO.load(with_fields(files, **{name: value}))


def test_spaces_that_lack_something(files: Files) -> None:
    hollow = pickle.dumps(HasState(spaces.Discrete(3), {"_shape": ()}))
    with pytest.raises(ValueError, match="field 'action_space' is damaged"):
        ScratchPPO.load(with_fields(files, action_space=hollow))


# --------------------------------------------------------------------- pickle bombs


def laughs(levels: int) -> Any:
    value: Any = ["ha"] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


BOMBS: dict[str, bytes] = {
    "shared lists": pickle.dumps(laughs(20)),
    "a list in itself": pickle.dumps(itself()),
    "deep lists": b"".join([b"]" * 100_000, b"a" * 99_999, b"."]),
    "an array without bytes": pickle.dumps(Calls(np._core.numeric._frombuffer, b"", np.dtype("f8"), (10**12,), "C")),
    "a reconstructed array": pickle.dumps(Calls(np._core.multiarray._reconstruct, np.ndarray, (10**12,), b"d")),
    "an array of no size": pickle.dumps(Calls(np.dtype, "V0", False, True)),
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b".",
    "a memo": b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".",
    "a tensor beyond its storage": pickle.dumps(
        Calls(th._utils._rebuild_tensor_v2, th.zeros(1).storage(), 0, (10**6,), (10**6,), False, OrderedDict())
    ),
    "a position beyond its key": pickle.dumps(np.random.RandomState(0)).replace(b"M\x70\x02u", b"M\xff\xffu"),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_pickle_bombs(bomb: bytes) -> None:
    if bomb == BOMBS["a memo"]:
        assert safe_loads(bomb, "a field") is None  # nothing is allocated for an index
        return
    with pytest.raises(ValueError, match="a field"):
        safe_loads(bomb, "a field")


@given(data=st.binary(max_size=60), position=st.floats(0, 1), length=st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_damaged_pickles_are_errors_of_ours(data: bytes, position: float, length: int) -> None:
    whole = pickle.dumps({"space": spaces.Box(-1, 1, (2,)), "schedule": FloatSchedule(0.1), "ep": deque([1.5], 3)})
    index = int(position * len(whole))
    for damaged in (data, whole[:index] + data[:length] + whole[index + length :]):
        try:
            safe_loads(damaged, "a field")
        except ValueError as error:
            assert "a field" in str(error)  # noqa: PT017  # most bytes are damaged pickles, some are not


# ------------------------------------------------------------------------ the weights


def test_weights_of_the_wrong_shape(files: Files) -> None:
    model = ScratchPPO.load(archive(files))
    before = model.policy.parameters_to_vector()
    for name, of in (("policy.pth", "policy"), ("policy.optimizer.pth", "policy.optimizer")):
        state = model.get_parameters()[of]
        if of == "policy":
            state["value_net.bias"] = th.zeros(2)
            expected = r"value_net\.bias must have shape \(1,\), not \(2,\)"
        else:
            state["state"][3]["exp_avg"] = th.zeros(7)
            expected = r"exp_avg of parameter 3 must have shape \(64,\), not \(7,\)"
        hostile = {name: torch_file(state)}
        with pytest.raises(ValueError, match=expected):
            ScratchPPO.load(archive(files, **hostile))
        with pytest.raises(ValueError, match=expected):
            model.set_parameters({**model.get_parameters(), of: state})
        assert np.array_equal(model.policy.parameters_to_vector(), before)


def test_weights_that_are_not_finite_are_a_warning(files: Files) -> None:
    state = ScratchPPO.load(archive(files)).policy.state_dict()
    state["action_net.weight"][0, 0] = th.nan
    with pytest.warns(UserWarning, match=r"action_net\.weight are not finite"):
        ScratchPPO.load(archive(files, **{"policy.pth": torch_file(state)}))


# ------------------------------------------------------------------- ordinary files


def assert_same_fields(ours: ScratchPPO, theirs: ScratchPPO) -> None:
    """All attributes, as the bytes of their pickles; the policy by its parameters."""
    assert vars(ours).keys() == vars(theirs).keys()
    for name in vars(ours).keys() - {"policy", "env", "_vec_normalize_env", "_engine"}:
        assert pickle.dumps(vars(ours)[name]) == pickle.dumps(vars(theirs)[name]), name
    assert_same_model(ours, theirs)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "architecture": {
        "policy_kwargs": {
            "net_arch": {"pi": [8], "vf": [4]},
            "activation_fn": th.nn.LeakyReLU,
            "optimizer_class": th.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.9, 0.99)},
            "log_std_init": np.float32(-0.5),
        }
    },
    "schedules": {"learning_rate": LinearSchedule(1e-3, 1e-4, 0.5), "clip_range": FloatSchedule(0.1), "clip_range_vf": 0.2},
    "paths": {"tensorboard_log": Path("logs")},
}


@pytest.mark.parametrize("kwargs", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@pytest.mark.parametrize("algorithm", [PPO, ScratchPPO])
@pytest.mark.parametrize("seed", [None, 3])
def test_ordinary_files_load_the_same_either_way(
    algorithm: Any, kwargs: dict[str, Any], seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = algorithm("MlpPolicy", "Pendulum-v1", seed=seed, **SMALL, **kwargs)
    model.learn(32)
    model.action_space.sample()
    stream = io.BytesIO()
    model.save(stream)
    safe, trusting = (ScratchPPO.load(stream, allow_pickle=allow_pickle) for allow_pickle in (False, True))
    assert_same_fields(safe, trusting)
    assert np.array_equal(safe.action_space.sample(), trusting.action_space.sample())


@pytest.mark.parametrize("space", OBSERVATION_SPACES.values(), ids=OBSERVATION_SPACES.keys())
def test_every_observation_space_loads_the_same_either_way(space: spaces.Space) -> None:
    model = PPO(
        "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy", ToyEnv(space, spaces.Discrete(2)), **SMALL
    )
    stream = io.BytesIO()
    model.learn(16).save(stream)
    assert_same_fields(*(ScratchPPO.load(stream, allow_pickle=allow_pickle) for allow_pickle in (False, True)))


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES.keys())
def test_every_action_space_loads_the_same_either_way(space: spaces.Space) -> None:
    stream = io.BytesIO()
    ScratchPPO("SharedMlpPolicy", ToyEnv(OBSERVATION_SPACES["box"], space), **SMALL).learn(16).save(stream)
    assert_same_fields(*(ScratchPPO.load(stream, allow_pickle=allow_pickle) for allow_pickle in (False, True)))


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.5),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.ones((2, 3))),
        np.ones((2, 3, 4)).transpose(2, 0, 1),
        np.zeros((0, 3)),
        np.random.default_rng(7),
        np.random.Generator(np.random.Philox(3)),
        np.random.RandomState(7),
        th.arange(6.0).reshape(2, 3)[:, 1],
        th.nn.Parameter(th.ones(2)),
        th.float32,
        th.device("cpu"),
        th.Size([1, 2]),
        {"a": (1, 2.5, None, True, "text", b"bytes", 10**30, {3})},
        OrderedDict(a=1),
        deque([1, 2], 3),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values(value: Any, protocol: int) -> None:
    pickled = pickle.dumps(value, protocol)
    ours, theirs = safe_loads(pickled, "a field"), pickle.loads(pickled)
    assert type(ours) is type(theirs)
    if isinstance(value, th.Tensor):
        assert th.equal(ours, theirs)
        assert (ours.stride(), ours.requires_grad) == (theirs.stride(), theirs.requires_grad)
    elif isinstance(value, np.random.RandomState):
        assert np.array_equal(ours.randint(0, 10**6, 1000), theirs.randint(0, 10**6, 1000))
    else:
        assert pickle.dumps(ours, protocol) == pickle.dumps(theirs, protocol)


def test_statistics_load_the_same_either_way(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    ScratchPPO("MlpPolicy", env, **SMALL).learn(32)
    env.save(str(tmp_path / "statistics.pkl"))
    safe, trusting = (
        load_vec_normalize(tmp_path / "statistics.pkl", make_vec_env("Pendulum-v1", 2), allow_pickle=allow_pickle)
        for allow_pickle in (False, True)
    )
    assert pickle.dumps(safe.__getstate__()) == pickle.dumps(trusting.__getstate__())
    with pytest.raises(ValueError, match="do not fit the environments"):
        load_vec_normalize(tmp_path / "statistics.pkl", make_vec_env("CartPole-v1", 2))


def test_statistics_of_the_wrong_shape_or_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "statistics.pkl"
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    env.obs_rms.var[0] = np.nan  # type: ignore[union-attr]  # of a Box
    env.save(str(path))
    with pytest.warns(UserWarning, match=r"obs_rms\.var .* is not finite"):
        load_vec_normalize(path, make_vec_env("Pendulum-v1"))
    env.obs_rms.mean = np.zeros(2)  # type: ignore[union-attr]  # likewise
    env.save(str(path))
    with pytest.raises(ValueError, match=r"obs_rms\.mean .* must have shape \(3,\), not \(2,\)"):
        load_vec_normalize(path, make_vec_env("Pendulum-v1"))


def test_the_users_own_classes_need_trust(files: Files) -> None:
    class Mine(th.nn.ReLU):
        pass

    stream = io.BytesIO()
    ScratchPPO("MlpPolicy", "CartPole-v1", policy_kwargs={"activation_fn": Mine}, **SMALL).save(stream)
    with pytest.raises(UnsafeFileError, match="field 'policy_kwargs' holds"):
        ScratchPPO.load(stream)
    given_by_hand = ScratchPPO.load(stream, custom_objects={"policy_kwargs": {"activation_fn": Mine}})
    assert_same_model(ScratchPPO.load(stream, allow_pickle=True), given_by_hand)


def old_schedules() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "constant": get_schedule_fn(0.2),
            "linear": get_linear_fn(1e-3, 1e-4, 0.5),
            "wrapped": get_schedule_fn(get_linear_fn(1e-3, 1e-4, 0.5)),
            "in a class": FloatSchedule(constant_fn(0.1)),
        }


@pytest.mark.parametrize("name", old_schedules())
def test_functions_of_old_files_become_schedules(name: str, files: Files) -> None:
    function = old_schedules()[name]
    pickled = cloudpickle.dumps(function)
    assert b"_make_function" in pickled
    loaded = ScratchPPO.load(with_fields(files, clip_range=pickled)).clip_range
    assert [loaded(progress) for progress in (1.0, 0.7, 0.2, 0.0)] == [function(progress) for progress in (1.0, 0.7, 0.2, 0.0)]  # type: ignore[operator]  # a schedule
    assert b"_make_function" not in cloudpickle.dumps(loaded), "saved again, it is of today"


def test_a_function_that_borrows_the_name_of_a_schedule_is_not_run(files: Files) -> None:
    def outer(val: Any) -> Callable[[Any], Any]:
        return lambda _: 1 / 0 * val

    function = outer(0.3)
    unread = ScratchPPO.load(with_fields(files, clip_range=cloudpickle.dumps(function)))
    with pytest.raises(UnsafeFileError, match=r"clip_range was the function .*outer\.<locals>\.<lambda>.*custom_objects"):
        unread.clip_range(1.0)  # type: ignore[operator]  # a schedule
    function.__qualname__, function.__module__ = "constant_fn.<locals>.func", "stable_baselines3.common.utils"
    pickled = cloudpickle.dumps(function)
    with pytest.raises(ZeroDivisionError):
        pickle.loads(pickled)(1.0)
    assert ScratchPPO.load(with_fields(files, clip_range=pickled)).clip_range(1.0) == 0.3  # type: ignore[operator]  # a schedule


def test_every_row_of_the_table_is_there() -> None:
    for row in ALLOWED:
        for name in row.names:
            if row.use in (NAMED, BUILT) and (row.module != "rl_zoo3.utils" or "rl_zoo3" in sys.modules):
                assert hasattr(importlib.import_module(row.module), name)
        assert row.why


def test_the_reader_imports_nothing_of_the_package_but_errors_and_checks() -> None:
    """So that whatever reads files can import it."""
    folder = Path(safe_files.__path__[0])
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sb3_ppo_from_scratch"):
                assert str(node.module).split(".")[1] in ("errors", "checks", "safe_files"), file
