"""
A trained agent at play, as a GIF: an episode of an agent that :mod:`benchmarks.compare` left behind.

The pictures in the README come from the first two lines, with the agents that their runs had left beside the records. Agents
are not committed; the last two train one anew and show it::

    python -m benchmarks.episode --entry CartPole-v1 --every 2
    python -m benchmarks.episode --entry Breakout-500k

    python -m benchmarks.compare --only CartPole-v1 --side fast --seeds 1 --out runs/compare
    python -m benchmarks.episode --entry CartPole-v1 --every 2 --results runs/compare

Beside the GIF stands a JSON file with the agent's weights' checksum, which the record of its training names too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
from PIL import Image, ImageDraw
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.comparison.one_run import evaluation_env, weights_digest
from benchmarks.comparison.protocol import PROTOCOL, SIDES
from benchmarks.comparison.records import model_path, record_path
from benchmarks.evaluation import EVALUATION_SEED
from benchmarks.options import number
from benchmarks.record import RESULTS, provenance, write_json
from sb3_ppo_from_scratch import ScratchPPO

__all__ = ["Episode", "main", "play", "write_gif"]

_CAPTION_HEIGHT = 16


class Episode(NamedTuple):
    """What happened in an episode."""

    frames: list[np.ndarray]
    """``[height, width, 3]``, one per step"""
    score: float
    """return of the whole episode; on Atari of the game with its raw rewards"""


def play(model: BaseAlgorithm, env: VecEnv, deterministic: bool) -> Episode:
    """
    One episode, from its first state to its end as ``Monitor`` knows it.

    :param model: who plays
    :param env: one environment that renders RGB arrays
    :param deterministic: whether it takes its most probable actions
    """
    env.seed(EVALUATION_SEED)
    th.manual_seed(EVALUATION_SEED)
    observation, frames = env.reset(), []
    while True:
        frames.append(np.asarray(env.get_images()[0]))
        action, _ = model.predict(observation, deterministic=deterministic)  # type: ignore[arg-type]  # no tuple
        observation, _, _, infos = env.step(action)
        if "episode" in infos[0]:
            return Episode(frames, float(infos[0]["episode"]["r"]))


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


def main() -> None:
    """Play the agent of the command line, and write the GIF."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.episode", description="an episode of a trained agent as a GIF")
    parser.add_argument("--entry", choices=PROTOCOL, required=True, help="of the comparison's protocol")
    parser.add_argument("--side", choices=SIDES, default="fast", help="who trained it (%(default)s)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of its training (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "compare", help="benchmarks.compare's --out (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the GIF (that of the records)")
    parser.add_argument("--every", type=number(int, 1), default=1, help="show each so many-th step (%(default)s)")
    parser.add_argument("--max-frames", type=number(int, 1), default=300, help="show at most so many frames (%(default)s)")
    parser.add_argument("--width", type=number(int, 16), default=240, help="in pixels (%(default)s)")
    options = parser.parse_args()
    entry, where = PROTOCOL[options.entry], (options.results, options.entry, options.side, options.seed)
    if entry.task().normalize is not None:
        parser.error(f"--entry must be one without VecNormalize, whose statistics are not kept, not {options.entry}")
    if not model_path(*where).exists():
        sys.exit(
            f"episode: there is no {model_path(*where)}, for agents are not committed; train one by benchmarks.compare with "
            "an --out of yours, and give that as --results"
        )
    trained, model = json.loads(record_path(*where).read_text(encoding="utf-8")), ScratchPPO.load(model_path(*where))
    if weights_digest(model) != trained["weights_sha256"]:
        sys.exit(f"episode: {model_path(*where)} is not the agent of {record_path(*where)}: their weights differ")
    episode = play(model, evaluation_env(entry, 1, "rgb_array"), entry.deterministic)
    frames = episode.frames[:: options.every][: options.max_frames]
    gif = (options.out or options.results) / f"{options.entry}.gif"
    whole = len(episode.frames) <= options.every * options.max_frames
    caption = f"{entry.env_id}, return {episode.score:g}{'' if whole else ' at the end'}"
    write_gif(frames, gif, caption, 0.04 if options.every > 1 else 0.06, options.width)
    told = {key: trained[key] for key in ("entry", "side", "seed", "timesteps", "engine", "weights_sha256")}
    write_json(
        gif.with_suffix(".json"),
        {**provenance("benchmarks.episode"), "agent": told, "return": episode.score, "steps": len(episode.frames)},
    )
    print(f"wrote {gif}: {len(frames)} of {len(episode.frames)} steps, return {episode.score:g}")


if __name__ == "__main__":
    main()
