"""A ``gymnasium.vector.VectorEnv`` as an SB3 ``VecEnv``, in each of Gymnasium's three ways to begin the next episode."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_ppo_from_scratch.vec_env.memory import ObservationGuard, keep_finals_of_vector_env

__all__ = ["NativeVecEnv"]

Infos = list[dict[str, Any]]

_PLAY_AHEAD = ("ale_py", "envpool", "gymnasium")
"""Whose vector environments are stepped by two methods: ALE's, EnvPool's, and Gymnasium's ``AsyncVectorEnv``."""


class NativeVecEnv(VecEnv):
    """
    Steps all environments of a ``gymnasium.vector.VectorEnv`` in one call, and speaks SB3's ``VecEnv`` to the outside.

    When an episode ends, ``dones[i]`` is set, ``infos[i]["terminal_observation"]`` is its final observation,
    ``infos[i]["TimeLimit.truncated"]`` says whether a time limit cut it, and ``infos[i]["episode"]`` holds its return, length
    and time as SB3's ``Monitor`` counts them. How the next episode begins depends on ``env.metadata["autoreset_mode"]``
    (https://farama.org/Vector-Autoreset-Mode):

    - *next-step*: the step after the end ignores the action, gives reward 0 and returns the next episode's first observation.
      Such a *reset row* is no transition: :attr:`reset_rows` marks it, and ScratchPPO leaves it out of its data.
    - *same-step* and *disabled*: the next episode's first observation comes with the end of the last one, as in SB3. There
      are no reset rows, and SB3's own algorithms can learn from it too.

    An environment that reports an end and then goes on with the same episode (ALE's ``life_loss_info``) fits no mode.

    :param env: the vector environment; those that return only a part of the environments per step are not supported
    :param filename: write each episode to ``filename + ".monitor.csv"``, as ``VecMonitor`` does; ``None`` for no file. A file
        that is there already is kept under another name, with a warning, unless it is that of a run which is then resumed.
    :param info_keywords: entries of an episode's last ``info`` to add to its ``infos[i]["episode"]`` and to the file
    :raises TypeError: if ``env`` is no ``VectorEnv``
    :raises ValueError: if it does not say how it begins the next episode, or steps only a part of its environments
    """

    reset_rows: np.ndarray
    """``[n_envs]``, bool: whether the last step of each environment only began an episode; a new array with each step"""
    resetting: np.ndarray
    """``[n_envs]``, bool: whether the next step will; ``reset_rows`` one step ahead"""

    def __init__(self, env: VectorEnv, filename: str | None = None, info_keywords: tuple[str, ...] = ()):
        if not isinstance(env, VectorEnv):
            raise TypeError(f"env must be a gymnasium.vector.VectorEnv, not {type(env).__name__}")
        self.env = env
        self.autoreset_mode = _autoreset_mode(env)
        _check_batch_size(env)
        keep_finals_of_vector_env(env)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        spec = getattr(env, "spec", None)
        self.spec = spec if hasattr(spec, "id") else None  # EnvPool's is of another kind
        self.info_keywords = info_keywords
        self._t_start = time.time()
        self._results_writer = self._open(filename)
        self._obs_guard = ObservationGuard()
        self._actions = np.empty(0)
        self._is_playing = False
        self._begin_episodes()

    def _open(self, filename: str | None) -> ResultsWriter | None:
        if filename is None:
            return None
        _set_aside(filename)
        header: dict[str, float | str] = {"t_start": self._t_start, "env_id": str(None if self.spec is None else self.spec.id)}
        return ResultsWriter(filename, header=header, extra_keys=self.info_keywords)

    def _begin_episodes(self) -> None:
        self.reset_rows = np.zeros(self.num_envs, dtype=bool)
        self.resetting = np.zeros(self.num_envs, dtype=bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)

    @property
    def has_reset_rows(self) -> bool:
        """Whether a step can be a reset row."""
        return self.autoreset_mode is AutoresetMode.NEXT_STEP

    # ---------------------------------------------------------- reset and step

    def reset(self) -> VecEnvObs:
        """
        Begin a new episode everywhere.

        :return: first observations, ``[n_envs, *obs_shape]`` or a dict of such
        """
        self._settle()
        obs, info = self.env.reset(seed=self._next_seed(), options=self._next_options())  # type: ignore[arg-type]  # lists too
        self._reset_seeds()
        self._reset_options()
        self._begin_episodes()
        self.reset_infos = _per_environment(info, self.num_envs)
        self._obs_guard = ObservationGuard()
        return self._obs_guard(obs)

    def _next_seed(self) -> int | list[int | None] | None:
        """Environment ``i`` gets ``seed + i``, which Gymnasium's environments do themselves if they are given one number."""
        first = self._seeds[0]
        if first is None or self._seeds != [first + i for i in range(self.num_envs)]:
            return None if set(self._seeds) == {None} else self._seeds
        return first

    def _next_options(self) -> dict[str, Any] | None:
        if any(options != self._options[0] for options in self._options):
            raise ValueError("options must be the same for all environments of a vector environment")
        return dict(self._options[0]) or None

    def step_async(self, actions: np.ndarray) -> None:
        """
        Begin the step where the environments play in threads or processes of their own; others wait for :meth:`step_wait`.

        :param actions: ``[n_envs, *action_shape]``
        """
        self._actions = np.asarray(actions, dtype=self.action_space.dtype)
        if (parts := _parts_of_step(self.env)) is None:
            return
        self._is_playing = True  # before it is: Ctrl-C may come in between, and a step sent twice ends the process
        try:
            getattr(self.env, parts[0])(self._actions)
        except Exception:
            self._is_playing = False
            raise

    def _end_step(self) -> Any:
        """What the environment's ``step`` returns."""
        if not self._is_playing:
            return self.env.step(self._actions)
        self._is_playing = False
        _, end = _parts_of_step(self.env) or ("", "")
        return getattr(self.env, end)()

    def _settle(self) -> None:
        """Wait for a step that nobody has waited for."""
        if self._is_playing:
            self._end_step()

    def step_wait(self) -> VecEnvStepReturn:
        """
        Take the step.

        :return: observations ``[n_envs, *obs_shape]`` or a dict of such, rewards ``[n_envs]`` float32, dones ``[n_envs]``,
            and one info per environment
        """
        obs, rewards, terminated, truncated, info = self._end_step()
        dones = np.logical_or(terminated, truncated)
        ended = dones.nonzero()[0].tolist()
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            self.reset_rows, self.resetting = self.resetting, dones.copy()
            obs = self._obs_guard(obs)
            infos, finals = self._next_step(obs, ended, info)
        elif self.autoreset_mode is AutoresetMode.SAME_STEP:
            obs = self._obs_guard(obs)
            infos, finals = self._same_step(ended, info)
        else:
            obs, infos, finals = self._reset_ended(obs, ended, info)
        for info_of_one, cut in zip(infos, (truncated & ~terminated).tolist(), strict=True):
            info_of_one["TimeLimit.truncated"] = cut
        for row, final in finals.items():
            infos[row]["terminal_observation"] = final
        self._count(rewards, ended, infos)
        return obs, np.array(rewards, dtype=np.float32), dones, infos

    def _next_step(self, obs: VecEnvObs, ended: list[int], info: dict[str, Any]) -> tuple[Infos, dict[int, Any]]:
        """Infos, and final observations by row: here they are the observations that the environment shows."""
        infos = _per_environment(info, self.num_envs)
        for row in self.reset_rows.nonzero()[0].tolist():
            self.reset_infos[row], infos[row] = infos[row], {}
        return infos, {row: _copy_row(obs, row) for row in ended}

    def _same_step(self, ended: list[int], info: dict[str, Any]) -> tuple[Infos, dict[int, Any]]:
        """Likewise; the environment reports how an episode ended under the keys ``final_obs`` and ``final_info``."""
        own = {key: value for key, value in info.items() if key.removeprefix("_") not in ("final_obs", "final_info")}
        infos = _per_environment(own, self.num_envs)
        if not ended:
            return infos, {}
        if "final_obs" not in info:
            raise ValueError("env must put the final observations into info['final_obs'] in the mode SAME_STEP")
        last_infos = _per_environment(info.get("final_info", {}), self.num_envs)
        for row in ended:
            self.reset_infos[row], infos[row] = infos[row], last_infos[row]
        return infos, {row: _copy_row(info["final_obs"], row) for row in ended}

    def _reset_ended(self, obs: VecEnvObs, ended: list[int], info: dict[str, Any]) -> tuple[VecEnvObs, Infos, dict[int, Any]]:
        """Likewise, and observations with those of the next episodes: here the environment leaves the reset to its user."""
        infos = _per_environment(info, self.num_envs)
        finals = {row: _copy_row(obs, row) for row in ended}
        if ended:
            mask = np.zeros(self.num_envs, dtype=bool)
            mask[ended] = True
            obs, reset_info = self.env.reset(options={"reset_mask": mask})
            reset_infos = _per_environment(reset_info, self.num_envs)
            for row in ended:
                self.reset_infos[row] = reset_infos[row]
        return self._obs_guard(obs), infos, finals

    def _count(self, rewards: np.ndarray, ended: list[int], infos: Infos) -> None:
        """Add to the statistics of the current episodes, and put those of ended ones into their infos."""
        self._returns += rewards
        self._lengths += 1
        self._returns[self.reset_rows] = 0.0
        self._lengths[self.reset_rows] = 0
        for row in ended:
            self._report(row, infos[row])
            self._returns[row] = 0.0
            self._lengths[row] = 0

    def _report(self, row: int, info: dict[str, Any]) -> None:
        """What ``Monitor`` would say of an ended episode; a ``Monitor`` inside the environment has already said it."""
        if "episode" not in info:
            seconds = round(time.time() - self._t_start, 6)
            info["episode"] = {"r": round(float(self._returns[row]), 6), "l": int(self._lengths[row]), "t": seconds}
            info["episode"] |= {key: info[key] for key in self.info_keywords}
        if self._results_writer is not None:
            self._results_writer.write_row(info["episode"])

    def close(self) -> None:
        """Close the environment and the file."""
        with contextlib.suppress(Exception):  # of processes that have ended, in the middle of a step
            self._settle()
        if self._results_writer is not None:
            self._results_writer.close()
        self.env.close()

    # -------------------------------------------------- what lies inside the environment

    @property
    def _envs(self) -> list[gym.Env] | None:
        """The single environments, where they exist in this process."""
        return getattr(self.env.unwrapped, "envs", None)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        An attribute of each single environment; where there are none, the vector environment's own.

        From an ``AsyncVectorEnv``, which calls what can be called, a method's name gives its result.
        """
        if self._envs is not None:
            values: Sequence[Any] = [env.get_wrapper_attr(attr_name) for env in self._envs]
        elif attr_name != "render_mode" and hasattr(self.env, "get_attr"):
            values = self.env.get_attr(attr_name)
        else:
            values = [getattr(self.env, attr_name)] * self.num_envs
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of each single environment; where there are none, the vector environment's own.

        :raises ValueError: for some of the environments only, where they are not in this process
        """
        if self._envs is not None:
            for i in self._get_indices(indices):
                setattr(self._envs[i], attr_name, value)
            return
        self._all(indices)
        if hasattr(self.env, "set_attr"):
            self.env.set_attr(attr_name, [value] * self.num_envs)
        else:
            setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """
        Call a method of each single environment; where there are none, the vector environment's own, once for all.

        :raises ValueError: for some of the environments only, where they are not in this process
        """
        if self._envs is not None:
            return [self._envs[i].get_wrapper_attr(method_name)(*args, **kwargs) for i in self._get_indices(indices)]
        self._all(indices)
        if hasattr(self.env, "call"):
            return list(self.env.call(method_name, *args, **kwargs))
        return [getattr(self.env, method_name)(*args, **kwargs)] * self.num_envs

    def _all(self, indices: VecEnvIndices) -> None:
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"indices must be None or cover all environments of {self.env}, not {indices}: they are one")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Whether each single environment is inside such a wrapper, as far as can be seen from this process.

        For ``Monitor`` it is always so: ``infos[i]["episode"]`` is here, as SB3 wants to know.
        """
        if issubclass(wrapper_class, Monitor):
            return [True for _ in self._get_indices(indices)]
        return [self._envs is not None and is_wrapped(self._envs[i], wrapper_class) for i in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture per environment, if ``render_mode`` is ``"rgb_array"``."""
        images = self.env.render() if self.render_mode == "rgb_array" else None
        return [None] * self.num_envs if images is None else list(images)  # type: ignore[arg-type]  # arrays in this mode


