"""The rollout: what a policy saw, did and received over ``n_steps`` steps, and the data set that an update learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeGuard

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.preprocessing import get_obs_shape, is_image_space
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ppo_from_scratch.advantages import compute_gae

__all__ = [
    "RolloutData",
    "ScratchRolloutBuffer",
    "action_dtype",
    "is_channels_last",
    "is_ours",
    "is_replaceable",
    "minibatch_source",
    "rates_later",
]

Observations = th.Tensor | dict[str, th.Tensor]
Extras = Mapping[str, th.Tensor]


class RolloutData(NamedTuple):
    """
    Transitions in no particular arrangement of time: the data set of a whole rollout, or a minibatch of it.

    The first six fields are those of SB3's ``RolloutBufferSamples``. ``B`` is the number of transitions.
    """

    observations: Observations
    """``[B, *obs_shape]`` in the space's dtype, or a dict of such"""
    actions: th.Tensor
    """``[B, action_dim]``, float32, as sampled (before clipping to the space)"""
    old_values: th.Tensor
    """``[B]``, the critic's values during the rollout"""
    old_log_prob: th.Tensor
    """``[B]``, log-probabilities of the actions during the rollout"""
    advantages: th.Tensor
    """``[B]``, from :func:`compute_gae`"""
    returns: th.Tensor
    """``[B]``, from :func:`compute_gae`"""
    dist_params: th.Tensor | None = None
    """``[B, n_params]``, the behaviour policy's distribution, or ``None`` if it is not known"""
    extras: Extras = MappingProxyType({})
    """
    by name ``[B, ...]``, whatever else a loss needs; see ``ScratchPPO.row_extras``. Of a maskable policy ``"action_masks"``,
    ``[B, n_choices]``, bool
    """

    @property
    def size(self) -> int:
        """Number of transitions, B."""
        return self.advantages.shape[0]

    def take(self, indices: th.Tensor, channels_last: bool = False) -> RolloutData:
        """
        :param indices: ``[b]``, int64, on the data's device
        :param channels_last: whether images lie channels-last in the copy too, as in the buffer; or else channels-first
        :return: a copy of those transitions, in that order
        """

        def select(values: th.Tensor) -> th.Tensor:
            if channels_last and values.dim() == 4:
                return values.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
            return values.index_select(0, indices)

        if isinstance(self.observations, dict):
            observations: Observations = {key: select(value) for key, value in self.observations.items()}
        else:
            observations = select(self.observations)
        rest = (None if field is None else field.index_select(0, indices) for field in self[1:-1])
        extras = {name: field.index_select(0, indices) for name, field in self.extras.items()}
        return RolloutData(observations, *rest, extras=extras)  # type: ignore[arg-type, misc]  # the fields keep their order

    def minibatches(self, batch_size: int) -> Iterator[RolloutData]:
        """
        One pass over the data in random order, cut into minibatches; the last one may be smaller.

        The order comes from NumPy's global generator, drawn once per pass, as in SB3.

        :param batch_size: transitions per minibatch
        """
        order = th.from_numpy(np.random.permutation(self.size)).to(self.advantages.device)
        for indices in order.split(batch_size):
            yield self.take(indices)


