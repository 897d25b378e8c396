"""The losses and diagnostics: hand-worked tables, gradients checked in double precision, and the exact KL by sampling."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch as th
from torch.distributions import Categorical, Normal, kl_divergence

from sb3_ppo_from_scratch.advantages import normalize_advantages
from sb3_ppo_from_scratch.losses import (
    PPOLoss,
    approx_kl,
    clip_fraction,
    clipped_surrogate_loss,
    entropy_loss,
    ppo_loss,
    value_loss,
)


def vector(*numbers: float, requires_grad: bool = False) -> th.Tensor:
    return th.tensor(numbers, dtype=th.float64, requires_grad=requires_grad)


# With clip_range 1/4 the ratio is held within [3/4, 5/4]; the loss is minus the smaller (more pessimistic) product.
SURROGATE_TABLE = [
    # advantage, ratio, loss, whether the ratio's gradient survives
    pytest.param(2.0, 1.0, -2.0, True, id="unmoved"),
    pytest.param(2.0, 1.5, -2.5, False, id="gain-above-the-range-is-clipped"),
    pytest.param(2.0, 0.5, -1.0, True, id="loss-below-the-range-counts-in-full"),
    pytest.param(-2.0, 1.5, 3.0, True, id="negative-advantage-loss-above-the-range-counts-in-full"),
    pytest.param(-2.0, 0.5, 1.5, False, id="negative-advantage-gain-below-the-range-is-clipped"),
    pytest.param(2.0, 1.125, -2.25, True, id="inside-the-range"),
    pytest.param(0.0, 3.0, 0.0, True, id="no-advantage"),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "has_gradient"), SURROGATE_TABLE)
def test_surrogate_by_hand(advantage: float, ratio: float, loss: float, has_gradient: bool) -> None:
    ratios = vector(ratio, requires_grad=True)
    result = clipped_surrogate_loss(vector(advantage), ratios, 0.25)
    assert result.shape == ()
    assert result.item() == loss
    result.backward()
    assert ratios.grad.item() == (-advantage if has_gradient else 0.0)


def test_surrogate_is_the_mean() -> None:
    assert clipped_surrogate_loss(vector(2, -2), vector(1.5, 1.5), 0.25).item() == (-2.5 + 3.0) / 2


@pytest.mark.parametrize(
    ("value", "old_value", "clip", "expected"),
    [
        pytest.param(5.0, 1.0, None, 4.0, id="no-clip"),
        pytest.param(1.5, 1.0, 1.0, 2.25, id="inside-the-clip"),
        pytest.param(5.0, 1.0, 1.0, 1.0, id="held-above"),  # to 2: (3 - 2)^2
        pytest.param(-5.0, 1.0, 1.0, 9.0, id="held-below"),  # to 0: (3 - 0)^2
    ],
)
def test_trap_8_value_loss_has_no_half_and_no_max(value: float, old_value: float, clip: float | None, expected: float) -> None:
    """Trap 8: return 3; a factor 1/2 or the maximum with the unclipped error would give other numbers."""
    assert value_loss(vector(value), vector(3), vector(old_value), clip).item() == expected


def test_value_loss_is_the_mean() -> None:
    assert value_loss(vector(1, 2), vector(3, 2)).item() == 2.0


def test_a_clipped_value_has_no_gradient() -> None:
    values = vector(5.0, 1.5, requires_grad=True)
    value_loss(values, vector(3, 3), vector(1, 1), 1.0).backward()
    assert values.grad.tolist() == [0.0, -1.5]


def test_value_clip_needs_old_values() -> None:
    with pytest.raises(ValueError, match=r"clip_range_vf=0\.2 needs old_values"):
        value_loss(vector(1), vector(2), None, 0.2)


def test_entropy_by_hand() -> None:
    assert entropy_loss(vector(1, 3), vector(-7, -7)).item() == -2.0


def test_entropy_without_closed_form_is_minus_log_prob() -> None:
    assert entropy_loss(None, vector(-1, -3)).item() == -2.0


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((1.0, 1.0), 0.0), ((1.25, 0.75), 0.0), ((1.5, 1.0), 0.5), ((0.5, 2.0), 1.0)],
)
def test_clip_fraction_by_hand(ratios: tuple[float, ...], expected: float) -> None:
    assert clip_fraction(vector(*ratios), 0.25).item() == expected


def test_approx_kl_by_hand() -> None:
    # ratio 2: 2 - 1 - log 2; ratio 1/2: 1/2 - 1 + log 2; mean 1/4
    assert approx_kl(th.log(vector(2.0, 0.5))).item() == pytest.approx(0.25, abs=1e-15)
    assert approx_kl(vector(0.0, 0.0)).item() == 0.0


def test_trap_9_approx_kl_is_never_negative() -> None:
    """Trap 9: k3, unlike the mean of ``-log_ratio``, is non-negative for every single sample."""
    for log_ratio in th.arange(-30, 31, dtype=th.float64) / 10:
        assert approx_kl(log_ratio[None]).item() >= 0.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(Normal(vector(0.0), vector(1.0)), Normal(vector(0.2), vector(0.9)), id="gaussian"),
        pytest.param(Categorical(vector(0.2, 0.3, 0.5)), Categorical(vector(0.3, 0.3, 0.4)), id="categorical"),
    ],
)
def test_trap_9_approx_kl_estimates_kl_of_old_to_new(
    old: th.distributions.Distribution, new: th.distributions.Distribution
) -> None:
    """Trap 9: its expectation over the old policy's actions is KL(old || new), not KL(new || old)."""
    th.manual_seed(0)
    actions = old.sample((400_000,))
    estimate = approx_kl(new.log_prob(actions) - old.log_prob(actions)).item()
    exact, reverse = kl_divergence(old, new).item(), kl_divergence(new, old).item()
    assert estimate == pytest.approx(exact, rel=0.02)
    assert abs(estimate - exact) < abs(estimate - reverse)


