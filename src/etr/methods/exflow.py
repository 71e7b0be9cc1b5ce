"""ExFlow: experts whom tokens take one after the other stand on one rank (arXiv 2401.08383)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.checked import check_types
from etr.systems.plan import PLANNERS, Consecutive, Demand, Devices, Planner, RoundRobin
from etr.systems.program import Program
from etr.systems.travel import hops


@dataclass(frozen=True, kw_only=True)
class ExFlow(Planner):
    """Keep hops between neighbouring layers on a rank, and on a node, as many as possible.

    Layer after layer is placed by linear assignment, given the layer before, and then over again
    given both neighbours for as long as that helps; from several first layers, of which the best
    stays. So it is never worse than `consecutive` and `round_robin` on the trace it plans from.
    """

    name = "exflow"
    summary = "experts that follow each other in neighbouring layers on one rank"
    needs_choices = True

    solver: Literal["assignment", "exact"] = "assignment"
    """Linear assignments; or also an integer program, which is exact, for ranks of one node and
    small sizes."""
    seconds: float = 60.0
    """Most time for the integer program."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be > 0")

    def place(self, demand: Demand, devices: Devices) -> Tensor:
        near, table = closeness(devices), hops(demand)
        starts = [kind().place(demand, devices) for kind in (Consecutive, RoundRobin)]
        found = starts + [improved(greedy(s[0], table, near), table, near) for s in starts]
        if self.solver == "exact":
            if devices.num_nodes > 1:
                raise ValueError(
                    f"solver='exact' places on ranks of one node, not of {devices.num_nodes}; use "
                    "solver=assignment"
                )
            best = exact(table, devices.num_ranks, self.seconds)
            found += [] if best is None else [best]
        return max(found, key=lambda ranks: kept(ranks, table, near))


def closeness(devices: Devices) -> Tensor:
    """What a hop is worth: 1 if it stays on its rank, and 1 on its node if there are several."""
    rank = torch.arange(devices.num_ranks)
    node = devices.node_of(rank)
    same = (rank[:, None] == rank).long()
    return same if devices.num_nodes == 1 else same + (node[:, None] == node)


def kept(ranks: Tensor, table: Tensor, near: Tensor) -> int:
    """Worth of all hops.

    Args:
        ranks: of every expert, int64 [L, E].
        table: hops, int64 [L - 1, E, E].
        near: what one is worth between each two ranks, int64 [R, R].
    """
    return int((table * near[ranks[:-1, :, None], ranks[1:, None, :]]).sum())


def greedy(first: Tensor, table: Tensor, near: Tensor) -> Tensor:
    """Each layer best for the one before, int64 [L, E].

    Args:
        first: ranks of the first layer's experts, int64 [E].
    """
    found = [first]
    for hop in table:
        found.append(_assigned(hop.T @ near[found[-1]]))
    return torch.stack(found)


def improved(ranks: Tensor, table: Tensor, near: Tensor) -> Tensor:
    """Place layer after layer anew given both neighbours, until nothing is gained."""
    ranks, best = ranks.clone(), -1
    while (worth := kept(ranks, table, near)) > best:
        best = worth
        for place in range(len(ranks)):
            gain = torch.zeros(ranks.shape[1], len(near), dtype=torch.int64)
            if place:
                gain += table[place - 1].T @ near[ranks[place - 1]]
            if place < len(table):
                gain += table[place] @ near[ranks[place + 1]]
            ranks[place] = _assigned(gain)
    return ranks


def _assigned(gain: Tensor) -> Tensor:
    """Equally many experts to each rank for the greatest gain [E, R]: int64 [E]."""
    from scipy.optimize import linear_sum_assignment

    block = gain.shape[0] // gain.shape[1]
    _, seat = linear_sum_assignment(gain.repeat_interleave(block, 1).numpy(), maximize=True)
    return torch.from_numpy(seat).long() // block


def exact(table: Tensor, num_ranks: int, seconds: float) -> Tensor | None:
    """The most hops that stay on a rank, by integer program, int64 [L, E]; None if out of time."""
    layers, experts = table.shape[0] + 1, table.shape[1]
    program = Program()
    on = program.choices(layers, experts, num_ranks)
    for layer in on:
        for expert in layer:
            program.sums_to(expert, 1)
        for rank in layer.unbind(1):
            program.sums_to(rank, experts // num_ranks)
    program.sums_to(on[0, 0, :1], 1)  # ranks may change names
    for place, first, second in table.nonzero().tolist():
        stays = program.amounts(num_ranks, cost=-float(table[place, first, second]))
        for rank, variable in enumerate(stays):
            for end in (on[place, first, rank], on[place + 1, second, rank]):
                program.row([(variable, 1.0), (end, -1.0)], high=0.0)
    found = program.solve(seconds)
    return None if found is None else found[on].argmax(-1)


CARD = Card(
    name="exflow",
    title="ExFlow",
    summary=ExFlow.summary,
    paper="2401.08383",
    level="system",
    branch="load balancing",
    rows=(Row(table=PLANNERS, kind=ExFlow),),
    against="round_robin",
    moves=("bytes",),
    claim=(
        "Where tokens stay within hidden groups of experts, hops between ranks fall from over 0.7 "
        "of all by round robin to 0, on the trace it plans from and on a held-out one; on none of "
        "6 random traces that it plans from are they more than by round robin."
    ),
    departs=(
        "Layers are placed over again until nothing is gained, from two first layers, and the best "
        "plan stays; nodes count like ranks, in one step. A token with k experts makes k * k hops "
        "between two layers."
    ),
)
