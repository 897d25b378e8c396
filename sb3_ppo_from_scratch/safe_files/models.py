"""
Model files without running anything that they hold.

SB3's files keep most of a model as pickles; :mod:`sb3_ppo_from_scratch.safe_files.unpickler` reads those. Every field is then
checked to be of its kind before SB3 sees it, and SB3's own readers get a file that was written here, of what was read.
"""

from __future__ import annotations

import base64
import binascii
import copy
import io
import json
import pathlib
import pickle
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch.overrides import TorchFunctionMode

from sb3_ppo_from_scratch.checks.arguments import errors_for_assertions
from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.archive import read_archive, read_bytes
from sb3_ppo_from_scratch.safe_files.old_schedules import UnreadSchedule
from sb3_ppo_from_scratch.safe_files.parts import check_schedule, check_space, is_number
from sb3_ppo_from_scratch.safe_files.refusal import shown
from sb3_ppo_from_scratch.safe_files.table import names_moved_module, renamed
from sb3_ppo_from_scratch.safe_files.torch_files import load_torch
from sb3_ppo_from_scratch.safe_files.unpickler import Unread, safe_loads

__all__ = [
    "SafeModel",
    "check_schedules_read",
    "check_weights",
    "errors_of_file",
    "finish_load",
    "load_vec_normalize",
    "moved_fields",
    "put_variables",
    "read_fields",
    "safe_archive",
    "weights_archive",
]

# ------------------------------------------------------------------ fields

_RECOMPUTED = frozenset({"lr_schedule"})
"""Fields that every load computes anew, from ``learning_rate``; old files hold a function here."""
_NEVER_SAVED = frozenset(
    {
        "policy",
        "device",
        "env",
        "replay_buffer",
        "rollout_buffer",
        "_vec_normalize_env",
        "_logger",
        "_custom_logger",
        "_engine",
    }
    | {"_resumed", "_may_replace_engine", "_warned_of_skipped"}
)
"""Fields that no save writes, and that would be used; making an ``env`` by its name can import a module that it names."""
_NEEDED = ("policy_class", "observation_space", "action_space")
_DEFAULTS: dict[str, Any] = {"policy_kwargs": {}, "verbose": 0}
"""What SB3's ``load`` looks at, and what ``save(exclude=...)`` may leave out all the same."""
_MAX_FIELDS = 10_000
"""A model has 43, and what subclasses add."""
_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "ent_coef")
_RECORDS = ("ep_info_buffer", "ep_success_buffer")
"""What the last episodes reported, of which anything may be left out: it is for a log."""