def _set_aside(filename: str) -> None:
    """``ResultsWriter`` begins its file anew: an earlier run's episodes get a name that SB3's plots pass over."""
    path = Path(filename)  # what SB3 makes of it
    if not filename.endswith(Monitor.EXT):
        path = path / Monitor.EXT if path.is_dir() else Path(f"{filename}.{Monitor.EXT}")
    if path.is_file() and path.stat().st_size > 0:
        kept = next(other for i in itertools.count(1) if not (other := Path(f"{path}.{i}")).exists())
        path.rename(kept)
        warnings.warn(f"{path} holds episodes of an earlier run, which are kept as {kept}", stacklevel=4)


def _autoreset_mode(env: VectorEnv) -> AutoresetMode:
    mode = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        allowed = ", ".join(str(mode) for mode in AutoresetMode)
        raise ValueError(f"env.metadata['autoreset_mode'] must be one of {allowed}, not {mode!r}") from error


def _check_batch_size(env: VectorEnv) -> None:
    config = getattr(env.unwrapped, "config", None)  # EnvPool's
    batch_size = config.get("batch_size") if isinstance(config, dict) else getattr(env.unwrapped, "batch_size", None)
    if batch_size and batch_size != env.num_envs:
        raise ValueError(f"env must step all of its {env.num_envs} environments at once, not batch_size={batch_size} of them")


