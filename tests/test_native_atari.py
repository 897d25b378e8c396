"""Atari games from ALE's and EnvPool's C++ beside SB3's ``make_atari_env`` and ``VecFrameStack``, on the same actions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.atari_wrappers import NoopResetEnv
from stable_baselines3.common.env_util import make_atari_env, unwrap_wrapper
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack

from sb3_ppo_from_scratch import ScratchPPO, ScratchRolloutBuffer
from sb3_ppo_from_scratch.vec_env import ATARI_BACKENDS, NativeAtariEnv, make_native_atari_env

ale_py = pytest.importorskip("ale_py", reason="Atari is optional: pip install 'sb3-ppo-from-scratch[atari]'")
pytest.importorskip("cv2", reason="SB3's side of the comparison needs it")
gym.register_envs(ale_py)

N_ENVS = 2


class Transition(NamedTuple):
    """What one game gave for one action."""

    observation: np.ndarray
    """``[4, 84, 84]``"""
    reward: float
    done: bool
    truncated: bool
    final: np.ndarray | None
    """``[4, 84, 84]``"""
    episode: dict[str, Any] | None


@pytest.fixture(params=ATARI_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "envpool":
        pytest.importorskip("envpool", reason="EnvPool is optional: pip install 'sb3-ppo-from-scratch[envpool]'")
    return request.param


def make_native(env_id: str, backend: str, **kwargs: Any) -> NativeAtariEnv:
    """With as few no-ops as the backend can: none, or one."""
    return make_native_atari_env(env_id, N_ENVS, 1, backend, noop_max=0 if backend == "ale" else 1, **kwargs)


def make_reference(env_id: str, backend: str, **kwargs: Any) -> VecEnv:
    env = make_atari_env(env_id, N_ENVS, wrapper_kwargs={"noop_max": 0 if backend == "ale" else 1, **kwargs})
    assert isinstance(env, DummyVecEnv)
    assert (unwrap_wrapper(env.envs[0], NoopResetEnv) is None) == (backend == "ale")
    return VecFrameStack(env, 4)


def play(env: VecEnv, n_transitions: int) -> list[list[Transition]]:
    """For each game its transitions, with random actions that do not depend on when the others are reset."""
    actions = np.random.default_rng(0).integers(env.action_space.n, size=(N_ENVS, 10 * n_transitions))
    games: list[list[Transition]] = [[] for _ in range(N_ENVS)]
    obs = channels_first(env.reset())
    while min(map(len, games)) < n_transitions:
        new_obs, rewards, dones, infos = env.step(actions[range(N_ENVS), [len(game) for game in games]])
        for i, (game, info) in enumerate(zip(games, infos, strict=True)):
            if isinstance(env, NativeAtariEnv) and env.reset_rows[i]:
                continue
            final = info.get("terminal_observation")
            final = None if final is None else channels_first(final[None])[0]
            cut = info["TimeLimit.truncated"]
            game.append(Transition(obs[i].copy(), rewards[i], dones[i], cut, final, info.get("episode")))
        obs = channels_first(new_obs)
    env.close()
    return [game[:n_transitions] for game in games]


def channels_first(images: np.ndarray) -> np.ndarray:
    return images if images.shape[1] == 4 else images.transpose(0, 3, 1, 2)


def compare(ours: list[list[Transition]], theirs: list[list[Transition]]) -> tuple[int, float]:
    """All but the pixels must be equal; the largest difference of two pixels, and the share of those that differ."""
    differences = []
    for mine, reference in zip(ours, theirs, strict=True):
        for a, b in zip(mine, reference, strict=True):
            assert (a.reward, a.done, a.truncated) == (b.reward, b.done, b.truncated)
            differences.append(np.abs(a.observation.astype(int) - b.observation))
            assert (a.final is None) == (b.final is None)
            if a.final is not None and b.final is not None and a.episode is None:
                differences.append(np.abs(a.final.astype(int) - b.final))  # at the end of a game SB3 pools older frames
    return int(np.max(differences)), float(np.mean(np.array(differences) > 0))


@pytest.mark.parametrize(
    ("game", "n_transitions", "largest", "share"),
    [("Breakout", 300, 0, 0.0), ("Pong", 150, 16, 0.005), ("Freeway", 100, 30, 0.02), ("SpaceInvaders", 250, 16, 0.001)],
)
def test_trap_5_what_learning_sees_is_what_sb3_shows(
    game: str, n_transitions: int, largest: int, share: float, backend: str
) -> None:
    """
    Trap 5: observations with their stacks, clipped rewards, and lost lives as ends.

    In Breakout to the last pixel, through lost lives and new games; Freeway has no FIRE.
    """
    env_id = f"{game}NoFrameskip-v4"
    ours, theirs = play(make_native(env_id, backend), n_transitions), play(make_reference(env_id, backend), n_transitions)
    largest_here, share_here = compare(ours, theirs)
    assert largest_here <= largest
    assert share_here <= share
    if game in ("Breakout", "SpaceInvaders"):
        assert sum(step.done for game in ours for step in game) > 1
        assert {step.reward for game in ours for step in game} == {0.0, 1.0}


def test_trap_5_statistics_see_whole_games_with_unclipped_rewards(backend: str) -> None:
    """Trap 5: as ``Monitor`` under ``AtariWrapper``; ALE's frames exactly, EnvPool's but for no-ops and rounding."""
    env_id = "SpaceInvadersNoFrameskip-v4"
    ours, theirs = play(make_native(env_id, backend), 700), play(make_reference(env_id, backend), 700)
    pairs = [
        (a.episode, b.episode)
        for mine, reference in zip(ours, theirs, strict=True)
        for a, b in zip(mine, reference, strict=True)
        if a.episode or b.episode
    ]
    assert pairs
    for mine, reference in pairs:
        assert mine is not None
        assert reference is not None
        assert mine["r"] == reference["r"] > 10
        assert mine["l"] == pytest.approx(reference["l"], abs=0 if backend == "ale" else 4)


def test_trap_5_lives_may_also_not_count_and_rewards_stay_raw(backend: str) -> None:
    env_id, options = "SpaceInvadersNoFrameskip-v4", {"terminal_on_life_loss": False, "clip_reward": False}
    ours = play(make_native(env_id, backend, **options), 700)
    theirs = play(make_reference(env_id, backend, **options), 700)
    compare(ours, theirs)
    ends = [step.episode for game in ours for step in game if step.done]
    assert ends
    assert all(ends)
    assert max(step.reward for game in ours for step in game) > 1


def test_a_game_is_cut_at_its_time_limit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 80 frames in place of 108,000; the final observation is there to bootstrap from."""
    monkeypatch.setattr("sb3_ppo_from_scratch.vec_env.atari._MAX_FRAMES", 80)
    games = play(make_native("PongNoFrameskip-v4", backend), 50)
    for game in games:
        ends = [i for i, step in enumerate(game) if step.done]
        assert np.diff(ends).tolist() == [18] * (len(ends) - 1)  # of 20 steps, two are the opening
        assert all(game[i].truncated and game[i].final is not None and game[i].episode for i in ends)
        assert all(game[i].episode["l"] == 80 for i in ends)


