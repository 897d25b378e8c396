"""
Schedules in files of SB3 before 2.7, which are functions there: recognised by their names, replaced by SB3's classes of today.

cloudpickle writes such a function as its code and the variables that it closes over. The code is thrown away unread. What a
name stands for is decided here, so that the worst a file can do is to name another of these schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

__all__ = ["OldFunction", "make_cell", "make_code", "make_empty_cell", "make_function", "set_function_state", "to_schedule"]

_MODULES = ("stable_baselines3.common.utils", "rl_zoo3.utils", "utils.utils")
"""Where these functions were defined; the last is the zoo's before it was a package."""
_SCHEDULES: dict[str, Callable[..., Any]] = {
    # the variables of a closure come in the order of their names
    "constant_fn.<locals>.func": lambda val: ConstantSchedule(_number(val)),
    "get_schedule_fn.<locals>.<lambda>": lambda value_schedule: FloatSchedule(to_schedule(value_schedule)),
    "get_schedule_fn.<locals>.constant": lambda value_schedule: FloatSchedule(to_schedule(value_schedule)),
    "get_linear_fn.<locals>.func": lambda end, end_fraction, start: LinearSchedule(
        _number(start), _number(end), _number(end_fraction)
    ),
    "linear_schedule.<locals>.func": lambda initial_value: LinearSchedule(_number(initial_value), 0.0, 1.0),
}


class OldFunction:
    """A function in a file: its name, and the values that it closes over. It cannot be called."""

    def __init__(self) -> None:
        self.module: Any = None
        self.name: Any = None
        self.closure: list[Any] = []


def make_code(*parts: Any) -> None:
    """A function's code: nothing is kept of it."""


def make_empty_cell() -> list[Any]:
    """A variable that a function closes over; what is in it comes later, if at all."""
    return []


def make_cell(value: Any) -> list[Any]:
    """A variable that a function closes over."""
    return [value]


def make_function(*parts: Any) -> OldFunction:
    """A function of which nothing is known yet."""
    return OldFunction()


def set_function_state(function: Any, state: Any) -> None:
    """:param state: its attributes, and the slots of a function as cloudpickle names them."""
    _, slots = state
    function.module, function.name = slots["__module__"], slots["__qualname__"]
    function.closure = [value for cell in slots["__closure__"] or () for value in cell]


def to_schedule(value: Any) -> Any:
    """
    :param value: an :class:`OldFunction`, or anything else, which is returned as it is
    :return: the schedule of today that computes what the function did
    :raises LookupError: if it is not one of SB3's or the zoo's
    """
    if not isinstance(value, OldFunction):
        return value
    if value.module not in _MODULES or value.name not in _SCHEDULES:
        raise LookupError(f"the function {str(value.module)[:200]}.{str(value.name)[:200]}")
    return _SCHEDULES[value.name](*value.closure)


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise LookupError(f"a schedule of {type(value).__name__}")
    return float(value)
