"""Small matrix products belong on one thread: BLAS would otherwise wake the others for less work than waking them takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

__all__ = ["single_threaded"]

_ALONE = 2**17  # OpenBLAS stays on one thread by itself below twice this
_WORTH_IT = 2**24  # above, as for 256 rows through 256 x 256 weights, more threads earn what they cost


def single_threaded(multiply_adds: int) -> AbstractContextManager[Any]:
    """
    A context in which NumPy's matrix products run on one thread, if their size makes that the better choice.

    Outside of it the process's own setting holds, whatever that is.

    :param multiply_adds: multiplications in the largest product inside
    """
    if not _ALONE < multiply_adds < _WORTH_IT:
        return nullcontext()
    return _blas().limit(limits=1)


@cache
def _blas() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController  # here, so that a machine whose networks run on a GPU can do without it

    return ThreadpoolController().select(user_api="blas")