def test_seeds(backend: str) -> None:
    """The same seed gives the same games, another gives others; a model's seed replaces the environment's."""

    def first(seed: int | None, model_seed: int | None = None) -> list[Any]:
        env = make_native_atari_env("BreakoutNoFrameskip-v4", 2, seed, backend)
        if model_seed is not None:
            env.seed(model_seed)
        observations = [env.reset(), *(env.step(np.full(2, 2))[0] for _ in range(3))]
        env.close()
        return [obs.tobytes() for obs in observations]

    assert first(1) == first(1) == first(5, 1) != first(5)
    first(2**32 - 1)


def test_training_and_evaluation(backend: str, tmp_path: Any) -> None:
    env = make_native_atari_env("BreakoutNoFrameskip-v4", 4, backend=backend, filename=str(tmp_path / "games"))
    model = ScratchPPO("CnnPolicy", env, n_steps=64, batch_size=128, n_epochs=1, seed=1, device="cpu").learn(256)
    buffer = model.rollout_buffer
    assert isinstance(buffer, ScratchRolloutBuffer)
    assert model.get_env() is env
    assert buffer.observations.shape == (64, 4, 4, 84, 84)
    assert buffer.valid is not None
    lost = [(step, i) for step, i in np.argwhere(buffer.episode_starts == 1) if step and buffer.valid[step, i]]
    assert lost
    for step, i in lost:
        first = buffer.observations[step, i]
        assert not first[:3].any()
        assert first[3].any()
        assert not buffer.valid[max(0, step - 3) : step, i].any()  # a no-op, FIRE, and action 2
    evaluation = make_native_atari_env("BreakoutNoFrameskip-v4", 2, 3, backend)
    returns, lengths = evaluate_policy(model, evaluation, n_eval_episodes=2, deterministic=False, return_episode_rewards=True)
    assert len(returns) == 2
    assert min(lengths) > 300  # frames of five lives
    env.close()
    assert len(load_results(str(tmp_path))) == len(model.ep_info_buffer)


def test_the_package_imports_no_backend() -> None:
    check = "import sys, sb3_ppo_from_scratch.vec_env; assert not {'ale_py', 'envpool'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("env_id", ["Breakout-v4", "ALE/Breakout-v5", "CartPole-v1", "NothingNoFrameskip-v4"])
def test_only_games_without_frame_skip(env_id: str) -> None:
    with pytest.raises(ValueError, match=rf"env_id must be an Atari game without frame skip, .* not '{env_id}'"):
        make_native_atari_env(env_id)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "atari"}, ValueError, "backend must be one of 'ale', 'envpool', not 'atari'"),
        ({"n_envs": 0}, ValueError, "n_envs must be at least 1, not 0"),
        ({"noop_max": -1}, ValueError, "noop_max must be at least 0, not -1"),
        ({"noop_max": 0, "backend": "envpool"}, ValueError, "noop_max must be at least 1, not 0"),
        ({"frame_skip": 0}, ValueError, "frame_skip must be at least 1, not 0"),
        ({"n_stack": "4"}, TypeError, "n_stack must be an integer"),
        ({"clip_reward": 1}, TypeError, "clip_reward must be"),
        ({"action_repeat_probability": 2.0}, ValueError, "action_repeat_probability must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_native_atari_env("BreakoutNoFrameskip-v4", **arguments)


def test_games_of_several_words_are_found() -> None:
    env = make_native_atari_env("MsPacmanNoFrameskip-v4")
    assert env.action_space.n == 9
    env.close()
