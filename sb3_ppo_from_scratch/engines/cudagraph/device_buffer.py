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

from sb3_ppo_from_scratch.advantages import fill_gae
from sb3_ppo_from_scratch.buffer import Observations, RolloutData, ScratchRolloutBuffer, _store, action_dtype, is_channels_last
from sb3_ppo_from_scratch.engines.cudagraph.cuda_graph import Captured
from sb3_ppo_from_scratch.engines.cudagraph.transfer import Upload

__all__ = ["DeviceRolloutBuffer"]

_DECIDED_ON_DEVICE = ("values", "log_probs", "advantages", "returns")
_KNOWN_ON_HOST = ("rewards", "episode_starts", "actions")


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

    :param buffer_size: see :class:`ScratchRolloutBuffer`, as all that follow
    :param observation_space: see there
    :param action_space: see there
    :param device: where the storage is
    :param gae_lambda: see there
    :param gamma: see there
    :param n_envs: see there
    """

    observations = _fetched("observations")
    values = _fetched("values")
    log_probs = _fetched("log_probs")
    advantages = _fetched("advantages")
    returns = _fetched("returns")
    dist_params = _fetched("dist_params")

    def _allocate_storage(self) -> None:
        self.on_device: dict[str, Any] = {"observations": self._zeros_for(self.observation_space), "dist_params": None}
        """Storage ``[n_envs, n_steps, ...]``: environment by environment, so that its rows are the data set in SB3's order"""
        for name in _DECIDED_ON_DEVICE:
            self.on_device[name] = self._zeros()
        self.actions = self._allocate((self.action_dim,), action_dtype(self.action_space))
        self.rewards, self.episode_starts = self._allocate((), np.float32), self._allocate((), np.float32)
        self._uploads = {name: Upload(self._for_upload(name), self.device) for name in _KNOWN_ON_HOST}
        for name, upload in self._uploads.items():
            self.on_device[name] = upload.tensor
        self._end = Upload(np.zeros((self.n_envs + 2,), np.float32), self.device)
        self._last_values = self._zeros()[:, 0].clone()
        self._finite = th.ones((), dtype=th.bool, device=self.device)
        self._gae = Captured(self._fill_advantages, self.device)
        self._gae_is_ready = False
        self._obs_uploads: dict[str | None, Upload] = {}
        self._uploaded: Any = None
        self._uploaded_tensors: Any = None

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

    def upload(self, obs: np.ndarray | dict[str, np.ndarray]) -> Observations:
        """
        Bring observations to the device, for the policy to look at.

        :param obs: ``[n_envs, *obs_shape]`` or a dict of such; :meth:`add` knows this very object again
        :return: valid until other observations are uploaded
        """
        if isinstance(obs, dict):
            self._uploaded_tensors = {key: self._upload_one(key, value) for key, value in obs.items()}
        else:
            self._uploaded_tensors = self._upload_one(None, obs)
        self._uploaded = obs
        return self._uploaded_tensors

    def _upload_one(self, key: str | None, array: np.ndarray) -> th.Tensor:
        array = np.asarray(array)
        upload = self._obs_uploads.get(key)
        if upload is None or not upload.fits(array):
            upload = self._obs_uploads[key] = Upload(array, self.device)
        return upload(array)

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor,
        log_prob: th.Tensor,
        dist_params: th.Tensor | None = None,
        valid: np.ndarray | None = None,
    ) -> None:
        """
        Store one step of every environment; see :meth:`ScratchRolloutBuffer.add`.

        :param obs: if this very object was given to :meth:`upload` last, it is not uploaded again
        :param action: see there, as all that follow
        :param reward: see there
        :param episode_start: see there
        :param value: see there; the fastest if it is on the device, as are the next two
        :param log_prob: see there
        :param dist_params: see there
        :param valid: see there
        :raises IndexError: if the buffer is full
        """
        if self.full:
            raise IndexError(f"the rollout buffer already holds its {self.buffer_size} steps; call reset() first")
        step = self.pos
        uploaded = self._uploaded_tensors if obs is self._uploaded else self.upload(obs)
        if isinstance(uploaded, dict):
            for key, storage in self.on_device["observations"].items():
                self._put(storage, uploaded[key])
        else:
            self._put(self.on_device["observations"], uploaded)
        _store(self.actions[step], action)
        self.rewards[step] = reward
        self.episode_starts[step] = episode_start
        self._put(self.on_device["values"], value)
        self._put(self.on_device["log_probs"], log_prob)
        if dist_params is not None:
            if self.on_device["dist_params"] is None:
                self.on_device["dist_params"] = self._zeros(tuple(dist_params.shape[1:]))
            self._put(self.on_device["dist_params"], dist_params)
        self._end_step(valid)

    def _put(self, storage: th.Tensor, source: th.Tensor) -> None:
        target = storage[:, self.pos]
        target.copy_(source.detach().reshape(target.shape), non_blocking=True)

    # --------------------------------------------------------------- advantages

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Fill ``advantages`` and ``returns`` on the device (:func:`fill_gae`), without waiting for it.

        :param last_values: ``[n_envs]`` or ``[n_envs, 1]``, values of the observations after the last step
        :param dones: ``[n_envs]``, whether the last step ended an episode
        """
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

    def dataset(self, by_row: bool = False) -> RolloutData:
        """See :meth:`ScratchRolloutBuffer.dataset`; here it is on the device, and shares the storage's memory."""
        data, numbers = self.rows(), self.transitions()
        if by_row:
            data = data._replace(observations=th.arange(data.size, device=self.device))
        return data if numbers is None else data.take(th.as_tensor(numbers, device=self.device), channels_last=True)

    def flat_observations(self) -> Observations:
        """See :meth:`ScratchRolloutBuffer.flat_observations`."""
        observations = self.on_device["observations"]
        if isinstance(observations, dict):
            return {key: value.flatten(0, 1) for key, value in observations.items()}
        return observations.flatten(0, 1)
