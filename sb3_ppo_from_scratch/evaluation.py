"""
Playing with the masks that training had: SB3's loops show a model observations, and nothing of which actions are allowed.

Where the mask is a key of the observation, ``ScratchPPO.predict`` finds it there, and all of SB3's tools work as they are.
Otherwise :class:`WithMasks` stands between the model and the loop, and asks the environments. ``learn`` does so for SB3's
``EvalCallback`` and its subclasses, and ``scratch-zoo`` for the zoo's scripts.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy as sb3_evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ppo_from_scratch.policies import takes_masks
from sb3_ppo_from_scratch.vec_env.masks import find_masks, keep_infos, kept_infos, leave_masks_raw

__all__ = ["WithMasks", "evaluate_policy", "mask_evaluation"]


def evaluate_policy(
    model: BaseAlgorithm, env: gym.Env | VecEnv, *args: Any, use_masking: bool = True, **kwargs: Any
) -> tuple[float, float] | tuple[list[float], list[int]]:
    """
    SB3's ``evaluate_policy``, which also passes the masks of the environments; states of recurrent policies as SB3's does.

    :param model: whose policy may be maskable or not
    :param env: in which it plays
    :param args: as SB3's function takes them
    :param use_masking: whether a maskable policy gets masks
    :param kwargs: as SB3's function takes them
    :return: as SB3's function does
    :raises ValueError: if the environments say nowhere which actions they allow, see :mod:`~.vec_env.masks`
    """
    if use_masking and takes_masks(type(model.policy)):
        if not isinstance(env, VecEnv):
            env = DummyVecEnv([lambda: env])  # type: ignore[list-item, return-value]  # as SB3 does
        env = keep_infos(env)
        model = WithMasks(model, env)  # type: ignore[assignment]  # it plays as one
    return sb3_evaluate_policy(model, env, *args, **kwargs)


class WithMasks:
    """
    A model whose ``predict`` gets the masks of the environments that it plays in; all else is the model's.

    :param model: with a maskable policy
    :param env: which it is shown the observations of, as :func:`~.vec_env.masks.keep_infos` returned it
    """

    def __init__(self, model: Any, env: VecEnv):
        self._model, self._env = model, env
        self._source: Any = None
        self._steps = 0
        leave_masks_raw(env)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """As the model does, of the environments' current observations."""
        if self._source is None:  # they have been reset by now
            self._source = find_masks(self._env, self._model.action_space)
        last = kept_infos(self._env)
        kept = None if last is None else self._source.after_step(*last)
        masks = self._source(observation, kept, self._steps)
        self._steps += 1
        return self._model.predict(observation, state, episode_start, deterministic, action_masks=masks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property  # type: ignore[misc]  # SB3's callbacks and the zoo look at what they were given
    def __class__(self) -> Any:
        return type(self._model)


def mask_evaluation(model: Any, callback: EvalCallback) -> None:
    """
    Let a callback's evaluations have masks.

    :param model: that it evaluates, with a maskable policy
    :param callback: SB3's or a subclass; it calls SB3's ``evaluate_policy``
    """
    callback.eval_env = keep_infos(callback.eval_env)
    callback.model = WithMasks(model, callback.eval_env)  # type: ignore[assignment]  # it evaluates like one
