"""rl-zoo3 with ``--algo scratch_ppo``: the real command line, started as a process."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_ppo_from_scratch.zoo import SCRIPTS, hyperparams_file
from tests.runs import rows

pytest.importorskip("rl_zoo3", reason="the zoo is optional: pip install 'sb3-ppo-from-scratch[zoo]'")

ROOT = Path(__file__).resolve().parents[1]
CARTPOLE = ("--algo", "scratch_ppo", "--env", "CartPole-v1")
BREAKOUT = ("--algo", "scratch_ppo", "--env", "BreakoutNoFrameskip-v4")
ENGINE = ("-params", "engine:'torch'")


def python(*arguments, cwd, status=0, path=(), **environment):
    """Start Python, and return what it printed. It finds the package and ``path``, and no display."""
    inherited = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    search = os.pathsep.join(map(str, [*path, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]))
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": search, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == status, result.stdout
    return result.stdout


def zoo(*arguments, **kwargs):
    return python("-m", "sb3_ppo_from_scratch.zoo", *arguments, **kwargs)


def frames(video):
    """The frames of a video as bytes, decoded to the last."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = imageio_ffmpeg.read_frames(str(video))
    next(reader)  # the description
    return list(reader)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The zoo's log folder, with a run on CartPole-v1 in it."""
    folder = tmp_path_factory.mktemp("zoo") / "logs"
    zoo("train", *CARTPOLE, "--n-timesteps", 20000, "--seed", 1, "-f", folder, "--save-freq", 20000, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def normalized(logs):
    """The folder of a run with VecNormalize, in processes of its own, with everything that ``train`` can write."""
    options = ("--save-freq", 128, "--eval-freq", 128, "--eval-episodes", 1, "--vec-env", "subproc", "--progress", "-tb", "tb")
    printed = zoo("train", *CARTPOLE, "-n", 256, "-f", logs / "vec", *options, *ENGINE, "n_envs:2", "normalize:True", cwd=logs)
    assert "Using the engine torch" in printed
    return logs / "vec" / "scratch_ppo" / "CartPole-v1_1"


@pytest.fixture(scope="module")
def breakout(logs):
    """The folder of a short run on Breakout."""
    pytest.importorskip("ale_py")
    zoo("train", *BREAKOUT, "-n", 4096, "-f", logs, cwd=logs)
    return logs / "scratch_ppo" / "BreakoutNoFrameskip-v4_1"


@pytest.fixture
def ffmpeg_path(tmp_path):
    """A PATH with ffmpeg and python in it, which the zoo calls by these names."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "ffmpeg").symlink_to(shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe())
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


# ---------------------------------------------------- registration and arguments


def test_importing_the_package_leaves_the_zoo_alone(tmp_path):
    check = "import sys, sb3_ppo_from_scratch, sb3_ppo_from_scratch.zoo; assert 'rl_zoo3' not in sys.modules"
    python("-c", check, cwd=tmp_path)


def test_register_adds_to_the_shared_tables_and_touches_nothing_else(tmp_path):
    check = """
from rl_zoo3 import ALGOS, exp_manager, hyperparams_opt, train
from sb3_ppo_from_scratch import ScratchPPO, zoo

tables = (ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER)
before = [dict(table) for table in tables]
zoo.register()
zoo.register()
ours = [table.pop("scratch_ppo") for table in tables]
assert ours == [ScratchPPO, zoo.sample_params, tables[2]["ppo"]]
assert [dict(table) for table in tables] == before
assert train.ALGOS is exp_manager.ALGOS is ALGOS
assert exp_manager.HYPERPARAMS_SAMPLER is tables[1]
"""
    python("-c", check, cwd=tmp_path)


def test_help_lists_every_script(tmp_path):
    printed = zoo("--help", cwd=tmp_path)
    assert list(SCRIPTS) == [line.split()[0] for line in printed.split("scripts:\n")[1].splitlines()]


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train", "--algo", "scratchppo"], ["enjoy", "--algo=scratch-ppo"]],
)
def test_an_unknown_script_or_algorithm_gets_one_line_and_status_2(arguments, tmp_path):
    printed = zoo(*arguments, cwd=tmp_path, status=2)
    assert printed.count("\n") == 1
    assert arguments[-1].split("=")[-1] in printed


def test_there_are_hyperparameters_for_every_environment_of_the_zoo():
    folder = Path(importlib.util.find_spec("rl_zoo3").origin).parent / "hyperparams"
    theirs, of_lstms = (yaml.safe_load((folder / name).read_text()) for name in ("ppo.yml", "ppo_lstm.yml"))
    text = hyperparams_file().read_text()
    ours = yaml.safe_load(text)
    # the zoo registers version 3 of its lander, and has hyperparameters for version 2; RecurrentPPO's batch_size is 128
    without_velocities = {
        name.replace("-v2", "-v3"): {"batch_size": 128, **entry} for name, entry in of_lstms.items() if "NoVel" in name
    }
    assert len(without_velocities) == 6
    theirs |= without_velocities
    assert set(ours) >= set(theirs)
    if f"rl_zoo3 {version('rl_zoo3')}," in text:
        for entry in (*ours.values(), *theirs.values()):
            entry |= {"policy_kwargs": "".join(entry.get("policy_kwargs", "").split())}
        assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("given", [(), ("-conf", "mine.yml"), ("--conf-file=mine.yml",)])
def test_our_hyperparameters_are_used_unless_others_are_given(given, tmp_path):
    (tmp_path / "mine.yml").write_text("CartPole-v1: {n_timesteps: 64, policy: MlpPolicy, n_steps: 64}")
    printed = python("-m", "sb3_ppo_from_scratch.train", *CARTPOLE, *given, "-n", 64, "--eval-freq", -1, cwd=tmp_path)
    assert f"Loading hyperparameters from: {'mine.yml' if given else hyperparams_file()}\n" in printed
    assert (tmp_path / "logs" / "scratch_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()


# ------------------------------------------------------------- train and enjoy


def test_a_trained_agent_is_enjoyed(logs):
    printed = zoo("enjoy", *CARTPOLE, "-f", logs, "--no-render", "-n", 1000, cwd=logs)
    mean = float(printed.split("Mean reward: ")[1].split()[0])
    assert mean > 100  # an untrained agent gets about 9


def saved(folder, algo, env):
    path = folder / algo / f"{env}_1"
    parameters = load_from_zip_file(path / f"{env}.zip")[1]
    statistics = path / env / "vecnormalize.pkl"
    return parameters, statistics.read_bytes() if statistics.exists() else b""


@pytest.mark.parametrize(
    ("env", "n_steps"),
    [("CartPole-v1", 32), ("Pendulum-v1", 256), ("MountainCar-v0", 16)],
    ids=["plain", "gSDE", "VecNormalize"],
)
def test_the_zoos_ppo_and_ours_end_with_identical_parameters(env, n_steps, tmp_path):
    options = ("--env", env, "-n", 2048, "--seed", 3, "-f", tmp_path, "--eval-freq", -1, "-params", f"n_steps:{n_steps}")
    zoo("train", "--algo", "ppo", *options, cwd=tmp_path)
    zoo("train", "--algo", "scratch_ppo", *options, ENGINE[1], cwd=tmp_path)
    (theirs, their_statistics), (ours, our_statistics) = (saved(tmp_path, algo, env) for algo in ("ppo", "scratch_ppo"))
    assert list(ours["policy"]) == list(theirs["policy"])
    for name, parameter in theirs["policy"].items():
        assert np.array_equal(ours["policy"][name], parameter), name
    assert ours["policy.optimizer"]["param_groups"] == theirs["policy.optimizer"]["param_groups"]
    assert our_statistics == their_statistics
    assert bool(our_statistics) == (env == "MountainCar-v0")


def test_a_policy_with_a_memory_trains_and_is_watched(tmp_path):
    """Its entry names the policy; a saved model goes on, ``enjoy`` hands its state from step to step."""
    pendulum = ("--algo", "scratch_ppo", "--env", "PendulumNoVel-v1")
    small = ("-params", "n_steps:32", "n_epochs:1", "--eval-freq", -1)
    printed = zoo("train", *pendulum, "-n", 128, "-f", "logs", *small, cwd=tmp_path)
    assert "MlpLstmPolicy" in printed
    assert "Using the engine lstm" in printed
    model = tmp_path / "logs" / "scratch_ppo" / "PendulumNoVel-v1_1" / "PendulumNoVel-v1.zip"
    printed = zoo("train", *pendulum, "-n", 128, "-f", "more", "-i", model, *small, cwd=tmp_path)
    assert "Loading pretrained agent" in printed
    printed = zoo("enjoy", *pendulum, "-f", "more", "--no-render", "-n", 210, cwd=tmp_path)
    assert "Episode Reward" in printed


def test_training_writes_checkpoints_evaluations_statistics_and_tensorboard(normalized):
    written = {str(path.relative_to(normalized)) for path in normalized.rglob("*.*")}
    assert {"CartPole-v1.zip", "rl_model_128_steps.zip", "rl_model_256_steps.zip", "best_model.zip"} <= written
    assert {"evaluations.npz", "CartPole-v1/vecnormalize.pkl", "0.monitor.csv", "1.monitor.csv"} <= written
    assert list((normalized.parents[2] / "tb").rglob("CartPole-v1/ScratchPPO_1/events*"))
    config = yaml.unsafe_load((normalized / "CartPole-v1" / "config.yml").read_text())
    assert (config["engine"], config["normalize"], config["n_epochs"]) == ("torch", True, 20)


def test_an_environment_that_cannot_be_made_in_its_process_ends_the_run(tmp_path):
    """SB3's SubprocVecEnv would wait for it for ever."""
    options = ("-n", 64, "-f", tmp_path, "--vec-env", "subproc", "--env-kwargs", "sizes:3", "-params", "n_envs:2")
    printed = zoo("train", *CARTPOLE, *options, cwd=tmp_path, status=1)
    assert "failed: its process ended" in printed
    assert "unexpected keyword argument 'sizes'" in printed


def test_training_resumes_with_its_statistics(normalized):
    model = normalized / "CartPole-v1.zip"
    hyperparams = (*ENGINE, "n_envs:2", "normalize:True", "n_epochs:3")
    printed = zoo("train", *CARTPOLE, "-n", 64, "-f", normalized / "more", "-i", model, *hyperparams, cwd=normalized)
    assert "Loading pretrained agent" in printed
    assert "Loading saved VecNormalize stats" in printed
    data, parameters, _ = load_from_zip_file(normalized / "more" / "scratch_ppo" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert data["n_epochs"] == 3
    updates = load_from_zip_file(model)[1]["policy.optimizer"]["state"][0]["step"]
    assert parameters["policy.optimizer"]["state"][0]["step"] == updates + 3


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_its_folder_with_the_same_bits(tmp_path):
    hyperparams = (*ENGINE, "n_envs:2", "normalize:True", "n_epochs:2")
    often = ("--eval-freq", 200, "--eval-episodes", 1, "--checkpoint-freq", 1)
    options = ("-n", 512, "--seed", 3, *often, "-tb", "tb", *hyperparams)
    for folder in ("whole", "cut"):
        zoo("train", *CARTPOLE, "-f", folder, *options, cwd=tmp_path)
    whole, cut = (tmp_path / folder / "scratch_ppo" / "CartPole-v1_1" for folder in ("whole", "cut"))
    before, last = sorted((cut / "checkpoints").glob("*.ckpt"))
    assert before.name.split("-")[1] == "448"
    last.unlink()
    for name in ("CartPole-v1.zip", "CartPole-v1/vecnormalize.pkl"):
        (cut / name).unlink()

    zoo("train", *CARTPOLE, "-f", "cut", *options, "--resume", cut, cwd=tmp_path)
    assert [path.name for path in cut.parent.iterdir()] == ["CartPole-v1_1"]
    parameters, others = (load_from_zip_file(path / "CartPole-v1.zip")[1]["policy"] for path in (cut, whole))
    assert all(np.array_equal(parameters[name], others[name]) for name in others)
    normalizations = [pickle.loads((path / "CartPole-v1" / "vecnormalize.pkl").read_bytes()) for path in (cut, whole)]
    assert len({(each.obs_rms.mean.tobytes(), each.ret_rms.var.tobytes()) for each in normalizations}) == 1
    assert rows(cut) == rows(whole)
    assert len(rows(whole)["0.monitor.csv"]) > 1
    with np.load(cut / "evaluations.npz") as ours, np.load(whole / "evaluations.npz") as theirs:
        assert ours["timesteps"].tolist() == theirs["timesteps"].tolist() == [200, 400]
        assert ours["results"].tolist() == theirs["results"].tolist()


def test_a_resumed_run_keeps_what_it_was_begun_with(tmp_path):
    options = ("-f", "logs", "--eval-freq", -1, "--checkpoint-freq", 1)
    zoo("train", *CARTPOLE, *options, "-n", 128, "--seed", 3, *ENGINE, "n_envs:2", "n_steps:32", cwd=tmp_path)
    run = tmp_path / "logs" / "scratch_ppo" / "CartPole-v1_1"
    files = [run / "CartPole-v1" / name for name in ("config.yml", "args.yml", "command.txt")]
    before = [file.read_text() for file in files]
    for other, name in (
        (("-n", 256), "-n must be 128, as --resume"),
        (("--seed", 4), "--seed must be 3, as --resume"),
        (("-params", "n_envs:2"), "-params must be {'engine': 'torch', 'n_envs': 2, 'n_steps': 32}, as --resume"),
        (("-conf", "other.yml"), "gamma must be 0.98, as --resume"),
    ):
        text = hyperparams_file().read_text().replace("gamma: 0.98", "gamma: 0.9")
        (tmp_path / "other.yml").write_text(text)
        assert name in zoo("train", *CARTPOLE, *options, "--resume", run, *other, cwd=tmp_path, status=1)
    printed = zoo("train", *CARTPOLE, *options, "--resume", run, cwd=tmp_path)  # whatever is left out is the run's
    assert "finished" in printed
    assert "Overwriting" not in printed
    assert [file.read_text() for file in files] == before


def test_help_of_train_lists_our_options(tmp_path):
    printed = zoo("train", "--help", cwd=tmp_path)
    assert all(option in printed for option in ("--checkpoint-freq", "--resume", "{dummy,subproc,native,envpool}"))


def test_what_cannot_be_resumed_is_refused(tmp_path):
    printed = zoo("train", *CARTPOLE, "-f", "logs", "--resume", "nowhere", cwd=tmp_path, status=1)
    assert "--resume nowhere: no checkpoints in nowhere/checkpoints" in printed
    printed = zoo("train", "--algo", "ppo", "--env", "CartPole-v1", "--checkpoint-freq", 0, cwd=tmp_path, status=1)
    assert "--resume and --checkpoint-freq are for --algo scratch_ppo, not ppo" in printed


def test_a_checkpoint_is_enjoyed_with_its_statistics(normalized):
    # 600 steps: an episode of CartPole takes at most 500
    options = ("-f", normalized.parents[1], "--load-checkpoint", 128, "--no-render", "-n", 600)
    printed = zoo("enjoy", *CARTPOLE, *options, cwd=normalized)
    assert "Loading running average" in printed
    assert "Mean reward" in printed


@pytest.mark.slow
def test_a_full_run_on_cartpole_reaches_the_highest_score_in_the_zoos_benchmark(tmp_path):
    zoo("train", *CARTPOLE, "--seed", 1, "-f", tmp_path, "--eval-freq", -1, *ENGINE, cwd=tmp_path)
    options = ("--log-dir", tmp_path, "--benchmark-dir", tmp_path / "benchmark", "-n", 10000, "--no-hub")
    zoo("benchmark", *options, "--num-threads", 1, cwd=tmp_path)
    table = [line.replace(" ", "") for line in (tmp_path / "benchmark.md").read_text().splitlines()]
    assert "|scratch_ppo|CartPole-v1|500|0|100k|10000|20|" in table


@pytest.mark.slow
def test_breakout_is_trained_and_enjoyed(breakout):
    printed = zoo("enjoy", *BREAKOUT, "-f", breakout.parents[1], "--no-render", "-n", 300, cwd=breakout)
    assert "Stacking 4 frames" in printed
    assert "Atari Episode Score" in printed


# ------------------------------------------------------------- native environments


def test_native_cartpole_is_trained_resumed_and_enjoyed(tmp_path):
    native = ("--vec-env", "native", "--seed", 1, "-f", "logs")
    options = ("--eval-freq", 512, "--eval-episodes", 2, "--save-freq", 512)
    printed = zoo("train", *CARTPOLE, *native, *options, "-n", 1024, *ENGINE, "normalize:True", "n_envs:4", cwd=tmp_path)
    assert "Eval num_timesteps=1024" in printed
    run = tmp_path / "logs" / "scratch_ppo" / "CartPole-v1_1"
    statistics = run / "CartPole-v1" / "vecnormalize.pkl"
    assert b"sb3_ppo_from_scratch" not in statistics.read_bytes()
    episodes = (run / "0.monitor.csv").read_text().splitlines()[2:]
    n_steps = sum(int(episode.split(",")[1]) for episode in episodes)
    assert n_steps <= 1024 - (len(episodes) - 4)  # a reset, of which each but an environment's last has been, is no step
    assert yaml.unsafe_load((run / "CartPole-v1" / "args.yml").read_text())["vec_env"] == "native"
    printed = zoo("train", *CARTPOLE, *native, "-n", 256, "--eval-freq", -1, "-i", run / "CartPole-v1.zip", cwd=tmp_path)
    assert "Loading saved VecNormalize stats" in printed
    printed = zoo("enjoy", *CARTPOLE, "-f", "logs", "--exp-id", 1, "--no-render", "-n", 600, cwd=tmp_path)
    assert "Loading running average" in printed
    assert "Mean reward" in printed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "envpool"])
