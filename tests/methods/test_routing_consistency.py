"""Local routing consistency: worked traces, as rows of the table and in every summary.

tests/systems/test_systems_consistency.py holds both measures to brute force.
"""

from __future__ import annotations

import pytest
import torch

from etr.systems import MEASURES


def measure(text: str, experts: list[int], num_experts: int = 4) -> float:
    """Of one sequence whose tokens have one expert each."""
    chosen = torch.tensor(experts)[:, None]
    return MEASURES.parse(text).of(chosen, torch.zeros(len(chosen)), num_experts)


@pytest.mark.criterion
def test_worked_traces() -> None:
    """A constant trace has SRP = SCH = 1; two experts in turn have SRP = 2/3 in windows of 2 and
    more tokens and SCH = 1/2 with one expert held; with all held SCH = 1. Experts 0, 0, 1, 0 in
    windows of 2 have SRP = 3/4, and SCH = 2/3 with one held."""
    in_turn, worked = [0, 1] * 6, [0, 0, 1, 0]
    for segment in (2, 4, 6):
        assert measure(f"srp:segment={segment}", [3] * 8) == 1
        assert measure(f"sch:segment={segment},size=1", [3] * 8) == 1
        assert measure(f"srp:segment={segment}", in_turn) == pytest.approx(2 / 3)
        assert measure(f"sch:segment={segment},size=1", in_turn) == 1 / 2
        assert measure(f"sch:segment={segment},size=4", torch.arange(12).remainder(4).tolist()) == 1
    assert measure("srp:segment=2", worked) == 3 / 4
    assert measure("sch:segment=2,size=1", worked) == pytest.approx(2 / 3)
    assert measure("sch:segment=2,size=2", worked) == 1


def test_titles_name_the_options() -> None:
    titles = [MEASURES.parse(text).title for text in ("srp:segment=8", "sch:segment=8,size=2")]
    assert titles == ["SRP(8)", "SCH(8, 2)"]
