"""
What rl-zoo3 reads besides models, without running anything: its YAML files, and VecNormalize's statistics.

The zoo loads a run's ``config.yml`` and ``args.yml`` with YAML's unsafe loader, evaluates texts in them as Python, imports the
wrappers that it finds named there and gives them their arguments, and unpickles the statistics. A run from the Hub brings all
of these with it. Here a file's size, count and depth are bounded before anything is built, what would be evaluated is parsed
(:func:`evaluate` stands in for ``eval`` in the zoo's modules), and wrappers are those of a table.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from rl_zoo3 import exp_manager, utils
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.models import load_vec_normalize
from sb3_ppo_from_scratch.safe_files.unpickler import safe_call, safe_name

__all__ = ["ConfigLoader", "evaluate", "read_safely"]

MAX_SIZE = 64 * 1024
"""Characters in a YAML file; the zoo's own are of one or two thousand."""
MAX_VALUES = 10_000
"""Values in it, those that stand in it twice counted twice."""
MAX_DEPTH = 32
"""How deep they may be nested."""
MAX_TEXT = 2000
"""Characters in a text that the zoo would evaluate."""
MAX_DIGITS = 64
"""Characters in a number."""
MAX_ARGUMENT = 10_000
"""The largest integer among a wrapper's arguments: most of them are sizes of arrays."""

_WRAPPERS = {
    "env_wrapper": gym.Wrapper,
    "vec_env_wrapper": VecEnvWrapper,
    "callback": BaseCallback,
    "policy": BasePolicy,
}
"""Fields that name a class for the zoo to import, and what it must be."""
_IMPORTED = (
    *("gymnasium.wrappers", "stable_baselines3.common.atari_wrappers", "stable_baselines3.common.callbacks"),
    *("stable_baselines3.common.monitor", "stable_baselines3.common.policies", "stable_baselines3.common.vec_env"),
    *("sb3_contrib.common.wrappers", "rl_zoo3.callbacks", "rl_zoo3.wrappers", "sb3_ppo_from_scratch.vec_env"),
)
"""Modules, with those in them, that define classes and do nothing else."""
_PACKAGES = {module.partition(".")[0] for module in _IMPORTED}
"""Nothing else of these; of others, what the user has imported already."""
_TEXTS = {"filter_keys", "dict_time_key", "stats_key", "padding_type", "channels_order", "key", "norm_obs_keys"}
"""Arguments of wrappers that are texts, but no names of files."""
_NAMES = {
    "HerReplayBuffer": HerReplayBuffer,
    "RMSpropTFLike": "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
}
_TAG = "tag:yaml.org,2002:python/"


def read_safely() -> None:
    """From now on, in this process, the zoo runs nothing that a file holds; what is typed on its command line, it does."""
    yaml.UnsafeLoader = ConfigLoader  # type: ignore[misc, assignment]  # the zoo looks it up there at every call
    VecNormalize.load = staticmethod(load_vec_normalize)  # type: ignore[assignment, method-assign]  # likewise
    for module in (utils, exp_manager):
        module.eval = evaluate  # type: ignore[attr-defined]  # a module's own names come before Python's
    utils.StoreDict.__call__ = _store_what_is_typed  # type: ignore[method-assign]  # the same, for the user's own words


def _store_what_is_typed(
    action: argparse.Action, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
) -> None:
    pairs = (argument.partition(":") for argument in values)
    setattr(namespace, action.dest, {key: builtins.eval(value, vars(utils) | {"eval": eval}) for key, _, value in pairs})


# ------------------------------------------------------- what would be evaluated


def evaluate(text: str) -> Any:
    """
    ``"dict(net_arch=[64], activation_fn=nn.Tanh)"``, ``"{'norm_obs': True}"`` or ``"True"``, without evaluating it.

    :param text: plain data, ``dict(...)`` of it, or the names of activations and optimizers
    :return: what it stands for; never a text, which could be evaluated again
    :raises UnsafeFileError: if there is anything else in it
    """
    try:
        if len(text) > MAX_TEXT:
            raise ValueError("it is too long")
        value = _value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(value, (str, bytes)):
            raise ValueError("it is a text within a text")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UnsafeFileError(
            f"a hyperparameter is {text[:80]!r}: only plain values, dict(...) and activations are read, nothing is evaluated"
        ) from error
    return value


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("it unpacks a dict")
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _value(item) for key, item in zip(node.keys, node.values, strict=True) if key is not None
        }
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _named(ast.unparse(node))
    return ast.literal_eval(node)


