"""What is made of answers that are not what they should be: a callback's, and a policy's that could not answer."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from torch import nn

from sb3_ppo_from_scratch.errors import NonFiniteError

__all__ = ["goes_on", "why_no_answer"]


def goes_on(callback: BaseCallback) -> bool:
    """
    Ask a callback after a step whether training goes on, and each one of a list of them.

    ``None``, the answer of a function without a ``return``, is a warning and no end: to SB3 it is one, without a word.

    :return: whether none has returned ``False``, or what else Python takes for it
    """
    if type(callback) is CallbackList:  # which would take a None among others for an end
        callback.n_calls += 1
        callback.num_timesteps = callback.model.num_timesteps
        answers = [goes_on(each) for each in callback.callbacks]  # all of them are asked
        return all(answers)
    answer: bool | None = callback.on_step()
    if answer is None:
        function = callback.callback if isinstance(callback, ConvertCallback) else type(callback)
        name = getattr(function, "__qualname__", repr(function))
        warnings.warn(
            f"the callback {name} returned None, and training goes on: return True, or False to end it", stacklevel=2
        )
        return True
    return bool(answer)


def why_no_answer(policy: nn.Module, space: spaces.Space, observations: Any) -> Exception | None:
    """
    Why a policy may have failed on observations that looked well.

    :param policy: the policy
    :param space: of the observations
    :param observations: ``[n, *obs_shape]`` or a dict of such
    :return: the error to raise instead of the policy's own, if there is a better one
    """
    for name, parameter in policy.named_parameters():
        if not th.isfinite(parameter).all():
            return NonFiniteError("weights", f"the policy's {name} is not finite: load a saved model, or begin anew")
    for key, leaf in space.spaces.items() if isinstance(space, spaces.Dict) else [("", space)]:
        choices = leaf.n if isinstance(leaf, spaces.Discrete) else getattr(leaf, "nvec", None)
        if choices is None:
            continue
        batch = np.asarray(observations[key] if isinstance(observations, dict) else observations).reshape(
            -1, *np.shape(choices)
        )
        outside = np.argwhere((batch < 0) | (batch >= choices))
        if len(outside):
            which, row = f"observation {key!r}" if key else "observation", outside[0, 0]
            return ValueError(f"{which} {batch[row].tolist()} in environment {row} lies outside its space {leaf}")
    return None
