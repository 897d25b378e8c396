"""Generalized Advantage Estimation and advantage normalisation: hand-worked tables, limits and SB3's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_from_scratch.advantages import compute_gae, normalize_advantages


def column(*numbers: float, dtype: type = np.float64) -> np.ndarray:
    """One environment's steps as ``[n_steps, 1]``."""
    return np.array(numbers, dtype=dtype)[:, None]


def random_rollout(n_steps: int, n_envs: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n_steps * 1000 + n_envs)
    return {
        "rewards": rng.normal(size=(n_steps, n_envs)).astype(dtype),
        "values": rng.normal(size=(n_steps, n_envs)).astype(dtype),
        "episode_starts": (rng.random((n_steps, n_envs)) < 0.2).astype(dtype),
        "last_values": rng.normal(size=n_envs).astype(dtype),
        "dones": rng.random(n_envs) < 0.5,
    }


# gamma 1/2, lambda 1/2, one environment, rewards 1 2 3, values 4 2 8, last value 16.
# Each row is worked by hand: delta_t = r_t + V_{t+1}/2 - V_t; A_t = delta_t + A_{t+1}/4, both cut where an episode begins.
HAND_TABLE = [
    # no episode ends: deltas -2 4 3; A_2 = 3, A_1 = 4 + 3/4, A_0 = -2 + 4.75/4
    pytest.param((0, 0, 0), False, (-0.8125, 4.75, 3.0), id="one-long-episode"),
    # the last step ends one: delta_2 = 3 - 8 = -5; A_1 = 4 - 5/4, A_0 = -2 + 2.75/4
    pytest.param((0, 0, 0), True, (-1.3125, 2.75, -5.0), id="done-at-the-end"),
    # step 1 is a new episode's first: delta_0 = 1 - 4 = -3 and nothing flows back into A_0
    pytest.param((0, 1, 0), False, (-3.0, 4.75, 3.0), id="cut-before-step-1"),
    # step 2 is a new episode's first: delta_1 = 2 - 2 = 0, so A_1 = 0 and A_0 = delta_0
    pytest.param((0, 0, 1), False, (-2.0, 0.0, 3.0), id="cut-before-step-2"),
    # that step 0 is a first one has no say: nothing comes before it
    pytest.param((1, 0, 0), False, (-0.8125, 4.75, 3.0), id="first-start-is-irrelevant"),
    # every step is an episode: A_t = r_t - V_t
    pytest.param((1, 1, 1), True, (-3.0, 0.0, -5.0), id="episodes-of-one-step"),
]