class ScratchRolloutBuffer(RolloutBuffer):
    """
    Stores ``n_steps`` steps of ``n_envs`` environments, computes advantages and returns, and hands out the data set.

    The public arrays have shape ``[n_steps, n_envs, ...]`` at all times. Their memory is laid out environment by environment,
    so that the data set in SB3's order (environment-major) is a view of them, not a copy. Images ``[channels, height, width]``
    lie channels-last in it, as environments make them and convolutions like them. Dict observations are held as a
    dict of arrays. It is a drop-in for SB3's ``RolloutBuffer`` and ``DictRolloutBuffer``: SB3's own PPO trains on it.

    :param buffer_size: n_steps, steps per environment and rollout
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param device: where the data set's tensors go
    :param gae_lambda: see :func:`compute_gae`
    :param gamma: see :func:`compute_gae`
    :param n_envs: number of parallel environments
    """

    takes_tensors: ClassVar[bool] = False
    """Whether :meth:`add` wants observations as :meth:`observe` returned them, instead of the environments' own."""
    observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]  # one class for array and Dict spaces
    dist_params: np.ndarray | None
    """``[n_steps, n_envs, n_params]``: the behaviour policy's logits, or means and log standard deviations"""
    extras: dict[str, np.ndarray]
    """by name ``[n_steps, n_envs, ...]``: what a loss of the user's needs besides"""
    unrated: np.ndarray
    """``[n_steps]``, bool: steps whose values, log-probabilities and distribution parameters :meth:`rate` has yet to bring"""
    valid: np.ndarray | None
    """``[n_steps, n_envs]``, bool: which rows are transitions; ``None`` if all are. Others are not in the data set."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
    ):
        # RolloutBuffer's own constructor would allocate its storage too
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.gae_lambda = gae_lambda
        self.gamma = gamma
        self._allocate_storage()
        self.reset()

    def observe(self, obs: np.ndarray | dict[str, np.ndarray]) -> Observations:
        """
        Observations for the policy to look at.

        :param obs: ``[n_envs, *obs_shape]`` or a dict of such
        :return: the same on the buffer's device
        """
        return obs_as_tensor(obs, self.device)

    def _allocate_storage(self) -> None:
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            self.observations = {key: self._allocate_obs(each) for key, each in space.spaces.items()}
        else:
            self.observations = self._allocate_obs(space)
        self.actions = self._allocate((self.action_dim,), action_dtype(self.action_space))
        self.dist_params = None
        self.extras = {}
        for name in ("rewards", "episode_starts", "values", "log_probs", "advantages", "returns"):
            setattr(self, name, self._allocate((), np.float32))

    def _allocate(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike | None) -> np.ndarray:
        return np.zeros((self.n_envs, self.buffer_size, *shape), dtype=dtype).swapaxes(0, 1)

    def _allocate_obs(self, space: spaces.Space) -> np.ndarray:
        shape: tuple[int, ...] = get_obs_shape(space)  # type: ignore[assignment]  # a Dict does not nest
        if is_channels_last(space):
            channels, height, width = shape
            return np.moveaxis(self._allocate((height, width, channels), space.dtype), -1, -3)
        return self._allocate(shape, space.dtype)

    def reset(self) -> None:
        """Begin a new rollout; the storage is used again."""
        self.pos = 0
        self.full = False
        self.valid = None
        self.unrated = np.zeros(self.buffer_size, bool)

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor | None,
        log_prob: th.Tensor | None,
        dist_params: th.Tensor | None = None,
        valid: np.ndarray | None = None,
        extras: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """
        Store one step of every environment.

        :param obs: ``[n_envs, *obs_shape]`` or a dict of such, what the policy saw
        :param action: ``[n_envs, *action_shape]``, as sampled
        :param reward: ``[n_envs]``
        :param episode_start: ``[n_envs]``, whether ``obs`` is the first of an episode
        :param value: ``[n_envs]`` or ``[n_envs, 1]``; ``None`` if it comes with :meth:`rate`
        :param log_prob: ``[n_envs]``, or ``None`` likewise
        :param dist_params: ``[n_envs, n_params]``, see :func:`sb3_ppo_from_scratch.distributions.distribution_parameters`
        :param valid: ``[n_envs]``, bool, whether each step is a transition; ``None`` if all are
        :param extras: by name ``[n_envs, ...]``; storage comes with the first sight of a name
        :raises IndexError: if the buffer is full
        """
        if self.full:
            raise IndexError(f"the rollout buffer already holds its {self.buffer_size} steps; call reset() first")
        step = self.pos
        self._put_observations(obs)
        _store(self.actions[step], action)
        self.rewards[step] = reward
        self.episode_starts[step] = episode_start
        if value is None or log_prob is None:
            self.unrated[step] = True
        else:
            self._put("values", value)
            self._put("log_probs", log_prob)
        if dist_params is not None:
            self._put("dist_params", dist_params)
        if extras or self.extras:
            self._put_extras(extras)
        self._end_step(valid)

    def _put_observations(self, obs: Any) -> None:
        if isinstance(self.observations, dict):
            for key, storage in self.observations.items():
                _store(storage[self.pos], obs[key])
        else:
            _store(self.observations[self.pos], obs)

    def _put(self, name: str, source: th.Tensor) -> None:
        """Store ``[n_envs, ...]`` of what the policy says."""
        storage = getattr(self, name)
        if storage is None:
            storage = self._allocate(tuple(source.shape[1:]), np.float32)
            setattr(self, name, storage)
        _store(storage[self.pos], source)

    def _put_extras(self, extras: Mapping[str, np.ndarray]) -> None:
        if self.pos == 0:
            kept = self.extras
            self.extras = {name: kept.get(name, np.empty(0)) for name in extras}
        if extras.keys() != self.extras.keys():
            raise ValueError(f"extras must be {sorted(self.extras)} in every step of a rollout, not {sorted(extras)}")
        for name, value in extras.items():
            array = _array(value)
            self._make_room(name, array)
            self.extras[name][self.pos] = array

    def _make_room(self, name: str, array: np.ndarray) -> None:
        """Storage for one of the extras: what was of integers becomes one of floats when the first float comes."""
        storage = self.extras[name]
        if array.shape[:1] != (self.n_envs,) or (self.pos > 0 and array.shape != storage.shape[1:]):
            shape = list(storage.shape[1:]) if self.pos > 0 else "[n_envs, ...]"
            raise ValueError(f"extras[{name!r}] must have shape {shape} (n_envs={self.n_envs}), not {list(array.shape)}")
        if array.dtype.kind not in "biuf":
            raise TypeError(f"extras[{name!r}] must be numbers, not of dtype {array.dtype}")
        if array.shape != storage.shape[1:]:
            self.extras[name] = self._allocate(array.shape[1:], array.dtype)
        elif not np.can_cast(array.dtype, storage.dtype):
            self.extras[name] = self._allocate(array.shape[1:], np.result_type(array, storage))
            self.extras[name][...] = storage

    def _end_step(self, valid: np.ndarray | None) -> None:
        """Note which of the step's rows are transitions, and go on to the next step."""
        if valid is not None and not valid.all():
            if self.valid is None:
                self.valid = ~self._allocate((), bool)
            self.valid[self.pos] = valid
        self.pos += 1
        self.full = self.pos == self.buffer_size

    # -------------------------------------------- what the policy says, after the steps

    def keeps(self, obs: Any) -> bool:
        """Whether the storage will hold all that a policy in float32 sees in ``obs``: ``[n_envs, *obs_shape]``, or a dict."""
        storage = self.observations
        if isinstance(storage, dict):
            return isinstance(obs, dict) and all(_is_exact(obs[key].dtype, each.dtype) for key, each in storage.items())
        return isinstance(obs, np.ndarray) and _is_exact(obs.dtype, storage.dtype)

    def unrated_steps(self, n_rows: int) -> Iterator[slice]:
        """
        The steps that :meth:`rate` has yet to come for, a few at a time.

        :param n_rows: how many transitions to have at most at a time, but at least one step
        """
        steps, length = np.flatnonzero(self.unrated), max(1, n_rows // self.n_envs)
        for run in np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1):
            for part in (run[start : start + length] for start in range(0, len(run), length)):
                yield slice(int(part[0]), int(part[-1]) + 1)

    def acted(self, steps: slice) -> tuple[Any, np.ndarray]:
        """
        What the policy saw and did in ``steps``, environment-major; views where that is possible.

        :return: ``[n_rows, *obs_shape]``, or a dict of such, and ``[n_rows, action_dim]``
        """
        stored = self.observations
        if isinstance(stored, dict):
            seen: Any = {key: _by_environment(each[steps]) for key, each in stored.items()}
        else:
            seen = _by_environment(stored[steps])
        return seen, _by_environment(self.actions[steps])

    def extra(self, name: str, steps: slice) -> np.ndarray | None:
        """One of the extras in ``steps``, ``[n_rows, ...]`` in the order of :meth:`acted`; ``None`` if there is none."""
        return _by_environment(self.extras[name][steps]) if name in self.extras else None

    def rate(self, steps: slice, values: np.ndarray, log_probs: np.ndarray, dist_params: np.ndarray) -> None:
        """
        Store what the policy says of the rows of :meth:`acted`.

        :param steps: as there
        :param values: ``[n_rows]``
        :param log_probs: ``[n_rows]``
        :param dist_params: ``[n_rows, n_params]``
        """
        if self.dist_params is None:
            self.dist_params = self._allocate(dist_params.shape[1:], np.float32)
        for target, source in ((self.values, values), (self.log_probs, log_probs), (self.dist_params, dist_params)):
            by_environment = target[steps].swapaxes(0, 1)
            by_environment[...] = source.reshape(by_environment.shape)
        self.unrated[steps] = False

    # ------------------------------------------------------------- the data set

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """
        Fill ``advantages`` and ``returns`` from the stored steps (:func:`compute_gae`).

        :param last_values: ``[n_envs]`` or ``[n_envs, 1]``, values of the observations after the last step
        :param dones: ``[n_envs]``, whether the last step ended an episode
        """
        last = last_values.detach().cpu().numpy().reshape(self.n_envs)
        self.advantages[:], self.returns[:] = compute_gae(
            self.rewards, self.values, self.episode_starts, last, dones, self.gamma, self.gae_lambda
        )

    def is_known_finite(self) -> bool:
        """Whether all numbers of the rollout are known to be finite; ``False`` where nobody has looked."""
        return False

    def dataset(self, by_row: bool = False) -> RolloutData:
        """
        The rollout's ``n_steps * n_envs`` transitions in environment-major order, on the buffer's device.

        On CPU the tensors share the buffer's memory (actions excepted, which become float32). Where some rows are no
        transitions (:attr:`valid`), the data set is a copy of the others.

        :param by_row: whether ``observations`` are to be not observations, which may be large, but their row numbers in
            :meth:`flat_observations`, ``[B]`` int64
        :raises RuntimeError: if the rollout is not complete, or holds no transition
        """
        if not self.full:
            raise RuntimeError(
                f"the rollout buffer holds {self.pos} of {self.buffer_size} steps; only a full one is a data set"
            )
        n_rows = self.n_envs * self.buffer_size
        data = RolloutData(
            th.arange(n_rows, device=self.device) if by_row else self.flat_observations(),
            self._flatten(self.actions.astype(np.float32, order="K", copy=False)),
            self._flatten(self.values),
            self._flatten(self.log_probs),
            self._flatten(self.advantages),
            self._flatten(self.returns),
            None if self.dist_params is None else self._flatten(self.dist_params),
            {name: self._flatten(value) for name, value in self.extras.items()},
        )
        return data if self.valid is None else data.take(self._transitions(self.valid), channels_last=True)

    def flat_observations(self) -> Observations:
        """All ``n_steps * n_envs`` observations, environment-major, those that belong to no transition included."""
        if isinstance(self.observations, dict):
            return {key: self._flatten(value) for key, value in self.observations.items()}
        return self._flatten(self.observations)

    def _transitions(self, valid: np.ndarray) -> th.Tensor:
        if not valid.any():
            raise RuntimeError(
                f"a rollout of {self.buffer_size} steps holds no transition, only resets: n_steps must be larger"
            )
        return self._flatten(valid).nonzero().flatten()

    def _flatten(self, array: np.ndarray) -> th.Tensor:
        flat = array.swapaxes(0, 1).reshape(self.n_envs * self.buffer_size, *array.shape[2:])
        return th.from_numpy(flat).to(self.device)

    def get(self, batch_size: int | None = None) -> Iterator[RolloutData]:  # type: ignore[override]  # a richer batch
        """
        SB3's interface to one pass over the data in random order.

        :param batch_size: transitions per minibatch; ``None`` for all in one
        """
        data = self.dataset()
        return data.minibatches(data.size if batch_size is None else batch_size)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> RolloutData:  # type: ignore[override]
        return self.dataset().take(th.as_tensor(batch_inds, device=self.device))


