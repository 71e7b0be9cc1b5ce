"""The lower bound: caps integrated and sampled, its three forms, and far tails."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erfc

from etr.theory import capacity_lower_bound, log_cap_probability, log_capacity_lower_bound


def integrated_log_cap(hidden_size: int, d: float) -> float:
    """log of the two caps' share of the sphere, by integrating sin^(H-2) over the angle.

    The integrand is divided by its largest value, at the cap's edge, so that nothing underflows.
    """
    power, edge = hidden_size - 2, math.acos(d)

    def height(angle: float) -> float:
        return (math.sin(angle) / math.sin(edge)) ** power

    width = min(edge, 60 * math.tan(edge) / max(power, 1))
    cap = quad(height, edge - width, edge, epsabs=0, epsrel=1e-12, limit=400)[0]
    whole = 0.5 * math.log(math.pi) + math.lgamma((hidden_size - 1) / 2)
    whole -= math.lgamma(hidden_size / 2)
    return math.log(2 * cap) + power * math.log(math.sin(edge)) - whole


@pytest.mark.parametrize("d", [0.01, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("hidden_size", [2, 3, 16, 128, 1024, 8192])
def test_exact_form_against_integration(hidden_size: int, d: float) -> None:
    expected = integrated_log_cap(hidden_size, d)
    assert log_cap_probability(hidden_size, d) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    bound = log_capacity_lower_bound(hidden_size, 8, d)
    assert bound == pytest.approx(-expected - math.log(8), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("hidden_size", [2, 8, 64])
def test_exact_form_against_random_cosines(hidden_size: int) -> None:
    generator = np.random.default_rng(hidden_size)
    x = generator.standard_normal((200_000, hidden_size))
    cosine = np.abs(x[:, 0]) / np.linalg.norm(x, axis=1)
    for d in np.array([0.3, 0.8, 1.3]) / math.sqrt(hidden_size):
        share = math.exp(float(log_cap_probability(hidden_size, d)))
        error = math.sqrt(share * (1 - share) / len(x))
        assert abs((cosine >= d).mean() - share) <= 4 * error


@pytest.mark.parametrize(
    ("hidden_size", "tolerance"), [(64, 0.18), (128, 0.12), (1024, 0.02), (4096, 0.005)]
)
def test_erfc_is_close_up_to_five(hidden_size: int, tolerance: float) -> None:
    d = np.linspace(0, 5 / math.sqrt(hidden_size), 200)
    ratio = capacity_lower_bound(hidden_size, 8, d, "erfc") / capacity_lower_bound(
        hidden_size, 8, d
    )
    assert np.abs(ratio - 1).max() < tolerance
    assert np.abs(ratio - 1).max() > tolerance / 2, "the tolerance is stated too wide"


def test_erfc_is_far_off_where_the_affinity_is_large() -> None:
    d = 0.9
    assert log_capacity_lower_bound(128, 8, d) > 15 + log_capacity_lower_bound(128, 8, d, "erfc")


@pytest.mark.parametrize("hidden_size", [2, 128, 16384])
def test_order_of_the_forms(hidden_size: int) -> None:
    d = np.linspace(0, 1, 501)
    exact, second, third = (
        log_capacity_lower_bound(hidden_size, 8, d, form)
        for form in ("exact", "erfc", "exponential")
    )
    assert (third <= second + 1e-12).all()
    assert np.isfinite(second).all()
    assert np.isfinite(exact[:-1]).all()
    assert exact[-1] == np.inf
    for bound in (exact, second, third):
        assert bound[0] == pytest.approx(-math.log(8))
        assert (np.diff(bound) > 0).all()


def test_formulas_where_nothing_underflows() -> None:
    z = math.sqrt(128 * 0.2**2 / (2 - 0.2**2))
    assert capacity_lower_bound(128, 8, 0.2, "erfc") == pytest.approx(1 / (8 * erfc(z)), rel=1e-12)
    exponential = capacity_lower_bound(128, 8, 0.2, "exponential")
    assert exponential == pytest.approx(math.exp(z**2) / 8, rel=1e-12)


def test_the_two_ways_meet() -> None:
    """The tail integral takes over from the incomplete beta function without a step."""
    d = np.linspace(0.50, 0.56, 400)  # the change is inside
    log = log_cap_probability(4096, d)
    assert log[0] > -645 > log[-1]
    second_difference = np.diff(log, 2)
    assert np.abs(np.diff(second_difference)).max() < 1e-6


def test_far_tails_stay_finite_and_small_affinities_count() -> None:
    assert np.isinf(capacity_lower_bound(4096, 8, 0.7))
    assert np.isfinite(log_capacity_lower_bound(4096, 8, 0.7))
    assert log_cap_probability(128, 1e-9) < 0
    slope = float(log_cap_probability(128, 1e-9)) / 1e-9
    density = 2 * math.exp(math.lgamma(64) - math.lgamma(63.5)) / math.sqrt(math.pi)
    assert slope == pytest.approx(-density, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 8, 0.1), "hidden_size=1"),
        ((128, 0, 0.1), "num_experts=0"),
        ((128, 8, -0.1), "affinity=-0.1"),
        ((128, 8, 1.1), "affinity=1.1"),
        ((128, 8, np.nan), "affinity=nan"),
        ((128, 8, 0.1, "gaussian"), "form='gaussian'"),
    ],
)
def test_lower_bound_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        capacity_lower_bound(*arguments)


def test_lower_bound_broadcasts() -> None:
    found = capacity_lower_bound([[64], [128]], 8, [0.1, 0.2, 0.9])
    assert found.shape == (2, 3)
    assert found[1, 2] == capacity_lower_bound(128, 8, 0.9)