@pytest.mark.parametrize(("starts", "done", "expected"), HAND_TABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hand_worked_table(starts: tuple[int, ...], done: bool, expected: tuple[float, ...], dtype: type) -> None:
    values = column(4, 2, 8, dtype=dtype)
    advantages, returns = compute_gae(
        column(1, 2, 3, dtype=dtype), values, column(*starts, dtype=dtype), np.array([16], dtype), np.array([done]), 0.5, 0.5
    )
    assert advantages[:, 0].tolist() == list(expected)  # halves and quarters are exact in binary
    assert returns[:, 0].tolist() == [a + v for a, v in zip(expected, (4, 2, 8), strict=True)]
    assert advantages.dtype == returns.dtype == dtype


def test_environments_do_not_mix() -> None:
    both = random_rollout(20, 2)
    advantages, returns = compute_gae(**both, gamma=0.9, gae_lambda=0.8)
    for env in range(2):
        alone = {name: array[..., env : env + 1] for name, array in both.items()}
        alone_advantages, alone_returns = compute_gae(**alone, gamma=0.9, gae_lambda=0.8)
        assert np.array_equal(advantages[:, env : env + 1], alone_advantages)
        assert np.array_equal(returns[:, env : env + 1], alone_returns)


def test_lambda_0_is_the_one_step_td_target() -> None:
    # gamma 1/2: the target of step t is r_t + V_{t+1}/2, with the last value after the last step
    _, returns = compute_gae(
        column(1, 2, 3), column(4, 2, 8), column(0, 0, 0), np.array([16.0]), np.array([False]), gamma=0.5, gae_lambda=0.0
    )
    assert returns[:, 0].tolist() == [2.0, 6.0, 11.0]


def test_lambda_1_is_the_monte_carlo_return() -> None:
    # gamma 1/2, an episode ending after step 1: 1 + 2/2 and 2; then 3 + 16/2 for the one that goes on
    rollout = (column(1, 2, 3), column(4, 2, 8), column(1, 0, 1), np.array([16.0]), np.array([False]))
    _, returns = compute_gae(*rollout, gamma=0.5, gae_lambda=1.0)
    assert returns[:, 0].tolist() == [2.0, 2.0, 11.0]


def test_lambda_1_does_not_depend_on_values_inside_an_episode() -> None:
    rollout = random_rollout(30, 3, np.float64)
    other = dict(rollout, values=rollout["values"] + 5.0)
    _, returns = compute_gae(**rollout, gamma=0.95, gae_lambda=1.0)
    _, other_returns = compute_gae(**other, gamma=0.95, gae_lambda=1.0)
    np.testing.assert_allclose(returns, other_returns, rtol=1e-12, atol=1e-12)


def test_gamma_0_sees_only_the_reward() -> None:
    rollout = random_rollout(10, 2, np.float64)
    _, returns = compute_gae(**rollout, gamma=0.0, gae_lambda=0.7)
    np.testing.assert_allclose(returns, rollout["rewards"], rtol=1e-12, atol=1e-12)


def test_a_done_hides_the_last_value() -> None:
    rollout = dict(random_rollout(10, 2), dones=np.array([True, False]))
    shifted = dict(rollout, last_values=rollout["last_values"] + 100.0)
    advantages, _ = compute_gae(**rollout, gamma=0.99, gae_lambda=0.95)
    shifted_advantages, _ = compute_gae(**shifted, gamma=0.99, gae_lambda=0.95)
    assert np.array_equal(advantages[:, 0], shifted_advantages[:, 0])
    assert (advantages[-1, 1] != shifted_advantages[-1, 1]).all()


def test_inputs_stay_as_they_were() -> None:
    rollout = random_rollout(10, 2)
    before = {name: array.copy() for name, array in rollout.items()}
    compute_gae(**rollout, gamma=0.99, gae_lambda=0.95)
    assert all(np.array_equal(array, before[name]) for name, array in rollout.items())


@pytest.mark.parametrize("gamma", [0.0, 0.98, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(("n_steps", "n_envs"), [(1, 1), (1, 8), (128, 1), (64, 8)])
def test_same_bits_as_sb3(n_steps: int, n_envs: int, gamma: float, gae_lambda: float) -> None:
    rollout = random_rollout(n_steps, n_envs)
    box = spaces.Box(-1, 1, (1,))
    theirs = RolloutBuffer(n_steps, box, box, "cpu", gae_lambda=gae_lambda, gamma=gamma, n_envs=n_envs)
    theirs.rewards, theirs.values, theirs.episode_starts = (
        rollout[name].copy() for name in ("rewards", "values", "episode_starts")
    )
    theirs.compute_returns_and_advantage(th.from_numpy(rollout["last_values"]), rollout["dones"])
    advantages, returns = compute_gae(**rollout, gamma=gamma, gae_lambda=gae_lambda)
    assert advantages.dtype == np.float32
    assert np.array_equal(advantages, theirs.advantages)
    assert np.array_equal(returns, theirs.returns)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rewards", (0, 2)),
        ("rewards", (5,)),
        ("values", (4, 2)),
        ("episode_starts", (5, 1)),
        ("last_values", (2, 1)),
        ("last_values", (1,)),
        ("dones", (5, 2)),
    ],
)
def test_shapes_that_do_not_agree(name: str, shape: tuple[int, ...]) -> None:
    rollout = dict(random_rollout(5, 2), **{name: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=rf"{name} must have shape .*{shape[0]}"):
        compute_gae(**rollout, gamma=0.99, gae_lambda=0.95)


def test_normalize_by_hand() -> None:
    # mean 3, squared deviations 4 0 4, unbiased variance 8 / 2, standard deviation 2
    normalized = normalize_advantages(th.tensor([1.0, 3.0, 5.0], dtype=th.float64))
    assert normalized.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-8)


def test_normalized_has_mean_0_and_standard_deviation_1() -> None:
    th.manual_seed(0)
    normalized = normalize_advantages(7 + 3 * th.randn(1000, dtype=th.float64))
    assert normalized.mean().item() == pytest.approx(0, abs=1e-9)
    assert normalized.std().item() == pytest.approx(1, abs=1e-6)


def test_trap_7_one_element_is_not_normalized() -> None:
    """Trap 7: a minibatch of one has no standard deviation; it must not become NaN."""
    assert normalize_advantages(th.tensor([2.5])).tolist() == [2.5]


def test_equal_advantages_become_zero() -> None:
    assert normalize_advantages(th.full((4,), 2.5)).tolist() == [0.0] * 4
