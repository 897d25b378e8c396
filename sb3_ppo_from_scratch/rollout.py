"""Phase one of PPO: act in the environments, and fill the buffer with what was seen, done and received."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_ppo_from_scratch.buffer import ScratchRolloutBuffer, rates_later
from sb3_ppo_from_scratch.checkpoint import all_callbacks
from sb3_ppo_from_scratch.checks.answers import goes_on, why_no_answer
from sb3_ppo_from_scratch.checks.finite import StepCheck, check_rollout
from sb3_ppo_from_scratch.distributed import DataParallelAlgorithm
from sb3_ppo_from_scratch.engines import Engine
from sb3_ppo_from_scratch.policies import mask_argument
from sb3_ppo_from_scratch.recurrent import LSTM_STATES, Memory, is_recurrent, remembered
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, TwoHalves, with_reset_rows
from sb3_ppo_from_scratch.vec_env.halves import halves_of
from sb3_ppo_from_scratch.vec_env.masks import MaskSource
from sb3_ppo_from_scratch.vec_env.memory import ObservationGuard, own_copy
from sb3_ppo_from_scratch.vec_env.stepping import Answer, AtOnce, InTurn

__all__ = [
    "FinalObservations",
    "RolloutAlgorithm",
    "bootstrap_time_limits",
    "cut_short",
    "holds_users_code",
    "to_env_actions",
]

ValuesOf = Callable[[Any], np.ndarray]
"""From a batch of observations, ``[n, *obs_shape]`` or a dict of such, to their values, ``[n]``."""

_HARMLESS = ("stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_ppo_from_scratch")
"""Whose callbacks leave the policy as it is."""


class RolloutAlgorithm(DataParallelAlgorithm):
    """What ``ScratchPPO`` does in phase one."""

    _told_of_halves = False
    """Whether the user knows why the halves of the environments are not stepped in turn"""
    nan_observations: bool | Collection[str] | None
    _nan_understood: set[str]
    """Keys of observations whose NaN the network has made finite numbers of"""
    _guard: ObservationGuard | None
    """Keeps observations from being written to by those who made them; ``None`` before the first rollout"""
    _last_memory: np.ndarray | None
    """What a recurrent policy remembers before the next step, see :meth:`Memory.array`; ``None`` for nothing"""

    _mask_source: MaskSource | None
    """Where masks come from; ``None`` if the policy takes none, or is to train without"""
    _last_action_masks: np.ndarray | None
    """``[n_envs, n_choices]``, those that belong to ``_last_obs`` where infos give them"""

    @abstractmethod
    def _current_engine(self) -> Engine:
        """The engine for the policy as it is now."""

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Step the environments with the current policy and fill the buffer, advantages and returns included.

        The local variables keep SB3's names, for callbacks read them. Where all are SB3's, the zoo's, ours or bystanders,
        an engine may leave values and log-probabilities for after the rollout: ``values``, ``log_probs`` and
        ``obs_tensor`` are ``None`` then.

        :param env: the training environments
        :param callback: called at every step, and before and after the rollout
        :param rollout_buffer: buffer to fill, of ``n_rollout_steps`` steps
        :param n_rollout_steps: steps per environment
        :return: whether the rollout is complete; not so if the callback ended training
        :raises NonFiniteError: for NaN or infinity in observations, rewards, or what the policy makes of them
        """
        assert self._last_obs is not None, "learn() resets the environments first"
        assert self._last_episode_starts is not None
        ours = rollout_buffer if isinstance(rollout_buffer, ScratchRolloutBuffer) else None
        observe = ours.observe if ours is not None else partial(obs_as_tensor, device=self.device)
        takes_tensors = ours is not None and ours.takes_tensors
        unwatched = type(callback) is ConvertCallback and callback.callback is None  # SB3's, where there is no callback
        native = _masked_env(env, rollout_buffer)
        masks = self._mask_source
        is_users = not unwatched and holds_users_code(callback)
        may_defer = self._may_defer(rollout_buffer)
        check = self._step_check(env)
        if self._guard is None:
            self._guard = ObservationGuard()
            self._last_obs = self._guard(self._last_obs)
        self.policy.set_training_mode(False)
        n_steps = 0
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        rollout_buffer.gamma, rollout_buffer.gae_lambda = self.gamma, self.gae_lambda  # a callback may have changed them
        engine = self._current_engine()
        engine.begin_rollout()
        finals = FinalObservations()
        check(self._last_obs, None, 0)
        memory = self._remembered()
        turns = self._turns(env, is_users, keeps_seen=takes_tensors)

        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            action_masks = None if masks is None else masks(self._last_obs, self._last_action_masks, n_steps)
            with_masks = mask_argument(action_masks)
            keeps = ours.keeps if ours is not None and may_defer and engine.defers else None
            briefly_if = None if is_users else keeps  # nobody looks
            question = partial(self._answer, engine, observe, briefly_if, with_masks=with_masks, memory=memory)
            obs_tensor, (actions, values, log_probs, dist_params, after) = turns.answer(self._last_obs, question)
            later = values is None or (keeps is not None and keeps(self._last_obs))
            clipped_actions = to_env_actions(actions, self.action_space, self.policy)
            check.before_step()
            new_obs, rewards, dones, infos = turns.step(clipped_actions, is_last=n_steps + 1 == n_rollout_steps)
            new_obs = self._guard(new_obs)
            reset_rows = None if native is None else native.reset_rows
            check(new_obs, rewards, n_steps)

            self.num_timesteps += env.num_envs * self.group.size
            if not unwatched:
                callback.update_locals(locals())
                if not goes_on(callback):
                    self._complete(engine, rollout_buffer, finals)
                    self._catch_up(turns.end())
                    return False
            if is_users and not self._counts_still(engine):  # what a callback does to the policy counts from the next step on
                self._complete(engine, rollout_buffer, finals)
                engine, later = self._current_engine(), False  # this step's values are by the old weights
                engine.begin_rollout()
            self._update_info_buffer(infos, dones)
            n_steps += 1

            if rows := cut_short(dones, infos):
                for row in rows:
                    check.final(infos[row]["terminal_observation"], row, n_steps - 1)
                if later:
                    finals.add(n_steps - 1, rows, infos, rewards, self.gamma)
                if values is not None:
                    rewards = self._bootstrap(engine, rewards, rows, infos, after)
            valid = None
            if reset_rows is not None and reset_rows.any():
                valid = ~reset_rows
                dones = dones | reset_rows  # what follows a reset row begins an episode
            seen = obs_tensor if takes_tensors else self._last_obs
            step = (seen, actions, rewards, self._last_episode_starts, values, log_probs)
            if ours is None:
                rollout_buffer.add(*step)  # type: ignore[arg-type]  # Dict observations too
            else:
                remembered_before = {} if memory is None else {LSTM_STATES: memory.array()}
                extras = {**self.row_extras(infos), **with_masks, **remembered_before}
                ours.add(*step, dist_params, valid, extras)
                ours.unrated[n_steps - 1] = later
            self._last_obs = new_obs
            self._last_action_masks = None if masks is None else masks.after_step(dones, infos)
            self._last_episode_starts = dones.copy()  # some environments hand out one array for ever
            memory = self._remember(after)

        self._complete(engine, rollout_buffer, finals)
        values = self._ask(engine.predict_values, new_obs, observe(new_obs), memory)  # type: ignore[arg-type]  # no tuple
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        check_rollout(rollout_buffer)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def row_extras(self, infos: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """
        To be overridden: more about the step just taken, which a loss of one's own finds in ``batch.extras`` by name.

        :param infos: of the step, one per environment
        :return: by name ``[n_envs, ...]``, the same names in every step; nothing by default
        """
        return {}

    def _turns(self, env: VecEnv, is_users: bool, keeps_seen: bool) -> AtOnce:
        """How a rollout steps its environments: in two halves where there are such and nothing forbids it."""
        if not halves_of(env):
            return AtOnce(env)
        obstacles = {
            "VecNormalize takes its statistics from all environments": isinstance(env, VecNormalize),
            f"a {type(env).__name__} is around them: wrap each half instead": not isinstance(env, TwoHalves),
            "a callback of your own may change the policy at each step, for it has no is_bystander = True": is_users,
            "gSDE draws its noise for all environments": self.use_sde,
            "the policy takes masks": self._mask_source is not None,
            "the policy has a memory": is_recurrent(self.policy),
        }
        obstacle = next((name for name, is_there in obstacles.items() if is_there), None)
        if obstacle is None and isinstance(env, TwoHalves):
            return InTurn(env, lambda actions: to_env_actions(actions, self.action_space, self.policy), keeps_seen)
        if self.verbose >= 1 and not self._told_of_halves:
            self._told_of_halves = True
            print(f"Stepping both halves of the environments at once: {obstacle}")
        return AtOnce(env)

    def _answer(
        self,
        engine: Engine,
        observe: Callable[[Any], Any],
        briefly_if: Callable[[Any], bool] | None,
        obs: Any,
        with_masks: dict[str, Any],
        memory: Memory | None,
    ) -> tuple[Any, Answer]:
        """What the policy sees of observations, and what it says; of some that may be only its actions."""
        if briefly_if is not None and briefly_if(obs):
            return None, (self._ask(partial(engine.sample_actions, **with_masks), obs, obs), None, None, None, None)
        obs_tensor = observe(obs)
        return obs_tensor, self._ask(partial(engine.act, **with_masks), obs, obs_tensor, memory)

    def _catch_up(self, step: VecEnvStepReturn | None) -> None:
        """After an early end: the environments may be a step ahead of the rollout."""
        if step is not None:
            self._last_obs, _, dones, infos = step  # type: ignore[assignment]  # no tuple
            self._last_episode_starts = dones.copy()
            self._update_info_buffer(infos, dones)

    def _remembered(self) -> Memory | None:
        """What a recurrent policy remembers before the next step; ``None`` for others."""
        if not is_recurrent(self.policy):
            return None
        assert self._last_episode_starts is not None
        return remembered(self.policy, self._last_memory, self._last_episode_starts)

    def _remember(self, after: Memory | None) -> Memory | None:
        """Keep what a recurrent policy remembers after a step, and return it as it counts before the next one."""
        if after is None:
            return None
        self._last_memory = after.array()
        return self._remembered()

    def _ask(self, question: Callable[..., Any], obs: Any, prepared: Any, memory: Memory | None = None) -> Any:
        """An engine's answer to observations, ``prepared`` as it takes them; or why there is none."""
        try:
            return question(prepared) if memory is None else question(prepared, memory=memory)
        except (RuntimeError, IndexError) as error:
            reason = why_no_answer(self.policy, self.observation_space, obs)
            if reason is None:
                raise
            raise reason from error

    def _may_defer(self, rollout_buffer: RolloutBuffer) -> bool:
        """Whether the policy's word on a step may wait, as far as code of the user's goes that is no callback."""
        own_extras = type(self).row_extras is not RolloutAlgorithm.row_extras or "row_extras" in vars(self)
        return rates_later(rollout_buffer) and not own_extras

    def _complete(self, engine: Engine, rollout_buffer: RolloutBuffer, finals: FinalObservations) -> None:
        """Whatever of the steps so far was to come later, by the weights that they were taken with."""
        if isinstance(rollout_buffer, ScratchRolloutBuffer) and rollout_buffer.unrated.any():
            with engine.as_acted():
                engine.complete(rollout_buffer)
                finals.bootstrap(rollout_buffer.rewards, self._values_by(engine))

    def _bootstrap(
        self, engine: Engine, rewards: np.ndarray, rows: list[int], infos: list[dict[str, Any]], memory: Memory | None = None
    ) -> np.ndarray:
        """:param memory: of a recurrent policy, *after* the step: it goes on to the final observation"""
        if memory is None:
            return bootstrap_time_limits(rewards, rows, infos, self._values_by(engine), self.gamma, engine.batched_bootstrap)
        for group in [rows] if engine.batched_bootstrap else [[row] for row in rows]:
            of_group = self._values_by(engine, memory.of(group))
            rewards = bootstrap_time_limits(rewards, group, infos, of_group, self.gamma, at_once=True)
        return rewards

    def _values_by(self, engine: Engine, memory: Memory | None = None) -> ValuesOf:
        def values_of(observations: Any) -> np.ndarray:
            values = self._ask(engine.predict_values, observations, self.policy.obs_to_tensor(observations)[0], memory)
            return values[:, 0].numpy(force=True)

        return values_of

    def _counts_still(self, engine: Engine) -> bool:
        """Whether the policy is as it was when ``engine`` took the last step."""
        return engine.policy is self.policy and engine.is_unchanged() and engine.is_as_acted()

    def _step_check(self, env: VecEnv) -> StepCheck:
        return StepCheck(env, self.observation_space, self._may_be_nan)

    def _may_be_nan(self, key: str, obs: Any) -> bool:
        """Whether NaN may stand in the observations of a key (empty where there are none)."""
        if self.nan_observations is None:
            return key in self._nan_understood or self._makes_sense_of(key, obs)
        return self.nan_observations is True or (self.nan_observations is not False and key in self.nan_observations)

    def _makes_sense_of(self, key: str, obs: Any) -> bool:
        """A network of SB3's makes NaN of NaN; one of the user's that does not has been written for it."""
        observations = self.policy.obs_to_tensor(obs)[0]
        n = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
        memory = remembered(self.policy, None, np.ones(n)) if is_recurrent(self.policy) else None
        with th.no_grad():
            values = self.policy.predict_values(observations, *(() if memory is None else (memory.critic, memory.starts)))
        if th.isfinite(values).all():
            self._nan_understood.add(key)
            warnings.warn(
                f"there is NaN in the observations{f' {key!r}' if key else ''}, and the network makes finite numbers of it. "
                "If it is meant to, say so: nan_observations=True, or a list of keys; False makes NaN an error",
                stacklevel=6,
            )
        return key in self._nan_understood


def holds_users_code(callback: BaseCallback) -> bool:
    """Whether some callback may change the policy: one that is neither SB3's, the zoo's nor ours, and no bystander."""
    return any(
        isinstance(each, ConvertCallback) or type(each).__module__.partition(".")[0] not in _HARMLESS
        for each in all_callbacks(callback, with_lists=True)
        if getattr(each, "is_bystander", False) is not True
    )


def _masked_env(env: VecEnv, rollout_buffer: RolloutBuffer) -> NativeVecEnv | TwoHalves | None:
    """The environment that says which rows are no transitions, if there can be such."""
    native = with_reset_rows(env)
    if native is not None and not isinstance(rollout_buffer, ScratchRolloutBuffer):
        raise ValueError(
            "rollout_buffer_class must be a subclass of ScratchRolloutBuffer for an environment with reset rows (next-step "
            f"autoreset), for they are to be left out, not {type(rollout_buffer).__name__}"
        )
    return native


def to_env_actions(actions: np.ndarray, action_space: spaces.Space, policy: ActorCriticPolicy) -> np.ndarray:
    """
    The actions to step the environments with: within a Box's bounds, unchanged for any other space.

    A squashed policy's actions lie in [-1, 1] and are scaled to the bounds; a Gaussian's are unbounded and get clipped.
    The buffer keeps ``actions`` as they were sampled, for those have the log-probability that the policy reported.

    :param actions: ``[n_envs, *action_shape]``
    :param action_space: the environments' action space
    :param policy: for ``squash_output`` and ``unscale_action``
    :return: ``[n_envs, *action_shape]``
    """
    if not isinstance(action_space, spaces.Box):
        return actions
    if policy.squash_output:
        return policy.unscale_action(actions)
    return actions.clip(action_space.low, action_space.high)  # np.clip does this by a detour


def cut_short(dones: np.ndarray, infos: list[dict[str, Any]]) -> list[int]:
    """
    The environments whose episode was cut by a time limit in this step.

    :param dones: ``[n_envs]``
    :param infos: one dict per environment, as ``VecEnv.step`` returns them
    """
    return [
        index
        for index in np.asarray(dones).nonzero()[0].tolist()
        if infos[index].get("terminal_observation") is not None and infos[index].get("TimeLimit.truncated", False)
    ]


def bootstrap_time_limits(
    rewards: np.ndarray,
    rows: list[int],
    infos: list[dict[str, Any]],
    predict_values: ValuesOf,
    gamma: float,
    at_once: bool = False,
) -> np.ndarray:
    r"""
    Where an episode was cut by a time limit, add what would have followed: :math:`r_t \leftarrow r_t + \gamma V(s_{final})`.

    The value is of the *final* observation (``infos[i]["terminal_observation"]``), never of the one that the environment
    was reset to; advantages are cut there all the same (SB3 issues 633 and 651). What SB3 does otherwise: it adds to the
    environment's own array, which may be read-only or handed out again, and into an array of integers, which rounds the
    value away.

    :param rewards: ``[n_envs]``
    :param rows: of :func:`cut_short`, at least one
    :param infos: one dict per environment, as ``VecEnv.step`` returns them
    :param predict_values: the critic
    :param gamma: discount factor
    :param at_once: whether one call may serve all environments, which may round differently from SB3's call for each
    :return: ``[n_envs]``, rewards in an array of their own
    """
    rewards = _reals(rewards)
    for group in [rows] if at_once else [[row] for row in rows]:
        rewards[group] += gamma * predict_values(_batch([infos[row]["terminal_observation"] for row in group]))
    return rewards


class FinalObservations:
    """Of a rollout's episodes that time limits have cut: for :func:`bootstrap_time_limits` of many steps at once."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[int] = []
        self._observations: list[Any] = []
        self._rewards: list[float] = []
        self._gammas: list[float] = []

    def add(self, step: int, rows: list[int], infos: list[dict[str, Any]], rewards: np.ndarray, gamma: float) -> None:
        """
        Keep copies, for whoever made them may write over them.

        :param step: number of the step within the rollout
        :param rows: of :func:`cut_short`
        :param infos: one dict per environment, as ``VecEnv.step`` returns them
        :param rewards: ``[n_envs]``
        :param gamma: discount factor
        """
        self._steps += [step] * len(rows)
        self._rows += rows
        self._observations += [own_copy(infos[row]["terminal_observation"]) for row in rows]
        self._rewards += rewards[rows].tolist()
        self._gammas += [gamma] * len(rows)

    def bootstrap(self, rewards: np.ndarray, predict_values: ValuesOf, at_once: int = 256) -> None:
        """
        Add what would have followed, and begin anew.

        :param rewards: ``[n_steps, n_envs]``, those that are concerned are replaced
        :param predict_values: see :func:`bootstrap_time_limits`
        :param at_once: observations per call
        """
        received, gammas = np.array(self._rewards, rewards.dtype), np.array(self._gammas, rewards.dtype)
        for part in (slice(start, start + at_once) for start in range(0, len(self._rows), at_once)):
            values = predict_values(_batch(self._observations[part]))
            rewards[self._steps[part], self._rows[part]] = received[part] + gammas[part] * values
        for kept in (self._steps, self._rows, self._observations, self._rewards, self._gammas):
            kept.clear()


def _batch(observations: list[Any]) -> Any:
    """``[n, *obs_shape]``, or a dict of such."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: np.stack([each[key] for each in observations]) for key in first}
    return np.stack(observations)


def _reals(rewards: np.ndarray) -> np.ndarray:
    """A copy that can hold a value; the precision of floats stays."""
    return np.array(rewards, dtype=rewards.dtype if rewards.dtype.kind == "f" else np.float32)
