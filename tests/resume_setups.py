"""Environments, wrappers and callbacks that keep their state in every place that we could think of."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)


class Walk(gym.Env):
    """Its observation, reward and end follow from numbers in [0, 1) that :meth:`draw` gives."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-9.0, 9.0, (2,), np.float64)
        self.action_space = spaces.Discrete(3)
        self.place = 0.0

    def draw(self) -> float:
        """The next number."""
        return float(self.np_random.random())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.place = self.draw()
        return np.array([self.place, 0.0]), {}

    def step(self, action: Any) -> Any:
        drawn = self.draw()
        self.place = np.clip(self.place + drawn - 0.25 * float(action), -9, 9)
        return np.array([self.place, drawn]), drawn + float(action == 1), drawn < 0.15, False, {}


class OwnGenerator(Walk):
    """Holds a generator of its own, of any kind."""

    def __init__(self, make: Callable[[], Any]):
        super().__init__()
        self.generator = make()

    def draw(self) -> float:
        if isinstance(self.generator, th.Generator):
            return float(th.rand(1, generator=self.generator))
        return float(self.generator.random())


class Drawing(Walk):
    """Calls a function."""

    def __init__(self, function: Callable[[], float]):
        super().__init__()
        self.function = function

    def draw(self) -> float:
        return self.function()


class Seeding(Drawing):
    """Seeds Python's global generator with its own: a forked process begins with another one each time."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            random.seed(seed)
        return super().reset(seed=seed)


class Holding(Walk):
    """Draws by turning the crank of an object that it holds."""

    def __init__(self, held: Any, crank: Callable[[Any], float]):
        super().__init__()
        self.held = held
        self.crank = crank

    def draw(self) -> float:
        return self.crank(self.held)


def scrambled(number: int) -> float:
    """A number in [0, 1) for each integer."""
    return (number * 0.6180339887498949) % 1.0


def closure_generator() -> Walk:
    generator = np.random.default_rng(1)
    return Drawing(lambda: float(generator.random()))


def closure_counter() -> Walk:
    count = 0

    def draw() -> float:
        nonlocal count
        count += 1
        return scrambled(count)

    return Drawing(draw)


class OfClass(Walk):
    """Counts in its class."""

    count = 0

    def draw(self) -> float:
        type(self).count += 1
        return scrambled(type(self).count)


class GeneratorOfClass(Walk):
    """Draws from its class's generator."""

    generator: ClassVar = np.random.default_rng(2)

    def draw(self) -> float:
        return float(self.generator.random())


MODULES = np.random.default_rng(3)
COUNTS: list[int] = []


def of_module() -> float:
    return float(MODULES.random())


def of_modules_list() -> float:
    COUNTS.append(0)
    return scrambled(len(COUNTS))


class Slotted(Walk):
    """Counts in a slot."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def draw(self) -> float:
        self.count += 1
        return scrambled(self.count)


class Viewing(Walk):
    """Writes through one array and reads through another."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = np.zeros(2)
        self.part = self.memory[1:]

    def draw(self) -> float:
        self.part += 1
        return scrambled(int(self.memory[1]))


class Switching(Walk):
    """What it does next is a method, a function or a class, and becomes another one."""

    def __init__(self, first: Any, then: Any):
        super().__init__()
        self.steps = 0
        self.rule, self.then = first, then

    def draw(self) -> float:
        self.steps += 1
        if self.steps == 20:
            self.rule = self.then
        return self.rule(super().draw())


class BoundMethods(Switching):
    """Between two of its own methods."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.rule, self.then = self.easy, self.hard

    def easy(self, number: float) -> float:
        return number

    def hard(self, number: float) -> float:
        return number / 2


def halved(number: float) -> float:
    return number / 2


class Half(float):
    """A class that is called."""

    def __new__(cls, number: float) -> Half:
        return super().__new__(cls, number / 2)


class Deleting(Walk):
    """What it does follows from whether an attribute is there."""

    def __init__(self) -> None:
        super().__init__()
        self.easy = True
        self.steps = 0

    def draw(self) -> float:
        self.steps += 1
        if self.steps == 20:
            del self.easy
        return super().draw() / (1 if hasattr(self, "easy") else 2)


class Curriculum(Walk):
    """Replaces its space, or changes it, and what it does follows from its bounds."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.steps, self.in_place = 0, in_place

    def draw(self) -> float:
        self.steps += 1
        if self.steps == 20 and self.in_place:
            self.observation_space.high[:] = 8.0
        elif self.steps == 20:
            self.observation_space = spaces.Box(-9.0, 8.0, (2,), np.float64)
        return super().draw() * float(self.observation_space.high[0]) / 9.0