def read_fields(data: bytes, custom_objects: dict[str, Any] | None = None, owner: type = object) -> dict[str, Any]:
    """
    A model's attributes from the file ``data`` of its archive, without running anything.

    :param data: JSON, with pickles in base64 under ``":serialized:"``
    :param custom_objects: values to use instead of the file's, which are not even looked at
    :param owner: the class of the model; fields named as its methods are refused
    :return: the attributes by name
    :raises UnsafeFileError: naming the field and the object, for anything that the table does not hold
    :raises ValueError: for a damaged file, or a field that is not of its kind
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file 'data' is damaged: {type(error).__name__}: {str(error)[:300]}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the file 'data' is damaged: it holds a {type(fields).__name__}, not the fields of a model")
    if len(fields) > _MAX_FIELDS:
        raise ValueError(f"the file 'data' is damaged: it holds {len(fields)} fields, more than {_MAX_FIELDS}")
    custom = custom_objects or {}
    read = {name: custom[name] if name in custom else _read_field(name, value, owner) for name, value in fields.items()}
    for name in read.keys() - custom.keys():
        _check_field(name, read[name])
    return read


def _read_field(name: str, value: Any, owner: type) -> Any:
    if name in _RECOMPUTED:
        return None
    if (name in _NEVER_SAVED and value is not None) or name.startswith("__") or callable(getattr(owner, name, None)):
        raise UnsafeFileError(
            f"field {name[:80]!r} is not one that a save writes, and using it could run something. Nothing was run"
        )
    if not isinstance(value, dict) or ":serialized:" not in value:
        return value
    try:
        pickled = base64.b64decode(value[":serialized:"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"field {name!r} is damaged: {error}") from error
    remedy = f"load with allow_pickle=True; or give the value yourself: custom_objects={{{name!r}: ...}}"
    if name in _RECORDS:
        return _without_unread(name, safe_loads(pickled, f"field {name!r}", remedy, lenient=True))
    if name in _SCHEDULES:  # whoever only predicts does not need it
        schedule = safe_loads(pickled, f"field {name!r}", remedy, lenient=True)
        inner = vars(schedule).get("value_schedule") if isinstance(schedule, FloatSchedule) else schedule
        if isinstance(inner, Unread | UnreadSchedule):  # the second, if the model was saved after it had been loaded like this
            return UnreadSchedule(name, str(vars(inner).get("what"))[:300])
    return safe_loads(pickled, f"field {name!r}", remedy)


def _without_unread(name: str, records: Any) -> Any:
    """What episodes reported, without what is not plain data."""
    left_out: dict[str, str] = {}

    def plain(record: Any) -> Any:
        if not isinstance(record, dict):
            return record
        for key, value in record.items():
            if _holds_unread(value):
                left_out.setdefault(str(key)[:80], _first_unread(value).what)
        return {key: value for key, value in record.items() if not _holds_unread(value)}

    if not isinstance(records, deque | list):
        return deque(maxlen=100)
    kept = [record for record in map(plain, records) if _is_record(name, record)]
    if left_out:
        what = ", ".join(f"{key!r} ({kind})" for key, kind in list(left_out.items())[:5])
        warnings.warn(f"field {name!r}: what episodes reported as {what} is not plain data and was left out", stacklevel=6)
    return deque(kept, records.maxlen if isinstance(records, deque) else None)


def _is_record(name: str, record: Any) -> bool:
    """Whether a log could take a mean of it."""
    if name == "ep_success_buffer":
        return isinstance(record, Real)
    return isinstance(record, dict) and all(isinstance(record.get(key), Real) for key in ("r", "l"))


def _first_unread(value: Any) -> Any:
    if isinstance(value, Unread):
        return value
    inner = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    parts = inner if isinstance(inner, list | tuple | set | frozenset | deque) else ()
    return next(filter(None, map(_first_unread, parts)), None)


def _holds_unread(value: Any) -> bool:
    return _first_unread(value) is not None


# ------------------------------------------------------------------ the kind of every field


def _is_integer(value: Any) -> bool:
    return (type(value) is int or isinstance(value, np.integer)) and abs(int(value)) < 2**63


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= 4096


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_subclass(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _is_observation(value: Any) -> bool:
    arrays = value.values() if isinstance(value, dict) else (value,)
    return all(isinstance(array, np.ndarray | th.Tensor) for array in arrays)


_INTEGERS = (
    *("verbose", "num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "seed", "sde_sample_freq", "_n_updates"),
    *("_episode_num", "_stats_window_size", "n_envs", "n_steps", "batch_size", "n_epochs"),
)
_NUMBERS = ("start_time", "_current_progress_remaining", "gamma", "gae_lambda", "vf_coef", "max_grad_norm", "target_kl")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_INTEGERS, (_is_integer, "an integer of 64 bits")),
    **dict.fromkeys(_NUMBERS, (is_number, "a number")),
    **dict.fromkeys(("use_sde", "normalize_advantage", "use_masking"), (_is_flag, "True or False")),
    **dict.fromkeys(("engine", "precision", "nan_policy"), (_is_text, "a name")),
    "policy_class": (lambda value: _is_subclass(value, BasePolicy), "a subclass of BasePolicy"),
    "rollout_buffer_class": (lambda value: _is_subclass(value, RolloutBuffer), "a subclass of RolloutBuffer"),
    **dict.fromkeys(("policy_kwargs", "rollout_buffer_kwargs"), (lambda value: isinstance(value, dict), "a dict")),
    **dict.fromkeys(_RECORDS, (lambda value: isinstance(value, deque | list), "a list")),
    **dict.fromkeys(("_last_obs", "_last_original_obs"), (_is_observation, "an array, or a dict of arrays")),
    **dict.fromkeys(
        ("_last_episode_starts", "_last_action_masks", "_last_memory"),
        (lambda value: isinstance(value, np.ndarray), "an array"),
    ),
    "action_noise": (lambda value: False, "None"),
    "tensorboard_log": (lambda value: _is_text(value) or isinstance(value, pathlib.PurePath), "a path"),
}
"""By field: whether a value is of the right kind, and what that is called. ``None`` mostly is."""
_CANNOT_BE_NONE = frozenset(("policy_class", "policy_kwargs", "verbose", "engine", "precision", "nan_policy", "n_steps"))


def _check_field(name: str, value: Any) -> None:
    """:raises ValueError: unless the field is of its kind; fields of subclasses may be anything that can be read"""
    try:
        if name in ("observation_space", "action_space"):
            check_space(value)
            repr(copy.deepcopy(value))  # reads all that makes it up; a space remembers what it was asked
        elif name in _SCHEDULES and value is not None:
            check_schedule(value)
        elif name in _KINDS and not (value is None and name not in _CANNOT_BE_NONE):
            right, kind = _KINDS[name]
            if not right(value):
                raise ValueError(f"it must be {kind}, not {shown(value)}")
        if name == "policy_kwargs":
            _check_policy_kwargs(value)
    except Exception as error:
        raise ValueError(f"field {name!r} is damaged: {str(error)[:300] or type(error).__name__}") from error


_OF_AN_LSTM = {"bias", "dropout", "batch_first", "bidirectional", "proj_size"}


def _check_policy_kwargs(kwargs: dict[str, Any]) -> None:
    """A class of the table where a class of another kind is due would be called with arguments that are not meant for it."""
    kinds = {
        "activation_fn": th.nn.Module,
        "optimizer_class": th.optim.Optimizer,
        "features_extractor_class": BaseFeaturesExtractor,
    }
    for name, value in kwargs.items():
        if name in kinds:
            if not _is_subclass(value, kinds[name]):
                raise ValueError(f"{name} must be a {kinds[name].__name__}, not {shown(value)}")
        elif name.endswith("_kwargs") and not isinstance(value, dict | None):
            raise ValueError(f"{name} must be a dict, not {shown(value)}")
        elif name in ("lstm_hidden_size", "n_lstm_layers") and not _is_integer(value):
            raise ValueError(f"{name} must be an integer, not {shown(value)}")
    if (
        unknown := (kwargs.get("lstm_kwargs") or {}).keys() - _OF_AN_LSTM
    ):  # a device, say, would get memory before it is checked
        raise ValueError(f"lstm_kwargs must be of {', '.join(sorted(_OF_AN_LSTM))}, not {shown(sorted(map(str, unknown)))}")


# ------------------------------------------------------------------ models


class SafeModel(NamedTuple):
    """A model file in parts that SB3's ``load`` puts together again without unpickling anything."""

    archive: io.BytesIO
    """weights alone, and the fields' names"""
    fields: dict[str, Any]
    """all fields' values, to be passed as ``custom_objects``"""
    schedules: dict[str, UnreadSchedule]
    """those that were not read; ``fields`` have a number in their place, for a policy cannot be built without"""
    variables: dict[str, th.Tensor]
    """the model's tensors that are no weights, by their paths in it"""


