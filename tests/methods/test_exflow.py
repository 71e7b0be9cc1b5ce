"""ExFlow: hops stay on a rank; worked example, planted groups, brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from traces import planted, share_between_ranks, some, ways_to_place

from etr.methods.exflow import ExFlow, closeness, exact, greedy, improved, kept
from etr.systems import PLANNERS, Demand, Devices, hops, travel

TWO, FOUR = Devices(num_ranks=2), Devices(num_ranks=4)


def worked() -> Tensor:
    """Hops 0 to 3 five times, 1 to 2 four, 2 to 1 five, 3 to 0 four, 0 to 1 once."""
    table = torch.zeros(1, 4, 4, dtype=torch.int64)
    for first, second, count in ((0, 3, 5), (1, 2, 4), (2, 1, 5), (3, 0, 4), (0, 1, 1)):
        table[0, first, second] = count
    return table


@pytest.mark.criterion
@pytest.mark.parametrize("k", [1, 2])
def test_planted_groups_are_found(k: int) -> None:
    """Where tokens stay within hidden groups of experts, hops between ranks fall from over 0.7 of
    all by round robin to 0, on the trace it plans from and on a held-out one; on none of 6 random
    traces that it plans from are they more than by round robin."""
    seen, held_out = planted(0, k=k), planted(1, k=k)
    rival = PLANNERS["round_robin"]()
    plan = ExFlow().plan(seen, FOUR)
    for demand in (seen, held_out):
        assert share_between_ranks(travel(demand, rival.plan(demand, FOUR))) > 0.7
        assert share_between_ranks(travel(demand, plan)) == 0
    for seed in range(6):
        demand = some(seed)
        ours, theirs = (travel(demand, p.plan(demand, TWO)) for p in (ExFlow(), rival))
        assert ours.hops_between_ranks <= theirs.hops_between_ranks


def test_worked_example() -> None:
    """Of 19 hops 1 stays with consecutive experts, none by round robin, 18 by greedy assignment
    from consecutive ones, and all by the program."""
    near, table = closeness(TWO), worked()
    consecutive, in_turn = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert kept(consecutive.repeat(2, 1), table, near) == 1
    assert kept(in_turn.repeat(2, 1), table, near) == 0
    found = greedy(consecutive, table, near)
    assert (found[1].tolist(), kept(found, table, near)) == ([1, 1, 0, 0], 18)
    best = exact(table, 2, seconds=60)
    assert best is not None
    assert best.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert kept(best, table, near) == 19


@pytest.mark.parametrize("seed", range(3))
def test_the_program_equals_brute_force_and_assignments_do_not_lose(seed: int) -> None:
    demand = some(seed, layers=2)
    table, near = hops(demand), closeness(TWO)
    ways = ways_to_place(4, 2)
    best = max(kept(torch.stack(way), table, near) for way in product(ways, ways))
    plan = ExFlow(solver="exact").plan(demand, TWO)
    assert kept(plan.rank_of_expert, table, near) == best
    start = torch.tensor([0, 0, 1, 1])
    first = greedy(start, table, near)
    assert kept(first, table, near) <= kept(improved(first, table, near), table, near) <= best


def test_nodes_count_too() -> None:
    """Groups of twice a rank's experts fit on a node: nothing leaves it."""
    demand, devices = planted(0, groups=2), Devices(num_ranks=4, num_nodes=2)
    assert travel(demand, ExFlow().plan(demand, devices)).hops_between_nodes == 0
    with pytest.raises(ValueError, match="solver='exact' places on ranks of one node, not of 2"):
        ExFlow(solver="exact").plan(demand, devices)


def test_one_layer_and_no_tokens() -> None:
    nothing = Demand.of(torch.zeros(3, 0, 2, dtype=torch.int64), torch.zeros(0).long(), 4)
    for demand in (some(0, layers=1), nothing):
        assert ExFlow().plan(demand, TWO).is_even


@pytest.mark.parametrize("option", ["solver=best", "seconds=0"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        PLANNERS.parse(f"exflow:{option}")


def test_counts_alone_do_not_do() -> None:
    with pytest.raises(ValueError, match="planner 'exflow' needs the choices of every token"):
        ExFlow().plan(Demand(counts=torch.ones(2, 4).long()), TWO)
