"""The geometric model: exact forms against other forms of the same, and the crossover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom, norm

from etr.theory import (
    crossover,
    expert_choice_success,
    false_positive,
    geometric_success,
    token_choice_success,
    true_positive,
)

SIGNALS = np.linspace(0, 6, 61)


@pytest.mark.parametrize("signal", [0.0, 0.7, 1.5, 4.0])
def test_fixed_rates_are_the_exact_forms(signal: float) -> None:
    p, q = [float(true_positive(signal, 8))] * 8, [float(false_positive(signal))] * 8
    assert p[0] == pytest.approx(norm.cdf(signal) ** 7, rel=1e-12)
    assert q[0] == pytest.approx(norm.sf(signal), rel=1e-12)
    for c in (1, 10, 30):
        token = geometric_success("token", c, 128, 8, signal)
        assert token == pytest.approx(token_choice_success(c, 128, p), rel=1e-12)
        expert = geometric_success("expert", c, 128, 8, signal)
        assert expert == pytest.approx(expert_choice_success(c, 128, q), rel=1e-12)


@pytest.mark.parametrize("choice", ["expert", "both"])
@pytest.mark.parametrize("capacity", [1, 10, 40])
def test_noisy_rates_are_means_over_the_score(choice: str, capacity: int) -> None:
    def weighted(x: float) -> float:
        return norm.pdf(x - 1.5) * float(geometric_success(choice, capacity, 128, 8, x))

    mean = quad(weighted, 0, 10, epsabs=1e-10)[0]  # a fixed score below 0 is not offered,
    below = quad(  # so that part is written out
        lambda x: (
            norm.pdf(x - 1.5)
            * (norm.cdf(x) ** 7 if choice == "both" else 1)
            * binom.cdf(
                capacity - 1,
                127,
                (1 - norm.cdf(x) ** 8) / 8 if choice == "both" else norm.sf(x),
            )
        ),
        -8,
        0,
        epsabs=1e-10,
    )[0]
    found = geometric_success(choice, capacity, 128, 8, 1.5, noisy=True)
    assert found == pytest.approx(mean + below, abs=1e-8)


def test_noisy_marginals() -> None:
    assert false_positive(1.5, noisy=True) == pytest.approx(norm.sf(1.5 / math.sqrt(2)))
    by_two = true_positive(1.5, 2, noisy=True)  # one rival: the same event
    assert by_two == pytest.approx(norm.cdf(1.5 / math.sqrt(2)), rel=1e-12)
    assert true_positive(2.0, 1, noisy=True) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_without_signal_the_noisy_token_is_one_of_all(num_experts: int) -> None:
    for c in (1, 3, 50):
        expert = geometric_success("expert", c, 100, num_experts, 0.0, noisy=True)
        assert expert == pytest.approx(c / 100, rel=1e-9)
        assert true_positive(0.0, num_experts, True) == pytest.approx(1 / num_experts, rel=1e-9)


@pytest.mark.parametrize("noisy", [False, True])
def test_both_never_beats_choosing_the_expert(noisy: bool) -> None:
    c = np.arange(1, 129)[:, None]
    both = geometric_success("both", c, 128, 8, SIGNALS, noisy)
    assert (both <= true_positive(SIGNALS, 8, noisy) + 1e-12).all()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 600), st.integers(1, 300), st.integers(1, 64))
def test_with_noise_expert_choice_is_never_behind(s: int, c: int, num_experts: int) -> None:
    expert = geometric_success("expert", c, s, num_experts, SIGNALS, noisy=True)
    for other in ("token", "both"):
        rival = geometric_success(other, c, s, num_experts, SIGNALS, noisy=True)
        assert (expert - rival).min() > -1e-11
    assert crossover(c, s, num_experts, noisy=True) == 0


@pytest.mark.parametrize(("s", "num_experts"), [(64, 4), (128, 8), (1024, 64)])
def test_fixed_crossover_parts_the_signals(s: int, num_experts: int) -> None:
    c = np.unique(np.ceil(np.array([0.1, 0.6, 1.0, 1.1]) * s / num_experts))
    found = crossover(c, s, num_experts)
    assert (np.diff(found) < 0).all()
    for capacity, signal in zip(c, found, strict=True):
        lead = geometric_success("expert", capacity, s, num_experts, SIGNALS) - geometric_success(
            "token", capacity, s, num_experts, SIGNALS
        )
        before, after = (signal > SIGNALS) & (SIGNALS > 0.3), signal < SIGNALS
        assert (lead[before] < 0).all()
        assert (lead[after] >= -1e-12).all()


def test_crossover_shapes_and_extremes() -> None:
    found = crossover([[5], [16]], [128, 256, 512], 8)
    assert found.shape == (2, 3)
    assert found[1, 0] == crossover(16, 128, 8)
    assert crossover(128, 128, 8) == 0  # room for all: expert choice loses nothing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometric_success("none", 1, 2, 2, 1.0), "choice='none'"),
        (lambda: geometric_success("token", 1, 2, 2, -1.0), "signal=-1"),
        (lambda: geometric_success("both", 1, 2, 2, 31.0), "signal=31"),
        (lambda: geometric_success("expert", 1, 2, 0, 1.0), "num_experts=0"),
        (lambda: true_positive(np.nan, 2), "signal=nan"),
        (lambda: false_positive(-1.0), "signal=-1"),
        (lambda: crossover(0, 2, 2), "capacity=0"),
    ],
)
def test_geometric_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
