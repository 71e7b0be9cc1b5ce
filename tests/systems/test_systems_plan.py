"""Planners, what a plan says, and what tokens travel under it."""

from __future__ import annotations

import pytest
import torch

from etr.systems import PLANNERS, Demand, Devices, Plan, travel

L, N, K, E = 3, 40, 2, 8


def a_demand(seed: int = 0) -> Demand:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.rand(L, N, E, generator=generator).topk(K).indices
    choices[torch.rand(L, N, K, generator=generator) < 0.2] = -1
    return Demand.of(choices, torch.arange(N) // 8, E)


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_planner_gives_each_rank_equally_many_experts(name, ranks):
    """A row that plans otherwise is a dispatcher's, and says so by `is_even`."""
    demand, devices = a_demand(), Devices(num_ranks=ranks)
    plan = PLANNERS[name]().plan(demand, devices, source="model")
    assert plan.rank_of_expert.shape == (L, E)
    assert plan.is_even
    again = Plan.from_dict(plan.to_dict())
    assert again.to_dict() == plan.to_dict()
    assert torch.equal(again.rank_of_expert, plan.rank_of_expert)
    # Renumbered by `order`, consecutive blocks are what the plan asks for.
    blocks = plan.rank_of_expert.gather(1, plan.order())
    assert blocks.tolist() == [[e * ranks // E for e in range(E)]] * L


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_refuses_experts_that_do_not_divide(name):
    with pytest.raises(ValueError, match="num_experts=8 is not a multiple of num_ranks=3"):
        PLANNERS[name]().plan(a_demand(), Devices(num_ranks=3))


def test_placements():
    demand = Demand(counts=torch.tensor([[1, 9, 5, 2], [4, 4, 4, 4]]))
    devices = Devices(num_ranks=2)

    def place(text: str) -> list[list[int]]:
        return PLANNERS.parse(text).plan(demand, devices).rank_of_expert.tolist()

    assert place("consecutive") == [[0, 0, 1, 1]] * 2
    assert place("round_robin") == [[0, 1, 0, 1]] * 2
    # By load 9, 5, 2, 1 in the first layer; equal loads in order of number.
    assert place("round_robin:by_load=true") == [[1, 0, 1, 0], [0, 1, 0, 1]]
    order = PLANNERS.parse("round_robin").plan(demand, devices).order()
    assert order.tolist() == [[0, 2, 1, 3]] * 2


def test_the_published_example_of_hops():
    """E = 4, 2 ranks, 2 layers: hops 0->3 5, 1->2 4, 2->1 5, 3->0 4, 0->1 1 (arXiv 2401.08383)."""
    hops = [(0, 3)] * 5 + [(1, 2)] * 4 + [(2, 1)] * 5 + [(3, 0)] * 4 + [(0, 1)]
    choices = torch.tensor(hops).T[:, :, None]
    demand = Demand.of(choices, torch.zeros(len(hops), dtype=torch.int64), 4)

    def stay(*ranks: list[int]) -> int:
        plan = Plan(rank_of_expert=torch.tensor(ranks), devices=Devices(num_ranks=2))
        found = travel(demand, plan)
        return found.hops - found.hops_between_ranks

    assert stay([0, 0, 1, 1], [0, 0, 1, 1]) == 1
    assert stay([0, 1, 0, 1], [0, 1, 0, 1]) == 0
    assert stay([0, 0, 1, 1], [1, 1, 0, 0]) == 18
    assert stay([0, 1, 0, 1], [1, 0, 1, 0]) == 19


@pytest.mark.parametrize("name", PLANNERS)
def test_travel_equals_plain_loops(name):
    demand, devices = a_demand(1), Devices(num_ranks=4, num_nodes=2)
    plan = PLANNERS[name]().plan(demand, devices)
    found = travel(demand, plan)
    ranks, choices = plan.rank_of_expert.tolist(), demand.choices.tolist()
    pairs, hops, load = [], [], [[0] * 4 for _ in range(L)]
    for layer in range(L):
        for token in range(N):
            home = int(demand.sequence[token]) % 4
            for expert in choices[layer][token]:
                if expert < 0:
                    continue
                rank = ranks[layer][expert]
                pairs.append((home, rank))
                load[layer][rank] += 1
                following = choices[layer + 1][token] if layer + 1 < L else ()
                hops += [(rank, ranks[layer + 1][other]) for other in following if other >= 0]
    assert (found.pairs, found.hops) == (len(pairs), len(hops))
    assert found.pairs_between_ranks == sum(a != b for a, b in pairs)
    assert found.pairs_between_nodes == sum(a // 2 != b // 2 for a, b in pairs)
    assert found.hops_between_ranks == sum(a != b for a, b in hops)
    assert found.hops_between_nodes == sum(a // 2 != b // 2 for a, b in hops)
    assert found.load.tolist() == load
    assert found.max_over_mean == pytest.approx(max(max(row) * 4 / sum(row) for row in load))


def test_one_rank_sends_nothing_and_empty_traces_are_ordinary():
    plan = PLANNERS["consecutive"]().plan(a_demand(), Devices(num_ranks=1))
    found = travel(a_demand(), plan)
    assert (found.pairs_between_ranks, found.hops_between_ranks, found.max_over_mean) == (0, 0, 1)
    empty = Demand.of(torch.zeros(L, 0, K, dtype=torch.int64), torch.zeros(0), E)
    found = travel(empty, PLANNERS["round_robin"]().plan(empty, Devices(num_ranks=2)))
    assert (found.pairs, found.hops, found.max_over_mean) == (0, 0, 0)


def test_uneven_plans_are_not_carried_out_by_renumbering():
    plan = Plan(rank_of_expert=torch.tensor([[0, 0, 0, 1]]), devices=Devices(num_ranks=2))
    assert not plan.is_even
    with pytest.raises(ValueError, match="different numbers of experts"):
        plan.order()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 0}, "num_ranks=0"),
        ({"num_nodes": 3}, "num_ranks=2 is not a multiple of num_nodes=3"),
        ({"rank_of_expert": [[0, 2]]}, "rank_of_expert holds 2; ranks are 0 to 1"),
        ({"rank_of_expert": [[0, -1]]}, "rank_of_expert holds -1"),
        ({"rank_of_expert": [[0, True]]}, "whole numbers"),
        ({"rank_of_expert": [[0], [0, 1]]}, "plan.json is not a plan"),
        ({"rank_of_expert": []}, r"\[L, E\]"),
        ({"rank_of_expert": None}, "plan.json is not a plan"),
    ],
)
def test_damaged_plans_are_refused(change, message):
    good = PLANNERS["consecutive"]().plan(a_demand(), Devices(num_ranks=2)).to_dict()
    with pytest.raises(ValueError, match=message):
        Plan.from_dict({**good, **change}, "plan.json")


def test_what_is_not_a_plan_and_what_is_for_other_sizes():
    for other in ({}, [], 3, {"num_ranks": 2}):
        with pytest.raises(ValueError, match=r"plan.json is not a plan of etr plan"):
            Plan.from_dict(other, "plan.json")
    plan = Plan(rank_of_expert=torch.zeros(2, E).long(), devices=Devices(num_ranks=1))
    with pytest.raises(ValueError, match=r"2 layers of 8 experts, the choices for 3 layers of 8"):
        travel(a_demand(), plan)
    with pytest.raises(ValueError, match="choices holds 9; num_experts=8"):
        Demand.of(torch.full((1, 1, 1), 9), torch.zeros(1), E)