def test_native_breakout_is_trained_and_enjoyed(kind, tmp_path):
    pytest.importorskip("ale_py" if kind == "native" else "envpool")
    options = ("--vec-env", kind, "-n", 256, "-f", "logs", "--eval-freq", 256, "--eval-episodes", 1)
    printed = zoo("train", *BREAKOUT, *options, "-params", "n_epochs:1", "n_steps:32", cwd=tmp_path)
    assert "Eval num_timesteps=256" in printed
    run = tmp_path / "logs" / "scratch_ppo" / "BreakoutNoFrameskip-v4_1"
    assert load_from_zip_file(run / "BreakoutNoFrameskip-v4.zip")[0]["observation_space"].shape == (4, 84, 84)
    printed = zoo("enjoy", *BREAKOUT, "-f", "logs", "--no-render", "-n", 400, cwd=tmp_path)
    assert "Stacking 4 frames" in printed
    assert "Atari Episode Score" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env", "Pendulum-v1", "--vec-env", "native"), "no native vector environment for Pendulum-v1"),
        (("--env", "CartPole-v1", "--vec-env", "envpool"), "--vec-env envpool is for Atari games, not CartPole-v1"),
        (("--env", "CartPole-v1", "--vec-env", "native", "--algo", "ppo"), "is for --algo scratch_ppo, not ppo"),
        (
            ("--env", "CartPole-v1", "--vec-env", "native", "-params", "env_wrapper:'rl_zoo3.wrappers.TimeFeatureWrapper'"),
            "takes no env_wrapper, not",
        ),
    ],
)
def test_what_a_native_environment_cannot_serve_is_an_error(arguments, message, tmp_path):
    assert message in zoo("train", "--algo", "scratch_ppo", *arguments, "-n", 64, cwd=tmp_path, status=1)


