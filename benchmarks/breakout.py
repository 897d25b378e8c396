"""
Breakout for 10 million steps with rl-zoo3's hyperparameters: one command that begins, or goes on where the last one ended.

Ctrl-C, SIGTERM or ``--minutes`` end a command with a checkpoint; the same command goes on from there::

    python -m benchmarks.breakout --out runs/breakout

``record.json`` in the folder has every evaluation, every stretch of training games and every command with its commit and
machine. The command that reaches the end writes the agent, ``model.zip``, and lets it play 100 games in SB3's own wrappers.
``learning_curve.png`` shows how far the run has got. Two options run nothing: ``--picture`` draws it anew from the record, and
``--export`` writes the newest checkpoint's agent where rl-zoo3's scripts find it::

    python -m benchmarks.breakout --out benchmarks/results/breakout --picture
    python -m benchmarks.breakout --out runs/breakout --export runs/agent
    scratch-zoo enjoy --algo scratch_ppo --env BreakoutNoFrameskip-v4 -f runs/agent

A checkpoint has 20 MiB. Where that is too much to keep, an agent and the record do: ``--start`` takes both from a folder and
goes on with the same steps and schedules, though with new moments of Adam, and so not with the same bits::

    python -m benchmarks.breakout --out runs/breakout --start benchmarks/results/breakout

Where each command runs on another machine, ``--unpack`` takes the folder that ``--pack`` has left (:mod:`benchmarks.packing`):
all that the next command needs, in pieces. The first command goes without ``--unpack``::

    python -m benchmarks.breakout --device cuda --engine cudagraph --minutes 8 --out runs/gpu --unpack pieces --pack pieces
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from benchmarks.cases import native_games
from benchmarks.evaluation import EVALUATION_SEED, evaluate
from benchmarks.options import command_line, number
from benchmarks.packing import pack, unpack
from benchmarks.record import provenance, write_json
from benchmarks.tasks import Task, load_entry, load_task
from sb3_ppo_from_scratch import ResumableCheckpoint, ScratchPPO, has_checkpoint
from sb3_ppo_from_scratch.engines import PRECISIONS
from sb3_ppo_from_scratch.vec_env import ATARI_BACKENDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ENV_ID",
    "PUBLISHED",
    "Journal",
    "draw",
    "export",
    "main",
    "parse_options",
    "save_agent",
    "steps_done",
    "summary",
    "train_breakout",
]

Record = dict[str, Any]

ENV_ID = "BreakoutNoFrameskip-v4"
PUBLISHED = {"rl-zoo3": (398.0, 33.0), "CleanRL": (414.7, 28.0)}
"""Mean score after 10 million steps and its spread, as published by others."""
AGENT = "agent"
"""Folder of an exported agent beside its record."""
_STRETCH = 20_000
"""Timesteps whose games make one row of the learning curve."""
_GAMES_AT_ONCE = 8
_SECONDS_BETWEEN_LINES = 30.0
_EVALUATION_MINUTES = 2.0
"""What must be left of a command for it to play the last games as well."""


class Journal(BaseCallback):
    """
    Writes down what happens, tells the progress, evaluates, and ends a command whose time is up at the next boundary.

    :param path: of the record, which is brought up to date with each row
    :param record: as it was read, or a new one
    :param timesteps: of the whole training
    :param eval_every: timesteps between evaluations
    :param eval_episodes: whole games per evaluation; 0 for none
    :param deadline: ``time.monotonic()`` at which to stop
    :param checkpoint: what writes checkpoints, before this callback in the list
    :param games: for evaluations, with raw rewards
    """

    is_bystander = True

    def __init__(
        self,
        path: Path,
        record: Record,
        timesteps: int,
        eval_every: int,
        eval_episodes: int,
        deadline: float,
        checkpoint: ResumableCheckpoint,
        games: VecEnv,
    ):
        super().__init__()
        self.path, self.record, self.timesteps = path, record, timesteps
        self.eval_every, self.eval_episodes = eval_every, eval_episodes
        self.deadline, self.checkpoint, self.games = deadline, checkpoint, games
        self.stopped = False
        """Whether there is something left to do."""
        self._time_is_up = False
        self._scores: list[float] = []
        self._stretch_begun = 0
        self._line_at = (0.0, 0)

    def _on_training_start(self) -> None:
        for name in ("training", "evaluations"):  # of a command that was killed after its last checkpoint
            self.record[name] = [row for row in self.record[name] if row["timesteps"] <= self.num_timesteps]
        self.record["sessions"][-1]["from"] = self._stretch_begun = self.num_timesteps
        self._line_at = (time.monotonic(), self.num_timesteps)

    def _on_rollout_start(self) -> None:
        self.stopped = self._time_is_up  # the checkpoint of this boundary has been written
        session = self.record["sessions"][-1]
        session |= {"to": self.num_timesteps, "seconds": round(time.time() - session["started_at"], 1)}
        if self.num_timesteps - self._stretch_begun >= _STRETCH:
            self._note_stretch()
        if self.eval_episodes and self.num_timesteps >= self.eval_every * (len(self.record["evaluations"]) + 1):
            self.evaluate()
        if time.monotonic() >= self._line_at[0] + _SECONDS_BETWEEN_LINES:
            self._tell()

    def _on_step(self) -> bool:
        self._scores += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        if not self._time_is_up and time.monotonic() >= self.deadline:
            self._time_is_up = True
            self.checkpoint.save_freq = 1
        return not self.stopped

    def _on_training_end(self) -> None:
        self.record["sessions"][-1]["to"] = self.num_timesteps
        self._note_stretch()
        self._tell()

    def _note_stretch(self) -> None:
        """A row of the learning curve; games that last longer than a stretch count where they end."""
        mean = round(statistics.fmean(self._scores), 3) if self._scores else None
        self.record["training"].append({"timesteps": self.num_timesteps, "games": len(self._scores), "mean": mean})
        self._scores, self._stretch_begun = [], self.num_timesteps
        write_json(self.path, self.record)

    def evaluate(self) -> None:
        """Append a row of whole games with sampled actions, as rl-zoo3 plays Atari."""
        seed = EVALUATION_SEED + _GAMES_AT_ONCE * len(self.record["evaluations"])
        games = evaluate(self.model, self.games, self.eval_episodes, deterministic=False, env_seed=seed)
        self.record["evaluations"].append(
            {"timesteps": self.num_timesteps, "session": len(self.record["sessions"]) - 1, **games._asdict()}
        )
        write_json(self.path, self.record)
        print(f"evaluation after {self.num_timesteps:,} steps: {described(games.returns)}", flush=True)

    def _tell(self) -> None:
        now, (then, steps) = time.monotonic(), self._line_at
        fps = (self.num_timesteps - steps) / max(now - then, 1e-9)
        left = timedelta(seconds=round(max(0, self.timesteps - self.num_timesteps) / fps)) if fps > 0 else "unknown time"
        last = [info["r"] for info in self.model.ep_info_buffer or []]
        score = f"{statistics.fmean(last):.1f}" if last else "none yet"
        share = self.num_timesteps / self.timesteps
        print(
            f"{self.num_timesteps:,} of {self.timesteps:,} steps ({share:.1%}), {fps:.0f} steps/s, {left} left, "
            f"mean score of the last {len(last)} games: {score}",
            flush=True,
        )
        self._line_at = (now, self.num_timesteps)

    def state_dict(self) -> None:
        """The record is a file of its own, and the next command has a deadline of its own."""

    def load_state_dict(self, state: None) -> None:
        """Nothing, in turn."""


def described(scores: list[float]) -> str:
    """Mean, standard deviation and number of ``scores``, in words."""
    return f"{statistics.fmean(scores):.1f} +- {statistics.pstdev(scores):.1f} over {len(scores)} games"


def train_breakout(options: argparse.Namespace, task: Task | None = None) -> Record:
    """
    Begin or go on, until the training is done or the time is up; the last command plays the final games.

    :param options: of :func:`parse_options`
    :param task: hyperparameters; ``None`` for rl-zoo3's
    :return: the record, which is in the folder too; ``done`` tells whether there is nothing left to do
    """
    task = task or load_task("atari")
    deadline = time.monotonic() + 60.0 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "record.json"
    record = _begun_record(options)
    record["sessions"].append(_new_session(options))
    checkpoint = ResumableCheckpoint(None, options.out / "checkpoints")
    # the games' C++ cannot be saved: each command begins new ones
    seed = options.seed + 1000 * (len(record["sessions"]) - 1)
    env = native_games(ENV_ID, task.n_envs, seed, options.backend, options.halves)
    games = native_games(ENV_ID, _GAMES_AT_ONCE, EVALUATION_SEED, options.backend, halves=False, clip_reward=False)
    timesteps = int(options.timesteps)
    journal = Journal(path, record, timesteps, int(options.eval_every), options.eval_episodes, deadline, checkpoint, games)
    callbacks: list[BaseCallback] = [checkpoint, journal]
    try:
        if has_checkpoint(options.out / "checkpoints"):
            model = ScratchPPO.resume(options.out / "checkpoints", env, device=options.device)
            print(f"going on after {model.num_timesteps:,} of {timesteps:,} steps", flush=True)
            model.continue_learning(callbacks)
        elif options.start is not None:
            model = ScratchPPO.load(agent_file(options.start / AGENT), env, device=options.device)
            print(f"going on with the agent of {model.num_timesteps:,} of {timesteps:,} steps", flush=True)
            left = max(0, timesteps - model.num_timesteps)  # whole rollouts end after the last step asked for
            model.learn(left, callback=callbacks, reset_num_timesteps=False)
        else:
            choice = {name: getattr(options, name) for name in ("seed", "device", "engine", "precision")}
            model = ScratchPPO(task.policy, env, **choice, **task.arguments)
            model.learn(timesteps, callback=callbacks)
        record["engine_used"] = model._current_engine().name
    finally:  # a signal ends the program from within learn
        write_json(path, record)
        env.close()
        games.close()
    session = record["sessions"][-1]
    in_time = session["to"] == session["from"] or time.monotonic() < deadline - 60.0 * _EVALUATION_MINUTES
    if not journal.stopped and in_time:
        record |= _final(model, options)
        write_json(path, record)
    return record


def summary(record: Record) -> str:
    """
    The handbook's sentence about a run (``tests/test_readme.py`` compares them).

    :param record: of a run, finished or not
    """
    hours = sum(session.get("seconds", 0.0) for session in record["sessions"]) / 3600
    reached, total = steps_done(record), float(record["timesteps"])
    score = "no evaluation yet"
    if "final" in record:
        training = described(record["last_training_games"]["returns"])
        score = f"an evaluation at the end of {described(record['final']['returns'])} (the last in training: {training})"
    elif record["evaluations"]:
        last = record["evaluations"][-1]
        score = f"an evaluation after {last['timesteps']:,} steps of {described(last['returns'])}"
    return (
        f"{reached:,} of {total:,.0f} steps ({hours:.1f} hours), and {score}, beside "
        + " and ".join(f"{who}'s {mean:g} +- {spread:g}" for who, (mean, spread) in PUBLISHED.items())
        + " after all of them"
    )


def steps_done(record: Record) -> int:
    """How far the record's rows reach."""
    return max([row["timesteps"] for name in ("training", "evaluations") for row in record[name]], default=0)