@dataclasses.dataclass
class Counter:
    """Counts in an object of a class of its own."""

    count: int = 0
    pair: Any = None

    def next(self) -> float:
        self.count += 1
        return scrambled(self.count)


class SlottedCounter:
    """The same in a slot."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> float:
        self.count += 1
        return scrambled(self.count)


class Pair(NamedTuple):
    """Two counters."""

    first: Counter
    second: Counter


class Mode(enum.Enum):
    """Of an environment."""

    EASY = 1
    HARD = 2


class Modal(Walk):
    """Its mode is a member of an enumeration, or a date."""

    def __init__(self, first: Any, then: Any):
        super().__init__()
        self.steps, self.mode, self._then = 0, first, then

    def draw(self) -> float:
        self.steps += 1
        if self.steps == 20:
            self.mode = self._then
        return super().draw() / (1 if self.mode != self._then else 2)


def knotted() -> Counter:
    counter = Counter()
    counter.pair = [counter]
    return counter


def counting(held: Any) -> float:
    """Every kind of container, as a counter."""
    if isinstance(held, dict):
        held["count"] = held.get("count", 0) + 1
        return scrambled(held["count"])
    if isinstance(held, set):
        held.add(len(held))
    elif isinstance(held, np.ndarray):
        held += 1
        return scrambled(int(held[0]))
    else:
        held.append(len(held) if not held else held[-1] + 1)
        return scrambled(int(held[-1]))
    return scrambled(len(held))


class OwnState(Walk):
    """Counts where only its own state_dict says so, or does not."""

    __slots__ = ("count",)

    def __init__(self, complete: bool = True):
        super().__init__()
        self.count, self.complete = 0, complete

    def draw(self) -> float:
        self.count += 1
        return scrambled(self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"place": float(self.place), "count": self.count if self.complete else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        self.count = state["count"]


class Noisy(gym.Wrapper):
    """Has a generator of its own."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.generator = np.random.default_rng(5)

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return (obs, reward + self.generator.random(), *rest)


class Stating(gym.Wrapper):
    """Offers a state, of which wrappers over it shall not take it for theirs."""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.np_random.bit_generator.state, "place": self.unwrapped.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.np_random.bit_generator.state = state["generator"]
        self.unwrapped.place = state["place"]


def transformed() -> gym.Env:
    env, count = Walk(), itertools.count()
    return gym.wrappers.TransformObservation(env, lambda obs: obs * scrambled(next(count)), env.observation_space)


class Scaling(VecEnvWrapper):
    """Scales rewards by what it counts, in an attribute or through a function."""

    def __init__(self, venv: VecEnv, count: Callable[[], int] | None = None):
        super().__init__(venv)
        self.count, self.counted = count, 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        self.counted += 1
        return obs, rewards * scrambled(self.counted if self.count is None else self.count()), dones, infos


class StatingWrapper(Scaling):
    """Offers its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted = state["counted"]


def enclosed() -> Callable[[], int]:
    count = itertools.count()
    return lambda: next(count)


# ------------------------------------------------------- callbacks that change what is learned


class Nudging(BaseCallback):
    """Moves a weight at each rollout's start, by a number that it draws."""

    def __init__(self, source: Any = None):
        super().__init__()
        self.source, self.count = source, 0

    def draw(self) -> float:
        if self.source is None:
            self.count += 1
            return scrambled(self.count)
        if isinstance(self.source, th.Generator):
            return float(th.rand(1, generator=self.source))
        return self.source.next() if hasattr(self.source, "next") else float(self.source.random())

    def _on_rollout_start(self) -> None:
        with th.no_grad():
            self.model.policy.action_net.bias += self.draw()

    def _on_step(self) -> bool:
        return True