def _named(name: str) -> Any:
    """A class of the table, under the names that the zoo's modules have for it."""
    found = _NAMES.get(name, name)
    if found is name:
        package, _, attribute = name.removeprefix("torch.").removeprefix("th.").rpartition(".")
        if package not in ("nn", "optim"):
            raise ValueError(f"it names {name}")
        found = f"torch.{'nn.modules.activation' if package == 'nn' else f'optim.{attribute.lower()}'}.{attribute}"
    return safe_name(found, "a hyperparameter") if isinstance(found, str) else found


# ------------------------------------------------------- the reader


class ConfigLoader(yaml.SafeLoader):
    """
    A YAML file of plain data, in bounds, and of Python's objects those that the safe reader of models builds.

    :raises UnsafeFileError: if there is more in it than hyperparameters, or more of it than the zoo ever writes
    :raises ValueError: if it is damaged, or a field is not what the zoo expects; the message names file and field
    """

    def __init__(self, stream: Any):
        self._file = str(getattr(stream, "name", "the YAML file"))
        self._sizes: dict[int, int] = {}
        self._depth = 0
        try:
            text = stream if isinstance(stream, (str, bytes)) else stream.read(MAX_SIZE + 1)
            if len(text) > MAX_SIZE:
                self._refuse(f"is longer than {MAX_SIZE} characters")
            super().__init__(text)
        except (yaml.YAMLError, UnicodeError) as error:
            raise self._damaged(error) from error

    def _refuse(self, why: str) -> None:
        raise UnsafeFileError(f"{self._file} {why}. Nothing of it was run")

    def _damaged(self, error: Exception) -> ValueError:
        words = " ".join(str(error).split())[:200]
        return ValueError(f"{self._file} is not a file of hyperparameters: {type(error).__name__}: {words}")

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count what is composed, before anything is built: what is shared counts as often as it stands there."""
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"is nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(map(self._size, _children(node)))
        elif id(node) not in self._sizes:
            self._refuse("contains itself")
        if self._sizes[id(node)] > MAX_VALUES:
            self._refuse(f"holds more than {MAX_VALUES} values")
        return node

    def _size(self, node: yaml.Node) -> int:
        return self._sizes.get(id(node), 0)

    def get_single_data(self) -> Any:
        """
        The file's content, in which no text is left that the zoo would evaluate, nor the name of anything but a wrapper.

        :raises UnsafeFileError: see the class
        :raises ValueError: see the class
        """
        try:
            data = super().get_single_data()
            if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
                raise ValueError("it must hold one mapping, of names to values")
            return _checked(data, self._file)
        except UnsafeFileError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise self._damaged(error) from error


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _construct_number(loader: ConfigLoader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > MAX_DIGITS:
        raise ValueError(f"a number of {len(node.value)} characters")
    is_int = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)


def _construct_tuple(loader: ConfigLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_name(loader: ConfigLoader, name: str, node: yaml.Node) -> Any:
    return safe_name(name, "the YAML file")


def _construct_call(loader: ConfigLoader, name: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        parts = loader.construct_mapping(node, deep=True)
        return safe_call(name, parts.get("args", []), parts.get("state"), "the YAML file")
    return safe_call(name, loader.construct_sequence(node, deep=True), None, "the YAML file")  # type: ignore[arg-type]  # else YAML's error


def _construct_nothing(loader: ConfigLoader, name: str, node: yaml.Node) -> Any:
    raise UnsafeFileError(f"the YAML file holds the Python object {name!r}. Nothing of it was run")


for _number in ("int", "float"):
    ConfigLoader.add_constructor(f"tag:yaml.org,2002:{_number}", _construct_number)
ConfigLoader.add_constructor(_TAG + "tuple", _construct_tuple)
ConfigLoader.add_multi_constructor(_TAG + "name:", _construct_name)
ConfigLoader.add_multi_constructor(_TAG + "object/apply:", _construct_call)
ConfigLoader.add_multi_constructor(_TAG, _construct_nothing)


# ------------------------------------------------------- the fields


def _checked(data: dict[str, Any], file: str) -> dict[str, Any]:
    """A run's hyperparameters or arguments, each as the zoo expects it."""
    for key in _WRAPPERS:
        if key == "policy" and "." not in str(data.get(key)):
            continue  # a policy's name, which the zoo does not import
        given = data.get(key) or []
        for wrapper in given if isinstance(given, list) else [given]:
            _check_wrapper(key, wrapper)
    if isinstance(data.get("normalize"), str):
        data["normalize"] = evaluate(data["normalize"])
    _check_field(
        data, "normalize", isinstance(data.get("normalize"), (bool, int, float, dict, type(None))), "true, false or a mapping"
    )
    for key in ("frame_stack", "n_envs"):
        _check_field(data, key, key not in data or _is_count(data[key]), f"an integer from 1 to {MAX_ARGUMENT}")
    if data.get("env_kwargs", {}) is None and Path(file).name == "config.yml":
        del data["env_kwargs"]  # the zoo expects a mapping there
    _check_field(data, "env_kwargs", isinstance(data.get("env_kwargs"), (dict, type(None))), "a mapping")
    if Path(file).name == "args.yml":
        _check_field(data, "env", re.fullmatch(r"\w[\w./-]*", str(data.get("env", "-"))) is not None, "an environment's name")
        data.setdefault("env_kwargs", None)
    return data


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_ARGUMENT


