"""
What is compared and when two scores count as equal, fixed before the runs.

*The question* is whether ScratchPPO's fast engines learn what SB3's PPO learns. *The answer* is the 95% confidence interval of
the difference of mean final returns over seeds, paired by seed, against a margin: within it, the two are equivalent; clear of
zero, they differ; else there are too few seeds to tell. A *final return* is an agent's mean over the evaluation episodes after
training. Every run's record repeats the margin and the hyperparameters that it was started under, and the report refuses
records of others.

The hyperparameters are rl-zoo3's (``hyperparams/scratch_ppo.yml``). Agents are evaluated as the zoo does it: with
deterministic actions, except on Atari. The zoo's own scores are of one agent each, from its file ``benchmark.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks import catch
from benchmarks.cases import Case, Contestant
from benchmarks.tasks import Task, load_task, schedule

__all__ = ["EVALUATION_ENVS", "PROTOCOL", "SIDES", "Entry", "Score"]

SIDES = {
    "sb3": "SB3 PPO",
    "reference": "ScratchPPO, reference",
    "fast": "ScratchPPO, fast engine",
    "native": "ScratchPPO, fast engine, native environments",
}
"""Who is compared, SB3 first, by the names that files and options have for them."""

EVALUATION_ENVS = 10
"""evaluation episodes are played side by side in so many environments"""


class Score(NamedTuple):
    """One agent's return over evaluation episodes."""

    mean: float
    std: float


@dataclass(frozen=True)
class Entry:
    """An environment, trained for so many steps."""

    env_id: str
    timesteps: int
    seeds: int
    margin: float | None
    """difference of mean returns that does not matter: 5% of the score at which the task counts as solved; ``None`` where
    there are too few seeds for any test"""
    zoo: Score | None
    """rl-zoo3's score; ``None`` where it trained for another number of steps"""
    sides: dict[str, Contestant]
    """the first is what the others are compared with"""
    hyperparameters: str = ""
    """entry of the hyperparameter file, if it is not ``env_id``"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """arguments of the algorithm that take the place of the zoo's"""
    evaluations: int = 20
    """during training, evenly spaced, the untrained policy's included"""
    episodes: int = 10
    """per evaluation"""
    final_episodes: int = 100
    deterministic: bool = True
    """whether agents are evaluated on their most probable actions"""
    note: str = ""
    """for the report"""

    @property
    def baseline(self) -> str:
        """The side that the others are compared with: SB3's PPO, or the reference engine, whose bits are SB3's."""
        return next(iter(self.sides))

    def task(self) -> Task:
        """The hyperparameters."""
        task = load_task(self.hyperparameters or self.env_id)
        return task._replace(arguments=task.arguments | self.overrides)

    def case(self) -> Case:
        """What :func:`benchmarks.cases.build` builds."""
        return Case(self.env_id, self.env_id, self.timesteps, self.task)


_SB3 = {"sb3": Contestant("sb3", "dummy"), "reference": Contestant("torch", "dummy")}
_SMALL = {**_SB3, "fast": Contestant("compiled", "dummy")}
_BREAKOUT = {**_SB3, "fast": Contestant("channels_last", "ale", precision="bf16")}
_LSTM = {"reference": Contestant("torch", "dummy"), "fast": Contestant("lstm", "dummy")}
# `compiled` serves no gSDE (Pendulum, MountainCarContinuous); LunarLander's records are of before it
_NUMPY = {**_SB3, "fast": Contestant("numpy", "dummy")}

