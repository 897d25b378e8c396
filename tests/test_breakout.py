"""``benchmarks.breakout``: commands that end, go on and finish, on tiny budgets; and the picture of what they wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env

from benchmarks import breakout, episode, packing
from benchmarks.breakout import parse_options, train_breakout
from benchmarks.comparison.one_run import weights_digest
from benchmarks.record import ROOT
from benchmarks.tasks import Task, load_task
from sb3_ppo_from_scratch import ScratchPPO

ROLLOUT = 8


def tiny_task() -> Task:
    return Task(0, "CnnPolicy", 2, {**load_task("atari").arguments, "n_steps": ROLLOUT // 2, "batch_size": 4, "n_epochs": 1})


def command(folder: Path, minutes: float, timesteps: int = 40, **options: Any) -> dict[str, Any]:
    """A command of so many minutes; evaluations are of one game. Returns the record."""
    chosen = {"eval_every": 1000, "eval_episodes": 1, "final_episodes": 1, **options}
    arguments = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    parsed = parse_options(["--out", str(folder), "--minutes", str(minutes), "--timesteps", str(timesteps), *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # games in C++ cannot be saved
        return train_breakout(parsed, tiny_task())


@pytest.fixture(autouse=True)
def _one_game(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a time, for evaluations."""
    pytest.importorskip("ale_py")
    monkeypatch.setattr(breakout, "_GAMES_AT_ONCE", 1)


@pytest.mark.slow
def test_several_commands_make_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends at a boundary, loses nothing, and leaves the rest to the next one; the last one plays the final games."""
    monkeypatch.setattr(breakout, "_STRETCH", ROLLOUT)
    first, second = command(tmp_path, 0), command(tmp_path, 0)
    last = command(tmp_path, 10, eval_every=24)
    assert [record["done"] for record in (first, second, last)] == [False, False, True]
    sessions = last["sessions"]
    assert [row["from"] for row in sessions] == [0, ROLLOUT, 2 * ROLLOUT]
    assert [row["to"] for row in sessions[:2]] == [ROLLOUT + 2, 2 * ROLLOUT + 2], "the step in which it stopped is lost"
    assert sessions[2]["to"] == 40
    assert all(row.keys() >= {"command", "commit", "machine", "versions", "seconds", "device"} for row in sessions)
    assert [row["timesteps"] for row in last["evaluations"]] == [24]
    assert last["evaluations"][0]["session"] == 2
    steps = [row["timesteps"] for row in last["training"]]
    assert steps == sorted(set(steps)), "no stretch is told twice"
    assert "final" not in second
    assert len(last["final"]["returns"]) == 1
    assert last["engine_used"] == "channels_last"
    assert last == json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    model = ScratchPPO.load(tmp_path / "model.zip")
    assert model.num_timesteps == 40
    assert (tmp_path / "model.zip").stat().st_size == last["model"]["bytes"]


@pytest.mark.slow
def test_rl_zoo3_plays_an_exported_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path / "run", 0)
    monkeypatch.setattr("sys.argv", ["breakout", "--out", str(tmp_path / "run"), "--export", str(tmp_path / "agent")])
    monkeypatch.setattr(breakout, "load_task", lambda name: tiny_task())
    with pytest.warns(UserWarning, match="not bit-exact"):
        breakout.main()
    path = tmp_path / "agent" / "scratch_ppo" / f"{breakout.ENV_ID}_1" / f"{breakout.ENV_ID}.zip"
    assert path.stat().st_size < 4e6, "without the optimizer's moments, and with weights of 16 bits"
    assert {parameter.dtype for parameter in ScratchPPO.load(path).policy.parameters()} == {th.float32}
    arguments = ("enjoy", "--algo", "scratch_ppo", "--env", breakout.ENV_ID, "-f", str(tmp_path / "agent"))
    enjoy = [sys.executable, "-m", "sb3_ppo_from_scratch.zoo", *arguments, "--no-render", "-n", "20"]
    done = subprocess.run(enjoy, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"Loading {path}" in done.stdout


def test_a_saved_agent_is_the_one_that_goes_on_playing(tmp_path: Path) -> None:
    """To the last bit: what is evaluated is what is in the file."""
    model = ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, seed=0, device="cpu").learn(64)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    breakout.save_agent(model, tmp_path / "agents" / "agent.zip")
    loaded = ScratchPPO.load(tmp_path / "agents" / "agent.zip", device="cpu")
    for saved, kept, was in zip(loaded.policy.parameters(), model.policy.parameters(), before, strict=True):
        assert th.equal(saved, kept)
        assert kept.dtype == th.float32
        th.testing.assert_close(kept, was, rtol=2**-11, atol=1e-7)


def test_an_agent_and_its_record_are_enough_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the steps, the schedules and the rows of the run that they come from."""
    command(tmp_path / "first", 0.0)
    monkeypatch.setattr(breakout, "load_task", lambda name: tiny_task())
    monkeypatch.setattr(
        "sys.argv", ["breakout", "--out", str(tmp_path / "first"), "--export", str(tmp_path / "kept" / "agent")]
    )
    breakout.main()
    shutil.copy(tmp_path / "first" / "record.json", tmp_path / "kept")
    saved = ScratchPPO.load(breakout.agent_file(tmp_path / "kept" / "agent"))
    record = command(tmp_path / "second", 5.0, start=tmp_path / "kept")
    assert record["done"]
    assert [session["from"] for session in record["sessions"]] == [0, saved.num_timesteps]
    assert record["training"][-1]["timesteps"] == 40
    end = ScratchPPO.load(tmp_path / "second" / "model.zip")
    assert end._total_timesteps == 40
    assert end._current_progress_remaining == pytest.approx(0.0)
    shutil.copy(tmp_path / "second" / "model.zip", breakout.agent_file(tmp_path / "kept" / "agent"))
    again = command(tmp_path / "third", 5.0, start=tmp_path / "kept", timesteps=38)
    assert again["sessions"][-1]["to"] == 40, "an agent that is past the end learns no more"
    assert again["final"]["returns"]


