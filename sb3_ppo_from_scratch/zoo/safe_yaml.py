"""
What rl-zoo3 reads besides models, without running anything: its YAML files, and VecNormalize's statistics.

The zoo loads a run's ``config.yml`` and ``args.yml`` with YAML's unsafe loader, evaluates ``normalize`` as Python, imports the
wrappers that it finds named there, and unpickles the statistics. A run from the Hub brings all of these with it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.models import load_vec_normalize
from sb3_ppo_from_scratch.safe_files.unpickler import safe_call, safe_name

__all__ = ["ConfigLoader", "read_safely"]

_KNOWN = ("gymnasium", "stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_ppo_from_scratch")
"""Packages that a wrapper named in a file may be imported from; any other must have been imported already."""
_BASES = (gym.Wrapper, VecEnvWrapper, BaseCallback)
_TAG = "tag:yaml.org,2002:python/"


def read_safely() -> None:
    """From now on, in this process: YAML's unsafe loader, and ``VecNormalize.load``, run nothing that a file holds."""
    yaml.UnsafeLoader = ConfigLoader  # type: ignore[misc, assignment]  # the zoo looks it up there at every call
    VecNormalize.load = staticmethod(load_vec_normalize)  # type: ignore[assignment, method-assign]  # likewise


class ConfigLoader(yaml.SafeLoader):
    """Plain YAML, and of Python's objects those that stand in :data:`sb3_ppo_from_scratch.safe_files.unpickler.ALLOWED`."""

    def get_single_data(self) -> Any:
        """
        The file's content, in which no string is left that the zoo would evaluate, nor the name of anything but a wrapper.

        :raises UnsafeFileError: if there is more in it than hyperparameters
        """
        data = super().get_single_data()
        if isinstance(data, dict):
            for key in ("env_wrapper", "vec_env_wrapper", "callback"):
                wrappers = data.get(key) or []
                for wrapper in wrappers if isinstance(wrappers, list) else [wrappers]:
                    _check_wrapper(key, next(iter(wrapper), None) if isinstance(wrapper, dict) else wrapper)
            if isinstance(data.get("normalize"), str):
                data["normalize"] = _literal(data["normalize"])
        return data


def _check_wrapper(key: str, name: Any) -> None:
    """As the zoo finds it, but only a wrapper or callback, and without importing what nobody has asked for."""
    found = name
    if isinstance(name, str):
        module, _, attribute = name.rpartition(".")
        if module not in sys.modules and module.split(".")[0] not in _KNOWN:
            raise UnsafeFileError(
                f"{key} names {name}, and importing a module that a file names would run it. If you trust it, import it "
                f"yourself: --gym-packages {module}. Or trust the whole file"
            )
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError as error:
            raise ValueError(f"{key} names {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, _BASES)):
        raise UnsafeFileError(f"{key} names {name}, which is not a wrapper or callback")


def _literal(text: str) -> Any:
    """``"{'norm_obs': True}"``, ``"dict(norm_obs=True)"`` or ``"True"``, without evaluating it."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "dict" and not tree.args:
            return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UnsafeFileError(
            f"normalize is {text[:80]!r}: only a dict of plain values is read, nothing is evaluated"
        ) from error


def _construct_tuple(loader: ConfigLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_name(loader: ConfigLoader, name: str, node: yaml.Node) -> Any:
    return safe_name(name, "the YAML file")


def _construct_call(loader: ConfigLoader, name: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        parts = loader.construct_mapping(node, deep=True)
        return safe_call(name, parts.get("args", []), parts.get("state"), "the YAML file")
    return safe_call(name, loader.construct_sequence(node, deep=True), None, "the YAML file")  # type: ignore[arg-type]  # else YAML's error


def _refuse(loader: ConfigLoader, name: str, node: yaml.Node) -> Any:
    raise UnsafeFileError(f"the YAML file holds the Python object {name!r}. Nothing of it was run")


ConfigLoader.add_constructor(_TAG + "tuple", _construct_tuple)
ConfigLoader.add_multi_constructor(_TAG + "name:", _construct_name)
ConfigLoader.add_multi_constructor(_TAG + "object/apply:", _construct_call)
ConfigLoader.add_multi_constructor(_TAG, _refuse)
