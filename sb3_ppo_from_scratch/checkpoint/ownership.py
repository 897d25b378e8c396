"""One run writes into a folder at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["FolderLock"]


class FolderLock:
    """
    A lock on a folder, which ends with the process that holds it, however that ends.

    Where folders cannot be locked (Windows, some network drives), nobody is kept out.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def acquire(self, folder: Path) -> bool:
        """
        Lock a folder, which is made if it is not there; a lock that is held already is given up first.

        :return: whether nobody else holds it
        """
        self.release()
        if os.name != "posix":
            return True
        import fcntl

        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError:  # whoever cannot write there will hear of it then
            self.release()
        return True

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