def safe_archive(
    path: str | pathlib.Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None, owner: type
) -> SafeModel:
    """
    Read a model file, so that SB3 can make a model of it.

    :param path: as ``load`` takes it
    :param custom_objects: as ``load`` takes them
    :param owner: the class that loads
    :raises UnsafeFileError: see :func:`read_archive` and :func:`read_fields`
    :raises ValueError: if the file is damaged, or not a model's
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects must be a dict or None, not {custom_objects!r}")
    files = _read_model(path)
    fields = {**_DEFAULTS, **read_fields(files["data"], custom_objects, owner)}
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise ValueError(f"{path} is not a model of PPO: its data lack {', '.join(missing)}")
    schedules = {name: value for name, value in fields.items() if isinstance(value, UnreadSchedule)}
    fields |= dict.fromkeys(schedules, 1.0)
    weights = {name: load_torch(content, name) for name, content in files.items() if name.endswith(".pth")}
    variables = _variables(weights)
    if not custom_objects or custom_objects.keys().isdisjoint(("policy_class", "policy_kwargs", *_NEEDED)):
        _check_size(fields, weights["policy.pth"])
    archive = _stored({"data": json.dumps(dict.fromkeys(fields)).encode()}, files, weights)
    return SafeModel(archive, fields, schedules, variables)


class _TrustingUnpickler(pickle.Unpickler):
    """Runs what a trusted pickle asks for, and finds modules that have moved since."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(renamed(module), name)


