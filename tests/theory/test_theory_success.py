"""Exact success rates against enumeration, SciPy's distributions and their own inverses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from etr.theory import (
    expected_kept,
    expert_choice_success,
    required_capacity,
    token_choice_success,
)

SMALL = [(s, e) for s in (1, 2, 3, 4, 5, 6) for e in (1, 2, 3)]


def enumerated_token_choice(capacity: int, s: int, p: list[float]) -> float:
    """All classes, places and choices of the others, one by one."""
    experts = range(len(p))
    total = 0.0
    for expert, place in itertools.product(experts, range(s)):
        for choices in itertools.product(experts, repeat=s - 1):
            before = choices[:place].count(expert)
            total += p[expert] * (before < capacity)
    return total / (len(p) * s * len(p) ** (s - 1))


def enumerated_expert_choice(capacity: int, s: int, q: list[float]) -> float:
    """All sets of tokens that outscore the telling one."""
    total = 0.0
    for rate in q:
        for better in itertools.product((True, False), repeat=s - 1):
            weight = np.prod([rate if x else 1 - rate for x in better])
            total += weight * (sum(better) < capacity)
    return total / len(q)


@pytest.mark.parametrize(("s", "num_experts"), SMALL)
def test_against_enumeration(s: int, num_experts: int) -> None:
    rates = [0.2, 0.9, 0.55][:num_experts]
    for capacity in range(1, s + 2):
        token = token_choice_success(capacity, s, rates)
        assert token == pytest.approx(enumerated_token_choice(capacity, s, rates), abs=1e-12)
        expert = expert_choice_success(capacity, s, rates)
        assert expert == pytest.approx(enumerated_expert_choice(capacity, s, rates), abs=1e-12)


@pytest.mark.parametrize("capacity", [1, 3, 10, 16, 40])
def test_token_choice_is_the_mean_over_places(capacity: int) -> None:
    places = np.arange(1, 129)
    mean = binom.cdf(capacity - 1, places - 1, 1 / 8).mean()
    found = token_choice_success(capacity, 128, np.linspace(0.1, 0.8, 8))
    assert found == pytest.approx(0.45 * mean, rel=1e-12)


@pytest.mark.parametrize("capacity", [1, 5, 16, 40])
def test_expected_kept_is_the_mean_of_a_minimum(capacity: int) -> None:
    x = np.arange(129)
    mean = (np.minimum(x, capacity) * binom.pmf(x, 128, 1 / 8)).sum()
    assert expected_kept(capacity, 128, 8) == pytest.approx(mean, rel=1e-12)


def test_everything_broadcasts() -> None:
    capacity, s = np.array([1, 5, 20])[:, None], np.array([32, 128])
    rates = np.full((2, 4), 0.3)
    for success in (token_choice_success, expert_choice_success):
        found = success(capacity, s, rates)
        assert found.shape == (3, 2)
        assert found.dtype == np.float64
        for i, j in np.ndindex(3, 2):
            assert found[i, j] == success(capacity[i, 0], s[j], rates[j])


def test_room_for_all_loses_none() -> None:
    assert token_choice_success(50, 50, [0.3, 0.5]) == pytest.approx(0.4, abs=1e-15)
    assert expert_choice_success(50, 50, [0.3, 0.5]) == 1.0


@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_required_capacity_is_the_least(wanted: float) -> None:
    q = [0.1, 0.3]

    def success(c: np.ndarray) -> np.ndarray:
        return expert_choice_success(c, 128, q)

    found = int(required_capacity(wanted, 128, success))
    assert expert_choice_success(found, 128, q) >= wanted
    if found > 1:
        assert expert_choice_success(found - 1, 128, q) < wanted
    assert (found == 1) == (wanted == 0.0)


def test_required_capacity_of_arrays() -> None:
    wanted, s = np.array([[0.1], [0.4]]), np.array([64, 256])
    found = required_capacity(wanted, s, lambda c: token_choice_success(c, s, [0.5] * 8))
    assert found.dtype == np.int64
    for i, j in np.ndindex(2, 2):
        one = required_capacity(
            wanted[i, 0], s[j], lambda c, j=j: token_choice_success(c, s[j], [0.5] * 8)
        )
        assert found[i, j] == one


def test_a_rate_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted=0.6 is out of reach.*0.5"):
        required_capacity(0.6, 64, lambda c: token_choice_success(c, 64, [0.5] * 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, [0.5]), "capacity=0"),
        ((1.5, 10, [0.5]), "capacity=1.5"),
        ((np.nan, 10, [0.5]), "capacity=nan"),
        ((1, 0, [0.5]), "num_tokens=0"),
        ((1, np.inf, [0.5]), "num_tokens=inf"),
        ((1, 10, [0.5, 1.1]), "positive=1.1"),
        ((1, 10, [-0.1]), "positive=-0.1"),
        ((1, 10, 0.5), "one probability per expert"),
        ((1, 10, []), "one probability per expert"),
    ],
)
@pytest.mark.parametrize("success", [token_choice_success, expert_choice_success])
def test_errors_outside_ranges(success, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        success(*arguments)
