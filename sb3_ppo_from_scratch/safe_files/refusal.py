"""How a file's content is refused, and shown in messages; what it costs to show it does not depend on the file."""

from __future__ import annotations

from typing import Any

__all__ = ["Refused", "name_of", "shown"]


class Refused(Exception):
    """What was refused, and why; becomes an ``UnsafeFileError`` where the field's name is known."""

    def __init__(self, what: str, why: str):
        super().__init__(what, why)
        self.what, self.why = what, why


def shown(value: Any) -> str:
    """``repr`` of plain values only, and of a few of them: others can be made to explode, or have a ``repr`` of their own."""
    if type(value) in (str, bytes):
        return repr(value[:80])
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 10**20):
        return repr(value)
    if type(value) is tuple and len(value) <= 8 and all(type(part) is int and abs(part) < 10**20 for part in value):
        return repr(value)
    return f"a {type(value).__name__}"


def name_of(value: Any) -> str:
    """A class by its full name, a name as it is, anything else by its kind."""
    if isinstance(value, str) and value.isprintable():
        return value[:160]
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else type(value).__name__