class StatingNudge(Nudging):
    """Offers its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.source.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.count = state["count"]


def nudging_function() -> Callable[[Any, Any], bool]:
    counts: list[int] = []

    def nudge(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> bool:
        counts.append(0)
        with th.no_grad():
            local_variables["self"].policy.action_net.bias += scrambled(len(counts)) / 8
        return True

    return nudge


def idle_function(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> bool:
    return True


# ------------------------------------------------------- the table


class Setup(NamedTuple):
    """What is trained on and with, and whether a resumed run is expected to have the same bits, or to say that it has not."""

    env: Callable[[], VecEnv]
    same: bool
    callbacks: Callable[[], Any] = list
    resumed_callbacks: Callable[[], Any] | None = None


def dummy(make: Callable[[], gym.Env]) -> Callable[[], VecEnv]:
    return lambda: DummyVecEnv([make] * 2)


def forked(make: Callable[[], gym.Env]) -> Callable[[], VecEnv]:
    return lambda: SubprocVecEnv([make] * 2, start_method="fork")


def shared(make: Callable[[], Any], env: Callable[[Any], gym.Env]) -> Callable[[], VecEnv]:
    """Two environments that hold one object."""

    def vec_env() -> VecEnv:
        held = make()
        return DummyVecEnv([lambda: env(held)] * 2)

    return vec_env


def global_numpy() -> float:
    return float(np.random.random())


def global_torch() -> float:
    return float(th.rand(1))


def walking(wrapper: Callable[[gym.Env], gym.Env]) -> Callable[[], VecEnv]:
    return dummy(lambda: wrapper(Walk()))


def plainly() -> VecEnv:
    return dummy(Walk)()


SETUPS: dict[str, Setup] = {
    # generators
    "np_random": Setup(dummy(Walk), same=True),
    "Generator": Setup(dummy(lambda: OwnGenerator(lambda: np.random.default_rng(1))), same=True),
    "Generator of MT19937": Setup(dummy(lambda: OwnGenerator(lambda: np.random.Generator(np.random.MT19937(1)))), same=True),
    "RandomState": Setup(dummy(lambda: OwnGenerator(lambda: np.random.RandomState(1))), same=True),
    "random.Random": Setup(dummy(lambda: OwnGenerator(lambda: random.Random(1))), same=True),
    "torch.Generator": Setup(dummy(lambda: OwnGenerator(lambda: th.Generator().manual_seed(1))), same=False),
    "SystemRandom": Setup(dummy(lambda: OwnGenerator(random.SystemRandom)), same=False),
    "global NumPy": Setup(dummy(lambda: Drawing(global_numpy)), same=True),
    "global Python": Setup(dummy(lambda: Drawing(random.random)), same=True),
    "global torch": Setup(dummy(lambda: Drawing(global_torch)), same=True),
    "urandom": Setup(dummy(lambda: Drawing(lambda: os.urandom(1)[0] / 256)), same=False),
    "clock": Setup(dummy(lambda: Drawing(lambda: time.perf_counter() % 1.0)), same=False),
    # places outside of attributes
    "closure's generator": Setup(dummy(closure_generator), same=False),
    "closure's counter": Setup(dummy(closure_counter), same=False),
    "class's counter": Setup(dummy(OfClass), same=False),
    "class's generator": Setup(dummy(GeneratorOfClass), same=False),
    "module's generator": Setup(dummy(lambda: Drawing(of_module)), same=False),
    "module's list": Setup(dummy(lambda: Drawing(of_modules_list)), same=False),
    "slots": Setup(dummy(Slotted), same=False),
    "view": Setup(dummy(Viewing), same=False),
    "shared generator": Setup(shared(lambda: np.random.default_rng(1), lambda held: OwnGenerator(lambda: held)), same=False),
    "shared list": Setup(shared(list, lambda held: Holding(held, counting)), same=False),
    "shared object": Setup(shared(Counter, lambda held: Holding(held, Counter.next)), same=False),
    # attributes that become others
    "bound method": Setup(dummy(BoundMethods), same=False),
    "function": Setup(dummy(lambda: Switching(float, halved)), same=False),
    "class": Setup(dummy(lambda: Switching(float, Half)), same=False),
    "lambda": Setup(dummy(lambda: Switching(float, lambda number: number / 2)), same=False),
    "deleted attribute": Setup(dummy(Deleting), same=False),
    "replaced space": Setup(dummy(lambda: Curriculum(in_place=False)), same=False),
    "changed space": Setup(dummy(lambda: Curriculum(in_place=True)), same=False),
    "enumeration": Setup(dummy(lambda: Modal(Mode.EASY, Mode.HARD)), same=True),
    "date": Setup(dummy(lambda: Modal(datetime.date(2020, 1, 1), datetime.date(2021, 1, 1))), same=True),
    # objects
    "list": Setup(dummy(lambda: Holding([], counting)), same=True),
    "dict": Setup(dummy(lambda: Holding({}, counting)), same=True),
    "set": Setup(dummy(lambda: Holding(set(), counting)), same=True),
    "deque": Setup(dummy(lambda: Holding(collections.deque(maxlen=3), counting)), same=True),
    "defaultdict": Setup(dummy(lambda: Holding(collections.defaultdict(int), counting)), same=True),
    "Counter": Setup(dummy(lambda: Holding(collections.Counter(), counting)), same=True),
    "OrderedDict": Setup(dummy(lambda: Holding(collections.OrderedDict(), counting)), same=True),
    "array": Setup(dummy(lambda: Holding(np.zeros(1), counting)), same=True),
    "array.array": Setup(dummy(lambda: Holding(__import__("array").array("l"), counting)), same=True),
    "dataclass": Setup(dummy(lambda: Holding(Counter(), Counter.next)), same=True),
    "object with slots": Setup(dummy(lambda: Holding(SlottedCounter(), SlottedCounter.next)), same=True),
    "named tuple": Setup(dummy(lambda: Holding(Pair(Counter(), Counter()), lambda pair: pair.second.next())), same=True),
    "object that holds itself": Setup(dummy(lambda: Holding(knotted(), Counter.next)), same=True),
    "itertools.count": Setup(dummy(lambda: Holding(itertools.count(), lambda held: scrambled(next(held)))), same=True),
    "itertools.cycle": Setup(dummy(lambda: Holding(itertools.cycle([0.1, 0.7, 0.4]), next)), same=False),
    "iterator of a list": Setup(dummy(lambda: Holding(iter([0.1, 0.7] * 200), next)), same=False),
    "generator function": Setup(dummy(lambda: Holding((scrambled(n) for n in range(999)), next)), same=False),
    "tensor": Setup(dummy(lambda: Holding(th.zeros(1), lambda held: scrambled(int(held.add_(1))))), same=True),
    "own state": Setup(dummy(OwnState), same=True),
    "own state, incomplete": Setup(dummy(lambda: OwnState(complete=False)), same=False),
    # wrappers
    "wrapper's generator": Setup(walking(Noisy), same=True),
    "TransformObservation's closure": Setup(dummy(transformed), same=False),
    "TransformReward": Setup(walking(lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward)), same=True),
    "NormalizeObservation": Setup(walking(gym.wrappers.NormalizeObservation), same=True),
    "TimeLimit": Setup(walking(lambda env: gym.wrappers.TimeLimit(env, 4)), same=True),
    "FrameStackObservation": Setup(walking(lambda env: gym.wrappers.FrameStackObservation(env, 3)), same=True),
    "StickyAction": Setup(walking(lambda env: gym.wrappers.StickyAction(env, 0.5)), same=True),
    "VecNormalize over a stating wrapper": Setup(lambda: VecNormalize(walking(Stating)()), same=True),
    "VecNormalize over a stating VecEnvWrapper": Setup(lambda: VecNormalize(StatingWrapper(plainly())), same=True),
    "VecFrameStack and VecMonitor": Setup(lambda: VecFrameStack(VecMonitor(plainly()), 2), same=True),
    "VecEnvWrapper": Setup(lambda: Scaling(plainly()), same=True),
    "VecEnvWrapper's closure": Setup(lambda: Scaling(plainly(), enclosed()), same=False),
    # other processes
    "worker's np_random": Setup(forked(Walk), same=True),
    "worker's global NumPy": Setup(forked(lambda: Drawing(global_numpy)), same=True),
    "worker's global Python": Setup(forked(lambda: Seeding(random.random)), same=True),
    "worker's global torch": Setup(forked(lambda: Drawing(global_torch)), same=True),
    "worker's closure": Setup(forked(closure_counter), same=False),
    "worker's class": Setup(forked(OfClass), same=False),
    "worker's bound method": Setup(forked(BoundMethods), same=False),
    "worker's torch.Generator": Setup(forked(lambda: OwnGenerator(lambda: th.Generator().manual_seed(1))), same=False),
    "VecNormalize over workers": Setup(lambda: VecNormalize(forked(Walk)()), same=True),
    "VecEnvWrapper's closure over workers": Setup(lambda: Scaling(forked(Walk)(), enclosed()), same=False),
    # callbacks
    "callback's counter": Setup(plainly, True, lambda: [Nudging()]),
    "callback's Generator": Setup(plainly, True, lambda: [Nudging(np.random.default_rng(1))]),
    "callback's RandomState": Setup(plainly, True, lambda: [Nudging(np.random.RandomState(1))]),
    "callback's random.Random": Setup(plainly, True, lambda: [Nudging(random.Random(1))]),
    "callback's torch.Generator": Setup(plainly, True, lambda: [Nudging(th.Generator().manual_seed(1))]),
    "callback's object": Setup(plainly, False, lambda: [Nudging(Counter())]),
    "callback's own state": Setup(plainly, True, lambda: [StatingNudge(Counter())]),
    "callback that is a function": Setup(plainly, True, lambda: [idle_function]),
    "callback that is a function with a closure": Setup(plainly, False, lambda: [nudging_function()]),
    "forgotten callback": Setup(plainly, False, lambda: [Nudging()], list),
}
