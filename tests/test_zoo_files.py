"""What rl-zoo3 reads besides models runs nothing either: YAML files, statistics, and what is named in them."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3", reason="the zoo is optional: pip install 'sb3-ppo-from-scratch[zoo]'")

from sb3_ppo_from_scratch import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.archive import read_archive
from sb3_ppo_from_scratch.zoo.safe_yaml import ConfigLoader
from tests.test_safe_load import Calls, with_fields
from tests.test_zoo import CARTPOLE, zoo


def read(text: str) -> Any:
    return yaml.load(text, Loader=ConfigLoader)


HOSTILE: dict[str, str] = {
    "apply": "!!python/object/apply:os.mkdir ['{made}']",
    "apply in a list": "[1, {{a: !!python/object/apply:os.mkdir ['{made}']}}]",
    "apply with a mapping": "!!python/object/apply:os.mkdir {{args: ['{made}']}}",
    "new": "!!python/object/new:os.mkdir ['{made}']",
    "eval": "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{made}')\"]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_yaml_runs(text: str, tmp_path: Path) -> None:
    text = text.format(made=tmp_path / "made")
    with pytest.raises(UnsafeFileError, match="YAML file holds"):
        read(text)
    assert not (tmp_path / "made").exists()
    yaml.unsafe_load(text)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:os.system {}",
        "!!python/object/apply:torch.nn.modules.activation.ReLU []",
        "!!python/name:collections.deque",
    ],
)
def test_names_of_other_things(text: str) -> None:
    with pytest.raises(UnsafeFileError, match="YAML file holds"):
        read(text)


@pytest.mark.parametrize(
    "data",
    [
        OrderedDict([("env", "CartPole-v1"), ("env_kwargs", None), ("n_envs", 8), ("learning_rate", 1e-3)]),
        {"policy_kwargs": {"net_arch": (64, 64)}, "normalize": {"gamma": 0.99}},
        {"gamma": np.float64(0.99), "n": np.int64(3), "array": np.arange(3)},
    ],
)
def test_what_the_zoo_writes_is_read_as_it_was(data: Any) -> None:
    text = yaml.dump(data, sort_keys=False)
    ours = read(text)
    assert repr(ours) == repr(yaml.unsafe_load(text)) == repr(data)
    assert type(ours) is type(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'norm_obs': True, 'norm_reward': False}", {"norm_obs": True, "norm_reward": False}),
        ("dict(norm_obs=True, clip_obs=5.0)", {"norm_obs": True, "clip_obs": 5.0}),
        ("True", True),
    ],
)
def test_normalize_is_not_evaluated(text: str, value: Any, tmp_path: Path) -> None:
    assert read(yaml.dump({"normalize": text})) == {"normalize": value}
    for hostile in (f"__import__('os').mkdir({str(tmp_path / 'made')!r})", "dict(a=print())", "dict(**x)", "("):
        with pytest.raises(UnsafeFileError, match="normalize is"):
            read(yaml.dump({"normalize": hostile}))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("key", ["env_wrapper", "vec_env_wrapper", "callback"])
def test_wrappers_are_wrappers(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_yaml.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    sound = ["gymnasium.wrappers.FlattenObservation", {"stable_baselines3.common.vec_env.VecFrameStack": {"n_stack": 2}}]
    assert read(yaml.dump({key: sound})) == {key: sound}
    assert read(f"{key}: null") == {key: None}
    for hostile in (
        "imported_by_yaml.Wrapper",
        "os.system",
        {"timeit.timeit": {"setup": "1"}},
        "gymnasium.make",
        ["os.mkdir"],
    ):
        with pytest.raises(UnsafeFileError, match=rf"{key} names"):
            read(yaml.dump({key: hostile}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with VecNormalize."""
    logs = tmp_path_factory.mktemp("zoo") / "logs"
    options = ("-n", 64, "-f", logs, "--eval-freq", -1, "-params", "n_envs:1", "n_steps:64", "normalize:True")
    zoo("train", *CARTPOLE, *options, cwd=logs.parent)
    return logs / "scratch_ppo" / "CartPole-v1_1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "file"),
    [
        ("enjoy", "CartPole-v1.zip"),
        ("enjoy", "CartPole-v1/vecnormalize.pkl"),
        ("enjoy", "CartPole-v1/config.yml"),
        ("train", "CartPole-v1.zip"),
        ("train", "CartPole-v1/vecnormalize.pkl"),
    ],
)
def test_a_hostile_run_needs_the_flag(script: str, file: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "scratch_ppo" / "CartPole-v1_1"
    shutil.copytree(run, folder)
    made = tmp_path / "made"
    payload = pickle.dumps(Calls(os.mkdir, str(made)))
    if file.endswith("zip"):
        (folder / file).write_bytes(with_fields(read_archive(folder / file), start_time=payload).getvalue())
    elif file.endswith("pkl"):
        (folder / file).write_bytes(payload)
    else:
        (folder / file).write_text(HOSTILE["apply"].format(made=made))
    more = (
        ("-i", folder / "CartPole-v1.zip", "-params", "n_envs:1", "normalize:True") if script == "train" else ("--no-render",)
    )
    arguments = (script, *CARTPOLE, "-f", tmp_path / "logs", "-n", 64, *more)
    printed = zoo(*arguments, cwd=tmp_path, status=1)
    (said,) = (line for line in printed.splitlines() if line.startswith(f"scratch-zoo {script}: "))
    assert "--allow-pickle" in said
    assert not made.exists()
    trusted = file.endswith("zip")  # the other two are no longer what the zoo needs
    zoo(*arguments, "--allow-pickle", cwd=tmp_path, status=0 if trusted else 1)
    assert made.exists()