def draw(record: Record, path: Path) -> None:
    """
    The learning curve: training games and evaluations over the steps so far, with the published scores.

    :param record: of a run, finished or not
    :param path: the PNG to write
    """
    from benchmarks.drawing import GREEN, VERMILION, save_figure, subplots  # matplotlib need not be on a machine that trains

    total = float(record["timesteps"])
    reached = steps_done(record)
    figure, axes = subplots(1, 1 if record["done"] else 2, (10, 4.4))
    for (who, (mean, spread)), color in zip(PUBLISHED.items(), (VERMILION, GREEN), strict=True):
        axes[0, 0].axhspan(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
        axes[0, 0].axhline(mean, color=color, linestyle=":", label=f"{who}, after 10 million steps: {mean:g} ± {spread:g}")
    for axis, end in zip(axes.flat, (total, max(reached, 1)), strict=False):
        _draw_scores(axis, record)
        axis.set_xlabel("environment steps (millions)")
        axis.set_xlim(0, end / 1e6)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("score of a game")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(f"{record['env']}, seed {record['seed']}: {reached:,} of {total:,.0f} steps ({reached / total:.1%})")
    save_figure(figure, path)


def _draw_scores(axis: Axes, record: Record) -> None:
    from benchmarks.drawing import BLACK, BLUE

    games = [row for row in record["training"] if row["mean"] is not None]
    axis.plot(_millions(games), [row["mean"] for row in games], color=BLUE, linewidth=1.2, label="training games, mean")
    returns = [row["returns"] for row in record["evaluations"]]
    means, spreads = [statistics.fmean(each) for each in returns], [statistics.pstdev(each) for each in returns]
    style: dict[str, Any] = {"fmt": "o", "color": BLACK, "markersize": 4, "linewidth": 1}
    axis.errorbar(_millions(record["evaluations"]), means, spreads, label="evaluations, mean ± std over games", **style)
    if "final" in record:
        steps, label = record["timesteps"] / 1e6, f"final evaluation: {described(record['final']['returns'])}"
        axis.plot(steps, record["final"]["mean"], "D", color=BLUE, markersize=9, label=label, clip_on=False, zorder=5)


def _millions(rows: list[Record]) -> list[float]:
    return [row["timesteps"] / 1e6 for row in rows]


def _begun_record(options: argparse.Namespace) -> Record:
    """The run's, or that of the run that it goes on from; else a new one."""
    for folder in filter(None, (options.out, options.start)):
        if (folder / "record.json").exists():
            return json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return _new_record(options)


def _new_record(options: argparse.Namespace) -> Record:
    choice = {name: getattr(options, name) for name in ("seed", "engine", "precision", "backend", "timesteps", "threads")}
    return {**choice, "env": ENV_ID, "sessions": [], "training": [], "evaluations": [], "done": False}


def _new_session(options: argparse.Namespace) -> Record:
    """Where and with what a command ran; what it did is added as it happens."""
    started = datetime.now(timezone.utc)
    names = ("command", "commit", "machine", "versions", "torch_threads")
    origin = provenance("benchmarks.breakout", options.commit)
    return {
        **{name: origin[name] for name in names},
        "device": options.device,
        **({"gpu": th.cuda.get_device_name(options.device)} if options.device.startswith("cuda") else {}),
        "started": started.isoformat(timespec="seconds"),
        "started_at": started.timestamp(),
    }


def _final(model: ScratchPPO, options: argparse.Namespace) -> Record:
    """Save the agent, and let it play by rl-zoo3's protocol: SB3's wrappers, whole games, raw rewards, sampled actions."""
    path = options.out / "model.zip"
    last = [float(info["r"]) for info in model.ep_info_buffer or []]
    save_agent(model, path)
    env = VecFrameStack(make_atari_env(f"ale_py:{ENV_ID}", _GAMES_AT_ONCE, seed=EVALUATION_SEED), n_stack=4)
    games = evaluate(model, env, options.final_episodes, deterministic=False)
    env.close()
    print(f"final evaluation: {described(games.returns)}", flush=True)
    return {
        "done": True,
        "final": {"mean": statistics.fmean(games.returns), "std": statistics.pstdev(games.returns), **games._asdict()},
        "last_training_games": {"mean": statistics.fmean(last) if last else None, "returns": last},
        "model": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size},
    }