def moved_fields(path: str | pathlib.Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None) -> dict[str, Any]:
    """
    Of a trusted model file, the fields that name modules which have moved: SB3 would not find them.

    :param path: as ``load`` takes it
    :param custom_objects: as ``load`` takes them
    :return: ``custom_objects`` and those
    :raises ValueError: if the file is damaged
    """
    custom = dict(custom_objects or {})
    for name, value in json.loads(read_archive(path).get("data", b"{}")).items():
        if name not in custom and isinstance(value, dict) and ":serialized:" in value:
            pickled = base64.b64decode(value[":serialized:"])
            if names_moved_module(pickled):
                custom[name] = _TrustingUnpickler(io.BytesIO(pickled)).load()
    return custom


def weights_archive(path: str | pathlib.Path | io.BufferedIOBase) -> io.BytesIO:
    """
    A model file without anything but its weights, checked as :func:`safe_archive` does.

    :param path: as ``set_parameters`` takes it
    :raises UnsafeFileError: see :func:`read_archive`
    :raises ValueError: if the file is damaged, or not a model's
    """
    files = _read_model(path)
    weights = {name: load_torch(content, name) for name, content in files.items() if name.endswith(".pth")}
    _variables(weights)
    return _stored({}, files, weights)


def _read_model(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, bytes]:
    files = read_archive(path)
    missing = [name for name in ("data", "policy.pth", "policy.optimizer.pth") if name not in files]
    if missing:
        raise ValueError(f"{path} is not a model of PPO: the archive has no {', '.join(missing)}")
    return files


def _variables(weights: dict[str, Any]) -> dict[str, th.Tensor]:
    """Take the tensors out that SB3 would put wherever their names say."""
    found: dict[str, th.Tensor] = {}
    for name in ("pytorch_variables.pth", "tensors.pth"):
        variables = weights.pop(name, None)
        if variables is None:
            continue
        if not isinstance(variables, dict) or not all(
            type(key) is str and (value is None or isinstance(value, th.Tensor)) for key, value in variables.items()
        ):
            raise ValueError(f"{name} is damaged: it must hold tensors by their names")
        found |= {key: value for key, value in variables.items() if value is not None}
    for name, state in weights.items():
        if not isinstance(state, dict):
            raise ValueError(f"{name} is damaged: it must hold tensors by their names, not a {type(state).__name__}")
    return found


def _stored(data: dict[str, bytes], files: dict[str, bytes], weights: dict[str, Any]) -> io.BytesIO:
    """An archive of what was read; torch's own reader gets to see nothing that torch has not written here."""
    stream = io.BytesIO()
    texts: dict[str, bytes] = {
        name: files[name] for name in ("_stable_baselines3_version", "system_info.txt") if name in files
    }
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (texts | data).items():
            archive.writestr(name, content)
        for name, value in weights.items():
            with archive.open(name, "w", force_zip64=True) as file:
                th.save(value, file)
    stream.seek(0)
    return stream


_NO_LAYERS = frozenset({"device", "use_sde", "full_std", "use_expln", "squash_output"})


def _check_size(fields: dict[str, Any], weights: dict[str, Any]) -> None:
    """
    Whether the policy that the fields describe is about as large as the weights, before any of it is allocated.

    :raises ValueError: if it is not, or if the fields describe none
    """
    given = sum(tensor.numel() for tensor in weights.values() if isinstance(tensor, th.Tensor))
    arch = json.dumps(fields["policy_kwargs"].get("net_arch"), default=str)
    if arch.count(",") > 4 * len(weights) + 16 or _lstm_layers(fields) > len(weights):
        raise ValueError("field 'policy_kwargs' is damaged: it describes more layers than there are weights for")
    with errors_of_file("fields 'policy_class', 'policy_kwargs', 'observation_space', 'action_space'"), _without_memory():
        policy = fields["policy_class"](
            fields["observation_space"],
            fields["action_space"],
            lambda _: 0.0,
            **{name: value for name, value in fields["policy_kwargs"].items() if name not in _NO_LAYERS},
        )
    described = sum(parameter.numel() for parameter in policy.parameters())
    if described > 2 * given + 1000:
        raise ValueError(
            f"field 'policy_kwargs' or a space is damaged: it describes {described} weights, the file has {given}"
        )