def random_batch(size: int = 7) -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(3)
    names = ("advantages", "returns", "old_values", "old_log_prob")
    return {name: th.randn(size, dtype=th.float64, generator=generator) for name in names}


def random_inputs(size: int = 7) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Values, log-probabilities and entropies, away from the kinks of the clips."""
    generator = th.Generator().manual_seed(4)
    inputs = th.randn(3, size, dtype=th.float64, generator=generator)
    return tuple(row.clone().requires_grad_() for row in inputs)  # type: ignore[return-value]


@pytest.mark.parametrize("clip_range_vf", [None, 0.3])
@pytest.mark.parametrize("closed_form_entropy", [True, False])
def test_gradient_in_double_precision(clip_range_vf: float | None, closed_form_entropy: bool) -> None:
    coefficients = {"clip_range": 0.2, "clip_range_vf": clip_range_vf, "ent_coef": 0.1, "vf_coef": 0.7}
    values, log_prob, entropy = random_inputs()
    loss = partial(ppo_loss, **random_batch(), **coefficients)
    if closed_form_entropy:
        assert th.autograd.gradcheck(lambda *inputs: loss(*inputs).total, (values, log_prob, entropy))
    else:
        assert th.autograd.gradcheck(lambda v, p: loss(v, p, None).total, (values, log_prob))


@pytest.mark.parametrize("sign", [1, -1])
def test_surrogate_gradient_in_double_precision(sign: int) -> None:
    ratio = vector(0.5, 0.9, 1.1, 1.5, requires_grad=True)
    advantages = sign * vector(1, 2, 3, 4)
    assert th.autograd.gradcheck(lambda r: clipped_surrogate_loss(advantages, r, 0.2), (ratio,))


def test_ppo_loss_by_hand() -> None:
    # one transition: ratio exp(log 2) = 2 held to 1.25, surrogate -(4 * 1.25) = -5; entropy loss -3; value loss (3-1)^2 = 4
    log_2 = float(th.log(vector(2.0)))
    loss = ppo_loss(
        vector(1.0),
        vector(log_2),
        vector(3.0),
        advantages=vector(4.0),
        returns=vector(3.0),
        old_values=vector(0.0),
        old_log_prob=vector(0.0),
        clip_range=0.25,
        ent_coef=0.5,
        vf_coef=2.0,
    )
    assert (loss.policy.item(), loss.entropy.item(), loss.value.item()) == (-5.0, -3.0, 4.0)
    assert loss.total.item() == -5.0 + 0.5 * -3.0 + 2.0 * 4.0
    assert loss.approx_kl.item() == pytest.approx(1 - log_2)
    assert loss.clip_fraction.item() == 1.0


def test_ppo_loss_clips_values_where_asked() -> None:
    values, log_prob, entropy = random_inputs()
    batch = random_batch()
    free = ppo_loss(values, log_prob, entropy, clip_range=0.2, **batch)
    clipped = ppo_loss(values, log_prob, entropy, clip_range=0.2, clip_range_vf=0.01, **batch)
    assert free.value.item() == value_loss(values, batch["returns"]).item()
    assert clipped.value.item() == value_loss(values, batch["returns"], batch["old_values"], 0.01).item()
    assert free.value.item() != clipped.value.item()


def test_only_the_total_and_its_parts_carry_a_gradient() -> None:
    loss = ppo_loss(*random_inputs(), clip_range=0.2, **random_batch())
    assert loss.total.requires_grad
    assert not loss.approx_kl.requires_grad
    assert not loss.clip_fraction.requires_grad
    assert all(part.shape == () for part in loss)


def test_same_policy_has_ratio_1() -> None:
    batch = random_batch()
    values, _, entropy = random_inputs()
    loss = ppo_loss(values, batch["old_log_prob"], entropy, clip_range=0.2, **batch)
    assert loss.approx_kl.item() == 0.0
    assert loss.clip_fraction.item() == 0.0
    assert loss.policy.item() == pytest.approx(-batch["advantages"].mean().item())


# ------------------------------------------------------------------------ weights

NAMES = ("values", "log_prob", "entropy", "advantages", "returns", "old_values", "old_log_prob")
COEFFICIENTS = {"clip_range": 0.1, "clip_range_vf": 0.2, "ent_coef": 0.3, "vf_coef": 0.5}


@pytest.mark.parametrize("n_rows", [1, 2, 7, 8])
def test_rows_of_weight_0_count_for_nothing(n_rows: int) -> None:
    """As if they were not there: losses, diagnostics, gradient, and normalised advantages."""
    numbers = th.from_numpy(np.random.default_rng(0).normal(size=(7, 8))).requires_grad_()
    weights = (th.arange(8) < n_rows).double()
    weighted = ppo_loss(**dict(zip(NAMES, numbers, strict=True)), **COEFFICIENTS, weights=weights)
    without = ppo_loss(**dict(zip(NAMES, numbers[:, :n_rows], strict=True)), **COEFFICIENTS)
    for name, ours, theirs in zip(PPOLoss._fields, weighted, without, strict=True):
        tolerance = 1e-6 if name == "clip_fraction" else 1e-12  # a mean of float32
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance), name
    gradients = [th.autograd.grad(loss.total, numbers)[0] for loss in (weighted, without)]
    th.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    normalized = normalize_advantages(numbers[3], weights)[:n_rows]
    th.testing.assert_close(normalized, normalize_advantages(numbers[3, :n_rows]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("copies", [2, 3])
def test_a_row_of_weight_n_counts_n_times(copies: int) -> None:
    numbers = th.from_numpy(np.random.default_rng(1).normal(size=(7, 4)))
    repeated = numbers.repeat_interleave(th.tensor([1, copies, 1, 1]), dim=1)
    weights = th.tensor([1.0, copies, 1.0, 1.0], dtype=th.float64)
    weighted = ppo_loss(**dict(zip(NAMES, numbers, strict=True)), **COEFFICIENTS, weights=weights)
    expected = ppo_loss(**dict(zip(NAMES, repeated, strict=True)), **COEFFICIENTS)
    np.testing.assert_allclose([float(part) for part in weighted], [float(part) for part in expected], rtol=1e-6)
    expected_advantages = normalize_advantages(repeated[3])[[0, 1, -2, -1]]
    th.testing.assert_close(normalize_advantages(numbers[3], weights), expected_advantages, rtol=1e-12, atol=1e-12)


def test_rows_of_weight_0_may_hold_anything_finite() -> None:
    """What they hold changes no bit."""
    results = []
    for filler in (0.0, 1e30):
        numbers = th.linspace(-1, 1, 56).reshape(7, 8).clone()
        numbers[:, 5:] = filler
        numbers.requires_grad_()
        weights = (th.arange(8) < 5).float()
        loss = ppo_loss(**dict(zip(NAMES, numbers, strict=True)), clip_range=0.1, ent_coef=0.3, weights=weights)
        results.append((*(part.detach() for part in loss), th.autograd.grad(loss.total, numbers)[0]))
    assert all(th.equal(a, b) for a, b in zip(*results, strict=True))


def test_shares_are_as_one_row() -> None:
    """Weights that sum to 1, more or less: no deviation is made of the rounding."""
    advantages = th.randn(64, generator=th.Generator().manual_seed(0))
    for share in (1 / 64, (1 + 1e-6) / 64):
        assert th.equal(normalize_advantages(advantages, th.full((64,), share)), advantages)
