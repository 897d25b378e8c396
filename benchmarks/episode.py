"""
A trained agent at play, as a GIF: an episode of an agent that :mod:`benchmarks.compare` left behind.

The pictures in ``docs/results.md`` come from the first two lines, with the agents that their runs had left beside the records.
The comparison's agents are not committed; the last two train one anew and show it::

    python -m benchmarks.episode --entry CartPole-v1 --every 2
    python -m benchmarks.episode --entry Breakout-500k

    python -m benchmarks.compare --only CartPole-v1 --side fast --seeds 1 --out runs/compare
    python -m benchmarks.episode --entry CartPole-v1 --every 2 --results runs/compare

Any agent's file will do, too, with the entry that says how it plays, such as that of :mod:`benchmarks.breakout`::

    python -m benchmarks.episode --entry Breakout-10M --agent runs/breakout/model.zip --every 4 --out runs/breakout

Beside the GIF stands a JSON file with the agent's weights' checksum, which the record of its training names too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from benchmarks.comparison.one_run import evaluation_env, weights_digest
from benchmarks.comparison.protocol import PROTOCOL, SIDES
from benchmarks.comparison.records import model_path, record_path
from benchmarks.evaluation import EVALUATION_SEED, evaluate
from benchmarks.options import command_line, number
from benchmarks.record import RESULTS, provenance, write_json
from sb3_ppo_from_scratch import ScratchPPO

__all__ = ["Camera", "Episode", "load_agent", "main", "parse_options", "play", "write_gif"]

_CAPTION_HEIGHT = 16


class Episode(NamedTuple):
    """What happened in an episode."""

    frames: list[np.ndarray]
    """``[height, width, 3]``, one per step"""
    score: float
    """return of the whole episode; on Atari of the game with its raw rewards"""


class Camera(VecEnvWrapper):
    """
    Takes a picture before every step.

    :param venv: one environment that renders RGB arrays
    """

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self.frames: list[np.ndarray] = []

    def reset(self) -> VecEnvObs:
        """Begin an episode, and a film."""
        self.frames = []
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the picture, and the step."""
        self.frames.append(np.asarray(self.venv.get_images()[0]))
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Pass on what came of it."""
        return self.venv.step_wait()


def play(model: BaseAlgorithm, env: VecEnv, deterministic: bool, seed: int = EVALUATION_SEED) -> Episode:
    """
    One episode, from its first state to its end as ``Monitor`` knows it.

    :param model: who plays
    :param env: one environment that renders RGB arrays
    :param deterministic: whether it takes its most probable actions
    :param seed: of the environment
    """
    camera = Camera(env)
    games = evaluate(model, camera, 1, deterministic, seed)
    return Episode(camera.frames, games.returns[0])


def write_gif(frames: list[np.ndarray], path: Path, caption: str, seconds_per_frame: float, width: int) -> None:
    """
    An endless loop with a caption below it.

    :param frames: ``[height, width, 3]`` each
    :param path: the file
    :param caption: one short line
    :param seconds_per_frame: at least 0.02, which browsers can do
    :param width: in pixels, of the picture
    """
    pictures = [_captioned(frame, caption, width) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 * seconds_per_frame)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=True)


def _captioned(frame: np.ndarray, caption: str, width: int) -> Image.Image:
    height = round(width * frame.shape[0] / frame.shape[1])
    picture = Image.new("RGB", (width, height + _CAPTION_HEIGHT), "white")
    picture.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    ImageDraw.Draw(picture).text((4, height + 2), caption, fill="black")
    return picture.quantize(32, dither=Image.Dither.NONE)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: ``None`` for this process's own
    """
    shared: dict[str, Any] = {"seed": 0, "results": RESULTS / "compare", "out": None}
    parser = command_line("benchmarks.episode", "an episode of a trained agent as a GIF", **shared)
    parser.add_argument("--entry", choices=PROTOCOL, required=True, help="of the comparison's protocol")
    parser.add_argument("--side", choices=SIDES, default="fast", help="who trained it (%(default)s)")
    parser.add_argument("--agent", type=Path, help="a file of your own, in place of the entry's agent of that side and seed")
    parser.add_argument("--game", type=number(int, 0), default=EVALUATION_SEED, help="seed of the environment (%(default)s)")
    parser.add_argument("--every", type=number(int, 1), default=1, help="show each so many-th step (%(default)s)")
    parser.add_argument("--start", type=number(int, 0), default=0, help="the first step to show (%(default)s)")
    parser.add_argument("--max-frames", type=number(int, 1), default=300, help="show at most so many frames (%(default)s)")
    parser.add_argument("--width", type=number(int, 16), default=240, help="in pixels (%(default)s)")
    options = parser.parse_args(arguments)
    if PROTOCOL[options.entry].task().normalize is not None:
        parser.error(f"--entry must be one without VecNormalize, whose statistics are not kept, not {options.entry}")
    return options


def load_agent(options: argparse.Namespace) -> tuple[ScratchPPO, dict[str, Any]]:
    """
    The agent of the command line, and what is known of it.

    :param options: see :func:`parse_options`
    :raises ValueError: if there is none, or if it is not the one that its record is about
    """
    where = (options.results, options.entry, options.side, options.seed)
    path = options.agent or model_path(*where)
    if not path.exists():
        raise ValueError(
            f"there is no {path}, for agents are not committed; train one by benchmarks.compare with an --out of yours, and "
            "give that as --results"
        )
    model = ScratchPPO.load(path)
    digest = weights_digest(model)
    if options.agent is not None:
        return model, {"file": path.name, "entry": options.entry, "timesteps": model.num_timesteps, "weights_sha256": digest}
    trained = json.loads(record_path(*where).read_text(encoding="utf-8"))
    if digest != trained["weights_sha256"]:
        raise ValueError(f"{path} is not the agent of {record_path(*where)}: their weights differ")
    return model, {key: trained[key] for key in ("entry", "side", "seed", "timesteps", "engine", "weights_sha256")}


def main() -> None:
    """Play the agent of the command line, and write the GIF."""
    options = parse_options()
    try:
        model, told = load_agent(options)
    except ValueError as error:
        sys.exit(f"episode: {error}")
    entry = PROTOCOL[options.entry]
    episode = play(model, evaluation_env(entry, 1, "rgb_array"), entry.deterministic, options.game)
    frames = episode.frames[options.start :: options.every][: options.max_frames]
    gif = (options.out or options.results) / f"{options.entry}.gif"
    whole = len(episode.frames) <= options.start + options.every * options.max_frames
    caption = f"{entry.env_id}, return {episode.score:g}{'' if whole else ' at the end'}"
    write_gif(frames, gif, caption, 0.04 if options.every > 1 else 0.06, options.width)
    record = {"agent": told, "game": options.game, "return": episode.score, "steps": len(episode.frames)}
    write_json(gif.with_suffix(".json"), {**provenance("benchmarks.episode"), **record})
    print(f"wrote {gif}: {len(frames)} of {len(episode.frames)} steps, return {episode.score:g}")


if __name__ == "__main__":
    main()
