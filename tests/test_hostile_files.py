"""Kinds of hostile file that got further than they should: foreign memory, live objects, other runs' files, no end."""

from __future__ import annotations

import array
import io
import os
import pickle
import random
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import FloatSchedule

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO, UnsafeFileError
from sb3_ppo_from_scratch.checkpoint import env_state
from sb3_ppo_from_scratch.checkpoint.env_state import capture, restore
from sb3_ppo_from_scratch.checkpoint.files import read_checkpoint, write_checkpoint
from sb3_ppo_from_scratch.checkpoint.plain_data import pack, unpack
from sb3_ppo_from_scratch.safe_files.table import ALLOWED
from sb3_ppo_from_scratch.safe_files.torch_files import load_torch
from sb3_ppo_from_scratch.safe_files.unpickler import safe_loads
from tests.helpers import ToyEnv
from tests.saved_models import Files, archive, files_of_a_model

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "policy_kwargs": {"net_arch": [4]}}


class Calls:
    """Pickles as a call of ``function``, and what else ``__reduce__`` may return."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def files() -> Files:
    return files_of_a_model(**SMALL)


def torch_file(content: Any) -> bytes:
    stream = io.BytesIO()
    th.save(content, stream)
    return stream.getvalue()


# ------------------------------------------------------------------ memory


def objects() -> np.ndarray:
    made = np.empty(4, object)
    made[:] = [["secret"]] * 4
    return made


def new_ex(kind: type, arguments: tuple[Any, ...], **named: Any) -> bytes:
    """A pickle of ``kind.__new__(kind, *arguments, **named)``."""

    class Made:
        def __reduce_ex__(self, protocol: Any) -> Any:
            import copyreg

            return copyreg.__newobj_ex__, (kind, arguments, named)  # type: ignore[attr-defined]  # of the standard library

    return pickle.dumps(Made(), 4)


ALIASES: dict[str, bytes] = {
    "called": pickle.dumps(Calls(np.ndarray, (4,), "u8", objects())),
    "made anew": new_ex(np.ndarray, ((4,), "u8", objects())),
    "made anew, by name": new_ex(np.ndarray, ((4,),), dtype="u8", buffer=objects()),
    "from a buffer": pickle.dumps(Calls(np._core.numeric._frombuffer, objects(), np.dtype("u8"), (4,), "C")),
    "a number": pickle.dumps(Calls(np._core.multiarray.scalar, np.dtype("u8"), objects()[:1])),
    "objects from bytes": pickle.dumps(Calls(np._core.numeric._frombuffer, bytes(8), np.dtype("O"), (1,), "C")),
    "an object from bytes": pickle.dumps(Calls(np._core.multiarray.scalar, np.dtype("O"), bytes(8))),
    "a state of objects": pickle.dumps(
        Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (4,), np.dtype("u8"), False, objects()))
    ),
    "objects as a state of bytes": pickle.dumps(
        Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, bytes(8)))
    ),
    "too few objects": pickle.dumps(
        Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (9,), np.dtype("O"), False, [1]))
    ),
    "a type of another size": pickle.dumps(Calls(np.dtype, "u8", False, True, state=(3, "<", None, None, None, 800, 8, 0))),
    "a structure": pickle.dumps(np.dtype([("a", "u8")])),
    "a tensor": pickle.dumps(Calls(th._utils._rebuild_tensor_v2, objects(), 0, (4,), (1,), False, OrderedDict())),
    "a view that is freed": pickle.dumps(bytearray(8), 5)[:-1] + b"\x98.",
    "a buffer from outside": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("pickled", ALIASES.values(), ids=ALIASES.keys())
def test_no_constructor_reaches_memory_that_is_not_the_files(pickled: bytes) -> None:
    with pytest.raises(UnsafeFileError):
        safe_loads(pickled, "a field")
    env = Keeping()
    with pytest.raises(ValueError, match="environments"):
        restore(env, hostile_state(env, [{"kept": pickle.loads(pickled) if pickled is None else None}], pickled))


def test_the_exploit_reads_memory_where_it_is_run() -> None:
    aliased = pickle.loads(ALIASES["called"])
    assert aliased[0] == aliased[1] != 0, "the addresses of objects, as numbers that can be written to"


GARBAGE: list[Any] = [
    *(None, 0, -1, 2**40, 2**63, "u8", "O", b"", bytes(8), (), (4,), (-1,), (2**40,), [1], {"a": 1}, {"buffer": objects()}),
    *(objects(), np.zeros(4), np.ndarray, np.dtype("O"), np.dtype("u8"), float("nan"), "MT19937", ((1, 2), (3, 4))),
]


def test_whatever_a_row_of_the_table_is_called_with_makes_a_value_or_an_error() -> None:
    rng = random.Random(0)
    names = [(row.module, name) for row in ALLOWED if callable(row.use) for name in row.names]
    made = 0
    for module, name in names:
        for _ in range(60):
            arguments = tuple(rng.choice(GARBAGE) for _ in range(rng.randrange(7)))
            call = pickle.dumps(arguments, 4)[:-1].removeprefix(b"\x80\x04")
            call = call[9:] if call.startswith(b"\x95") else call
            text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
            pickled = b"\x80\x04" + text + b"\x93" + call + b"R."
            try:
                value = safe_loads(pickled, "a field")
            except ValueError:
                continue
            made += 1
            if type(value) is np.ndarray and not value.dtype.hasobject:
                assert value.nbytes <= len(pickled)
                assert value.base is None or isinstance(value.base, bytes | bytearray | np.ndarray)
    assert made > 50


def mt19937_legacy() -> Any:
    return Calls(np.random._pickle.__generator_ctor, "MT19937", state=("MT19937", np.zeros(624, np.uint32), 10**6))  # type: ignore[attr-defined]  # as NumPy pickles


def philox() -> Any:
    generator = np.random.Philox(1)
    return Calls(np.random._pickle.__bit_generator_ctor, np.random.Philox, state={**generator.state, "buffer_pos": 10**6})  # type: ignore[attr-defined]  # likewise


def short_key() -> Any:
    state = {"bit_generator": "MT19937", "state": {"key": np.zeros(3, np.uint32), "pos": 600}, "has_gauss": 0, "gauss": 0.0}
    return Calls(np.random._pickle.__randomstate_ctor, "MT19937", state=state)  # type: ignore[attr-defined]  # likewise


@pytest.mark.parametrize("make", [mt19937_legacy, philox, short_key])
def test_generators_that_would_read_beyond_their_state(make: Callable[[], Any]) -> None:
    with pytest.raises(UnsafeFileError):
        safe_loads(pickle.dumps(make()), "a field")


def test_global_generators_in_a_checkpoint_are_checked(tmp_path: Path) -> None:
    ScratchPPO("MlpPolicy", "CartPole-v1", **SMALL).learn(16, ResumableCheckpoint(1, tmp_path / "a"))
    state = read_checkpoint(tmp_path / "a")
    kind, key, _, *rest = state["random"]["numpy"]
    state["random"]["numpy"] = (kind, key, 10**6, *rest)
    with pytest.raises(UnsafeFileError, match="position"):
        ScratchPPO.resume(write_checkpoint(tmp_path / "b", pack(state), 1, 1), "CartPole-v1")


def test_an_object_gets_its_state_once() -> None:
    whole = pickle.dumps(np.zeros(3), 2)
    with pytest.raises(UnsafeFileError, match="has its state already"):
        safe_loads(whole[:-1] + b"Nb.", "a field")


# ------------------------------------------------------------------ live objects


class Keeping(ToyEnv):
    """An environment with attributes of many kinds."""

    def __init__(self, kept: Any = None):
        super().__init__(spaces.Discrete(3), spaces.Discrete(2))
        self.kept = kept


class Colour(Enum):
    RED = 1
    BLUE = 2


class Slotted:
    __slots__ = ("number",)


class Thing:
    def __init__(self, number: int):
        self.number = number

    def method(self) -> int:
        return self.number


class Pair(tuple):  # with a dict, as most have
    pass


class Listing(list):
    pass


class Ran(Exception):
    pass


class Constructed:
    """Can only be made by its own code."""

    def __init__(self, *arguments: Any):
        if arguments != (1,):
            raise Ran(arguments)

    def __reduce__(self) -> Any:
        return Constructed, (1,)


class WithSetState:
    def __setstate__(self, state: Any) -> None:
        raise Ran(state)

    def __getstate__(self) -> Any:
        return {"a": 1}


def slotted(number: int) -> Slotted:
    made = Slotted()
    made.number = number
    return made


OWN: dict[str, Callable[[int], Any]] = {
    "an enumeration": lambda n: [Colour.RED, Colour.BLUE][n],
    "slots": slotted,
    "a dict of attributes": Thing,
    "a tuple": lambda n: Pair((n, 2)),
    "a list": lambda n: Listing([n, Thing(n)]),
    "objects in an array": lambda n: np.array([Thing(n), None], object),
    "texts in an array": lambda n: np.array([f"x{n}", "abc"]),
    "Python's generator": random.Random,
    "Python's array": lambda n: array.array("d", [n, 2.5]),
    "two that share": lambda n: (lambda shared: {"a": shared, "b": shared})(np.random.default_rng(n)),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_objects_of_an_environments_own_classes_come_back(make: Callable[[int], Any]) -> None:
    saved, fresh = Keeping(make(1)), Keeping(make(0))
    data = capture(saved)
    restore(fresh, data)
    assert repr(pickle.dumps(fresh.kept, 5)) == repr(pickle.dumps(saved.kept, 5))
    assert type(fresh.kept) is type(saved.kept)


@pytest.mark.parametrize("kind", [Constructed, WithSetState])
def test_no_code_of_an_environments_own_classes_runs(kind: Any) -> None:
    env = Keeping(kind(1) if kind is Constructed else kind())
    data = capture(env)
    with pytest.raises(UnsafeFileError, match="only its own"):
        restore(env, data)


def test_an_emulator_reads_no_state_from_a_file_that_is_not_trusted() -> None:
    """ALE's own reader takes numbers for addresses: a made-up state can end the process."""
    pytest.importorskip("ale_py")
    from stable_baselines3.common.env_util import make_atari_env

    saved, fresh = (make_atari_env("BreakoutNoFrameskip-v4").envs[0] for _ in range(2))
    saved.reset(seed=1)
    fresh.reset(seed=2)
    data = capture(saved)
    before = fresh.unwrapped.ale.getRAM().copy()
    with pytest.raises(UnsafeFileError, match=r"emulator \(ALEInterface\).*allow_pickle=True"):
        restore(fresh, data)
    np.testing.assert_array_equal(fresh.unwrapped.ale.getRAM(), before)
    restore(fresh, data, trust=True)
    np.testing.assert_array_equal(fresh.unwrapped.ale.getRAM(), saved.unwrapped.ale.getRAM())