def save_agent(model: ScratchPPO, path: Path) -> None:
    """
    Save a model that learns no more in a sixth of the bytes: without Adam's moments, and with weights of 16 bits.

    Whoever loads it has float32 weights again, rounded to 11 bits.

    :param model: it loses the moments, and its weights are rounded as the file's are
    :param path: of the zip file; its folder is made if need be
    """
    model.policy.optimizer.state.clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    model.policy.half()
    model.save(path)
    model.policy.float()


def export(model: ScratchPPO, folder: Path) -> Path:
    """
    Write an agent as rl-zoo3 writes one, so that its scripts play it.

    :param model: see :func:`save_agent`
    :param folder: what ``-f`` takes
    :return: the agent's file
    """
    import yaml  # which only the zoo needs

    path = agent_file(folder)
    save_agent(model, path)
    config = path.parent / ENV_ID / "config.yml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump(load_entry("atari")), encoding="utf-8")
    return path


def agent_file(folder: Path) -> Path:
    """Where rl-zoo3 looks for an agent in a folder of its runs."""
    return folder / "scratch_ppo" / f"{ENV_ID}_1" / f"{ENV_ID}.zip"


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Of the command line.

    :param arguments: ``None`` for those that the program was started with
    """
    parser = command_line("benchmarks.breakout", __doc__ or "", out=Path("runs/breakout"), seed=1, threads=2, commit=None)
    parser.add_argument("--engine", default="auto", help="ScratchPPO's (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(default)s")
    parser.add_argument("--backend", choices=ATARI_BACKENDS, default="ale", help="whose C++ runs the games (%(default)s)")
    parser.add_argument("--halves", action="store_true", help="play in two halves, one while the policy answers the other")
    parser.add_argument("--device", default="cpu", help="of the networks (%(default)s)")
    parser.add_argument("--minutes", type=number(float, 0), default=float("inf"), help="after which to stop (never)")
    parser.add_argument("--timesteps", type=number(float, 1), default=1e7, help="of the whole training (%(default)g)")
    parser.add_argument("--eval-every", type=number(float, 1), default=250_000, help="timesteps (%(default)s)")
    parser.add_argument("--eval-episodes", type=number(int, 0), default=16, help="games per evaluation (%(default)s)")
    parser.add_argument("--picture", action="store_true", help="draw the curve of the record in --out, and run nothing")
    parser.add_argument("--export", type=Path, help="folder for the newest checkpoint's agent, as rl-zoo3 writes one")
    parser.add_argument("--start", type=Path, help="folder of a record and an agent to go on from, if --out has no checkpoint")
    parser.add_argument("--unpack", type=Path, help="folder of pieces to go on from; --out must be empty")
    parser.add_argument("--pack", type=Path, help="folder for the run in pieces of at most 15 MB, when the command ends")
    parser.add_argument("--final-episodes", type=number(int, 1), default=100, help="games at the end (%(default)s)")
    options = parser.parse_args(arguments)
    if options.start is not None and not agent_file(options.start / AGENT).exists():
        parser.error(f"argument --start: must be a folder with {agent_file(Path(AGENT))}, not {options.start}")
    return options


def main() -> None:
    """Do what the command line says."""
    options = parse_options()
    path, picture = options.out / "record.json", options.out / "learning_curve.png"
    if options.picture:
        if not path.exists():
            sys.exit(f"breakout: there is no {path}; the same command without --picture makes it")
        record = json.loads(path.read_text(encoding="utf-8"))
        draw(record, picture)
        print(f"wrote {picture}\nfor docs/results.md: {summary(record)}")
        return
    if options.export is not None:
        env = native_games(ENV_ID, load_task("atari").n_envs, options.seed, options.backend, options.halves)
        print(f"wrote {export(ScratchPPO.resume(options.out / 'checkpoints', env, device=options.device), options.export)}")
        return
    th.set_num_threads(options.threads)
    if options.unpack is not None:
        unpack(options.unpack, options.out)
    try:
        record = train_breakout(options)
    finally:
        if options.pack is not None:
            pack(options.out, options.pack)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(record, picture)
    if not record["done"]:
        print("not done yet: the same command goes on from here")


if __name__ == "__main__":
    main()
