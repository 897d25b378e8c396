"""
All that a file may name.

A row says what comes of a name: the class itself, which can only be kept (``NAMED``), an empty object of it that gets
attributes (``BUILT``), or a call of a function of ours, which builds a plain value from checked parts and is never the
function that the file names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from sb3_ppo_from_scratch.safe_files import old_schedules, tensors, values
from sb3_ppo_from_scratch.safe_files.refusal import Refused, name_of

__all__ = ["ALLOWED", "BUILT", "NAMED", "Allowed", "Call", "find", "is_built", "is_named", "names_moved_module", "renamed"]


class Allowed(NamedTuple):
    """A row of :data:`ALLOWED`."""

    module: str
    names: tuple[str, ...]
    use: str | Callable[..., Any]
    """``NAMED``, ``BUILT``, ``STORED``, or the function of ours that a call of that name in the file becomes"""
    why: str


NAMED = "named"
"""The file may name this class, not call it. What a model then does with it is build a part of itself."""
BUILT = "built"
"""The file may make an empty object of this class, and set attributes that are not the names of its methods."""
STORED = "stored"
"""The file may hold bytes that torch wrote, which are read in turn."""


class Call(NamedTuple):
    """Stands on the unpickler's stack for a function that a file may call."""

    function: Callable[..., Any]


def _builtin_type(name: Any) -> Call:
    """What cloudpickle calls to make a function; here it makes none."""
    if name not in ("CodeType", "FunctionType"):
        raise Refused(f"types.{name_of(name)}", "it is not among the objects that are safe to build")
    return Call(old_schedules.make_code if name == "CodeType" else old_schedules.make_function)


_ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
    *("RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
)
_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_NUMBERS = ("bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_TORCH_TYPES = ("float16", "float32", "float64", "bfloat16", "int32", "int64", "uint8", "bool")

# fmt: off
ALLOWED: tuple[Allowed, ...] = (
    # what a model is made of
    Allowed("stable_baselines3.common.policies",
            ("ActorCriticPolicy", "ActorCriticCnnPolicy", "MultiInputActorCriticPolicy"), NAMED, "policy_class"),
    Allowed("sb3_ppo_from_scratch.policies", ("SharedMlpPolicy",), NAMED, "policy_class"),
    Allowed("sb3_contrib.common.maskable.policies",
            ("MaskableActorCriticPolicy", "MaskableActorCriticCnnPolicy", "MaskableMultiInputActorCriticPolicy"), NAMED,
            "policy_class"),
    Allowed("sb3_contrib.common.recurrent.policies",
            ("RecurrentActorCriticPolicy", "RecurrentActorCriticCnnPolicy", "RecurrentMultiInputActorCriticPolicy"), NAMED,
            "policy_class"),
    Allowed("sb3_ppo_from_scratch.recurrent.maskable",
            ("MaskableMlpLstmPolicy", "MaskableCnnLstmPolicy", "MaskableMultiInputLstmPolicy"), NAMED, "policy_class"),
    Allowed("stable_baselines3.common.torch_layers", ("FlattenExtractor", "NatureCNN", "CombinedExtractor"), NAMED,
            "policy_kwargs: features_extractor_class"),
    Allowed("torch.nn.modules.activation", _ACTIVATIONS, NAMED, "policy_kwargs: activation_fn"),
    Allowed("torch.nn.modules.linear", ("Identity",), NAMED, "policy_kwargs: activation_fn"),
    *(Allowed(f"torch.optim.{name.lower()}", (name,), NAMED, "policy_kwargs: optimizer_class") for name in _OPTIMIZERS),
    Allowed("stable_baselines3.common.sb2_compat.rmsprop_tf_like", ("RMSpropTFLike",), NAMED,
            "policy_kwargs: optimizer_class"),
    Allowed("stable_baselines3.common.buffers", ("RolloutBuffer", "DictRolloutBuffer"), NAMED, "rollout_buffer_class"),
    Allowed("sb3_contrib.common.maskable.buffers", ("MaskableRolloutBuffer", "MaskableDictRolloutBuffer"), NAMED,
            "rollout_buffer_class of MaskablePPO"),
    Allowed("sb3_ppo_from_scratch.buffer", ("ScratchRolloutBuffer",), NAMED, "rollout_buffer_class"),
    Allowed("sb3_ppo_from_scratch.engines.cudagraph.device_buffer", ("DeviceRolloutBuffer",), NAMED, "rollout_buffer_class"),
    # spaces, schedules, statistics
    Allowed("gymnasium.spaces.box", ("Box",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.discrete", ("Discrete",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.multi_discrete", ("MultiDiscrete",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.multi_binary", ("MultiBinary",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.dict", ("Dict",), BUILT, "spaces"),
    Allowed("gymnasium.spaces.tuple", ("Tuple",), BUILT, "environments' states"),
    Allowed("gymnasium.spaces.text", ("Text",), BUILT, "environments' states"),
    Allowed("gymnasium.spaces.sequence", ("Sequence",), BUILT, "environments' states"),
    Allowed("stable_baselines3.common.utils", ("FloatSchedule", "ConstantSchedule", "LinearSchedule"), BUILT, "schedules"),
    Allowed("rl_zoo3.utils", ("SimpleLinearSchedule",), BUILT, "schedules of models that rl-zoo3 trained"),
    Allowed("sb3_ppo_from_scratch.safe_files.old_schedules", ("UnreadSchedule",), BUILT, "models saved after a safe load"),
    Allowed("stable_baselines3.common.running_mean_std", ("RunningMeanStd",), BUILT, "VecNormalize"),
    Allowed("stable_baselines3.common.vec_env.vec_normalize", ("VecNormalize",), BUILT, "VecNormalize"),
    # schedules of SB3 before 2.7: functions, of which only the name and the numbers are used
    Allowed("cloudpickle.cloudpickle", ("_builtin_type",), _builtin_type, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_make_function",), old_schedules.make_function, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_make_empty_cell",), old_schedules.make_empty_cell, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_make_cell",), old_schedules.make_cell, "old schedules"),
    Allowed("cloudpickle.cloudpickle", ("_function_setstate",), old_schedules.set_function_state, "old schedules"),
    # plain data
    Allowed("builtins", ("float", "int", "bool", "str", "list", "dict", "tuple"), NAMED, "annotations, defaults"),
    Allowed("builtins", ("set",), values.make_set, "nothing but a set"),
    Allowed("builtins", ("frozenset",), values.make_frozenset, "nothing but a set"),
    Allowed("_codecs", ("encode",), values.make_bytes, "bytes in old files"),
    Allowed("builtins", ("bytearray",), values.make_bytearray, "bytes"),
    Allowed("builtins", ("complex",), values.make_complex, "numbers"),
    Allowed("builtins", ("range",), values.make_range, "numbers"),
    Allowed("builtins", ("slice",), values.make_slice, "numbers"),
    Allowed("collections", ("OrderedDict",), values.make_ordered_dict, "dict observations, nothing but a dict"),
    Allowed("collections", ("Counter",), values.make_counter, "environments' states, nothing but a dict"),
    Allowed("collections", ("defaultdict",), values.make_defaultdict, "environments' states, nothing but a dict"),
    Allowed("collections", ("deque",), values.make_deque, "ep_info_buffer, nothing but a list"),
    Allowed("datetime", ("datetime",), values.make_datetime, "episode infos"),
    Allowed("datetime", ("date",), values.make_date, "episode infos"),
    Allowed("datetime", ("timedelta",), values.make_timedelta, "episode infos"),
    Allowed("array", ("_array_reconstructor",), values.rebuild_python_array, "environments' states"),
    Allowed("array", ("array",), NAMED, "argument of the row before"),
    Allowed("itertools", ("count",), values.make_count, "environments' states"),
    Allowed("pathlib", ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"), values.make_path, "tensorboard_log"),
    Allowed("random", ("Random",), values.make_random, "environments' states"),
    Allowed("types", ("SimpleNamespace",), values.make_namespace, "environments' states"),
    # NumPy: numbers, arrays of numbers, the random generators of spaces
    Allowed("numpy", ("ndarray",), NAMED, "argument of the next rows"),
    Allowed("numpy", _NUMBERS, NAMED, "types of numbers, in policy_kwargs and spaces"),
    Allowed("numpy", ("dtype",), values.make_dtype, "of arrays of numbers"),
    Allowed("numpy._core.multiarray", ("_reconstruct",), values.make_empty_array, "arrays"),
    Allowed("numpy._core.multiarray", ("scalar",), values.make_scalar, "numbers"),
    Allowed("numpy._core.numeric", ("_frombuffer",), values.make_array, "arrays"),
    *(Allowed(f"numpy.random._{name.lower().removesuffix('dxsm')}", (name,), NAMED, "kinds of random generators")
      for name in values.BIT_GENERATORS),
    Allowed("numpy.random.bit_generator", ("SeedSequence",), NAMED, "argument of the next row"),
    Allowed("numpy.random.bit_generator", ("__pyx_unpickle_SeedSequence",), values.make_seed_sequence, "random generators"),
    Allowed("numpy.random._pickle", ("__bit_generator_ctor",), values.make_bit_generator, "random generators"),
    Allowed("numpy.random._pickle", ("__generator_ctor",), values.make_generator, "random generators"),
    Allowed("numpy.random._pickle", ("__randomstate_ctor",), values.make_random_state, "random generators of old spaces"),
    # torch: tensors, and what describes them
    Allowed("torch", _TORCH_TYPES, NAMED, "dtypes"),
    Allowed("torch", tuple(tensors.STORAGES), NAMED, "names of the dtypes of weights"),
    Allowed("torch", ("device",), tensors.make_device, "the name of a device"),
    Allowed("torch", ("Size",), tensors.make_size, "nothing but a tuple"),
    Allowed("torch.storage", ("_load_from_bytes",), STORED, "tensors"),
    Allowed("torch._utils", ("_rebuild_tensor_v2",), tensors.make_tensor, "tensors"),
    Allowed("torch._utils", ("_rebuild_parameter",), tensors.make_parameter, "tensors"),
)
"""All that a file may name, and what comes of it. Names are exact: there is no attribute access below them."""
# fmt: on

_TABLE = {(row.module, name): row.use for row in ALLOWED for name in row.names}
_RENAMED = {
    "gym.spaces.": "gymnasium.spaces.",
    "numpy.core.": "numpy._core.",
    "pathlib._local": "pathlib",
    "cloudpickle.cloudpickle_fast": "cloudpickle.cloudpickle",
    "sb3_ppo_from_scratch.device_buffer": "sb3_ppo_from_scratch.engines.cudagraph.device_buffer",
    "sb3_ppo_from_scratch.env_failure": "sb3_ppo_from_scratch.vec_env.failures",
    "sb3_ppo_from_scratch.stats": "sb3_ppo_from_scratch.update",
}
"""Beginnings of module names in files of other versions, and what they are called in the table."""


def renamed(module: str) -> str:
    """What a module is called today that a file of another version names."""
    for old, new in _RENAMED.items():
        if module.startswith(old):
            return new + module[len(old) :]
    return module


def names_moved_module(data: bytes) -> bool:
    """Whether a pickle may name a module that is called otherwise today."""
    return any(old.encode() in data for old in _RENAMED)


def find(module: Any, name: Any) -> Any:
    """
    Look a name up in the table; only then may its module be imported.

    :return: the class, a :class:`Call`, or :data:`STORED`
    :raises Refused: if it does not stand there
    """
    use = _TABLE.get((renamed(module), name)) if type(module) is str and type(name) is str else None
    if use is None:
        raise Refused(f"{name_of(module)}.{name_of(name)}", "it is not among the objects that are safe to build")
    if callable(use):
        return Call(use)
    return STORED if use == STORED else getattr(importlib.import_module(renamed(module)), name)


def is_named(kind: type) -> bool:
    """Whether a class stands in the table."""
    return (kind.__module__, kind.__qualname__) in _TABLE


def is_built(kind: Any) -> bool:
    """Whether a file may make empty objects of a class and give them attributes."""
    return isinstance(kind, type) and _TABLE.get((kind.__module__, kind.__qualname__)) is BUILT
