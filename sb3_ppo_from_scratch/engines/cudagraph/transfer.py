"""Copies between host and device that nobody waits for, through page-locked memory; on a CPU they are plain copies."""

from __future__ import annotations

import numpy as np
import torch as th

__all__ = ["Upload", "page_locked"]


def page_locked(tensor: th.Tensor, device: th.device) -> th.Tensor:
    """
    :param tensor: on the CPU
    :param device: which it will be copied to or from
    :return: an empty tensor like it, with its strides, in memory that a CUDA device can copy by itself
    """
    return th.empty_like(tensor, pin_memory=device.type == "cuda")


class Upload:
    """
    Copies arrays of one shape to a tensor on a device, without waiting for the device.

    :param like: an array of that shape and type; the tensor takes over its order in memory, so that nothing is transposed
    :param device: where the tensor is
    """

    def __init__(self, like: np.ndarray, device: th.device):
        on_host = _as_tensor(like)
        self.tensor = th.empty_like(on_host, device=device)
        """What was uploaded last; always the same memory."""
        self._staged = page_locked(on_host, device) if device.type == "cuda" else self.tensor
        self._stage = self._staged.numpy()
        self._done = th.cuda.Event() if device.type == "cuda" else None

    def fits(self, array: np.ndarray) -> bool:
        """Whether this is for arrays like ``array``."""
        return array.shape == self._stage.shape and array.dtype == self._stage.dtype

    def __call__(self, array: np.ndarray) -> th.Tensor:
        """
        :param array: may change as soon as this returns
        :return: :attr:`tensor`
        """
        if self._done is None:
            np.copyto(self._stage, array)
            return self.tensor
        self._done.synchronize()  # the last copy out of this memory; over long ago, as a rule
        np.copyto(self._stage, array)
        self.tensor.copy_(self._staged, non_blocking=True)
        self._done.record(th.cuda.current_stream(self.tensor.device))
        return self.tensor


def _as_tensor(array: np.ndarray) -> th.Tensor:
    """With the array's strides; nobody will write to it."""
    writable = np.empty_like(array, subok=False)  # in the same order in memory
    return th.from_numpy(writable)
