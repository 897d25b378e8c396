"""
Schedules in files of SB3 before 2.7, which are functions there: recognised by their names, replaced by SB3's classes of today.

cloudpickle writes such a function as its code and the variables that it closes over. The code is thrown away unread. What a
name stands for is decided here, so that the worst a file can do is to name another of these schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_ppo_from_scratch.errors import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.refusal import Refused, name_of, shown

__all__ = [
    "OldFunction",
    "UnreadSchedule",
    "make_cell",
    "make_code",
    "make_empty_cell",
    "make_function",
    "set_function_state",
    "to_schedule",
]

_MODULES = ("stable_baselines3.common.utils", "rl_zoo3.utils", "utils.utils")
"""Where these functions were defined; the last is the zoo's before it was a package."""
_SCHEDULES: dict[str, Callable[..., Any]] = {
    # the variables of a closure come in the order of their names
    "constant_fn.<locals>.func": lambda val: ConstantSchedule(_number(val)),
    "get_schedule_fn.<locals>.<lambda>": lambda value_schedule: _float_schedule(to_schedule(value_schedule)),
    "get_schedule_fn.<locals>.constant": lambda value_schedule: _float_schedule(to_schedule(value_schedule)),
    "get_linear_fn.<locals>.func": lambda end, end_fraction, start: LinearSchedule(
        _number(start), _number(end), _number(end_fraction)
    ),
    "linear_schedule.<locals>.func": lambda initial_value: LinearSchedule(_number(initial_value), 0.0, 1.0),
}


def _float_schedule(value: Any) -> FloatSchedule:
    kinds = (ConstantSchedule, LinearSchedule, FloatSchedule)
    return FloatSchedule(value if isinstance(value, kinds) else _number(value))


class OldFunction:
    """A function in a file: its name, and the values that it closes over. It cannot be called."""

    def __init__(self) -> None:
        self.module: Any = None
        self.name: Any = None
        self.closure: list[Any] = []

    def describe(self) -> str:
        """Its name, for messages."""
        return f"the function {name_of(self.module)}.{name_of(self.name)}"


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
    if type(function) is not OldFunction or type(state) is not tuple or len(state) != 2 or type(state[1]) is not dict:
        raise Refused("a function's state", "it is not what cloudpickle writes")
    _, slots = state
    function.module, function.name = slots["__module__"], slots["__qualname__"]
    cells = slots["__closure__"] or ()
    if type(cells) is not tuple or not all(type(cell) is list and len(cell) <= 1 for cell in cells[:9]):
        raise Refused("a function's state", "it is not what cloudpickle writes")
    function.closure = [value for cell in cells[:9] for value in cell]


def to_schedule(value: Any) -> Any:
    """
    :param value: an :class:`OldFunction`, or anything else, which is returned as it is
    :return: the schedule of today that computes what the function did
    :raises LookupError: if it is not one of SB3's or the zoo's
    """
    if not isinstance(value, OldFunction):
        return value
    if type(value.name) is not str or value.module not in _MODULES or value.name not in _SCHEDULES:
        raise LookupError(value.describe())
    return _SCHEDULES[value.name](*value.closure)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e300:
        raise LookupError(f"a schedule of {shown(value)}")
    return float(value)


class UnreadSchedule:
    """
    Stands for a function of a file that was not read, for it is not one of SB3's schedules. Nobody needs it to predict.

    :param field: which schedule of the model it is
    :param what: what the file holds instead of a number
    """

    def __init__(self, field: str, what: str):
        self.field = field
        self.what = what

    def __call__(self, progress_remaining: float) -> float:
        """:raises UnsafeFileError: always; only training asks"""
        raise UnsafeFileError(
            f"{self.field} was {self.what} in the model's file, which was not read since it could run something; to train, "
            f"give another: custom_objects={{{self.field!r}: ...}}; or, if you trust the file, load with allow_pickle=True"
        )

    def __repr__(self) -> str:
        return f"UnreadSchedule({self.field!r})"
