"""
The rollout buffer of a GPU: what the policy sees and says stays there, and the update draws its minibatches there.

Every frame crosses the bus once. What the host knows anyway (actions, rewards, episode starts) is collected on it and follows
in one copy per rollout. Nothing comes back, unless somebody asks for the public arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape
from typing_extensions import override

from sb3_ppo_from_scratch.advantages import fill_gae
from sb3_ppo_from_scratch.buffer import Observations, RolloutData, ScratchRolloutBuffer, action_dtype, is_channels_last
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured
from sb3_ppo_from_scratch.engines.cudagraph.transfer import Upload

__all__ = ["DeviceRolloutBuffer"]

_DECIDED_ON_DEVICE = ("values", "log_probs", "advantages", "returns")
_KNOWN_ON_HOST = ("rewards", "episode_starts", "actions")


def _copy(target: th.Tensor, source: th.Tensor) -> None:
    """Without waiting, whatever the shape."""
    target.copy_(source.detach().reshape(target.shape), non_blocking=True)


def _read_only(tensor: th.Tensor) -> np.ndarray:
    """``[n_steps, n_envs, ...]``; an error for whoever writes to it, who would change a copy and wonder."""
    array = tensor.numpy(force=True).swapaxes(0, 1)
    array.setflags(write=False)
    return array


def _fetched(name: str) -> Any:
    """A public array ``[n_steps, n_envs, ...]``, copied from the device when it is asked for; on a CPU it is the storage."""

    def fetch(self: DeviceRolloutBuffer) -> Any:
        tensor = self.on_device.get(name)
        if isinstance(tensor, dict):
            return {key: _read_only(value) for key, value in tensor.items()}
        return None if tensor is None else _read_only(tensor)

    return property(fetch, doc=f"``{name}``, ``[n_steps, n_envs, ...]``; waits for the device. Read-only.")


class DeviceRolloutBuffer(ScratchRolloutBuffer):
    """
    :class:`ScratchRolloutBuffer` with its storage on a device. It works on a CPU too, with the same numbers up to rounding.

    The public arrays are NumPy's as everywhere in SB3, but those of what the policy sees and says are copies made on request.
    Its parameters are :class:`ScratchRolloutBuffer`'s; ``device`` is where the storage is.
    """

    takes_tensors = True
    observations = _fetched("observations")
    values = _fetched("values")
    log_probs = _fetched("log_probs")
    advantages = _fetched("advantages")
    returns = _fetched("returns")
    dist_params = _fetched("dist_params")

    @override
    def _allocate_storage(self) -> None:
        self.on_device: dict[str, Any] = {"observations": self._zeros_for(self.observation_space), "dist_params": None}
        """Storage ``[n_envs, n_steps, ...]``: environment by environment, so that its rows are the data set in SB3's order"""
        for name in _DECIDED_ON_DEVICE:
            self.on_device[name] = self._zeros()
        self.actions = self._allocate((self.action_dim,), action_dtype(self.action_space))
        self.rewards, self.episode_starts = self._allocate((), np.float32), self._allocate((), np.float32)
        self.extras = {}
        self._uploads = {name: Upload(self._for_upload(name), self.device) for name in _KNOWN_ON_HOST}
        for name, upload in self._uploads.items():
            self.on_device[name] = upload.tensor
        self._end = Upload(np.zeros((self.n_envs + 2,), np.float32), self.device)
        self._last_values = self._zeros()[:, 0].clone()
        self._finite = th.ones((), dtype=th.bool, device=self.device)
        self._gae = Captured(self._fill_advantages, self.device)
        self._gae_is_ready = False
        self._obs_uploads: dict[str | None, Upload] = {}

    # ------------------------------------------------------------------ storage

    def _zeros(self, shape: tuple[int, ...] = (), dtype: th.dtype = th.float32) -> th.Tensor:
        return th.zeros((self.n_envs, self.buffer_size, *shape), dtype=dtype, device=self.device)

    def _zeros_for(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._zeros_for(each) for key, each in space.spaces.items()}
        shape: tuple[int, ...] = get_obs_shape(space)  # type: ignore[assignment]  # a Dict does not nest
        dtype = th.from_numpy(np.empty(0, space.dtype)).dtype
        if is_channels_last(space):
            channels, height, width = shape
            return self._zeros((height, width, channels), dtype).movedim(-1, -3)
        return self._zeros(shape, dtype)

    def _for_upload(self, name: str) -> np.ndarray:
        """``[n_envs, n_steps, ...]``, in the memory of the public array; actions in the type that the data set has."""
        array = getattr(self, name).swapaxes(0, 1)
        return array.astype(np.float32, copy=False) if name == "actions" else array

    # ------------------------------------------------------------------ rollout

    @override
    def observe(self, obs: np.ndarray | dict[str, np.ndarray]) -> Observations:
        """Valid until other observations are brought here; nobody waits for the device."""
        if isinstance(obs, dict):
            return {key: self._upload(key, value) for key, value in obs.items()}
        return self._upload(None, obs)

    def _upload(self, key: str | None, array: np.ndarray) -> th.Tensor:
        array = np.asarray(array)
        upload = self._obs_uploads.get(key)
        if upload is None or not upload.fits(array):
            upload = self._obs_uploads[key] = Upload(array, self.device)
        return upload(array)

    @override
    def _put_observations(self, obs: Any) -> None:
        one = next(iter(obs.values())) if isinstance(obs, dict) else obs
        tensors: Any = obs if isinstance(one, th.Tensor) else self.observe(obs)
        storage = self.on_device["observations"]
        if isinstance(storage, dict):
            for key, each in storage.items():
                _copy(each[:, self.pos], tensors[key])
        else:
            _copy(storage[:, self.pos], tensors)

    @override
    def _put(self, name: str, source: th.Tensor) -> None:
        if self.on_device[name] is None:
            self.on_device[name] = self._zeros(tuple(source.shape[1:]))
        _copy(self.on_device[name][:, self.pos], source)

    # --------------------------------------------------------------- advantages

    @override
    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """By :func:`fill_gae` on the device, without waiting for it."""
        for name, upload in self._uploads.items():
            upload(self._for_upload(name))
        self._end(np.concatenate([dones, [self.gamma, self.gamma * self.gae_lambda]], dtype=np.float32, casting="unsafe"))
        self._last_values.copy_(last_values.detach().reshape(self.n_envs), non_blocking=True)
        if not self._gae_is_ready:
            self._gae.prepare()
            self._gae_is_ready = True
        self._gae()

    @th.no_grad()
    def _fill_advantages(self) -> None:
        """The part that a CUDA graph holds."""
        rewards, values, starts, advantages, returns = (
            self.on_device[name].T for name in ("rewards", "values", "episode_starts", "advantages", "returns")
        )
        dones, (gamma, decay) = self._end.tensor[: self.n_envs], self._end.tensor[self.n_envs :]
        fill_gae(rewards, values, starts, self._last_values, dones, gamma, decay, advantages=advantages, returns=returns)
        # where a value or a reward is not finite, neither are the advantages before it
        finite = th.stack([th.isfinite(self.on_device[name]).all() for name in ("rewards", *_DECIDED_ON_DEVICE)])
        self._finite.copy_(finite.all())

    @override
    def is_known_finite(self) -> bool:
        """Whether rewards, values, log-probabilities, advantages and returns are; waits for the device, once for all."""
        return bool(self._finite.item())

    # ----------------------------------------------------------------- data set

    def rows(self) -> RolloutData:
        """
        Views of the storage: all ``n_steps * n_envs`` rows, environment-major, those that are no transitions included.

        :raises RuntimeError: if the rollout is not complete
        """
        if not self.full:
            raise RuntimeError(
                f"the rollout buffer holds {self.pos} of {self.buffer_size} steps; only a full one is a data set"
            )
        names = ("actions", "values", "log_probs", "advantages", "returns", "dist_params")
        stored = (self.on_device[name] for name in names)  # in the order of the fields
        flat: list[Any] = [None if each is None else each.flatten(0, 1) for each in stored]
        return RolloutData(self.flat_observations(), *flat)

    def transitions(self) -> np.ndarray | None:
        """
        Row numbers of the transitions, ``[B]`` int64, known without asking the device; ``None`` if all rows are.

        :raises RuntimeError: if there are none
        """
        if self.valid is None:
            return None
        numbers = np.flatnonzero(self.valid.T)
        if len(numbers) == 0:
            raise RuntimeError(
                f"a rollout of {self.buffer_size} steps holds no transition, only resets: n_steps must be larger"
            )
        return numbers

    @override
    def dataset(self, by_row: bool = False) -> RolloutData:
        """It is on the device, and shares the storage's memory."""
        extras = {name: self._flatten(value) for name, value in self.extras.items()}
        data, numbers = self.rows()._replace(extras=extras), self.transitions()
        if by_row:
            data = data._replace(observations=th.arange(data.size, device=self.device))
        return data if numbers is None else data.take(th.as_tensor(numbers, device=self.device), channels_last=True)

    @override
    def flat_observations(self) -> Observations:
        observations = self.on_device["observations"]
        if isinstance(observations, dict):
            return {key: value.flatten(0, 1) for key, value in observations.items()}
        return observations.flatten(0, 1)
