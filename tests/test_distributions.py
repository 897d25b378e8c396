"""The behaviour policy's parameters and the exact KL, for every action space; the process-wide switch is put back."""

from __future__ import annotations

import threading

import pytest
import torch as th
from stable_baselines3.common.distributions import Distribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.distributions import kl_divergence as sb3_kl_divergence
from stable_baselines3.common.utils import ConstantSchedule
from torch.distributions import Categorical, Normal, kl_divergence
from torch.distributions import Distribution as TorchDistribution

from sb3_ppo_from_scratch import MlpPolicy
from sb3_ppo_from_scratch.distributions import UncheckedDistributions, distribution_parameters, exact_kl
from tests.envs import ACTION_SPACES, BOX

CASES = [*((name, False) for name in ACTION_SPACES), ("box", True), ("box-2d", True)]
N_PARAMS = {"discrete": 3, "box": 4, "box-2d": 8, "multidiscrete": 9, "multibinary": 3}


def make_policy(action: str, use_sde: bool, seed: int, **kwargs: object) -> MlpPolicy:
    th.manual_seed(seed)
    policy = MlpPolicy(
        BOX,
        ACTION_SPACES[action],
        ConstantSchedule(1e-3),
        use_sde=use_sde,
        log_std_init=-0.2 * seed,
        ortho_init=False,
        **kwargs,
    )
    with th.no_grad():
        policy.action_net.weight.mul_(3)  # so that two policies differ visibly
    if use_sde:
        policy.reset_noise(6)
    return policy


def distribution_of(policy: MlpPolicy) -> Distribution:
    th.manual_seed(99)
    with th.no_grad():
        return policy.get_distribution(th.rand(6, 3) * 2 - 1)


@pytest.mark.parametrize(("action", "use_sde"), CASES)
def test_exact_kl_equals_sb3(action: str, use_sde: bool) -> None:
    old, new = (distribution_of(make_policy(action, use_sde, seed)) for seed in (1, 2))
    old_params, new_params = distribution_parameters(old), distribution_parameters(new)
    assert old_params.shape == (6, N_PARAMS[action])
    ours = exact_kl(new, old_params, new_params)
    theirs = sb3_kl_divergence(old, new)
    theirs = theirs.sum(dim=1) if theirs.dim() == 2 else theirs
    assert ours.shape == (6,)
    assert (ours > 0).all()
    th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("action", "use_sde"), CASES)
def test_kl_of_a_policy_to_itself_is_zero(action: str, use_sde: bool) -> None:
    distribution = distribution_of(make_policy(action, use_sde, 1))
    params = distribution_parameters(distribution)
    th.testing.assert_close(exact_kl(distribution, params, params), th.zeros(6), rtol=0, atol=1e-6)


def test_categorical_kl_by_hand() -> None:
    # KL((1/2, 1/2, 0+) || (1/4, 3/4, 0+)) = log(2) / 2 + log(2/3) / 2; unnormalised logits would spoil it
    distribution = distribution_of(make_policy("discrete", False, 1))
    old, new = (Categorical(probs=th.tensor([p], dtype=th.float64)).logits for p in ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0]))
    assert exact_kl(distribution, old, new).item() == pytest.approx(0.143841, abs=1e-6)


def test_gaussian_kl_by_hand() -> None:
    # log(s2/s1) + (s1^2 + d^2) / (2 s2^2) - 1/2 with s1 = 1, s2 = 2, d = 1: log 2 + 1/4 - 1/2; the other dimension is equal
    distribution = distribution_of(make_policy("box", False, 1))
    log_2 = 0.6931471805599453
    old, new = th.tensor([[1.0, 5.0, 0.0, 0.3]]), th.tensor([[0.0, 5.0, log_2, 0.3]])
    assert exact_kl(distribution, old, new).item() == pytest.approx(log_2 - 0.25, abs=1e-6)


def test_squashing_does_not_change_the_kl() -> None:
    distribution = SquashedDiagGaussianDistribution(1)
    old, new = (th.tensor([[mean, log_std]]) for mean, log_std in ((0.3, -0.5), (0.1, -0.2)))
    expected = kl_divergence(Normal(old[0, 0], old[0, 1].exp()), Normal(new[0, 0], new[0, 1].exp()))
    assert exact_kl(distribution, old, new).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"squash_output": True}], ids=["plain", "squashed"])
def test_parameters_of_gsde_read_back(kwargs: dict[str, bool]) -> None:
    distribution = distribution_of(make_policy("box", True, 1, **kwargs))
    mean, log_std = distribution_parameters(distribution).chunk(2, dim=1)
    assert th.equal(mean, distribution.distribution.mean)
    th.testing.assert_close(log_std.exp(), distribution.distribution.stddev)


def test_parameters_of_multidiscrete_are_normalised_per_factor() -> None:
    distribution = distribution_of(make_policy("multidiscrete", False, 1))
    for factor in distribution_parameters(distribution).split([2, 3, 4], dim=1):
        th.testing.assert_close(factor.exp().sum(dim=1), th.ones(6))


def test_unknown_distributions() -> None:
    assert distribution_parameters(None) is None
    with pytest.raises(TypeError, match="distribution must be one of SB3's built-in ones, not NoneType"):
        exact_kl(None, th.zeros(1, 2), th.zeros(1, 2))  # type: ignore[arg-type]  # the point of the test


@pytest.fixture(params=[True, False], ids=["validating", "not-validating"])
def validates(request: pytest.FixtureRequest) -> bool:
    """Torch's process-wide switch, set for the test and put back."""
    before = TorchDistribution._validate_args
    TorchDistribution.set_default_validate_args(request.param)
    yield request.param
    TorchDistribution.set_default_validate_args(before)


def is_checked() -> bool:
    """Whether a distribution made now would complain."""
    try:
        Normal(th.tensor(0.0), th.tensor(-1.0))
    except ValueError:
        return True
    return False


def test_unchecked_and_put_back(validates: bool) -> None:
    with UncheckedDistributions():
        assert not is_checked()
        with UncheckedDistributions():
            assert not is_checked()
        assert not is_checked()
    assert is_checked() == validates


def test_put_back_after_an_error(validates: bool) -> None:
    with pytest.raises(KeyError), UncheckedDistributions():
        raise KeyError
    assert is_checked() == validates


def test_unchecked_across_threads(validates: bool) -> None:
    """Two overlapping threads, the first in being the first out: still unchecked for the second, put back after it."""
    first_left = threading.Event()
    second_entered = threading.Event()
    seen: list[bool] = []

    def second() -> None:
        with UncheckedDistributions():
            second_entered.set()
            first_left.wait(10)
            seen.append(is_checked())

    thread = threading.Thread(target=second)
    with UncheckedDistributions():
        thread.start()
        assert second_entered.wait(10)
    first_left.set()
    thread.join(10)
    assert seen == [False]
    assert is_checked() == validates