# ------------------------------------------------------------- search for hyperparameters


@pytest.mark.slow
def test_optimize_finishes_and_its_trials_can_be_trained(tmp_path):
    storage = ("--storage", "sqlite:///studies.db", "--study-name", "cartpole")
    options = ("-n", 256, "--seed", 7, "-f", "logs", "--eval-episodes", 1)
    search = ("-optimize", "--n-trials", 3, "--pruner", "none", "--no-optim-plots")
    printed = zoo("train", *CARTPOLE, *search, *storage, *options, "-params", "n_envs:1", cwd=tmp_path)
    assert "Number of finished trials:  3" in printed
    (report,) = (tmp_path / "logs" / "scratch_ppo").glob("report_CartPole-v1_3-trials-256-tpe-none_*.csv")
    header, *trials = report.read_text().splitlines()
    assert len(trials) == 3
    assert {"params_vf_coef", "params_target_kl", "params_normalize_advantage"} <= set(header.split(","))
    trial = trials[1].split(",")
    assert trial[-1] == "COMPLETE"

    printed = zoo("train", *CARTPOLE, *storage, *options, "--trial-id", 1, "-params", "n_envs:1", "n_epochs:1", cwd=tmp_path)
    assert "Loading from Optuna study" in printed
    run = max((tmp_path / "logs" / "scratch_ppo").glob("CartPole-v1_*"), key=lambda path: int(path.name.split("_")[1]))
    data = load_from_zip_file(run / "CartPole-v1.zip")[0]
    values = dict(zip(header.split(","), trial, strict=True))
    assert data["vf_coef"] == float(values["params_vf_coef"])
    assert data["gamma"] == 1 - float(values["params_one_minus_gamma"])
    assert data["batch_size"] == 2 ** int(values["params_batch_size_pow"])