def hostile_state(env: Any, state: Any, tail: bytes = b"", **in_place: Any) -> bytes:
    """What :func:`capture` writes, with another state; ``tail`` is a pickle that is loaded, and thrown away, before it."""
    names = unpack(capture(env), "x")["levels"]
    before = (tail[:-1].removeprefix(b"\x80\x04").removeprefix(b"\x80\x05") + b"0") if tail else b""
    pickled = pickle.dumps((state, in_place), 2)
    return pack({"levels": names, "state": b"\x80\x04" + before + pickled.removeprefix(b"\x80\x02")})


ANCHOR = b"\x80\x04csb3_ppo_from_scratch.checkpoint.env_state\n_anchor\nK\x00X\x00\x00\x00\x00\x86R"


@pytest.mark.parametrize(
    ("tail", "what"),
    [
        (ANCHOR + b"}X\x04\x00\x00\x00stepNsb.", "a live environment given a state"),
        (ANCHOR + b"X\x04\x00\x00\x00stepNs.", "a live environment given an item"),
        (b"\x80\x04ctests.test_hostile_files\nThing\n}X\x06\x00\x00\x00methodNsb.", "a class given a state"),
        (b"\x80\x04ctests.test_hostile_files\nThing\n)\x81}X\x06\x00\x00\x00methodNsb.", "a method of an object"),
        (b"\x80\x04ctests.test_hostile_files\nThing\nK\x01\x85R.", "a constructor with arguments"),
        (b"\x80\x04ctests.helpers\nToyEnv.step\n}X\x0c\x00\x00\x00__defaults__)sb.", "a function's defaults"),
        (b"\x80\x04cnumpy\ndtype\nX\x02\x00\x00\x00V8\x85R.", "a dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_changes_no_live_object(tail: bytes, what: str) -> None:
    env = Keeping(Thing(1))
    step, method = env.step, Thing.method
    with pytest.raises(UnsafeFileError):
        restore(env, hostile_state(env, [{}], tail))
    assert (env.step, Thing.method) == (step, method)
    assert what


@pytest.mark.parametrize("values", [{"step": 1}, {"reset": None}, {"__class__": 1}, {"_np_random": 1, "close": 2}, {3: 4}])
def test_a_state_takes_the_place_of_no_method(values: dict[Any, Any]) -> None:
    env = Keeping()
    with pytest.raises(UnsafeFileError, match="which is not state"):
        restore(env, hostile_state(env, [values]))
    assert env.step.__self__ is env  # type: ignore[attr-defined]  # a method


def test_what_is_not_state_stays_as_the_fresh_environment_has_it(tmp_path: Path) -> None:
    env = gym.wrappers.TimeLimit(Keeping(), 5)
    inner = env.env
    restore(env, hostile_state(env, [{"env": 3, "_max_episode_steps": 7}, {"kept": "/etc/passwd"}]))
    assert env.env is inner
    assert env._max_episode_steps == 7
    assert inner.kept is None  # type: ignore[attr-defined]  # a Keeping


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "name",
    ["policy.action_net.weight.__class__", "policy.__class__", "logger", "policy.optimizer", "x", "policy.log_std.grad"],
)
@pytest.mark.parametrize("file", ["pytorch_variables.pth", "tensors.pth"])
def test_tensors_are_put_into_the_models_own_only(name: str, file: str, files: Files) -> None:
    data, grad = th.nn.Parameter.data, th.nn.Parameter.grad
    with pytest.raises(ValueError, match=f"names '{name}'"):
        ScratchPPO.load(archive(files, **{file: torch_file({name: th.zeros(1)})}))
    assert (th.nn.Parameter.data, th.nn.Parameter.grad) == (data, grad)


def test_tensors_by_name_are_checked_as_weights_are(files: Files) -> None:
    name = "policy.value_net.bias"
    loaded = ScratchPPO.load(archive(files, **{"pytorch_variables.pth": torch_file({name: th.tensor([7.0])})}))
    assert loaded.policy.value_net.bias.item() == 7
    with pytest.raises(ValueError, match=rf"{name} must have shape \(1,\), not \(2,\)"):
        ScratchPPO.load(archive(files, **{"pytorch_variables.pth": torch_file({name: th.zeros(2)})}))
    with pytest.warns(UserWarning, match=f"{name} are not finite"):
        ScratchPPO.load(archive(files, **{"pytorch_variables.pth": torch_file({name: th.tensor([th.nan])})}))


def two_directories(data: bytes, other: bytes) -> bytes:
    """An archive in which the record at the end tells of one directory, and another stands right before it."""
    end = data.rindex(b"PK\5\6")
    if data[end - 20 : end - 16] == b"PK\6\7":
        end -= 76
    return other[: other.rindex(b"PK\5\6")] + data[end:]


@pytest.mark.parametrize("name", ["policy.pth", "policy.optimizer.pth", "the whole"])
def test_an_archive_with_two_directories(name: str, files: Files) -> None:
    data = archive(files).getvalue() if name == "the whole" else files[name]
    other = archive({"archive/data.pkl": b"other", "archive/data/0": bytes(100)}).getvalue()
    for changed in (two_directories(data, other), data + other, shifted(data)):
        hostile = io.BytesIO(changed) if name == "the whole" else archive(files, **{name: changed})
        with pytest.raises(ValueError, match=r"disagree|damaged"):
            ScratchPPO.load(hostile)


def shifted(data: bytes) -> bytes:
    """The directory is not where the end says."""
    end = data.rindex(b"PK\5\6")
    offset = struct.unpack_from("<L", data, end + 16)[0]
    return data[: end + 16] + struct.pack("<L", (offset + 1) % 2**32) + data[end + 20 :]


def test_weights_that_torch_would_read_and_we_do_not() -> None:
    class Sneaky:
        def __reduce__(self) -> Any:
            return th._utils._rebuild_sparse_tensor, (th.sparse_coo, (th.zeros(1, 1), th.zeros(1), (10**9,), False))

    with pytest.raises(UnsafeFileError, match="_rebuild_sparse_tensor"):
        load_torch(torch_file({"a": Sneaky()}), "weights")


# ------------------------------------------------------------------ files that do not end


def shared(levels: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value] * 9
    return value


def deep_tuple() -> bytes:
    return b"\x80\x04)" + b"\x85" * 200_000


def memoized_key(parts: int, times: int) -> bytes:
    key = b"(" + b"K\x01" * parts + b"t" + b"\x94"
    return b"\x80\x04}" + b"(" + key + b"N" + (b"h\x00N") * times + b"u."


WITHOUT_END: dict[str, bytes] = {
    "numbers that collide": b"\x80\x04\x8f("
    + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") for n in range(1, 100_000))
    + b"\x90.",
    "tuples as keys, again and again": memoized_key(100_000, 200_000),
    "a deep tuple as a key": b"\x80\x04}" + deep_tuple()[2:] + b"Ns.",
    "a deep tuple in a set": b"\x80\x04\x8f(" + deep_tuple()[2:] + b"\x90.",
    "a deep tuple in a frozenset": b"\x80\x04(" + deep_tuple()[2:] + b"\x91.",
    "a shared list as a type": pickle.dumps(Calls(np.dtype, shared(30), False, True)),
    "a shared list as a path": pickle.dumps(Calls(type(Path()), shared(30))),
    "a shared list as a device": pickle.dumps(Calls(th.device, shared(30))),
    "a shared list as a name": b"\x80\x04" + pickle.dumps(shared(30), 4)[2 + 9 : -1] + b"X\x01\x00\x00\x00x\x93.",
    "a set from a list, again and again": b"\x80\x04cbuiltins\nset\n\x94("
    b"(" + b"K\x01" * 50_000 + b"l\x94" + b"0" + b"(" + b"h\x00h\x01\x85R" * 20_000 + b"ll.",
    "a seed of a million digits": pickle.dumps(
        Calls(
            np.random.bit_generator.__pyx_unpickle_SeedSequence,  # type: ignore[attr-defined]  # as NumPy pickles
            np.random.SeedSequence,
            1,
            None,
            state=(1 << 8_000_000, 0, None, 4, ()),
        )
    ),
    "an old space without a size": pickle.dumps(
        Calls(object.__new__, spaces.MultiDiscrete, state={"_shape": (10**13,), "dtype": np.dtype("i8")})
    ),
}


@pytest.mark.parametrize("pickled", WITHOUT_END.values(), ids=WITHOUT_END.keys())
def test_pickles_that_would_not_end(pickled: bytes) -> None:
    with pytest.raises(ValueError, match="a field") as raised:
        safe_loads(pickled, "a field")
    assert len(str(raised.value)) < 2000


def test_one_number_does_not_stand_for_many(files: Files) -> None:
    state = {"log_std": th.zeros(1).expand(10**9)}
    with pytest.raises(UnsafeFileError, match=r"policy\.pth holds torch\.Tensor of size"):
        ScratchPPO.load(archive(files, **{"policy.pth": torch_file(state)}))


def test_an_old_space_gets_no_size_from_the_file() -> None:
    text = b"".join(b"X" + struct.pack("<I", len(part)) + part for part in (b"_shape",))
    pickled = (
        b"\x80\x04cgymnasium.spaces.multi_discrete\nMultiDiscrete\n)\x81}"
        + text
        + b"\x8a\x06"
        + (10**13).to_bytes(6, "little")
    )
    made = safe_loads(pickled + b"\x85sb.", "a field")
    assert "start" not in vars(made)


class Endless(io.RawIOBase):
    """A stream that has a next byte for ever."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.size if whence == io.SEEK_END else offset

    def tell(self) -> int:
        return 0

    def readinto(self, buffer: Any) -> int:
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def streams(folder: Path) -> Iterator[Any]:
    yield io.BufferedReader(Endless(2**50))
    yield io.BufferedReader(Endless(1000))
    yield io.StringIO("text")
    yield 3
    yield None
    closed = io.BytesIO(b"x")
    closed.close()
    yield closed
    yield io.BytesIO(b"")
    yield (folder / "written").open("wb")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
        yield folder / "pipe"
        yield "/dev/zero"


def test_what_is_no_file_or_has_no_end(tmp_path: Path) -> None:
    for stream in streams(tmp_path):
        with pytest.raises(ValueError):  # noqa: PT011  # each has its own words
            ScratchPPO.load(stream)


# ------------------------------------------------------------------ where a file may write


def folder_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def run(folder: Path, formats: tuple[str, ...] = ("csv", "json", "log", "tensorboard")) -> None:
    model = ScratchPPO("MlpPolicy", make_vec_env("CartPole-v1", 1), **SMALL)
    model.set_logger(configure(str(folder / "logs"), list(formats)))
    model.learn(64, ResumableCheckpoint(16, folder / "checkpoints"))


def test_a_checkpoint_writes_into_no_other_runs_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    victim, hostile = tmp_path / "victim", tmp_path / "hostile"
    run(victim)
    run(hostile)
    state = read_checkpoint(hostile / "checkpoints")
    state["logger"]["folder"] = str(victim / "logs")
    for saved in state["logger"]["formats"]:
        saved.update({"folder": str(victim / "logs")}, **({"sizes": {}, "heads": {}} if "sizes" in saved else {}))
    for place in (tmp_path / "elsewhere", victim):  # beside logs that are not its own, too
        file = write_checkpoint(place / "checkpoints", pack(state), 64, 9)
        before = folder_of(victim)
        with pytest.warns(UserWarning, match="'csv' is not gone on with.*or holds another run's"):
            model = ScratchPPO.resume(file, make_vec_env("CartPole-v1", 1))
        model.continue_learning()
        assert folder_of(victim) == before


def test_a_checkpoint_does_not_say_where_the_next_learn_writes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    env = make_vec_env("CartPole-v1", 1)
    own, theirs = tmp_path / "run" / "tb", tmp_path / "theirs"
    for place in (own, theirs):
        model = ScratchPPO("MlpPolicy", env, tensorboard_log=str(place), **SMALL)
        model.learn(32, ResumableCheckpoint(16, tmp_path / "run" / f"{place.name}-checkpoints"))
    model = ScratchPPO.resume(tmp_path / "run" / "tb-checkpoints", env).continue_learning()
    assert model.tensorboard_log == str(own)
    before = folder_of(theirs)
    with pytest.warns(UserWarning, match=r"tensorboard_log=.*theirs.*is not of this run"):
        model = ScratchPPO.resume(tmp_path / "run" / "theirs-checkpoints", env).continue_learning()
    assert model.tensorboard_log is None
    assert folder_of(theirs) == before
    model = ScratchPPO.resume(tmp_path / "run" / "theirs-checkpoints", env, logs=theirs).continue_learning()
    assert model.tensorboard_log == str(theirs)


def test_a_copied_run_continues_the_copy(tmp_path: Path) -> None:
    import shutil

    run(tmp_path / "a", ("csv", "log"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = folder_of(tmp_path / "a")
    first = sorted((tmp_path / "b" / "checkpoints").iterdir())[0]
    ScratchPPO.resume(first, make_vec_env("CartPole-v1", 1)).continue_learning()
    assert folder_of(tmp_path / "a") == before
    assert (tmp_path / "b" / "logs" / "progress.csv").read_bytes().count(b"\n") > 1


def test_a_checkpoint_does_not_say_where_callbacks_write(tmp_path: Path) -> None:
    def evaluating(place: str) -> EvalCallback:
        return EvalCallback(Monitor(gym.make("CartPole-v1")), log_path=str(tmp_path / place), eval_freq=8, verbose=0)

    model = ScratchPPO("MlpPolicy", make_vec_env("CartPole-v1", 1), **SMALL)
    model.learn(32, [ResumableCheckpoint(16, tmp_path / "a" / "checkpoints"), evaluating("mine")])
    state = read_checkpoint(tmp_path / "a" / "checkpoints")
    for _, callback in state["callbacks"]:
        if callback["attributes"] is not None and "log_path" not in callback["attributes"]:
            callback["attributes"] |= {"log_path": str(tmp_path / "theirs"), "best_model_save_path": str(tmp_path / "theirs")}
    file = write_checkpoint(tmp_path / "b" / "checkpoints", pack(state), 32, 1)
    callback = evaluating("again")
    ScratchPPO.resume(file, make_vec_env("CartPole-v1", 1)).continue_learning(callback)
    assert callback.log_path == str(tmp_path / "again" / "evaluations")
    assert callback.best_model_save_path is None
    assert not (tmp_path / "theirs").exists()


# ------------------------------------------------------------------ what is ours opens


@pytest.mark.parametrize("excluded", [["verbose"], ["policy_kwargs"], ["learning_rate", "clip_range"], ["ep_info_buffer"]])
def test_a_file_without_some_fields(excluded: list[str]) -> None:
    stream = io.BytesIO()
    ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, device="cpu").save(stream, exclude=excluded)
    model = ScratchPPO.load(stream, make_vec_env("CartPole-v1", 1))
    model.learn(16)


def test_episode_infos_of_any_kind() -> None:
    model = ScratchPPO("MlpPolicy", "CartPole-v1", **SMALL).learn(16)
    assert model.ep_info_buffer is not None
    model.ep_info_buffer.append({"r": 1.5, "l": 3, "t": 0.1, "end": Colour.RED, "text": np.str_("x"), "more": [Thing(1)]})
    stream = io.BytesIO()
    model.save(stream)
    with pytest.warns(UserWarning, match=r"what episodes reported as 'end' \(tests\.test_hostile_files\.Colour\), 'more'"):
        loaded = ScratchPPO.load(stream)
    assert loaded.ep_info_buffer is not None
    assert loaded.ep_info_buffer[-1] == {"r": 1.5, "l": 3, "t": 0.1, "text": "x"}


def test_schedules_of_the_users_own_are_needed_for_training_only(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 1)
    model = ScratchPPO("MlpPolicy", env, learning_rate=lambda _: 1e-3, clip_range=lambda _: 0.1, **SMALL)
    model.learn(32, ResumableCheckpoint(16, tmp_path / "checkpoints")).save(tmp_path / "model")
    loaded = ScratchPPO.load(tmp_path / "model", env)
    obs = np.zeros((1, 4), np.float32)
    assert loaded.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 1e-3
    with pytest.raises(UnsafeFileError, match=r"(learning_rate|clip_range) was the function .*custom_objects"):
        loaded.learn(16)
    loaded.save(tmp_path / "again")
    assert isinstance(ScratchPPO.load(tmp_path / "again").clip_range, FloatSchedule)
    with pytest.raises(UnsafeFileError, match="custom_objects"):
        ScratchPPO.resume(tmp_path / "checkpoints", env)
    given = {"learning_rate": 1e-3, "clip_range": 0.1}
    ScratchPPO.resume(tmp_path / "checkpoints", env, custom_objects=given).continue_learning()
    ScratchPPO.load(tmp_path / "model", env, custom_objects=given).learn(16)


def test_plain_data_goes_through_unchanged() -> None:
    value = {
        "numbers": [1, -(2**200), 1.5, float("inf"), 1j, True, None, np.float32(2), np.int64(3), range(3)],
        ("tuple", 1): ({1, 2}, frozenset({"x"}), b"bytes", bytearray(b"y")),
        "marked": ["\0", "tuple"],
        "arrays": [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(["a", "bc"])],
        "generators": [np.random.default_rng(3), np.random.RandomState(4), np.random.Generator(np.random.Philox(1))],
        "tensor": th.arange(3),
    }
    back = unpack(pack(value), "a file")
    assert back["numbers"] == value["numbers"]
    assert [type(each) for each in back["numbers"]] == [type(each) for each in value["numbers"]]
    assert back[("tuple", 1)] == value[("tuple", 1)]
    assert back["marked"] == value["marked"]
    for ours, theirs in zip(back["arrays"], value["arrays"], strict=True):
        assert np.array_equal(ours, theirs)
        assert (ours.dtype, ours.flags.c_contiguous) == (theirs.dtype, theirs.flags.c_contiguous)
    for ours, theirs in zip(back["generators"], value["generators"], strict=True):
        assert ours.normal() == theirs.normal()
    assert th.equal(back["tensor"], value["tensor"])
    with pytest.raises(TypeError, match=r"\['a'\]\[1\] is a Thing, not plain data"):
        pack({"a": [1, Thing(1)]})


def test_nothing_of_this_package_unpickles_but_for_trust() -> None:
    assert env_state._TrustingUnpickler is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert safe_loads(pickle.dumps({"a": np.str_("x")}), "a field") == {"a": "x"}
