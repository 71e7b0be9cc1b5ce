"""Bounds: never violated, valid exactly where stated, and where they say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etr.theory import (
    Bounds,
    expert_choice_paper,
    expert_choice_success,
    expert_choice_tight,
    token_choice_paper,
    token_choice_success,
    token_choice_tight,
)

SWEEP = settings(derandomize=True, deadline=None, max_examples=150)
ROUNDING = 1e-12
rate_lists = st.lists(st.floats(0, 1), min_size=1, max_size=16)


def holds(bounds: Bounds, exact: np.ndarray) -> bool:
    slack = ROUNDING * exact + 1e-15
    return bool((bounds.lower <= exact + slack).all() and (exact <= bounds.upper + slack).all())


@SWEEP
@given(st.integers(1, 3000), st.integers(1, 5000), rate_lists)
def test_token_choice_bounds_hold(capacity: int, s: int, p: list[float]) -> None:
    exact = token_choice_success(capacity, s, p)
    assert holds(token_choice_paper(capacity, s, p), exact)
    assert holds(token_choice_tight(capacity, s, p), exact)


@SWEEP
@given(st.integers(1, 3000), st.integers(1, 5000), rate_lists)
def test_expert_choice_bounds_hold(capacity: int, s: int, q: list[float]) -> None:
    exact = expert_choice_success(capacity, s, q)
    assert holds(expert_choice_paper(capacity, s, q), exact)
    assert holds(expert_choice_tight(capacity, s, q), exact)


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_bounds_hold_on_a_grid_around_their_edges(choice: str) -> None:
    capacity = np.arange(1, 400)[:, None, None]
    s = np.array([1, 2, 50, 400, 2048])[:, None]
    rates = np.array([0.0, 1e-3, 0.05, 0.25, 0.5, 1.0])[:, None].repeat(8, -1)
    exact, paper, tight = {
        "token": (token_choice_success, token_choice_paper, token_choice_tight),
        "expert": (expert_choice_success, expert_choice_paper, expert_choice_tight),
    }[choice]
    value = exact(capacity, s, rates)
    assert holds(paper(capacity, s, rates), value)
    assert holds(tight(capacity, s, rates), value)


@pytest.mark.parametrize(
    ("capacity", "valid"), [(47, False), (48, True), (80, True), (81, False), (128, False)]
)
def test_token_choice_lower_constant_has_its_range(capacity: int, valid: bool) -> None:
    bounds = token_choice_paper(capacity, 128, [0.5] * 8)
    assert bool(bounds.valid) is valid
    assert bounds.lower == pytest.approx(capacity * 4 / 128 / 5 if valid else 0.0)


def test_the_lower_constant_fails_outside_its_range() -> None:
    """So that the range is no mere caution: far above 5 s/E one fifth is too much."""
    main = 128 * 4 / 128
    assert token_choice_success(128, 128, [0.5] * 8) < main / 5


@pytest.mark.parametrize(
    ("capacity", "sides"), [(12, "upper"), (13, "none"), (51, "none"), (52, "lower")]
)
def test_expert_choice_is_silent_in_between(capacity: int, sides: str) -> None:
    s, q = 101, [0.256]  # (s-1) q / 2 = 12.8, 2 s q = 51.7
    bounds = expert_choice_paper(capacity, s, q)
    assert (bounds.upper < 1) == (sides == "upper")
    assert (bounds.lower > 0) == (sides == "lower")
    assert bounds.vacuous == (sides == "none")
    assert bounds.valid == (sides != "none")


def test_expert_choice_is_valid_only_if_no_expert_is_between() -> None:
    bounds = expert_choice_paper(16, 128, [[0.01, 0.4], [0.01, 0.12]])
    assert bounds.valid.tolist() == [True, False]
    assert (bounds.lower > 0).all()


def test_tight_forms_are_tighter() -> None:
    capacity = np.arange(1, 80)  # at 80 = 5 s/E the paper's side is the limit itself
    p, q = [0.6] * 8, [0.1] * 8
    for paper, tight in (
        (token_choice_paper(capacity, 128, p), token_choice_tight(capacity, 128, p)),
        (expert_choice_paper(capacity, 128, q), expert_choice_tight(capacity, 128, q)),
    ):
        assert (tight.lower >= paper.lower - ROUNDING).all()
        assert (tight.upper <= paper.upper + ROUNDING).all()
        assert tight.valid.all()
        assert not paper.valid.all()


@pytest.mark.parametrize("s", [128, 2048])
def test_the_token_interval_is_as_narrow_as_stated(s: int) -> None:
    capacity = np.arange(1, s + 1)
    bounds = token_choice_tight(capacity, s, [1.0] * 8)
    mean = s / 8
    width = np.sqrt(mean * 7 / 8) / (2 * mean)
    assert (bounds.upper - bounds.lower).max() == pytest.approx(width, rel=1e-9)


def test_the_upper_constant_ten_could_be_one() -> None:
    capacity = np.arange(1, 129)
    success = token_choice_success(capacity, 128, [0.5] * 8)
    assert (success <= capacity * 4 / 128 * (1 + ROUNDING)).all()


@pytest.mark.parametrize(
    "bounds", [token_choice_paper, token_choice_tight, expert_choice_paper, expert_choice_tight]
)
def test_errors_and_shapes(bounds) -> None:
    found = bounds(np.arange(1, 4)[:, None], [10, 20], np.full((2, 3), 0.5))
    assert all(part.shape == (3, 2) for part in found)
    assert found.valid.dtype == bool
    for arguments in ((0, 10, [0.5]), (1, 0, [0.5]), (1, 10, [1.5]), (1, 10, 0.5)):
        with pytest.raises(ValueError, match=r"capacity|num_tokens|positive"):
            bounds(*arguments)
