"""MoETuner: even clusters, and the heaviest links; worked example, brute force, programs."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from torch import Tensor
from traces import some, ways_to_place

from etr.methods.moetuner import (
    MoETuner,
    best_ranks,
    dealt_by_load,
    deviation,
    heaviest,
    number_of_partitions,
    partition_program,
    ranks_program,
    slowness,
    swapped,
)
from etr.systems import PLANNERS, Demand, Devices, Plan, hops, travel
from etr.systems.travel import between_ranks

LOAD = torch.tensor([9, 1, 5, 3, 2, 4])
TWO_NODES = Devices(num_ranks=4, num_nodes=2)


def trace(seed: int, layers: int = 4, experts: int = 8, tokens: int = 2000) -> Demand:
    """Tokens walk from layer to layer by random probabilities, of which a few are large."""
    torch.manual_seed(seed)
    steep = torch.distributions.Dirichlet(torch.full((experts,), 0.3))
    expert = torch.distributions.Dirichlet(torch.full((experts,), 0.7)).sample()
    expert = expert.multinomial(tokens, replacement=True)
    walk = [expert]
    for _ in range(layers - 1):
        expert = steep.sample((experts,))[expert].multinomial(1).flatten()
        walk.append(expert)
    return Demand.of(torch.stack(walk)[..., None], torch.arange(tokens) // 10, experts)


def flows_of(demand: Demand, plan: Plan) -> Tensor:
    return between_ranks(hops(demand), plan.rank_of_expert, plan.devices.num_ranks)


def time_of(demand: Demand, plan: Plan) -> float:
    stay = torch.arange(plan.devices.num_ranks).repeat(len(demand.counts), 1)
    return heaviest(flows_of(demand, plan), stay, slowness(plan.devices, 9.0))


def least_time(flows: Tensor, slow: Tensor) -> float:
    """Of every way to give each layer's clusters other ranks."""
    ways = list(map(torch.tensor, permutations(range(len(slow)))))
    total = torch.zeros(len(ways), dtype=torch.float64)
    for flow in flows:
        both = [heaviest(flow[None], torch.stack(two), slow) for two in product(ways, repeat=2)]
        total = total[..., None] + torch.tensor(both).view(len(ways), len(ways))
    return float(total.min())


def least_deviation(load: Tensor, ways: Tensor) -> float:
    sums = torch.zeros(len(ways), 4).scatter_add(1, ways, load.float().expand(len(ways), -1))
    return float((sums - sums.mean(1, keepdim=True)).abs().sum(1).min())


@pytest.mark.criterion
def test_both_stages_are_best_and_links_get_lighter() -> None:
    """Of 8 experts in 4 layers on 4 ranks, with links 9 : 1, both stages equal brute force, and the
    heaviest links take 0.8 of the time of consecutive experts or less on every one of 5 random
    traces; on one of them integer programs come within 2.5 %, for clusters of every layer and ranks
    of two layers."""
    ways, slow = torch.stack(ways_to_place(8, 4)), slowness(TWO_NODES, 9.0)
    for seed in range(5):
        demand = trace(seed)
        plan = MoETuner().plan(demand, TWO_NODES)
        before = PLANNERS["consecutive"]().plan(demand, TWO_NODES)
        for load, rank in zip(demand.counts, plan.rank_of_expert, strict=True):
            assert deviation(load, rank, 4) == pytest.approx(least_deviation(load, ways))
        assert time_of(demand, plan) == pytest.approx(least_time(flows_of(demand, plan), slow))
        assert time_of(demand, plan) <= 0.8 * time_of(demand, before)
        assert travel(demand, plan).max_over_mean <= travel(demand, before).max_over_mean
    for load in demand.counts:
        program = MoETuner(solver="program").clusters(load, 4)
        assert deviation(load, program, 4) <= 1.025 * least_deviation(load, ways) + 1e-9
    flows = flows_of(demand, plan)[:1]
    ranks = ranks_program(flows, slow, None, seconds=60, gap=0.025)
    assert ranks is not None
    assert heaviest(flows, ranks, slow) <= 1.025 * least_time(flows, slow) + 1e-9


def test_worked_example() -> None:
    """On 3 ranks equal clusters deviate by 4 at least, the first of them 10, 8 and 6; unequal ones
    by 2."""
    found = MoETuner().clusters(LOAD, 3)
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
    assert deviation(LOAD, found, 3) == 4
    unequal = partition_program(LOAD, 3, seconds=60, gap=0.0, equal=False)
    assert unequal is not None
    assert deviation(LOAD, unequal, 3) == pytest.approx(2)
    assert number_of_partitions(6, 3) == 15


def test_trying_every_way_beats_dealing() -> None:
    """3, 3, 0 and three times 2 are level; experts dealt by load end up 7 and 5."""
    load = torch.tensor([3, 3, 2, 2, 2, 0])
    assert deviation(load, MoETuner().clusters(load, 2), 2) == 0
    assert deviation(load, dealt_by_load(load, 2), 2) == 2


def test_names_of_ranks_and_their_links_may_change_together() -> None:
    flows, slow = hops(some(1, experts=4)), slowness(TWO_NODES, 9.0)
    rank, other = best_ranks(flows, slow), torch.tensor([2, 0, 3, 1])
    names = torch.empty_like(slow)
    names[other[:, None], other] = slow
    assert heaviest(flows, other[rank], names) == heaviest(flows, rank, slow)


def test_what_stays_on_a_rank_costs_nothing() -> None:
    demand, one = some(2), Devices(num_ranks=1)
    assert time_of(demand, MoETuner().plan(demand, one)) == 0


def test_many_ranks_are_refined_by_swaps() -> None:
    flows, slow = hops(some(3, experts=4)), slowness(TWO_NODES, 9.0)
    stay = torch.arange(4).repeat(3, 1)
    found = heaviest(flows, swapped(stay, flows, slow), slow)
    assert heaviest(flows, best_ranks(flows, slow), slow) <= found < heaviest(flows, stay, slow)
    assert dealt_by_load(LOAD, 3).bincount().tolist() == [2, 2, 2]


def test_the_published_form_has_equal_sums_over_layers_alone() -> None:
    """Ranks hold unequal numbers of a layer's experts and equal ones in all."""
    counts = torch.tensor([[3, 1, 1, 1], [3, 1, 1, 1]])
    walk = [torch.arange(4).repeat_interleave(row) for row in counts]
    demand = Demand.of(torch.stack(walk)[..., None], torch.zeros(6).long(), 4)
    plan = MoETuner(equal=False).plan(demand, Devices(num_ranks=2))
    assert not plan.is_even
    assert plan.rank_of_expert.flatten().bincount().tolist() == [4, 4]
    assert travel(demand, plan).max_over_mean == 1


@pytest.mark.parametrize("option", ["solver=best", "seconds=0", "bandwidth_ratio=0", "gap=1"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        PLANNERS.parse(f"moetuner:{option}")
