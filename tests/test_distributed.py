"""Several processes train one agent: the same run, split. What happens in them is in :mod:`tests.ranks`."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_ppo_from_scratch import MlpPolicy, ScratchPPO
from sb3_ppo_from_scratch.buffer import RolloutData
from sb3_ppo_from_scratch.distributed.learning import Moments, Shares
from sb3_ppo_from_scratch.distributed.sharing import Statistics, added_since, put_together
from sb3_ppo_from_scratch.engines import choose_engine
from sb3_ppo_from_scratch.engines.reference.engine import TorchLearner
from sb3_ppo_from_scratch.update import Gradient, UpdateConfig, update
from tests.helpers import make_engine
from tests.ranks import SMALL, DoublePolicy
from tests.runs import rows

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def left_by(folder: Path, task: str) -> list[Any]:
    """What each rank returned."""
    found = [th.load(folder / f"{task}-{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert all("result" in each for each in found), [each.get("trace") for each in found]
    return [each["result"] for each in found]


TRAINED = ["float32", "float64", "numpy", "one_minibatch", "reset_rows", "images", "masked_lstm", "normalized"]
FAILED = ["raised+killed+killed_elsewhere", "frozen+stuck+evaluating"]
TASKS = [*TRAINED, "skipped", "stopped", "refused", "sums", "connected", *FAILED, "whole+begun", "resumed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what all tasks left."""
    path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.ranks", str(path), *TASKS]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300, capture_output=True)
    return path


# ---------------------------------------------------------------- the same run, split