def _check_field(data: dict[str, Any], key: str, sound: bool, allowed: str) -> None:
    if not sound:
        raise ValueError(f"{key} must be {allowed}, not {type(data.get(key)).__name__} {str(data.get(key))[:80]}")


def _check_wrapper(key: str, wrapper: Any) -> None:
    """As the zoo finds it, but only a wrapper of that kind, and without importing what nobody has asked for."""
    name, arguments = wrapper, dict[str, Any]()
    if isinstance(wrapper, dict):
        if len(wrapper) != 1:
            raise ValueError(f"{key} must be names, or names with their arguments, not a mapping of {len(wrapper)}")
        ((name, arguments),) = wrapper.items()
    is_class = isinstance(name, type) and issubclass(name, _WRAPPERS[key])
    found = name if is_class else _check_class(key, name)
    if not isinstance(arguments, dict) or not all(isinstance(argument, str) for argument in arguments):
        raise ValueError(f"{key} must give {name} its arguments by name")
    for argument, value in arguments.items():
        if not _is_harmless(argument, value):
            raise UnsafeFileError(
                f"{key} gives {name} the argument {argument!r}, which is more than numbers in bounds: a text could name a "
                "file to write. Nothing of it was run. If you trust the file, load with allow_pickle=True"
            )
        _check_argument(key, found, argument, value)


def _check_argument(key: str, wrapper: type, argument: str, value: Any) -> None:
    """Whether a wrapper takes it, and if its default is a number, whether it is one."""
    known = inspect.signature(wrapper).parameters
    if argument not in known:
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            raise ValueError(f"{key} gives {wrapper.__name__} the argument {argument!r}, which is none of {list(known)}")
        return
    default = known[argument].default
    allowed: Any = {bool: bool, int: int, float: (int, float)}.get(type(default))
    if allowed is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool)):
        raise ValueError(
            f"{key} must give {wrapper.__name__} a {type(default).__name__} for {argument}, not {type(value).__name__} {value}"
        )


def _check_class(key: str, name: Any) -> type:
    module, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not isinstance(name, str) or not re.fullmatch(r"(\w+\.)+\w+", name):
        raise UnsafeFileError(f"{key} names {str(name)[:80]!r}, which is not a class of a module")
    ours = any(module == known or module.startswith(known + ".") for known in _IMPORTED)
    if not ours and (module not in sys.modules or module.partition(".")[0] in _PACKAGES):
        raise UnsafeFileError(
            f"{key} names {name}, and importing a module that a file names would run it. If you trust it, import it "
            f"yourself: --gym-packages {module}. Or trust the whole file"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"{key} names {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, _WRAPPERS[key])):
        raise UnsafeFileError(f"{key} names {name}, which is not a {_WRAPPERS[key].__name__}")
    return found


def _is_harmless(argument: str, value: Any) -> bool:
    """Numbers in bounds, and texts that are known not to name files: a file never chooses where we write."""
    if isinstance(value, (list, tuple)):
        return all(_is_harmless(argument, item) for item in value)
    if isinstance(value, str):
        return argument in _TEXTS
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= (10**9 if argument == "max_episode_steps" else MAX_ARGUMENT)
    return value is None or isinstance(value, (bool, float))
