"""What rl-zoo3 reads besides models runs nothing either: YAML files, statistics, and what is named in them."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3", reason="the zoo is optional: pip install 'sb3-ppo-from-scratch[zoo]'")

from rl_zoo3 import exp_manager, utils

from sb3_ppo_from_scratch import UnsafeFileError
from sb3_ppo_from_scratch.safe_files.archive import read_archive
from sb3_ppo_from_scratch.zoo.safe_yaml import ConfigLoader, evaluate
from tests.test_safe_load import Calls, with_fields
from tests.test_zoo import CARTPOLE, python, zoo


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
        for nested in (hostile, repr(hostile), repr(repr(hostile))):
            with pytest.raises(UnsafeFileError, match="a hyperparameter is"):
                read(yaml.dump({"normalize": nested}))
    assert not (tmp_path / "made").exists()


def test_hyperparameters_of_the_zoo_are_parsed_as_they_would_be_evaluated() -> None:
    texts = {
        text
        for file in (Path(utils.__file__).parent / "hyperparams").glob("*.yml")
        for run in yaml.safe_load(file.read_text()).values()
        for key, text in run.items()
        if key in ("normalize", "policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs") and isinstance(text, str)
    }
    assert len(texts) > 20
    for text in texts:
        assert evaluate(text) == eval(text, vars(exp_manager) | {"eval": None}), text


EVALUATED = ("normalize", "policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "learning_rate")
NO_DATA = (
    "print()",
    "'print()'",
    "dict(a=print())",
    "{'a': print}",
    "nn.Module",
    "nn.modules.torch.os",
    "[].__class__",
    "0 .real",
)


@pytest.mark.parametrize("field", EVALUATED)
def test_no_file_reaches_eval(field: str, tmp_path: Path) -> None:
    """Python's own ``eval`` ends the process here; the zoo reads the field from a run's file, then from hyperparameters."""
    check = f"""
import builtins, pathlib, sys, yaml
from sb3_ppo_from_scratch.zoo.safe_yaml import read_safely
from rl_zoo3 import exp_manager, utils
read_safely()
builtins.eval = lambda *args: sys.exit("evaluated")
for text in {NO_DATA!r}:
    pathlib.Path("config.yml").write_text(yaml.dump({{{field!r}: text}}))
    hyperparams = {{{field!r}: text, "n_timesteps": 1}}
    manager = object.__new__(exp_manager.ExperimentManager)
    manager.verbose, manager.n_timesteps, manager.optimize_hyperparameters, manager.n_evaluations = 0, 0, False, 1
    for read in (lambda: utils.get_saved_hyperparams("."), lambda: manager._preprocess_hyperparams(hyperparams)):
        try:
            read()
        except ValueError:
            pass
