"""The errors of this package that callers may want to tell from any other ``ValueError``."""

from __future__ import annotations

__all__ = ["NonFiniteError", "RankFailedError", "UnsafeFileError"]


class UnsafeFileError(ValueError):
    """
    A file holds what the safe reader does not build, or is made to harm its reader. Nothing of it has been run or imported.

    The message names the file's field, the object in it, and what to do if the file is trusted.
    """


class NonFiniteError(ValueError):
    """
    NaN or infinity where it would have reached the weights. The model is as it was before, and stays usable.

    :param name: the tensor, as the message names it
    :param message: what was found where, and likely causes
    """

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, str]]:
        return type(self), (self.name, str(self))  # it may come from another process


class RankFailedError(RuntimeError):
    """
    One of the processes that train an agent together has died, hangs, or has raised an error; so training ends in all.

    :param rank: its number, ``None`` if that is not known
    :param cause: what it has done, as a sentence goes on after "rank 1"
    """

    def __init__(self, rank: int | None, cause: str):
        super().__init__(f"{'a rank' if rank is None else f'rank {rank}'} {cause}")
        self.rank, self.cause = rank, cause

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[int | None, str]]:
        return type(self), (self.rank, self.cause)  # it may come from another process
