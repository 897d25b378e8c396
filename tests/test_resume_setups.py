"""A resumed run is the same, or says that it is not: never another one in silence, wherever state is kept."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback

from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO
from sb3_ppo_from_scratch.checkpoint.replay import CANNOT_FORK
from tests.pages import WORDS
from tests.resume_setups import SETUPS, Setup

TOTAL = 16 * 8
KWARGS = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "seed": 4, "device": "cpu", "policy_kwargs": {"net_arch": [4]}}
SAYS = ("bit-exact",)


class CutOffError(Exception):
    """Ends a run before its time."""


def cut_off(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> bool:
    if local_variables["self"].num_timesteps == 16 * 5 + 6:
        raise CutOffError
    return True


def callbacks_of(made: list[Any], *more: BaseCallback) -> BaseCallback:
    converted = [each if isinstance(each, BaseCallback) else ConvertCallback(each) for each in made]
    return CallbackList([*more, *converted])


def result(model: ScratchPPO) -> tuple[Any, ...]:
    weights = [parameter.detach().numpy().tobytes() for parameter in model.policy.parameters()]
    model.env.close()
    return weights, np.asarray(model._last_obs).tobytes()


def whole(setup: Setup, folder: Path) -> Any:
    return result(ScratchPPO("MlpPolicy", setup.env(), **KWARGS).learn(TOTAL, callbacks_of(setup.callbacks())))


def cut(setup: Setup, folder: Path) -> Any:
    callbacks = callbacks_of([*setup.callbacks(), cut_off], ResumableCheckpoint(64, folder))
    model = ScratchPPO("MlpPolicy", setup.env(), **KWARGS)
    with pytest.raises(CutOffError):
        model.learn(TOTAL, callbacks)


def resumed(setup: Setup, folder: Path) -> Any:
    model = ScratchPPO.resume(folder, setup.env())
    made = (setup.resumed_callbacks or setup.callbacks)()
    return result(model.continue_learning(callbacks_of(made, ResumableCheckpoint(64, folder))))


def in_a_process(phase: Callable[[Setup, Path], Any], setup: Setup, folder: Path) -> tuple[Any, list[str]]:
    """As a program of its own, which a class, a module or a generator of the process tells from another."""

    def run() -> tuple[Any, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = phase(setup, folder)
        return found, [str(each.message) for each in caught if any(word in str(each.message) for word in SAYS)]

    th.optim.Adam([th.zeros(1)])  # imports what every child would import for a second or two
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)  # one that hangs ends, and with it the parent's wait
        try:
            answer = pickle.dumps(run())
        except BaseException as error:  # noqa: BLE001  # a fork must never go on as its parent would
            answer = pickle.dumps(f"{type(error).__name__}: {error}")
        for worker in multiprocessing.active_children():
            worker.kill()
        with os.fdopen(write, "wb") as file:
            file.write(answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        found = pickle.load(file)
    os.waitpid(pid, 0)
    return found if isinstance(found, tuple) else (None, [found])


QUICK = ("np_random", "closure's counter", "bound method", "worker's global NumPy", "callback's Generator")


@pytest.mark.skipif(CANNOT_FORK, reason="nothing is tried out here")
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETUPS])
def test_a_resumed_run_is_the_same_or_says_that_it_is_not(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    expected, _ = in_a_process(whole, setup, tmp_path)
    _, said_at_first = in_a_process(cut, setup, tmp_path)
    found, said = in_a_process(resumed, setup, tmp_path)
    assert expected is not None
    is_same = found == expected
    assert is_same or said, "another run, in silence"
    assert setup.same == (is_same and not said), said
    if said_at_first:
        assert said, "said at the first checkpoint, and not recorded"
        assert len(said_at_first) == 1, "said more than once"


def test_the_handbook_counts_them() -> None:
    same = sum(setup.same for setup in SETUPS.values())
    said = f"[{len(SETUPS)} set-ups](../tests/resume_setups.py): {same} go on with the same bits, {len(SETUPS) - same} say"
    assert said in WORDS
