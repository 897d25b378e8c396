"""SB3's wrappers over environments with reset rows: rows that are no transitions must not enter what a wrapper remembers."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_ppo_from_scratch.vec_env.halves import TwoHalves, halves_of
from sb3_ppo_from_scratch.vec_env.native import NativeVecEnv

__all__ = ["mask_reset_rows", "with_reset_rows"]


def with_reset_rows(env: VecEnv) -> NativeVecEnv | TwoHalves | None:
    """The native environment inside ``env`` if its steps can be reset rows; ``None`` if every step is a transition."""
    native = env.unwrapped
    return native if isinstance(native, NativeVecEnv | TwoHalves) and native.has_reset_rows else None


def mask_reset_rows(env: VecEnv) -> VecEnv:
    """
    Teach SB3's ``VecNormalize``, ``VecMonitor`` and ``VecFrameStack`` around a :class:`NativeVecEnv` about its reset rows.

    They take every row for a transition. Over an environment in next-step mode the final observation would enter
    ``VecNormalize``'s statistics and the next episode's stack of frames, a reward of 0 the scale of returns, and the reset
    the length of ``VecMonitor``'s episodes. ``ScratchPPO`` does this to its own environments; one that SB3's ``EvalCallback``
    or ``evaluate_policy`` gets under ``VecMonitor`` or ``VecFrameStack`` needs it too. Other wrappers, and subclasses of these
    three, are left as they are.

    :param env: any ``VecEnv``; its wrappers stay the same objects, and are saved as what they were
    :return: ``env``
    """
    for half in halves_of(env):
        mask_reset_rows(half)
    wrapper: VecEnv = env
    while with_reset_rows(env) is not None and isinstance(wrapper, VecEnvWrapper):
        wrapper.__class__ = _MINDFUL.get(type(wrapper), type(wrapper))
        wrapper = wrapper.venv
    return env


class _MindfulVecNormalize(VecNormalize):
    """
    Statistics of the observations that a policy acts on, and of the returns of transitions.

    They are those of ``DummyVecEnv``, with one exception: a final observation is normalized before the next episode's first
    observation is known, and so without it in the statistics.
    """

    def save(self, save_path: str) -> None:
        """As SB3's own class, which opens where this package is not installed."""
        plain = object.__new__(VecNormalize)
        plain.__dict__.update(self.__dict__)
        plain.save(save_path)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (VecNormalize,), self.__getstate__()  # likewise

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        assert isinstance(obs, np.ndarray | dict)  # SB3's types also allow tuples
        self.old_obs, self.old_reward = obs, rewards
        if self.training:
            self._update(obs, rewards, _native(self))
        for row in np.flatnonzero(dones):
            if "terminal_observation" in infos[row]:
                infos[row]["terminal_observation"] = self.normalize_obs(infos[row]["terminal_observation"])
        self.returns[dones] = 0
        return self.normalize_obs(obs), self.normalize_reward(rewards), dones, infos

    def _update(self, obs: Any, rewards: np.ndarray, native: NativeVecEnv | TwoHalves) -> None:
        acted_on, transitions = ~native.resetting, ~native.reset_rows
        if self.norm_obs and acted_on.any():
            for key, statistics in self.obs_rms.items() if isinstance(self.obs_rms, dict) else [(None, self.obs_rms)]:
                statistics.update((obs if key is None else obs[key])[acted_on])
        self.returns = self.returns * self.gamma + rewards
        if transitions.any():
            self.ret_rms.update(self.returns[transitions])


class _MindfulVecMonitor(VecMonitor):
    """Episodes are as long as their transitions are many."""

    def step_wait(self) -> VecEnvStepReturn:
        result = super().step_wait()
        self.episode_lengths -= _native(self).reset_rows
        return result


class _MindfulVecFrameStack(VecFrameStack):
    """A stack begins with its own episode's first observation."""

    def step_wait(self) -> Any:
        stacked = self.stacked_obs
        rows = _native(self).resetting
        if rows.any():
            for stack in (
                stacked.sub_stacked_observations.values() if hasattr(stacked, "sub_stacked_observations") else [stacked]
            ):
                stack.stacked_obs = stack.stacked_obs.copy()  # the last one has been handed out
                stack.stacked_obs[rows] = 0
        return super().step_wait()


def _native(env: VecEnv) -> NativeVecEnv | TwoHalves:
    native = with_reset_rows(env)
    assert native is not None, "mask_reset_rows changes wrappers only around environments with reset rows"
    return native


_MINDFUL: dict[type[VecEnv], type[Any]] = {
    VecFrameStack: _MindfulVecFrameStack,
    VecMonitor: _MindfulVecMonitor,
    VecNormalize: _MindfulVecNormalize,
}