@pytest.mark.parametrize(("cause", "pruned"), [(ValueError("NaN"), True), (KeyError("speed"), False)])
def test_a_trial_whose_environment_fails_is_pruned_where_the_zoo_would_prune_it(cause, pruned, monkeypatch):
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_ppo_from_scratch import EnvFailedError
    from sb3_ppo_from_scratch.zoo.manager import ScratchExperimentManager

    def fail(self, trial):
        raise EnvFailedError("environment 0 failed", 0) from cause

    monkeypatch.setattr(ExperimentManager, "objective", fail)
    manager = object.__new__(ScratchExperimentManager)
    with pytest.raises(optuna.exceptions.TrialPruned if pruned else EnvFailedError, match="environment 0 failed"):
        manager.objective(None)


# ------------------------------------------------------------- videos and plots


def test_a_video_of_cartpole_can_be_played(logs):
    zoo("record_video", *CARTPOLE, "-f", logs, "-n", 60, "-o", logs / "cartpole", cwd=logs)
    (video,) = (logs / "cartpole").glob("final-model-scratch_ppo-CartPole-v1-*.mp4")
    decoded = frames(video)
    assert len(decoded) >= 60
    assert len(set(decoded)) > 30


@pytest.mark.slow
def test_a_video_of_breakout_can_be_played(breakout):
    zoo("record_video", *BREAKOUT, "-f", breakout.parents[1], "-n", 60, cwd=breakout)
    (video,) = (breakout / "videos").glob("*.mp4")
    decoded = frames(video)
    assert len(decoded) >= 60
    assert len(set(decoded)) > 10
    assert max(decoded[0]) > 100  # not a black screen


