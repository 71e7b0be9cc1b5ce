"""Medians, quartiles, slopes, and the order in which systems take turns."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import budget
from benchmarks.budget import seconds_of_a_row, too_long
from benchmarks.cases import Case
from benchmarks.rounds import STRIDE, interleaved, plan_rounds
from benchmarks.spread import log_slope, paired_ratio, spread


def test_spread_interpolates_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert (found.low, found.median, found.high, found.count) == (1.75, 2.5, 3.25, 4)


def test_spread_of_one_value_is_that_value() -> None:
    found = spread([3.0])
    assert (found.low, found.median, found.high) == (3.0, 3.0, 3.0)


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        spread([])


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that becomes ten times slower does not change the ratio."""
    found = paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert found is not None
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


def test_ratios_use_the_rounds_that_both_ran() -> None:
    found = paired_ratio([8.0, None, None, 6.0], [2.0, 1.0, 1.0, 2.0], scale=0.5)
    assert found is not None
    assert (found.median, found.count) == (1.75, 2)


def test_no_common_round_is_no_ratio() -> None:
    assert paired_ratio([1.0, None], [None, 1.0]) is None


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_log_slope_finds_the_exponent(power: float) -> None:
    sizes = [128.0, 256.0, 1024.0]
    assert log_slope(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_log_slope_needs_two_sizes() -> None:
    with pytest.raises(ValueError, match="two different"):
        log_slope([8.0, 8.0], [1.0, 2.0])


def test_the_budget_sets_the_rounds() -> None:
    expected = {"a": 1.0, "b": 1.0}
    assert plan_rounds(expected, 10.0).rounds == 5
    assert plan_rounds(expected, 2.0).rounds == 3
    assert plan_rounds(expected, 1000.0).rounds == 25
    assert [plan_rounds(expected, budget).rounds for budget in (1.6, 1.4)] == [3, 2]


def test_a_case_is_left_out_by_what_the_machine_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens take two experts each: 512 rows times three matrices, forward and backward."""
    cpu, sizes = torch.device("cpu"), {"num_tokens": 256, "hidden_size": 8, "num_experts": 4}
    case = Case(group="layer", **sizes, top_k=2, intermediate_size=8, budget=9.0)
    for seconds, left_out in ((9.0 / (512 * 9), False), (9.1 / (512 * 9), True)):
        monkeypatch.setattr(budget, "seconds_of_a_row", lambda *_, value=seconds: value)
        assert bool(too_long(case, cpu)) == left_out
        served = dataclasses.replace(case, group="few", budget=3.0)
        assert bool(too_long(served, cpu)) == left_out
        assert not too_long(dataclasses.replace(case, group="memory"), cpu)
        assert not too_long(case, torch.device("cuda"))


def test_a_product_takes_its_time() -> None:
    sizes = {"num_tokens": 64, "hidden_size": 8, "num_experts": 4, "intermediate_size": 8}
    assert seconds_of_a_row(Case(group="layer", **sizes, budget=1.0), torch.device("cpu")) > 0


def test_slow_systems_run_less_often() -> None:
    plan = plan_rounds({"a": 1.0, "b": 1.1, "c": 1.2, "slow": 40.0}, 133.0)
    assert plan.stride == {"a": 1, "b": 1, "c": 1, "slow": STRIDE}
    assert plan.rounds == 10


def test_systems_take_turns() -> None:
    order: list[str] = []

    def step(name: str) -> dict[str, float]:
        order.append(name)
        return {"step": float(len(order))}

    plan = plan_rounds({"a": 1.0, "b": 1.0, "slow": 9.0}, 6.0, least=5)
    steps = {name: (lambda name=name: step(name)) for name in ("a", "b", "slow")}  # type: ignore[misc]
    done: list[tuple[int, int]] = []
    found = interleaved(steps, plan, lambda *counts: done.append(counts))
    assert order == ["a", "b", "slow", *["a", "b"] * 3, "a", "b", "slow"]
    assert found["slow"]["step"] == [3.0, None, None, None, 12.0]
    assert found["a"]["step"] == [1.0, 4.0, 6.0, 8.0, 10.0]
    assert done[-1] == (5, 5)