def _lstm_layers(fields: dict[str, Any]) -> int:
    """How many a file describes that says so."""
    return fields["policy_kwargs"].get("n_lstm_layers", 0)


class _StayingThere(TorchFunctionMode):
    """What has no memory cannot be moved to a device that has; SB3 does so with its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is th.Tensor.to else func(*args, **(kwargs or {}))


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors made here have a shape and nothing else; no random number is drawn for them."""
    with th.random.fork_rng(devices=[]), th.device("meta"), _StayingThere(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def errors_of_file(name: Any, given: dict[str, Any] | None = None) -> Iterator[None]:
    """
    Around what makes a model of a file: whatever it fails on, the message says in which file.

    :param name: the file, or what of it
    :param given: what the caller has passed himself, whose errors are his own
    :raises ValueError: in place of anything else
    """
    try:
        yield
    except UnsafeFileError:
        raise
    except ValueError as error:
        if type(error) is not ValueError or any(str(error).startswith(argument) for argument in (*(given or ()), "env")):
            raise
        raise ValueError(f"{_file_name(name)}: {error}") from error
    except Exception as error:
        if any(str(error).startswith(argument) for argument in given or ()):
            raise
        raise ValueError(f"{_file_name(name)}: {type(error).__name__}: {str(error)[:300]}") from error


def _file_name(name: Any) -> str:
    return str(name) if isinstance(name, str | pathlib.Path) else str(getattr(name, "name", "the file"))


def finish_load(model: Any, file: SafeModel, changed: Iterable[str]) -> Any:
    """
    What is left to do once SB3 has made a model of a file.

    :param model: the model
    :param file: of :func:`safe_archive`
    :param changed: names of attributes that the caller has replaced
    :return: ``model``
    :raises ValueError: see :func:`put_variables`
    """
    put_variables(model, file.variables)
    for name, schedule in file.schedules.items():
        if name not in changed:
            vars(model)[name] = FloatSchedule(schedule) if name.startswith("clip_range") else schedule
    if "learning_rate" in file.schedules and "learning_rate" not in changed:
        model.lr_schedule = FloatSchedule(model.learning_rate)
    return model


def check_schedules_read(model: Any) -> None:
    """:raises UnsafeFileError: if a model that is to be trained has a schedule that was not read"""
    for name in _SCHEDULES:
        schedule = getattr(model, name, None)
        schedule = vars(schedule).get("value_schedule") if isinstance(schedule, FloatSchedule) else schedule
        if isinstance(schedule, UnreadSchedule):
            schedule(1.0)


# ------------------------------------------------------------------ weights


def put_variables(model: Any, variables: dict[str, th.Tensor]) -> None:
    """
    Put tensors that are no weights where a file says: only into parameters, buffers and tensors that the model has.

    :param variables: by their paths in the model, as ``policy.log_std``
    :raises ValueError: for any other path and another shape; then none is changed
    """
    if not variables:
        return
    own: dict[str, th.Tensor] = {name: value for name, value in vars(model).items() if isinstance(value, th.Tensor)}
    for name, value in vars(model).items():
        if isinstance(value, th.nn.Module):
            own |= {f"{name}.{path}": tensor for path, tensor in (*value.named_parameters(), *value.named_buffers())}
    for name, tensor in variables.items():
        if name not in own:
            raise ValueError(f"pytorch_variables.pth names {name[:80]!r}, which is none of the model's parameters or buffers")
        _check_tensor(f"numbers of {name}", tensor, own[name])
    with th.no_grad():
        for name, tensor in variables.items():
            own[name].copy_(tensor)


def check_weights(policy: ActorCriticPolicy, params: dict[str, Any]) -> None:
    """
    Whether a file's tensors have the shapes of the parameters that they are for. Numbers that are not finite are a warning.

    :param policy: the policy as built, with its optimizer
    :param params: state dicts by name, as ``get_parameters`` returns them
    :raises ValueError: naming the first parameter that does not fit
    """
    for name, state in params.items():
        if not isinstance(state, dict):
            raise ValueError(f"the weights of {name} must be a dict of tensors, not a {type(state).__name__}")
    ours = policy.state_dict()
    for name, tensor in params.get("policy", {}).items():
        _check_tensor(f"weights of {name}", tensor, ours.get(name))  # unknown names are torch's to complain of
    if "policy.optimizer" in params:
        _check_optimizer(policy.optimizer, params["policy.optimizer"])


def _check_optimizer(optimizer: th.optim.Optimizer, saved: dict[str, Any]) -> None:
    groups, state = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or not all(map(_is_group, groups)):
        raise ValueError("the weights of policy.optimizer must hold param_groups of numbers, and the state of each parameter")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != len(parameters) or not state.keys() <= set(keys):
        raise ValueError(f"the weights of policy.optimizer are of {len(keys)} parameters, the model has {len(parameters)}")
    for key, parameter in zip(keys, parameters, strict=True):
        of_parameter = state.get(key, {})
        if not isinstance(of_parameter, dict):
            raise ValueError(f"the optimizer's state of parameter {key} must be a dict, not a {type(of_parameter).__name__}")
        for name, value in of_parameter.items():
            if isinstance(value, th.Tensor) and value.dim() > 0:
                _check_tensor(f"the optimizer's {name} of parameter {key}", value, parameter)
            elif not isinstance(value, th.Tensor | None) and not is_number(value):
                raise ValueError(f"the optimizer's {name} of parameter {key} must be a tensor, not {shown(value)}")


def _is_group(group: Any) -> bool:
    """Parameters by number, and the optimizer's arguments for them."""
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        return False
    if not all(type(key) is int for key in group["params"]):
        return False
    values = [value for name, value in group.items() if name != "params"]
    pairs = [part for value in values if isinstance(value, tuple | list) for part in value]
    single = [value for value in values if not isinstance(value, tuple | list)]
    return all(
        value is None or is_number(value) or isinstance(value, str) or (isinstance(value, th.Tensor) and value.numel() == 1)
        for value in (*single, *pairs)
    )


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
    :raises UnsafeFileError: if the file holds anything that the table does not
    :raises ValueError: if it is damaged, or the statistics do not fit ``venv``
    """
    if allow_pickle:
        return VecNormalize.load(str(path), venv)
    data, name = read_bytes(path)
    loaded = safe_loads(data, name)
    if not isinstance(loaded, VecNormalize):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the statistics of VecNormalize")
    with errors_of_file(path):
        _check_normalizer(loaded)
    with errors_for_assertions(f"the statistics in {path} do not fit the environments"):
        loaded.set_venv(venv)
    _check_statistics(loaded, path)
    return loaded


_NORMALIZER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("norm_obs", "norm_reward", "training"), _is_flag),
    **dict.fromkeys(("clip_obs", "clip_reward", "gamma", "epsilon"), is_number),
    "norm_obs_keys": lambda value: value is None or (isinstance(value, list) and all(map(_is_text, value))),
    "ret_rms": lambda value: isinstance(value, RunningMeanStd),
}


def _check_normalizer(env: VecNormalize) -> None:
    """:raises ValueError: unless all that ``VecNormalize`` uses is there and of its kind"""
    attributes = vars(env)
    check_space(attributes.get("observation_space"))
    check_space(attributes.get("action_space"))
    for name, right in _NORMALIZER.items():
        if not right(attributes.get(name)):
            raise ValueError(f"{name} must not be {shown(attributes.get(name))}")
    obs_rms = attributes.get("obs_rms")
    of_observations = list(obs_rms.values()) if isinstance(obs_rms, dict) else [obs_rms] if attributes["norm_obs"] else []
    for statistics in (*of_observations, attributes["ret_rms"]):
        parts = vars(statistics) if isinstance(statistics, RunningMeanStd) else {}
        arrays = [parts.get(part) for part in ("mean", "var")]
        numbers = [array for array in arrays if isinstance(array, np.ndarray | np.floating) and array.dtype.kind == "f"]
        if len(numbers) < 2 or not is_number(parts.get("count")):
            raise ValueError("obs_rms and ret_rms must have a mean, a variance, and how many they are of")


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
