"""``benchmarks.fast_path``: each measurement on a tiny budget, and what the report says of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.fast_path import __main__ as command
from benchmarks.fast_path import data, products, report, reset_rows
from benchmarks.fast_path.data import KINDS, LifeLog
from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.vec_env import make_native_atari_env
from tests.envs import ClockEnv


@pytest.fixture(scope="module")
def agent() -> ScratchPPO:
    pytest.importorskip("ale_py")
    return ScratchPPO("CnnPolicy", make_native_atari_env(data.ENV_ID, 1), seed=1, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_games_are_told_life_by_life(kind: str, agent: ScratchPPO, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "envpool":
        pytest.importorskip("envpool")
    monkeypatch.setattr(data, "GAMES_AT_ONCE", 2)
    games = data.play_games(agent, kind, 2)
    assert len(games) == 2
    for game in games:
        assert len(game.life_rewards) == data.LIVES
        assert sum(game.life_rewards) == game.score
        assert game.frames > 100


def test_only_whole_games_count(monkeypatch: pytest.MonkeyPatch) -> None:
    log = LifeLog(DummyVecEnv([ClockEnv]))
    log.reset()
    for _ in range(4):
        log.step(np.zeros((1, 1)))
    assert log.games == [[]], "an end without Monitor's statistics is a lost life"
    assert log._lives == [[3.0]]


@pytest.mark.parametrize(("kind", "fewest"), [("sb3", 1), ("ale", 0), ("envpool", 1)])
def test_games_begin_with_up_to_thirty_noops(kind: str, fewest: int) -> None:
    pytest.importorskip("ale_py")
    if kind == "envpool":
        pytest.importorskip("envpool")
    noops = data.count_noops(kind, 8)
    assert len(noops) == 8
    assert len(set(noops)) > 3
    assert fewest <= min(noops)
    assert max(noops) <= 30


def test_the_consoles_memory_tells_the_noops() -> None:
    pytest.importorskip("ale_py")
    with pytest.raises(ValueError, match="ram must be that of Breakout after 0 to 40 no-ops"):
        data.noops_before(np.zeros(128))


def test_reset_rows_by_counting_and_by_games(agent: ScratchPPO) -> None:
    share = reset_rows.share_of_reset_rows(agent, 60)
    assert 0.01 < share < 0.2
    rows = [{"timesteps": 1000, "games": 2}, {"timesteps": 4000, "games": 4}]
    assert reset_rows.shares_over_run(rows) == [{"timesteps": 1000, "share": 0.03}, {"timesteps": 4000, "share": 0.02}]


def test_who_can_step_some_games() -> None:
    pytest.importorskip("ale_py")
    assert str(reset_rows.steps_some_games("ale")).startswith("AssertionError")
    pytest.importorskip("envpool")
    assert reset_rows.steps_some_games("envpool") is None


def test_products_on_the_same_minibatches(agent: ScratchPPO) -> None:
    record = products.measure_products(agent, n_updates=8, n_envs=2, n_steps=16)
    assert record["updates"] == [4, 8]
    last = {name: values[-1] for name, values in record["distance"].items()}
    assert 0 < last["channels_last fp32"] < last["channels_last bf16"]
    assert last["channels_last fp32"] < 0.05
    assert last["reference, minibatches in another order"] > 0.05


def some_records(agent: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    kinds = {
        kind: {
            "scores": rng.normal(10, 1, 20).tolist(),
            "frames": [100] * 19 + [101],
            "life_rewards": rng.random((20, 5)).tolist(),
            "noops": rng.integers(0, 31, 20).tolist(),
        }
        for kind in KINDS
    }
    shares = [{"timesteps": 100, "share": 0.08}, {"timesteps": 200, "share": 0.06}, {"timesteps": 300, "share": 0.04}]
    names = list(products.CANDIDATES)[1:]
    return {
        "data": {"agent": agent, "games": 20, "kinds": kinds},
        "reset_rows": {
            "counted": {"before training": 0.09, "agent": 0.05},
            "over_the_run": shares,
            "steps": 1000,
            "transitions": 900,
            "steps_some_games": {"ale": "it said no", "envpool": None},
        },
        "products": {"updates": [4, 8], "distance": {name: [0.001, 0.01 * i] for i, name in enumerate(names, 1)}},
    }


def test_the_report_says_what_the_records_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fast_path", "report", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"data\.json is missing"):
        command.main()
    records = some_records({"timesteps": 12_345})
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    command.main()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    sentence = report.verdict(**records)
    assert sentence in text
    assert "reset rows are 8.0% of the run's first steps and 4.0% of its last" in sentence
    assert "weights of `channels_last` are 1.0% as far from the reference's" in sentence
    for said in ("after 12,345 steps", "11.1% more", "no, all or none (`it said no`)", "yes, `step(actions, env_id)` does"):
        assert said in text
    assert "| channels_last bf16 | 0.10% | 2.00% |" in text
    assert (tmp_path / "starts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data"], "--agent is needed for data"),
        (["reset-rows", "--agent", "a.zip"], "--run is needed"),
        (["report", "--games", "15"], "--games must be a multiple of 10, not 15"),
        (["fly"], "invalid choice"),
    ],
)
def test_bad_options(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.parse_options(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
