"""
Reading model files without running anything that they hold.

SB3's files keep most of a model as pickles; :mod:`sb3_ppo_from_scratch.safe_files.unpickler` reads those. The archive around
them is checked before anything is inflated, and everything is read into memory once: what was checked is what is used.
"""

from __future__ import annotations

import base64
import binascii
import copy
import io
import json
import pathlib
import stat
import warnings
import zipfile
import zlib
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_ppo_from_scratch.checks.arguments import errors_for_assertions
from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.unpickler import load_torch, safe_loads

__all__ = [
    "check_weights",
    "load_torch",
    "load_vec_normalize",
    "read_archive",
    "read_fields",
    "safe_archive",
    "safe_loads",
    "weights_archive",
]

# Bounds on what reading may cost; a model of a gigabyte, or a rollout's worth of pickled values, stays far below them.
FREE_BYTES = 64 * 2**20
"""An archive may always inflate to so many bytes ..."""
MAX_RATIO = 20
"""... and beyond that to so many times its own size. Weights compress by less than 2, pickles as text by less than 10."""
MAX_MEMBERS = 64
"""Files in an archive; SB3 writes six."""

# ------------------------------------------------------------------ the archive


def read_archive(path: str | pathlib.Path | io.BufferedIOBase, suffix: str = "zip") -> dict[str, bytes]:
    """
    Read all files of a zip archive into memory, once the archive has been found to be what it looks like.

    :param path: a path, with or without ``suffix``, or an open binary file
    :return: the content of each file, by name
    :raises UnsafeFileError: for files outside the archive, links, twins, encryption, and for more bytes than
        ``FREE_BYTES`` or ``MAX_RATIO`` times the archive's size
    :raises ValueError: for an archive that is damaged or incomplete
    :raises FileNotFoundError: if there is no such file
    """
    file = open_path(path, "r", suffix=suffix)
    try:
        return _read_archive(file, str(getattr(file, "name", "the file")))
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()


