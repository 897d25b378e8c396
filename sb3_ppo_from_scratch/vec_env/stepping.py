"""How a rollout steps its environments: all at once, or in two halves: while one plays, the policy answers the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_ppo_from_scratch.errors import NonFiniteError
from sb3_ppo_from_scratch.vec_env.halves import TwoHalves, joined, joined_step

__all__ = ["Answer", "AtOnce", "InTurn", "Question"]

Answer = tuple[Any, Any, Any, Any, Any]
"""The fields of a ``PolicyStep``, of which all but the actions may be ``None``: they are for after the rollout"""
Question = Callable[[Any], tuple[Any, Answer]]
"""From observations, ``[n, *obs_shape]`` or a dict of such, to them as the policy saw them, and its answer"""


class AtOnce:
    """
    Steps all environments, and then asks about all of them. :meth:`answer` and :meth:`step` are called in turn.

    :param env: the environments
    """

    def __init__(self, env: VecEnv):
        self.env = env

    def answer(self, obs: Any, question: Question) -> tuple[Any, Answer]:
        """
        :param obs: of all environments
        :param question: to be asked about them
        """
        return question(obs)

    def step(self, actions: np.ndarray, is_last: bool) -> VecEnvStepReturn:
        """
        :param actions: as the environments take them
        :param is_last: whether the rollout ends with this step
        """
        return self.env.step(actions)

    def end(self) -> VecEnvStepReturn | None:
        """In the middle of a rollout: the step that has begun already, ``None`` if there is none."""
        return None


class InTurn(AtOnce):
    """
    Sends each half of the environments into its next step as soon as it has made the last one, before the other is waited for.

    Within a rollout, that is, in which nobody changes the policy, and its memory, masks or gSDE's noise are not of all rows.

    :param env: the environments
    :param to_env_actions: from an answer's actions to those that the environments take
    :param keeps_seen: whether what the policy saw is wanted later; the next question may write over it
    """

    env: TwoHalves

    def __init__(self, env: TwoHalves, to_env_actions: Callable[[np.ndarray], np.ndarray], keeps_seen: bool):
        super().__init__(env)
        self.to_env_actions, self.keeps_seen = to_env_actions, keeps_seen
        self._question: Question | None = None
        self._answered: list[tuple[Any, Answer]] = []
        self._error: NonFiniteError | None = None
        env.settle()

    def answer(self, obs: Any, question: Question) -> tuple[Any, Answer]:
        """
        To the observations that :meth:`step` returned, the answer has been given there, in two parts.

        :param obs: of all environments
        :param question: to be asked about each half of them, and in the next :meth:`step`
        :return: what the policy saw, ``None`` unless ``keeps_seen``, and its answer
        :raises NonFiniteError: if the policy's probabilities are NaN
        """
        begins, self._question = self._question is None, question
        for index, rows in enumerate(self.env.rows) if begins else ():
            self._go_on(index, _part(obs, rows))
        if self._error is not None:
            raise self._error
        seen, answers = zip(*self._answered, strict=True)
        self._answered = []
        return _joined(seen), tuple(map(_joined, zip(*answers, strict=True)))

    def step(self, actions: np.ndarray, is_last: bool) -> VecEnvStepReturn:
        """
        :param actions: which have been sent
        :param is_last: whether the rollout ends with this step: an update may change the policy before the next
        """
        steps = []
        for index in range(2):
            steps.append(self.env.receive(index))
            if not is_last:
                self._go_on(index, steps[-1][0])
        return joined_step(steps)

    def end(self) -> VecEnvStepReturn | None:
        """As it is said there. The policy's answers are lost."""
        return self.env.step_wait() if len(self._answered) == 2 else None

    def _go_on(self, index: int, obs: Any) -> None:
        """Ask about a half, and send it on; after an error it rests."""
        if self._error is not None:
            return
        assert self._question is not None, "there was a first answer"
        try:
            seen, answer = self._question(obs)
        except NonFiniteError as error:
            self._error = error  # whoever looks at the observations first may know better
            return
        self._answered.append((_clone(seen) if self.keeps_seen else None, answer))
        self.env.send(index, self.to_env_actions(answer[0]))


def _part(obs: Any, rows: slice) -> Any:
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]


def _clone(seen: Any) -> Any:
    return {key: value.clone() for key, value in seen.items()} if isinstance(seen, dict) else seen.clone()


def _joined(parts: Sequence[Any]) -> Any:
    """:func:`joined`; ``None`` if one of them is."""
    return None if any(part is None for part in parts) else joined(parts)
