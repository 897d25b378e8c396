"""The shared library that ``pip install`` has built of ``kernel/``, where there was a compiler: how it is found and called."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import numpy as np

from sb3_ppo_from_scratch.engines.replayed import MEASURED

__all__ = ["INSTRUCTION_SETS", "MAX_LAYERS", "Kernel", "Layer", "Update", "kernel_reason", "load_kernel"]

VARIABLE = "SCRATCH_PPO_KERNEL"
"""Environment variable: an instruction set to use instead of the best one, or ``"none"``."""
INSTRUCTION_SETS = ("generic", "avx2", "avx512")
"""In the order of kernel.h."""
MAX_LAYERS = 64
_VERSION = 2
_PATH = Path(__file__).with_name("_kernel.so")
_INVALID_ACTION = -1

_Address = ctypes.c_void_p
_Integer = ctypes.c_int64
_Real = ctypes.c_double


class Layer(ctypes.Structure):
    """As in kernel.h."""

    _fields_ = (
        ("source", _Integer),
        ("inputs", _Integer),
        ("outputs", _Integer),
        ("activation", _Integer),
        ("coefficient", _Real),
        ("weight", _Integer),
        ("bias", _Integer),
    )


class Update(ctypes.Structure):
    """As in kernel.h."""

    _fields_ = (
        ("layers", _Address),
        ("n_layers", _Integer),
        ("distribution", _Integer),
        ("sizes", _Address),
        ("n_actions", _Integer),
        ("log_std", _Integer),
        ("n_parameters", _Integer),
        *((name, _Address) for name in ("parameters", "gradient", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "scratch")),
        ("n_features", _Integer),
        ("n_dist_params", _Integer),
        *((name, _Address) for name in ("observations", "actions", "old_values", "old_log_prob", "advantages", "returns")),
        *((name, _Address) for name in ("dist_params", "action_masks")),
        *((name, _Integer) for name in ("batch_size", "normalize_advantage", "clips_values", "raises")),
        *((name, _Real) for name in ("clip_range", "clip_range_vf", "ent_coef", "vf_coef", "max_grad_norm", "kl_limit")),
        *((name, _Integer) for name in ("step", "decoupled", "maximize")),
        *((name, _Real) for name in ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")),
    )


class Kernel:
    """
    The library, on one instruction set.

    :param library: as loaded
    :param instruction_set: one of :data:`INSTRUCTION_SETS` that this machine has
    """

    def __init__(self, library: ctypes.CDLL, instruction_set: str):
        self._library, self.instruction_set = library, instruction_set
        self._number = INSTRUCTION_SETS.index(instruction_set)

    def scratch(self, update: Update) -> np.ndarray:
        """Memory for what an update computes, zeros, from a multiple of 64 bytes on."""
        size = self._library.kernel_scratch_size(ctypes.byref(update))
        memory = np.zeros(size + 16, np.float32)
        start = -memory.ctypes.data % 64 // 4
        return memory[start : start + size]

    def epoch(self, update: Update, order: np.ndarray, wants_kl: bool) -> list[list[float]]:
        """
        Step on minibatch after minibatch, until one of them ends the update.

        :param update: filled in
        :param order: ``[n]``, int64, numbers of the transitions in the order in which to take them
        :param wants_kl: whether to compute the exact KL, which takes ``update.dist_params``
        :return: what was measured, :data:`MEASURED` of each minibatch that was begun
        :raises ValueError: if an action is none of the policy's choices
        """
        log = np.empty((max(-(-len(order) // update.batch_size), 1), len(MEASURED)), np.float32)
        arguments = (self._number, order.ctypes.data, len(order), int(wants_kl), log.ctypes.data)
        count = self._library.kernel_epoch(ctypes.byref(update), *arguments)
        if count == _INVALID_ACTION:
            raise ValueError("actions of the rollout must be choices of the action space, not others")
        return log[:count].tolist()


def kernel_reason() -> str | None:
    """Why there is no kernel to compute with; ``None`` if there is one."""
    loaded = _load(_PATH, os.environ.get(VARIABLE))
    return loaded if isinstance(loaded, str) else None


def load_kernel() -> Kernel:
    """
    The kernel, for the instruction set that :data:`VARIABLE` names, or the best one there is.

    :raises RuntimeError: if there is none
    """
    loaded = _load(_PATH, os.environ.get(VARIABLE))
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


@cache
def _load(path: Path, wanted: str | None) -> Kernel | str:
    """The kernel, or why there is none."""
    if wanted not in (None, "", *INSTRUCTION_SETS):
        return f"{VARIABLE}={wanted} in the environment" + " names no instruction set" * (wanted != "none")
    if not path.exists():
        return "its kernel was not built; pip install does that where there is a C compiler"
    try:
        library = ctypes.CDLL(str(path))
        if reason := _interface_reason(library):
            return reason
    except (OSError, AttributeError) as error:
        return f"its kernel cannot be loaded ({error})"
    available = [name for number, name in enumerate(INSTRUCTION_SETS) if library.kernel_runs_on(number)]
    if wanted and wanted not in available:
        return f"{VARIABLE}={wanted} in the environment names an instruction set that this machine does not have"
    return Kernel(library, wanted or available[-1])


def _interface_reason(library: ctypes.CDLL) -> str | None:
    """Declare the functions. A library of another version than this file would compute with other fields."""
    for name in ("kernel_interface", "kernel_runs_on", "kernel_scratch_size", "kernel_epoch"):
        getattr(library, name).restype = _Integer
    library.kernel_interface.argtypes = library.kernel_runs_on.argtypes = (_Integer,)
    library.kernel_scratch_size.argtypes = (_Address,)
    library.kernel_epoch.argtypes = (_Address, _Integer, _Address, _Integer, _Integer, _Address)
    found = [library.kernel_interface(which) for which in range(3)]
    if found != [_VERSION, ctypes.sizeof(Layer), ctypes.sizeof(Update)]:
        return f"its kernel is of version {found[0]}, not {_VERSION}: install the package again"
    return None