@pytest.mark.slow
def test_the_training_is_recorded_from_its_checkpoints(logs, ffmpeg_path):
    zoo("record_training", *CARTPOLE, "-f", logs, "-n", 20, "-o", logs / "training", cwd=logs, PATH=ffmpeg_path)
    names = {path.name.split("-scratch_ppo")[0] for path in (logs / "training").glob("*.mp4")}
    assert names == {"checkpoint-20000", "final-model", "training.mp4"}
    assert len(frames(logs / "training" / "training.mp4")) > 40  # two recordings


def test_plots(logs, tmp_path):
    pytest.importorskip("seaborn")
    printed = zoo("plot_train", "--algo", "scratch_ppo", "-e", "CartPole", "-f", logs, cwd=tmp_path)
    assert "no display: wrote plot_train_1.png" in printed
    with Image.open(tmp_path / "plot_train_1.png") as picture:
        assert picture.width > 300
    for run in (1, 2):
        folder = tmp_path / "scratch_ppo" / f"CartPole-v1_{run}"
        folder.mkdir(parents=True)
        results = np.array([[90.0 + run, 91.0 + run], [100.0 + run, 101.0 + run]])
        np.savez(folder / "evaluations.npz", timesteps=np.array([100, 200]), results=results)
    gather = ("-a", "scratch_ppo", "-e", "CartPole-v1", "-f", tmp_path, "-l", "ours")
    printed = zoo("all_plots", *gather, "--no-million", "--no-display", "-o", "gathered", cwd=tmp_path)
    assert "SCRATCH_PPO" in printed  # the zoo prints names in capitals and looks for folders in lower case
    assert "|CartPole-v1 |102 +/- 0  |" in printed  # the last evaluations: 101, 102 and 102, 103
    zoo("plot_from_file", "-i", "gathered", "-o", "plot.svg", cwd=tmp_path)
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    zoo("plot_from_file", "-i", "gathered", "-o", "plot.png", "--skip-timesteps", cwd=tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")  # by its name, and not SVG all the same


# ------------------------------------------------------------- Hugging Face Hub


@pytest.mark.slow
@pytest.mark.parametrize("with_statistics", [False, True])
def test_a_model_goes_to_the_hub_and_back(with_statistics, logs, normalized, ffmpeg_path, tmp_path):
    folder = normalized.parents[1] if with_statistics else logs
    hub = {
        "cwd": tmp_path,
        "path": [ROOT / "tests" / "fake_hub"],
        "FAKE_HUB": str(tmp_path / "hub"),
        "TRUST_REMOTE_CODE": "True",
        "PATH": ffmpeg_path,
    }
    (tmp_path / "hub").mkdir()
    zoo("push_to_hub", *CARTPOLE, "-f", folder, "-orga", "us", "-n", 30, **hub)
    zoo("load_from_hub", *CARTPOLE, "-f", "logs", "-orga", "us", **hub)
    sent, received = (path / "scratch_ppo" / "CartPole-v1_1" for path in (folder, tmp_path / "logs"))
    ours, theirs = (load_from_zip_file(path / "CartPole-v1.zip")[1]["policy"] for path in (sent, received))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    printed = zoo("enjoy", *CARTPOLE, "-f", "logs", "--no-render", "-n", 100, **hub)
    assert ("Loading running average" in printed) == with_statistics

    repository = tmp_path / "hub" / "us" / "scratch_ppo-CartPole-v1"
    assert (repository / "scratch_ppo-CartPole-v1.zip").is_file()
    assert len(frames(repository / "replay.mp4")) >= 30
    assert "scratch-zoo load_from_hub --algo scratch_ppo --env CartPole-v1 -orga us" in (repository / "README.md").read_text()
    listed = python("-c", "from rl_zoo3.utils import get_hf_trained_models; print(get_hf_trained_models('us'))", **hub)
    assert listed.strip() == "{'scratch_ppo-CartPole-v1': ('scratch_ppo', 'CartPole-v1')}"


# ---------------------------------------------------- several processes


def test_two_processes_train_one_agent(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "sb3_ppo_from_scratch.zoo")
    options = ("--eval-freq", 512, "--eval-episodes", 1, "--checkpoint-freq", 256, "-params", "normalize:True")
    train = (*torchrun, "train", *CARTPOLE, "-f", "logs", "--data-parallel")
    printed = python(*train, "-n", 1024, *options, cwd=tmp_path)
    run = tmp_path / "logs" / "scratch_ppo" / "CartPole-v1_1"
    assert printed.count("Saving to") == 1
    assert "total_timesteps      | 1024" in printed
    assert list(np.load(run / "evaluations.npz")["timesteps"]) == [512, 1024]
    assert len(list(run.glob("*.monitor.csv"))) == 8
    whole = load_from_zip_file(run / "CartPole-v1.zip")[1]["policy"]

    for part in ("checkpoints", "checkpoints-rank1"):  # as if it had been killed before the last one
        max((run / part).glob("*.ckpt")).unlink()
    printed = python(*train, "--resume", run, "-params", "normalize:True", cwd=tmp_path)
    assert "goes on at 768 of 1024 timesteps" in printed
    resumed = load_from_zip_file(run / "CartPole-v1.zip")[1]["policy"]
    assert all(np.array_equal(resumed[name], value) for name, value in whole.items())
    enjoyed = zoo("enjoy", *CARTPOLE, "-f", tmp_path / "logs", "--no-render", "-n", 500, "--load-best", cwd=tmp_path)
    assert "Episode Reward" in enjoyed
