"""Samples against the exact forms, within intervals that are wide enough for all at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from etr.theory import Estimate, GeometricModel, geometric_success, simulate, true_positive
from etr.theory.geometric import CHOICES

FOUR_SIGMA = math.erf(4 / math.sqrt(2))
SAMPLES = 8_000


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("signal", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "hidden_size", "capacity"),
    [(1, 1, 1, 1), (12, 3, 3, 2), (40, 8, 12, 3), (32, 4, 4, 12)],
)
def test_samples_agree_with_the_exact_forms(
    num_tokens: int, num_experts: int, hidden_size: int, capacity: int, signal: float, noisy: bool
) -> None:
    model = GeometricModel(
        num_tokens=num_tokens,
        num_experts=num_experts,
        hidden_size=hidden_size,
        capacity=capacity,
        signal=signal,
        sigma=0.3,
        noisy=noisy,
    )
    found = simulate(model, SAMPLES, seed=1)
    for choice in CHOICES:
        exact = geometric_success(choice, capacity, num_tokens, num_experts, signal, noisy)
        low, high = found[choice].interval(FOUR_SIGMA)
        assert low - 1e-12 <= exact <= high + 1e-12, choice
    low, high = found["found"].interval(FOUR_SIGMA)
    assert low <= true_positive(signal, num_experts, noisy) <= high + 1e-12


def test_a_wrong_rate_is_noticed() -> None:
    """The interval parts the right form from the one with the mean q in place of the score."""
    from etr.theory import expert_choice_success, false_positive

    found = simulate(GeometricModel(noisy=True), SAMPLES, seed=2)["expert"]
    low, high = found.interval(FOUR_SIGMA)
    wrong = expert_choice_success(6, 64, [float(false_positive(1.5, noisy=True))])
    assert not low - 0.2 < wrong < high + 0.2


def test_a_seed_repeats_and_sigma_changes_nothing() -> None:
    one, again, scaled = (
        simulate(GeometricModel(sigma=sigma), 500, seed=3) for sigma in (1.0, 1.0, 4.0)
    )
    assert one == again == scaled
    assert one != simulate(GeometricModel(), 500, seed=4)


def test_samples_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etr.theory.monte_carlo._CHUNK_NUMBERS", 1)
    found = simulate(GeometricModel(), 7, seed=0)
    assert {estimate.samples for estimate in found.values()} == {7}


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9999])
@pytest.mark.parametrize("successes", [0, 1, 20, 50])
def test_wilson_interval_is_scipys(successes: int, confidence: float) -> None:
    expected = binomtest(successes, 50).proportion_ci(confidence, method="wilson")
    found = Estimate(successes=successes, samples=50).interval(confidence)
    assert np.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GeometricModel(num_tokens=0), "num_tokens=0"),
        (lambda: GeometricModel(num_experts=0), "num_experts=0"),
        (lambda: GeometricModel(capacity=0), "capacity=0"),
        (lambda: GeometricModel(hidden_size=7), "hidden_size=7"),
        (lambda: GeometricModel(sigma=0.0), "sigma=0"),
        (lambda: GeometricModel(signal=-1.0), "signal=-1"),
        (lambda: simulate(GeometricModel(), 0, 0), "samples=0"),
        (lambda: Estimate(successes=1, samples=2).interval(1.0), "confidence=1"),
    ],
)
def test_monte_carlo_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