def _read_archive(file: Any, name: str) -> dict[str, bytes]:
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (
                members and min(member.header_offset for member in members) > 0
            ):  # the weights' own archive may be all that is left
                raise zipfile.BadZipFile("it does not begin at its beginning")
            _check_members(members, size, name)
            return {member.filename: archive.read(member) for member in members if not member.is_dir()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{name} is not a zip archive, or a damaged or incomplete one: {error}") from error


def _check_members(members: list[zipfile.ZipInfo], size: int, name: str) -> None:
    names = [member.filename for member in members]
    problem = next(filter(None, map(_member_problem, members)), None)
    if len(names) > MAX_MEMBERS:
        problem = f"{len(names)} files, more than {MAX_MEMBERS}"
    elif len(set(names)) < len(names):
        problem = "two files of the same name"
    elif sum(member.compress_size for member in members) > size:
        problem = "files that overlap"
    elif sum(member.file_size for member in members) > max(FREE_BYTES, MAX_RATIO * size):
        inflated = sum(member.file_size for member in members)
        problem = f"{inflated} bytes in {size} (a zip bomb: more than {MAX_RATIO} times, and more than {FREE_BYTES})"
    if problem is not None:
        raise UnsafeFileError(f"{name} holds {problem}. No model has that; nothing of it was read")


def _member_problem(member: zipfile.ZipInfo) -> str | None:
    name = member.filename
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or "\0" in member.orig_filename:
        return f"the file name {member.orig_filename[:80]!r}, which leads out of the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return f"{name[:80]!r}, a symbolic link"
    if member.flag_bits & 0x1:
        return f"{name[:80]!r}, which is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"{name[:80]!r}, compressed in a way that SB3 does not use"
    return None


# ------------------------------------------------------------------ model files

_RECOMPUTED = frozenset({"lr_schedule"})
"""Fields that every load computes anew, from ``learning_rate``; old files hold a function here."""
_NEVER_SAVED = frozenset(
    {"policy", "device", "env", "replay_buffer", "rollout_buffer", "_vec_normalize_env", "_logger", "_engine"}
)
"""Fields that no save writes, and that would be used; making an ``env`` by its name can import a module that it names."""
_NEEDED = ("policy_class", "policy_kwargs", "observation_space", "action_space", "verbose")


def read_fields(data: bytes, custom_objects: dict[str, Any] | None = None, owner: type = object) -> dict[str, Any]:
    """
    A model's attributes from the file ``data`` of its archive, without running anything.

    :param data: JSON, with pickles in base64 under ``":serialized:"``
    :param custom_objects: values to use instead of the file's, which are not even looked at
    :param owner: the class of the model; fields named as its methods are refused
    :return: the attributes by name
    :raises UnsafeFileError: naming the field and the object, for anything that :data:`ALLOWED` does not hold
    :raises ValueError: for a damaged file
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file 'data' is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the file 'data' is damaged: it holds a {type(fields).__name__}, not the fields of a model")
    custom = custom_objects or {}
    return {name: custom[name] if name in custom else _read_field(name, value, owner) for name, value in fields.items()}


def _read_field(name: str, value: Any, owner: type) -> Any:
    if name in _RECOMPUTED:
        return None
    if (name in _NEVER_SAVED and value is not None) or name.startswith("__") or callable(getattr(owner, name, None)):
        raise UnsafeFileError(
            f"field {name!r} is not one that a save writes, and using it could run something. Nothing was run"
        )
    if not isinstance(value, dict) or ":serialized:" not in value:
        return value
    try:
        pickled = base64.b64decode(value[":serialized:"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"field {name!r} is damaged: {error}") from error
    return safe_loads(
        pickled,
        f"field {name!r}",
        f"load with allow_pickle=True; or give the value yourself: custom_objects={{{name!r}: ...}}",
    )


def safe_archive(
    path: str | pathlib.Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None, owner: type
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    A model file in two parts that SB3's ``load`` puts together again without unpickling anything.

    :param path: as ``load`` takes it
    :param custom_objects: as ``load`` takes them
    :param owner: the class that loads
    :return: an archive without pickled fields; all fields' values, to be passed as ``custom_objects``
    :raises UnsafeFileError: see :func:`read_archive` and :func:`read_fields`
    :raises ValueError: if the file is damaged, or not a model's
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects must be a dict or None, not {custom_objects!r}")
    files = _read_model(path)
    fields = read_fields(files["data"], custom_objects, owner)
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise ValueError(f"{path} is not a model of PPO: its data lack {', '.join(missing)}")
    _check_kinds(fields)
    return _stored(files | {"data": json.dumps(dict.fromkeys(fields)).encode()}), fields


def weights_archive(path: str | pathlib.Path | io.BufferedIOBase) -> io.BytesIO:
    """
    A model file without anything but its weights, checked as :func:`safe_archive` does.

    :param path: as ``set_parameters`` takes it
    :raises UnsafeFileError: see :func:`read_archive`
    :raises ValueError: if the file is damaged, or not a model's
    """
    return _stored(_read_model(path))


def _read_model(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, bytes]:
    files = read_archive(path)
    missing = [name for name in ("data", "policy.pth", "policy.optimizer.pth") if name not in files]
    if missing:
        raise ValueError(f"{path} is not a model of PPO: the archive has no {', '.join(missing)}")
    return files


def _stored(files: dict[str, bytes]) -> io.BytesIO:
    """The archive again, uncompressed, once its weights are known to be nothing but weights."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            if name.endswith(".pth"):
                load_torch(content, name)
            archive.writestr(name, content)
    stream.seek(0)
    return stream


def _check_kinds(fields: dict[str, Any]) -> None:
    """What SB3's ``load`` relies on before the arguments are checked as the constructor's are."""
    kinds = {"policy_class": type, "policy_kwargs": dict, "observation_space": spaces.Space, "action_space": spaces.Space}
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise ValueError(f"field {name!r} must be a {kind.__name__}, not {type(fields[name]).__name__}")
    for name in ("observation_space", "action_space"):
        try:
            repr(copy.deepcopy(fields[name]))  # reads all that makes it up; a space remembers what it was asked
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"field {name!r} is damaged: {error}") from error