def same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return all(th.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", TRAINED)
def test_all_ranks_have_the_same_policy_after_every_update(folder: Path, task: str) -> None:
    ours, theirs = left_by(folder, task)
    assert len(ours["updates"]) == len(theirs["updates"]) >= 2
    for mine, yours in zip(ours["updates"], theirs["updates"], strict=True):
        assert same(mine["policy"], yours["policy"])
        assert same(mine["after"], yours["after"])
        assert not same(mine["policy"], mine["after"])
        assert mine["metrics"] == yours["metrics"]
        assert not th.equal(mine["data"][1], yours["data"][1]), "each rank has environments and noise of its own"
    assert ours["num_timesteps"] == theirs["num_timesteps"]
    assert ours["episodes"] == theirs["episodes"]


def test_sums_are_the_same_with_and_without_shared_memory(folder: Path) -> None:
    assert [len(rest) for rest in left_by(folder, "sums")[0]] == [1, 3, 3000, 300_000, 20, 400_000]
    assert all(not rest.any() for found in left_by(folder, "sums") for rest in found)
    for shared, connected in zip(left_by(folder, "float32"), left_by(folder, "connected"), strict=True):
        assert same(shared["updates"][-1]["after"], connected["updates"][-1]["after"])


class Together:
    """
    One process with all ranks' rows, on the very minibatches that the ranks drew.

    :param records: of one update, by rank
    :param batch_size: over all ranks
    """

    def __init__(self, records: list[dict[str, Any]], batch_size: int, dtype: th.dtype):
        self.parts = [
            RolloutData(*(field.to(dtype) if field.dtype == th.float32 else field for field in each["data"]))
            for each in records
        ]
        self.generators = [np.random.RandomState() for _ in records]
        for generator, record in zip(self.generators, records, strict=True):
            generator.set_state(("MT19937", *record["order"], 0, 0.0))
        self.shares = Shares([part.size for part in self.parts], batch_size)

    def pairs(self) -> Iterator[list[RolloutData]]:
        """One epoch's minibatches, in the ranks' parts."""
        orders = [
            th.from_numpy(generator.permutation(part.size)).split(width)
            for generator, part, width in zip(self.generators, self.parts, self.shares.widths, strict=True)
        ]
        for index in range(self.shares.n_minibatches):
            yield [part.take(order[index]) for part, order in zip(self.parts, orders, strict=True) if index < len(order)]

    def minibatches(self, batch_size: int) -> Iterator[RolloutData]:
        for pair in self.pairs():
            yield RolloutData(*(th.cat(fields) for fields in zip(*(part[:7] for part in pair), strict=True)))


class InRankOrder(TorchLearner):
    """Adds the gradients of the parts one by one, as a sum over ranks does."""

    together: Together

    def minibatches(self) -> Any:
        return self.together.pairs()

    def gradient(self, pair: Any) -> Gradient:
        numbers = np.array([astuple(Moments.of(part.advantages)) for part in pair])
        moments = Moments.together(numbers)
        total: Any = 0
        for part in pair:
            normalized = moments.normalized(part.advantages).to(next(self.policy.parameters()).dtype)
            found = super().gradient(part._replace(advantages=normalized))
            found.backward()
            gradient = th.cat([parameter.grad.flatten() for parameter in self.policy.parameters()])
            total = total + th.cat([gradient, th.stack([each.detach() for each in found.loss])]) * part.size
        total = total / sum(part.size for part in pair)
        sizes = [parameter.numel() for parameter in self.policy.parameters()]
        for parameter, part in zip(self.policy.parameters(), total[:-6].split(sizes), strict=True):
            parameter.grad.copy_(part.view_as(parameter))
        return Gradient(type(found.loss)(*total[-6:]), lambda: None)


def make_policy(kind: type[MlpPolicy], record: dict[str, Any]) -> Any:
    box = spaces.Box(-10.0, 10.0, (4,))
    policy = kind(box, spaces.Discrete(2), lambda _: 3e-4)
    policy.load_state_dict(record["policy"])
    policy.optimizer.load_state_dict(copy.deepcopy(record["optimizer"]))
    return policy


def config(batch_size: int, target_kl: float | None = None, normalize: bool = True) -> UpdateConfig:
    return UpdateConfig(batch_size, 2, 0.2, None, normalize, 0.0, 0.5, 0.5, target_kl)


@pytest.mark.parametrize(
    ("task", "kind", "dtype", "batch_size", "tolerance"),
    [
        ("float32", MlpPolicy, th.float32, 32, 1e-6),
        ("float64", DoublePolicy, th.float64, 32, 1e-12),
        ("reset_rows", MlpPolicy, th.float32, 32, 1e-6),
    ],
)
def test_an_update_is_that_of_one_process_with_all_rows(
    folder: Path, task: str, kind: type[MlpPolicy], dtype: th.dtype, batch_size: int, tolerance: float
) -> None:
    ranks = left_by(folder, task)
    for records in zip(*(each["updates"] for each in ranks), strict=True):
        # by rounding, from all rows in one
        policy = make_policy(kind, records[0])
        learner = TorchLearner(
            make_engine("torch", policy), Together(records, batch_size, dtype).minibatches, config(batch_size)
        )
        stats = update(learner, config(batch_size))
        for name, value in policy.state_dict().items():
            assert th.allclose(value, records[0]["after"][name], rtol=0, atol=tolerance), name
        for name, value in stats.metrics().items():
            assert records[0]["metrics"][f"train/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        # to the last bit, from the halves' sums
        policy = make_policy(kind, records[0])
        in_order = InRankOrder(make_engine("torch", policy), None, config(batch_size, normalize=False))
        in_order.together = Together(records, batch_size, th.float32)
        update(in_order, config(batch_size))
        assert same(policy.state_dict(), records[0]["after"])


@pytest.mark.parametrize(
    ("task", "engine", "batch_size", "target_kl"), [("numpy", "torch", 48, 0.02), ("one_minibatch", "torch", 128, None)]
)
def test_other_engines_take_the_reference_s_steps(
    folder: Path, task: str, engine: str, batch_size: int, target_kl: float | None
) -> None:
    """Its minibatches, statistics and early stop; the last minibatch of 48 is a smaller one."""
    ranks = left_by(folder, task)
    for records in zip(*(each["updates"] for each in ranks), strict=True):
        policy = make_policy(MlpPolicy, records[0])
        settings = config(batch_size, target_kl)
        learner = TorchLearner(make_engine(engine, policy), Together(records, batch_size, th.float32).minibatches, settings)
        stats = update(learner, settings)
        for name, value in policy.state_dict().items():
            assert th.allclose(value, records[0]["after"][name], rtol=0, atol=2e-5), name
        for name in ("kl", "approx_kl", "value_loss", "grad_norm"):
            assert records[0]["metrics"][f"train/{name}"] == pytest.approx(stats.metrics()[name], rel=1e-2, abs=1e-5), name


def test_shares_and_moments() -> None:
    for n_rows in ([64, 64], [61, 64], [1, 64, 30], [5, 0]):
        shares = Shares(n_rows, 8 * len(n_rows))
        assert shares.n_minibatches == -(-sum(n_rows) // (8 * len(n_rows)))
        assert all(n <= width * shares.n_minibatches for n, width in zip(n_rows, shares.widths, strict=True))
    assert Shares([100, 100], 64).widths == [32, 32]
    numbers = th.randn(50, generator=th.Generator().manual_seed(0)) * 3 + 100
    parts = [Moments.of(part) for part in (numbers[:7], numbers[7:7], numbers[7:])]
    whole = Moments.together(np.array([astuple(part) for part in parts]))
    assert whole.n == 50
    assert whole.mean == pytest.approx(numbers.double().mean().item(), rel=1e-12)
    assert whole.squares / 49 == pytest.approx(numbers.double().var().item(), rel=1e-12)
    expected = (numbers - numbers.mean()) / (numbers.std() + 1e-8)
    np.testing.assert_allclose(whole.normalized(numbers).numpy(), expected.numpy(), atol=1e-5)
    assert Moments.of(numbers[:1]).normalized(numbers[:1]).equal(numbers[:1]), "one advantage has no deviation"


# ---------------------------------------------------------------- what is shared besides


def test_statistics_are_those_of_all_observations(folder: Path) -> None:
    ours, theirs = left_by(folder, "normalized")
    n_steps, n_iterations = SMALL["n_steps"], len(ours["statistics"])
    assert n_iterations == 6
    for iteration in range(1, n_iterations):
        for mine, yours in zip(ours["statistics"][iteration], theirs["statistics"][iteration], strict=True):
            np.testing.assert_array_equal(mine, yours)
        everything = RunningMeanStd(shape=(3,))
        for rank in (ours, theirs):
            for observations in rank["seen"][: iteration * n_steps + 1]:
                everything.update(observations)
        mean, var, count, *_ = ours["statistics"][iteration]
        np.testing.assert_allclose(mean, everything.mean, rtol=1e-10)
        np.testing.assert_allclose(var, everything.var, rtol=1e-10)
        assert count == pytest.approx(everything.count, rel=1e-12)


def test_what_was_added_can_be_put_together_again() -> None:
    generator = np.random.default_rng(0)
    base = RunningMeanStd(shape=(2,))
    base.update(generator.normal(50.0, 2.0, (1000, 2)))
    before, parts, everything = Statistics.of(base), [], base.copy()
    for n in (5, 0, 8):
        running, new = base.copy(), generator.normal(40.0, 3.0, (n, 2))
        for each in (running, everything) if n else ():
            each.update(new)
        parts.append(added_since(before, Statistics.of(running)))
    whole = put_together(before, parts)
    np.testing.assert_allclose(whole.mean, everything.mean, rtol=1e-12)
    np.testing.assert_allclose(whole.var, everything.var, rtol=1e-12)
    assert whole.count == everything.count


def test_a_stop_or_a_skipped_minibatch_of_one_rank_is_one_of_all(folder: Path) -> None:
    # rank 1's callback stops it in the 5th step of the second iteration, of 16; rank 0 does not hear of it before the end
    assert left_by(folder, "stopped") == [128 + 4 * (16 + 5)] * 2
    (ours, mine), (theirs, yours) = left_by(folder, "skipped")
    assert ours == theirs == 1
    assert same(mine, yours)


# ---------------------------------------------------------------- faults


def test_a_fault_of_one_rank_ends_all_and_is_named(folder: Path) -> None:
    tasks = {
        "raised": "rank 1 ended with LookupError: a fault of the user's",
        "killed": "rank 1 has ended: there is no process",
        "killed_elsewhere": "rank 1 has ended: there is no process",
        "frozen": "rank 1 has given no sign of life",
        "stuck": "rank 1 has not got on for 3 seconds, at .* in step, and was ended",
    }
    for task, message in tasks.items():
        found = th.load(folder / f"{task}-0.pt", weights_only=False)
        assert found["error"] == "RankFailedError"
        assert re.search(message, found["message"]), found["message"]
        assert found["seconds"] < 15
        statuses = (folder / f"{task}.txt").read_text()
        assert statuses == ("[1, 1]" if task == "raised" else "[1, -9]"), "nobody is left behind"
    assert left_by(folder, "evaluating") == [4 * 128] * 2, "whoever evaluates may take its time"


# ---------------------------------------------------------------- resuming


def test_a_killed_run_is_resumed_with_the_same_bits(folder: Path) -> None:
    assert th.load(folder / "begun-0.pt", weights_only=False)["error"] == "RankFailedError"
    for mine, yours in zip(left_by(folder, "resumed"), left_by(folder, "whole"), strict=True):
        assert same(mine[0], yours[0])
        assert all(th.equal(mine[1]["state"][0][key], value) for key, value in yours[1]["state"][0].items())
        np.testing.assert_array_equal(mine[2], yours[2])
        assert mine[3] == yours[3]
    files = rows(folder / "whole")
    assert files == rows(folder / "begun"), "same episodes of all eight environments, same log"
    assert set(files) == {"progress.csv", *(f"{number}.monitor.csv" for number in range(8))}
    with pytest.raises(ValueError, match="is of a run of 2 processes, which goes on in as many"):
        ScratchPPO.resume(folder / "whole" / "checkpoints", "CartPole-v1")


# ---------------------------------------------------------------- refusals


def test_what_processes_cannot_share_is_refused(folder: Path) -> None:
    for said in left_by(folder, "refused"):
        batch, envs, engine, alone = said
        assert batch == "batch_size must be a multiple of the number of processes, 2, which share it, not 33"
        assert re.match("n_envs must be the same on all ranks, not . here and . on rank .", envs)
        assert "cudagraph: it cannot share its minibatches with other processes (data_parallel=True)" in engine
        assert alone.startswith("data_parallel must be True where several processes are started together (here 2,")
    with pytest.raises(TypeError, match="data_parallel"):
        ScratchPPO("MlpPolicy", "CartPole-v1", data_parallel=2)  # type: ignore[arg-type]  # on purpose
    model = ScratchPPO("MlpPolicy", "CartPole-v1", data_parallel=True, device="cpu")  # of one process it changes nothing
    assert model.is_rank_zero
    assert choose_engine("auto", model.policy, is_shared=True).engine.shares_minibatches