def _parts_of_step(env: VectorEnv) -> tuple[str, str] | None:
    """
    The names of the two methods that ``env.step`` calls, one to begin a step and one to wait for it, where there are such.

    Whoever wraps ``step``, inherits from its class or replaces it in an object has it called as it is.
    """
    return None if "step" in vars(env) else _parts_of_class(type(env))  # type: ignore[arg-type]  # classes are hashable


@cache
def _parts_of_class(env_class: type[VectorEnv]) -> tuple[str, str] | None:
    for begin, end in (("send", "recv"), ("step_async", "step_wait")):
        owners = {next((base for base in env_class.__mro__ if name in vars(base)), None) for name in ("step", begin, end)}
        owner = owners.pop()
        if not owners and owner is not None and owner.__module__.partition(".")[0] in _PLAY_AHEAD:
            return begin, end
    return None


def _per_environment(info: dict[str, Any], n_envs: int) -> Infos:
    """
    One dict per environment from Gymnasium's dict of arrays, in which ``_key`` says for which environments ``key`` holds.

    :param info: as ``VectorEnv.step`` returns it; dicts in it may nest
    :param n_envs: number of environments
    :return: new dicts, with a value per environment, or the same value for all if there is only one
    """
    infos: Infos = [{} for _ in range(n_envs)]
    for key, values in info.items():
        if key.startswith("_") and key[1:] in info:
            continue
        if isinstance(values, dict):
            values = _per_environment(values, n_envs)
        elif not isinstance(values, np.ndarray | list | tuple) or len(values) != n_envs:
            values = [values] * n_envs
        mask = info.get(f"_{key}")
        for row in range(n_envs) if mask is None else np.flatnonzero(mask):
            infos[row][key] = values[row]
    return infos


def _copy_row(obs: Any, row: int) -> Any:
    """One environment's observation, of its own memory."""
    single = {key: value[row] for key, value in obs.items()} if isinstance(obs, dict) else obs[row]
    return {key: np.array(value) for key, value in single.items()} if isinstance(single, dict) else np.array(single)