def test_what_was_written_after_the_last_checkpoint_is_dropped(tmp_path: Path) -> None:
    """A command that was killed had told of steps that are taken again."""
    record = command(tmp_path, 0)
    kept = {"timesteps": ROLLOUT, "games": 0, "mean": None}
    record["training"] = [kept, {"timesteps": 30, "games": 2, "mean": 1e6}]
    record["evaluations"] = [{"timesteps": 30, "session": 0, "returns": [1e6], "lengths": [1]}]
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    record = command(tmp_path, 0)
    assert record["training"][0] == kept
    assert "1000000.0" not in json.dumps(record)
    assert record["evaluations"] == []


def test_a_run_goes_on_where_its_pieces_were_carried_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the steps, the rows and the seeds of the run, and with the files that others have put beside them."""
    monkeypatch.setattr(breakout, "load_task", lambda name: tiny_task())
    monkeypatch.setattr(breakout, "draw", lambda record, path: None)
    monkeypatch.setattr(packing.pack, "__defaults__", (1_000_000,))
    seeds: list[int] = []
    games = breakout.native_games
    monkeypatch.setattr(breakout, "native_games", lambda *a, **k: (seeds.append(a[2]), games(*a, **k))[1])

    def main(name: str, *more: str) -> dict[str, Any]:
        arguments = ["--out", str(tmp_path / name), "--timesteps", "40", "--minutes", "0", "--eval-episodes", "0"]
        monkeypatch.setattr("sys.argv", ["breakout", *arguments, *more])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            breakout.main()
        return json.loads((tmp_path / name / "record.json").read_text(encoding="utf-8"))

    pieces = str(tmp_path / "pieces")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "0.monitor.csv").write_text("a game", encoding="utf-8")
    first = main("first", "--pack", pieces)
    assert max(path.stat().st_size for path in Path(pieces).iterdir()) <= 1_000_000 < packing.PIECE
    assert len(list(Path(pieces).iterdir())) > 4
    record = main("second", "--unpack", pieces)
    assert record["sessions"][:1] == first["sessions"]
    assert [row["from"] for row in record["sessions"]] == [0, ROLLOUT]
    assert (tmp_path / "second" / "0.monitor.csv").read_text(encoding="utf-8") == "a game"
    assert seeds[::2] == [1, 1001], "no game is played again"
    with pytest.raises(FileExistsError, match="second is not empty"):
        main("second", "--unpack", pieces)


def test_pieces_are_all_there_and_whole_or_none_is_taken(tmp_path: Path) -> None:
    run, pieces = tmp_path / "run", tmp_path / "pieces"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("00000001-8-steps.ckpt", "00000002-16-steps.ckpt"):
        (run / "checkpoints" / name).write_bytes(np.random.default_rng(0).bytes(100))
    (run / "record.json").write_text("{}", encoding="utf-8")
    assert len(packing.pack(run, pieces, 2_000)) > 3
    files = packing.pack(run, pieces, 9_000)
    assert [path.name for path in files] == ["piece-000", "piece-001", "pieces.json"]
    assert set(files) == set(pieces.iterdir()), "nothing of the first time is left"
    packing.unpack(pieces, tmp_path / "again")
    found = sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert found == ["checkpoints/00000002-16-steps.ckpt", "record.json"], "of the checkpoints the newest"
    files[1].write_bytes(b"other bytes")
    with pytest.raises(ValueError, match="piece-001 is damaged"):
        packing.unpack(pieces, tmp_path / "third")
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match="piece-001"):
        packing.unpack(pieces, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    with pytest.raises(FileNotFoundError, match="no folder"):
        packing.pack(tmp_path / "nowhere", pieces)


def test_final_games_that_do_not_fit_are_left_to_the_next_command(tmp_path: Path) -> None:
    first = command(tmp_path, 1, timesteps=ROLLOUT)
    assert (first["sessions"][-1]["to"], first["done"]) == (ROLLOUT, False)
    second = command(tmp_path, 1, timesteps=ROLLOUT)
    assert second["done"], "which has nothing else to do"
    assert len(second["final"]["returns"]) == 1
    assert second["final"]["mean"] == np.mean(second["final"]["returns"])


@pytest.mark.slow
def test_evaluations_leave_training_alone(tmp_path: Path) -> None:
    digests = []
    for name, every in (("often", ROLLOUT), ("never", 1000)):
        command(tmp_path / name, 10, timesteps=3 * ROLLOUT, eval_every=every)
        digests.append(weights_digest(ScratchPPO.load(tmp_path / name / "model.zip")))
    assert digests[0] == digests[1]


def a_record(done: bool) -> dict[str, Any]:
    evaluation = {"returns": [10.0, 30.0], "lengths": [1, 2]}
    record = {
        "env": breakout.ENV_ID,
        "seed": 1,
        "timesteps": 1e7,
        "sessions": [{"seconds": 5400.0}, {}],
        "training": [{"timesteps": 20_000, "games": 0, "mean": None}, {"timesteps": 40_000, "games": 3, "mean": 2.0}],
        "evaluations": [{"timesteps": 30_000, **evaluation}],
        "done": done,
    }
    final = {"final": {"mean": 20.0, **evaluation}, "last_training_games": {"mean": 3.0, "returns": [2.0, 4.0]}}
    return record | (final if done else {})


@pytest.mark.parametrize("done", [False, True])
def test_the_picture_says_how_far_the_run_got(done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("benchmarks.drawing.save_figure", lambda figure, path: figures.append(figure))
    breakout.draw(a_record(done), tmp_path / "curve.png")
    figure = figures[0]
    assert figure.get_suptitle() == "BreakoutNoFrameskip-v4, seed 1: 40,000 of 10,000,000 steps (0.4%)"
    assert len(figure.axes) == (1 if done else 2)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"rl-zoo3, after 10 million steps: 398 ± 33", "CleanRL, after 10 million steps: 414.7 ± 28"} <= set(labels)
    assert ("final evaluation: 20.0 +- 10.0 over 2 games" in labels) is done
    axis = figure.axes[0]
    assert (axis.get_xlim(), axis.get_xlabel(), axis.get_ylabel()) == (
        (0.0, 10.0),
        "environment steps (millions)",
        "score of a game",
    )
    assert axis.get_ylim()[1] > 442, "the published scores are seen"
    curve = next(line for line in axis.lines if line.get_label() == "training games, mean")
    assert list(zip(*curve.get_data(), strict=True)) == [(0.04, 2.0)]


def test_a_picture_of_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["breakout", "--out", str(tmp_path), "--picture"])
    with pytest.raises(SystemExit, match=r"there is no .*record\.json"):
        breakout.main()
    empty = a_record(False) | {"training": [], "evaluations": []}
    (tmp_path / "record.json").write_text(json.dumps(empty), encoding="utf-8")
    breakout.main()
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'learning_curve.png'}" in printed
    assert breakout.summary(empty) in printed
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_a_sentence() -> None:
    so_far = "40,000 of 10,000,000 steps (1.5 hours), and "
    published = ", beside rl-zoo3's 398 +- 33 and CleanRL's 414.7 +- 28 after all of them"
    scores = "20.0 +- 10.0 over 2 games"
    in_training = "(the last in training: 3.0 +- 1.0 over 2 games)"
    assert breakout.summary(a_record(True)) == f"{so_far}an evaluation at the end of {scores} {in_training}{published}"
    assert breakout.summary(a_record(False)) == f"{so_far}an evaluation after 30,000 steps of {scores}{published}"
    assert breakout.summary(a_record(False) | {"evaluations": []}) == f"{so_far}no evaluation yet{published}"


@pytest.mark.parametrize(
    "arguments",
    [["--minutes", "-1"], ["--backend", "dummy"], ["--timesteps", "0"], ["--threads", "0"], ["--start", "/nowhere"]],
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments)
    assert caught.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_an_agents_file_becomes_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many-th step from the first one asked for; the JSON beside it names the agent."""
    env = make_vec_env("CartPole-v1", 1)
    model = ScratchPPO("MlpPolicy", env, n_steps=32, batch_size=32, seed=1, device="cpu").learn(32)
    model.save(tmp_path / "agent.zip")
    arguments = {"entry": "CartPole-v1", "agent": tmp_path / "agent.zip", "out": tmp_path, "every": 2, "start": 3, "width": 60}
    monkeypatch.setattr("sys.argv", ["episode", *(text for k, v in arguments.items() for text in (f"--{k}", str(v)))])
    episode.main()
    told = json.loads((tmp_path / "CartPole-v1.json").read_text(encoding="utf-8"))
    assert told["agent"] == {
        "file": "agent.zip",
        "entry": "CartPole-v1",
        "timesteps": 32,
        "weights_sha256": weights_digest(model),
    }
    assert told["return"] == told["steps"], "every step of CartPole is worth 1"
    with Image.open(tmp_path / "CartPole-v1.gif") as picture:
        assert picture.width == 60
        assert 1 <= picture.n_frames <= (told["steps"] - 2) // 2