def check_weights(policy: ActorCriticPolicy, params: dict[str, Any]) -> None:
    """
    Whether a file's tensors have the shapes of the parameters that they are for. Numbers that are not finite are a warning.

    :param policy: the policy as built, with its optimizer
    :param params: state dicts by name, as ``get_parameters`` returns them
    :raises ValueError: naming the first parameter that does not fit
    """
    ours = policy.state_dict()
    for name, tensor in params.get("policy", {}).items():
        _check_tensor(f"weights of {name}", tensor, ours.get(name))
    optimizer = params.get("policy.optimizer", {})
    parameters = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in optimizer.get("param_groups", []) for key in group["params"]]
    for key, parameter in zip(keys, parameters, strict=False):  # torch itself says if their number differs
        for name, tensor in optimizer.get("state", {}).get(key, {}).items():
            if isinstance(tensor, th.Tensor) and tensor.dim() > 0:
                _check_tensor(f"the optimizer's {name} of parameter {key}", tensor, parameter)


def _check_tensor(name: str, tensor: Any, ours: th.Tensor | None) -> None:
    if not isinstance(tensor, th.Tensor):
        raise ValueError(f"the {name} must be a tensor, not a {type(tensor).__name__}")
    if ours is not None and tensor.shape != ours.shape:
        raise ValueError(f"the {name} must have shape {tuple(ours.shape)}, not {tuple(tensor.shape)}")
    if not th.isfinite(tensor).all():
        warnings.warn(f"the {name} are not finite: the model will act at random, or not at all", stacklevel=5)


# ------------------------------------------------------------- VecNormalize's files


def load_vec_normalize(path: str | pathlib.Path, venv: VecEnv, allow_pickle: bool = False) -> VecNormalize:
    """
    ``VecNormalize.load`` without running anything that the file holds.

    :param path: a file that ``VecNormalize.save`` wrote
    :param venv: the environments to normalise
    :param allow_pickle: for a trusted file: let SB3 unpickle it as it is
    :return: ``venv``, normalised with the file's statistics
    :raises UnsafeFileError: if the file holds anything that :data:`ALLOWED` does not
    :raises ValueError: if it is damaged, or the statistics do not fit ``venv``
    """
    if allow_pickle:
        return VecNormalize.load(str(path), venv)
    loaded = safe_loads(pathlib.Path(path).read_bytes(), str(path))
    if not isinstance(loaded, VecNormalize):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the statistics of VecNormalize")
    with errors_for_assertions(f"the statistics in {path} do not fit the environments"):
        loaded.set_venv(venv)
    _check_statistics(loaded, path)
    return loaded


def _check_statistics(env: VecNormalize, path: str | pathlib.Path) -> None:
    """As :func:`check_weights`, for means and variances."""
    by_key = env.obs_rms if isinstance(getattr(env, "obs_rms", None), dict) else {"": getattr(env, "obs_rms", None)}
    space = env.observation_space
    for key, statistics in by_key.items():
        of = space.spaces.get(key) if isinstance(space, spaces.Dict) else space
        if statistics is None or of is None:  # observations are not normalized
            continue
        for name in ("mean", "var"):
            value = np.asarray(getattr(statistics, name, None))
            if value.shape != of.shape:
                raise ValueError(f"obs_rms.{name} {key} in {path} must have shape {of.shape}, not {value.shape}")
            if not np.isfinite(value).all():
                warnings.warn(f"obs_rms.{name} {key} in {path} is not finite: observations will not be, either", stacklevel=3)