def rates_later(buffer: RolloutBuffer) -> TypeGuard[ScratchRolloutBuffer]:
    """Whether ``add`` may be called without what the policy says. A class of the user's with a storage of its own says no."""
    ours = ("add", "_put", "_put_observations", "acted", "rate")
    return isinstance(buffer, ScratchRolloutBuffer) and all(
        getattr(type(buffer), name) is getattr(ScratchRolloutBuffer, name) and name not in vars(buffer) for name in ours
    )


@cache
def _is_exact(source: np.dtype, target: np.dtype) -> bool:
    """Whether float32 numbers made of an array are the same after a copy into another type."""
    return np.can_cast(source, target) or (target == np.float32 and source.kind == "f")


def _by_environment(array: np.ndarray) -> np.ndarray:
    """From ``[k, n_envs, ...]`` to ``[n_envs * k, ...]``."""
    return array.swapaxes(0, 1).reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def action_dtype(space: spaces.Space) -> np.dtype:
    """What holds actions as they are sampled: the space's own type, unless a Box's would round them."""
    return np.result_type(space.dtype, np.float32) if isinstance(space, spaces.Box) else np.dtype(space.dtype)


def is_channels_last(space: spaces.Space) -> bool:
    """Whether observations ``[channels, height, width]`` are stored ``[height, width, channels]``: images are."""
    shape: tuple[int, ...] = get_obs_shape(space)  # type: ignore[assignment]  # a Dict does not nest
    return is_image_space(space) and shape[0] < min(shape[1:])


