"""The pixel game of the comparison: its rules, and that its two forms are one game."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.catch import BALL, BEST_RETURN, ENV_ID, PADDLE, SIZE, CatchEnv, CatchGames, CatchVectorEnv
from benchmarks.comparison.protocol import PROTOCOL
from sb3_ppo_from_scratch.vec_env import NativeVecEnv


def one_game(seed: int = 0) -> CatchGames:
    games = CatchGames(1)
    games.begin(0, np.random.default_rng(seed))
    return games


def step(games: CatchGames, action: int) -> tuple[float, bool]:
    rewards, missed = games.step(np.array([action]), [np.random.default_rng(0)], np.ones(1, bool))
    return float(rewards[0]), bool(missed[0])


def test_gymnasium_agrees() -> None:
    check_env(gym.make(ENV_ID, render_mode="rgb_array").unwrapped)


def test_a_caught_ball_is_worth_one_and_the_next_is_faster() -> None:
    games = one_game()
    games.x[0], games.drift[0], speed = games.paddle[0] + 1.0, 0.0, games.speed[0]
    n_steps = int(np.ceil((SIZE - BALL) / speed))
    results = [step(games, 1) for _ in range(n_steps)]
    assert results[:-1] == [(0.0, False)] * (n_steps - 1)
    assert results[-1] == (1.0, False)
    assert games.y[0] == 0
    assert games.speed[0] > speed


@pytest.mark.parametrize(("offset", "caught"), [(-BALL, False), (1 - BALL, True), (PADDLE - 1, True), (PADDLE, False)])
def test_the_paddle_must_touch_the_ball(offset: int, caught: bool) -> None:
    games = one_game()
    games.y[0], games.x[0], games.drift[0] = SIZE - BALL - 0.5, float(games.paddle[0] + offset), 0.0
    assert step(games, 1) == (float(caught), not caught)


def test_walls_reflect() -> None:
    games = one_game()
    games.x[0], games.drift[0] = 1.0, -3.0
    step(games, 1)
    assert (games.x[0], games.drift[0]) == (2.0, 3.0)
    games.x[0] = SIZE - BALL - 1.0
    step(games, 1)
    assert (games.x[0], games.drift[0]) == (SIZE - BALL - 2.0, -3.0)


def test_observations_are_the_last_two_frames() -> None:
    env = CatchEnv()
    first, _ = env.reset(seed=0)
    assert not first[0].any()
    second, *_ = env.step(2)
    assert np.array_equal(second[0], first[1])
    assert first[1].sum() == 255 * (BALL**2 + PADDLE)
    left, right = first[1, -1].nonzero()[0], second[1, -1].nonzero()[0]
    assert (len(left), right[0] - left[0]) == (PADDLE, 2)


def test_one_by_one_and_side_by_side_it_is_the_same_game() -> None:
    """But for the step in which the vector environment begins an episode."""
    together = CatchVectorEnv(3)
    single = [CatchEnv() for _ in range(3)]
    obs, _ = together.reset(seed=5)
    assert np.array_equal(obs, [env.reset(seed=5 + index)[0] for index, env in enumerate(single)])
    rng, ended, episodes = np.random.default_rng(0), np.zeros(3, bool), 0
    for _ in range(300):
        actions = rng.integers(0, 3, 3)
        obs, rewards, terminated, truncated, _ = together.step(actions)
        assert not truncated.any()
        for index, env in enumerate(single):
            result = (env.reset()[0], 0.0, False) if ended[index] else env.step(actions[index])[:3]
            assert np.array_equal(obs[index], result[0])
            assert (rewards[index], terminated[index]) == result[1:]
        ended = terminated
        episodes += int(ended.sum())
    assert episodes > 5


def test_it_has_reset_rows() -> None:
    env = NativeVecEnv(gym.make_vec(ENV_ID, 2, vectorization_mode="vector_entry_point"))
    env.reset()
    rows = np.zeros(2)
    for _ in range(120):
        env.step(np.zeros(2, np.int64))
        rows += env.reset_rows
    assert rows.all()


def test_the_best_player_sets_the_margin() -> None:
    returns = []
    for seed in range(100):
        env, total, ended = CatchEnv(), 0.0, False
        env.reset(seed=seed)
        while not ended:
            _, reward, ended, *_ = env.step(int(env._game.best_actions()[0]))
            total += reward
        returns.append(total)
    assert round(np.mean(returns)) == BEST_RETURN
    assert PROTOCOL["Catch"].margin == pytest.approx(0.1 * BEST_RETURN)