PROTOCOL: dict[str, Entry] = {
    "CartPole-v1": Entry(
        "CartPole-v1", 100_000, 10, 25.0, Score(500.0, 0.0), {**_SMALL, "native": Contestant("compiled", "native")}
    ),
    "Acrobot-v1": Entry("Acrobot-v1", 1_000_000, 5, 5.0, Score(-73.506, 18.201), _SMALL),
    # the only one without a score at which it is solved: 5% of the 1000 between a random agent and a trained one
    "Pendulum-v1": Entry("Pendulum-v1", 100_000, 5, 50.0, Score(-172.225, 104.159), _NUMPY),
    "Pendulum-v1-no-gSDE": Entry(
        "Pendulum-v1",
        100_000,
        10,
        50.0,
        None,
        _SMALL,
        overrides={"use_sde": False, "sde_sample_freq": -1},
        note="The zoo's hyperparameters but for gSDE, so that the engine `compiled` serves a continuous task, too.",
    ),
    "MountainCarContinuous-v0": Entry("MountainCarContinuous-v0", 20_000, 5, 4.5, Score(88.343, 2.572), _NUMPY),
    "LunarLander-v3": Entry(
        "LunarLander-v3",
        1_000_000,
        5,
        10.0,
        Score(242.119, 31.823),
        _NUMPY,
        note="The zoo's score is of LunarLander-v2.",
    ),
    "Reacher-v5": Entry(
        "Reacher-v5",
        200_000,
        5,
        2.0,
        None,
        {side: _SMALL[side] for side in ("sb3", "fast")},
        hyperparameters="Reacher-v2",
        evaluations=10,
        note="MuJoCo's; a fifth of the zoo's steps. The margin is 5% of the 40 between a random agent and a trained one.",
    ),
    "CartPoleNoVel-v1": Entry(
        "rl_zoo3.import_envs:CartPoleNoVel-v1",
        100_000,
        5,
        25.0,
        None,
        _LSTM,
        hyperparameters="CartPoleNoVel-v1",
        evaluations=10,
        note="CartPole without velocities, with an LSTM. The reference's bits are those of sb3-contrib's RecurrentPPO.",
    ),
    "Taxi-v4": Entry(
        "Taxi-v4",
        300_000,
        5,
        0.4,
        None,
        {"reference": Contestant("torch", "dummy"), "fast": Contestant("compiled", "dummy")},
        evaluations=10,
        deterministic=False,
        note=(
            "With masks of invalid actions. The reference's bits are those of sb3-contrib's MaskablePPO. Actions are sampled, "
            "since the most probable ones may lead round in a circle for 200 steps, for a return of -200. This and the margin "
            "were chosen on other seeds than those compared."
        ),
    ),
    "Catch": Entry(
        catch.ENV_ID,
        100_000,
        8,
        0.1 * catch.BEST_RETURN,
        None,
        {"reference": Contestant("torch", "dummy"), "fast": Contestant("channels_last", "native")},
        hyperparameters="atari",
        overrides={"learning_rate": schedule("lin_1e-3"), "clip_range": 0.2, "gamma": 0.97},
        evaluations=10,
        note=(
            "A pixel game for CnnPolicy that one core learns in minutes, with what the fast path changes on Atari: products "
            "in channels-last float32, and a vector environment with reset rows. SB3's side is the reference engine, whose "
            "bits are SB3's. The margin is a tenth of what a player gets who knows where each ball will come down. It and the "
            "hyperparameters (the zoo's for Atari, but with a larger learning rate and clip range and a shorter horizon) were "
            "chosen on other seeds than those compared."
        ),
    ),
    "Breakout-500k": Entry(
        "BreakoutNoFrameskip-v4",
        500_000,
        1,
        None,
        None,
        _BREAKOUT,
        hyperparameters="atari",
        evaluations=10,
        deterministic=False,
        note="A twentieth of the zoo's steps: what fits on a CPU. Learning rate and clip range fall to zero over these steps.",
    ),
    "Breakout-10M": Entry(
        "BreakoutNoFrameskip-v4",
        10_000_000,
        1,
        None,
        Score(398.033, 33.328),
        _BREAKOUT,
        hyperparameters="atari",
        deterministic=False,
        note="Both sides want a GPU; ScratchPPO's alone: `make breakout`.",
    ),
}
"""By the name that files and options have for an entry."""