def _store(target: np.ndarray, source: np.ndarray | th.Tensor) -> None:
    """Copy into the buffer whatever the shape: discrete observations and actions come without their axis (SB3 issue 1392)."""
    array = source if type(source) is np.ndarray else _array(source)
    if array.shape != target.shape:
        array = array.reshape(target.shape)
    if target.dtype == np.uint8 and target.ndim == 4:  # torch transposes images three times as fast as NumPy
        th.from_numpy(target).copy_(th.from_numpy(array))
    else:
        target[...] = array


def _array(source: Any) -> np.ndarray:
    return source.numpy(force=True) if isinstance(source, th.Tensor) else np.asarray(source)


def is_ours(buffer: RolloutBuffer) -> TypeGuard[ScratchRolloutBuffer]:
    """Whether ``buffer`` may be read as a data set. A class of the user's with a ``get`` of its own keeps the last word."""
    return isinstance(buffer, ScratchRolloutBuffer) and type(buffer).get is ScratchRolloutBuffer.get


def is_replaceable(buffer_class: type[RolloutBuffer]) -> bool:
    """Whether ours may stand in for a class: SB3's and sb3-contrib's own, as their files name them, hold the same data."""
    return buffer_class in (RolloutBuffer, DictRolloutBuffer) or buffer_class.__module__.startswith("sb3_contrib.")


def minibatch_source(buffer: RolloutBuffer) -> Callable[[int], Iterator[RolloutData]]:
    """How to draw one epoch's minibatches of a given size from ``buffer``. Ours builds its data set once per rollout."""
    if is_ours(buffer):
        return buffer.dataset().minibatches
    return buffer.get  # type: ignore[return-value]  # SB3's samples have the same first six fields
