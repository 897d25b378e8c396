"""The comparison with SB3's PPO: what is compared, how runs are kept, and what the figures say of them."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any

import pytest
from rl_zoo3.exp_manager import ExperimentManager

from benchmarks.comparison.protocol import PROTOCOL, Entry
from benchmarks.tasks import HYPERPARAMETERS


@pytest.mark.parametrize("entry", PROTOCOL.values(), ids=PROTOCOL)
def test_tasks_are_what_the_zoo_makes_of_its_file(entry: Entry) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        zoo = ExperimentManager(argparse.Namespace(), "ppo", entry.env_id, "", config=str(HYPERPARAMETERS))
        theirs: dict[str, Any] = zoo._preprocess_hyperparams(zoo.read_hyperparameters()[0])[0]
    ours = entry.task()
    assert zoo.deterministic_eval is entry.deterministic
    assert (zoo.n_envs, zoo.n_timesteps) == (ours.n_envs, ours.n_timesteps)
    assert ours.normalize == (zoo.normalize_kwargs if zoo.normalize else None)
    assert ours.policy == theirs.pop("policy")
    for name, value in {**theirs, **entry.overrides}.items():
        assert _at(ours.arguments[name], 0.3) == _at(value, 0.3), name
    assert ours.arguments.keys() == theirs.keys()


def _at(value: Any, progress: float) -> Any:
    return value(progress) if callable(value) else value