print("none")
"""
    assert python("-c", check, cwd=tmp_path).splitlines()[-1] == "none"


@pytest.mark.parametrize("key", ["env_wrapper", "vec_env_wrapper", "callback", "policy"])
def test_wrappers_are_wrappers(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_yaml.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert read(f"{key}: null") == {key: None}
    for hostile in (
        "imported_by_yaml.Wrapper",
        "os.system",
        {"timeit.timeit": {"setup": "1"}},
        "gymnasium.make",
        ["os.mkdir"],
        "rl_zoo3.benchmark.X",
        "rl_zoo3.exp_manager.VecNormalize",
        "stable_baselines3.common.vec_env.CloudpickleWrapper",
        {"os.path.join": {}},
    ):
        with pytest.raises(UnsafeFileError, match=rf"{key} names"):
            read(yaml.dump({key: hostile}))
    assert "rl_zoo3.benchmark" not in sys.modules


def test_sound_wrappers_are_read_as_they_are() -> None:
    sound = {
        "policy": "MlpPolicy",
        "env_wrapper": ["gymnasium.wrappers.FlattenObservation", {"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 2}}],
        "vec_env_wrapper": {"stable_baselines3.common.vec_env.VecFrameStack": {"n_stack": 2, "channels_order": "last"}},
        "callback": ["stable_baselines3.common.callbacks.StopTrainingOnNoModelImprovement"],
    }
    assert read(yaml.dump(sound)) == sound


@pytest.mark.parametrize(
    ("key", "name", "arguments"),
    [
        ("env_wrapper", "stable_baselines3.common.monitor.Monitor", {"filename": "x"}),
        ("env_wrapper", "stable_baselines3.common.monitor.Monitor", {"info_keywords": ["x"]}),
        ("env_wrapper", "gymnasium.wrappers.RecordVideo", {"video_folder": "x"}),
        ("vec_env_wrapper", "stable_baselines3.common.vec_env.VecMonitor", {"filename": "x"}),
        ("vec_env_wrapper", "stable_baselines3.common.vec_env.VecVideoRecorder", {"video_folder": "x"}),
        ("vec_env_wrapper", "stable_baselines3.common.vec_env.VecFrameStack", {"n_stack": 10**9}),
        ("callback", "stable_baselines3.common.callbacks.CheckpointCallback", {"save_freq": 1, "save_path": "x"}),
        ("env_wrapper", "rl_zoo3.wrappers.HistoryWrapper", {"horizon": {"a": 1}}),
    ],
)
def test_a_file_does_not_choose_where_we_write(key: str, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsafeFileError, match=f"{key} gives {name} the argument"):
        read(yaml.dump({key: [{name: arguments}]}))
    path = f"{key}: [{{{name}: {{filename: !!python/object/apply:pathlib.PosixPath [x]}}}}]"
    with pytest.raises(UnsafeFileError, match=f"{key} gives"):
        read(path)


EXHAUSTING = {
    "anchors": "a: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "many anchors": "".join(f"a{n}: &a{n} x\n" for n in range(10**5)),
    "base 60": "a: 1" + ":1" * 20_000,
    "digits": "a: " + "9" * 20_000,
    "hexadecimal": "a: 0x" + "f" * 20_000,
    "digits of a fraction": "a: 1" + ":1" * 20_000 + ".5",
    "depth": "a: " + "[" * 5000,
    "depth closed": "a: " + "[" * 100 + "]" * 100,
    "recursion": "&a {a: [*a]}",
    "recursive key": "? &a [*a]\n: 1",
    "merges": "a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 9000) + "]}",
    "values": "a: [" + "1," * 20_000 + "]",
    "frames": "frame_stack: 1000000000",
    "evaluated": "normalize: " + repr("(" * 1500),
    "evaluated unary": "normalize: " + repr("-" * 1500 + "1"),
}


@pytest.mark.parametrize("text", EXHAUSTING.values(), ids=EXHAUSTING.keys())
def test_no_yaml_exhausts(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(text)
    begin = resource.getrusage(resource.RUSAGE_SELF)
    with file.open() as opened, pytest.raises(ValueError, match=r"config\.yml|a hyperparameter is"):
        yaml.load(opened, Loader=ConfigLoader)
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert used.ru_maxrss - begin.ru_maxrss < 200 * 1024  # KiB; 10^5 anchors alone are more than that, once read


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"null",
            b"[1]",
            b"x",
            b"1: 2",
            b"a: 1\n---\nb: 2",
            b"? [a]\n: 1",
            b"? {a: 1}\n: 1",
            b"a: 2001-99-99",
            b"a: *b",
        ),
        *(
            b"a: !!int x",
            b"a: !!float [1]",
            b"\xff\xfe",
            b"\x00",
            b"a: \x07",
            b"a: !!omap 1",
            b"a: !!set [1]",
        ),
        *(
            b"normalize: [1]",
            b"frame_stack: x",
            b"frame_stack: null",
            b"frame_stack: 1.5",
            b"frame_stack: true",
            b"n_envs: -1",
        ),
        *(
            b"env_kwargs: [1]",
            b"env_kwargs: x",
            b"env_wrapper: [{a.b: 1}]",
            b"env_wrapper: {a.B: 1, c.D: 2}",
            b"env_wrapper: 1",
        ),
        *(b"policy: [a.b]", b"!!python/tuple {a: 1}", b"!!python/object/apply:numpy.dtype {args: 1}", b"<<: 1", b"<<: [1]"),
        *(
            b"env_wrapper: [{rl_zoo3.wrappers.FrameSkip: }]",
            b"env_wrapper: [{rl_zoo3.wrappers.FrameSkip: {skip: 1.5}}]",
            b"env_wrapper: [{rl_zoo3.wrappers.FrameSkip: {skip: true}}]",
            b"env_wrapper: [{rl_zoo3.wrappers.FrameSkip: {jump: 2}}]",
            b"env_wrapper: [{stable_baselines3.common.atari_wrappers.AtariWrapper: {clip_reward: 3}}]",
            b"%YAML 9.9\n---\na: 1",
            b"%TAG ! x:\n---\n!y a",
            b"@a",
            b"a: |9\n x",
        ),
    ],
)
def test_whatever_a_file_holds_there_is_one_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yml|names|gives|YAML file|must give"), file.open() as opened:
        yaml.load(opened, Loader=ConfigLoader)


@pytest.mark.parametrize(
    "content", [b"a: 1", b"env: [1]\nenv_kwargs: null", b"env: os:CartPole-v1", b"env: --help", b"env: x\nenv_kwargs: 1"]
)
def test_arguments_of_a_run_are_checked_too(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "args.yml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"args\.yml"), file.open() as opened:
        yaml.load(opened, Loader=ConfigLoader)


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
