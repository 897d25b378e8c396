"""``scratch-zoo train --vec-env native``: rl-zoo3's experiments on native vector environments. This imports rl_zoo3."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
from rl_zoo3 import ALGOS, exp_manager
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_from_scratch.ppo import ScratchPPO
from sb3_ppo_from_scratch.vec_env import NativeVecEnv, make_native_atari_env

__all__ = ["NativeExperimentManager", "offer_native_environments"]

_KINDS = {"native": "ale", "envpool": "envpool"}
"""What ``--vec-env`` takes besides the zoo's own, and where Atari games come from then."""

_ATARI_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"


def offer_native_environments() -> None:
    """Let the zoo's ``train`` take ``--vec-env native`` and ``--vec-env envpool``; to be called before it is run."""
    exp_manager.ExperimentManager = NativeExperimentManager  # type: ignore[misc]  # train asks this module for it
    add_argument = argparse.ArgumentParser.add_argument

    def add_with_native(parser: Any, *flags: str, **options: Any) -> Any:
        if "--vec-env" in flags:
            options["choices"] = [*options["choices"], *_KINDS]
            options["help"] += f"; for ScratchPPO also {' or '.join(_KINDS)}, all environments in one"
        return add_argument(parser, *flags, **options)

    argparse.ArgumentParser.add_argument = add_with_native  # type: ignore[assignment, method-assign]  # the same, but for one


class NativeExperimentManager(exp_manager.ExperimentManager):
    """
    The zoo's, which also makes native vector environments: those that Gymnasium has under ``gym.make_vec``, and Atari games.

    Everything around the environments (normalization, evaluation, checkpoints, search) stays the zoo's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kind = kwargs.get("vec_env_type")
        self._kind = kind if kind in _KINDS else None
        super().__init__(*args, **(kwargs | {"vec_env_type": "dummy"} if self._kind else kwargs))
        if self._kind is not None and not issubclass(ALGOS[self.algo], ScratchPPO):
            raise ValueError(
                f"--vec-env {self._kind} is for --algo scratch_ppo, not {self.algo}, which would take the steps that begin an "
                "episode for transitions"
            )
        self._atari_options: dict[str, Any] = {}
        self._lock = threading.RLock()  # --n-jobs searches in threads

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> tuple[Any, ...]:
        wrappers = hyperparams.get("env_wrapper") or []
        processed, env_wrapper, callbacks, vec_env_wrapper = super()._preprocess_hyperparams(hyperparams)
        if self._kind is not None:
            self._check_is_served(wrappers if isinstance(wrappers, list) else [wrappers])
            if self._is_atari:
                self._atari_options["n_stack"] = self.frame_stack or 1
                self.frame_stack = None
            env_wrapper = None
        return processed, env_wrapper, callbacks, vec_env_wrapper

    def _check_is_served(self, wrappers: list[Any]) -> None:
        """Whether a native environment can be what the hyperparameters ask for; it cannot be wrapped one by one."""
        where = f"{self.env_name.gym_id} with --vec-env {self._kind}"
        if self._is_atari:
            given = wrappers[0] if len(wrappers) == 1 else None
            if isinstance(given, dict) and list(given) == [_ATARI_WRAPPER]:
                self._atari_options |= given[_ATARI_WRAPPER]
            elif given != _ATARI_WRAPPER:
                raise ValueError(f"env_wrapper must be {_ATARI_WRAPPER} for {where}, not {wrappers}")
            if self.env_kwargs or self.eval_env_kwargs:
                raise ValueError(f"{where} takes no env_kwargs, not {self.env_kwargs or self.eval_env_kwargs}")
        elif self._kind != "native":
            raise ValueError(f"--vec-env {self._kind} is for Atari games, not {self.env_name.gym_id}")
        elif wrappers:
            raise ValueError(f"{where} takes no env_wrapper, not {wrappers}; --vec-env dummy does")
        elif gym.spec(self.env_name.gym_id).vector_entry_point is None:
            raise ValueError(f"Gymnasium has no native vector environment for {self.env_name.gym_id}; use --vec-env dummy")

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """As the zoo does, from native environments if asked for."""
        if self._kind is None:
            return super().create_envs(n_envs, eval_env, no_log)
        with self._lock:
            # it will be called with one function per environment, as DummyVecEnv would
            self.vec_env_class = partial(self._make_native, eval_env, no_log)  # type: ignore[assignment]  # not a class
            return super().create_envs(n_envs, eval_env, no_log)

    def _make_native(self, eval_env: bool, no_log: bool, env_fns: list[Callable[[], gym.Env]]) -> NativeVecEnv:
        env_id, n_envs = self.env_name.gym_id, len(env_fns)
        filename = None if eval_env or no_log else os.path.join(self.save_path, "0")
        if self._is_atari:
            return make_native_atari_env(
                env_id, n_envs, backend=_KINDS[str(self._kind)], filename=filename, **self._atari_options
            )
        env = gym.make_vec(env_id, n_envs, **(self.eval_env_kwargs if eval_env else self.env_kwargs))
        return NativeVecEnv(env, filename, self.monitor_kwargs.get("info_keywords", ()))
