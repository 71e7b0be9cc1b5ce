"""Two-stage exchange: rows go to a rank on the way, which fans them out and gathers results.

A token goes to each rank on the way once, however many experts it has behind it, and the weighted
sum of their outputs comes back as one row. In the backward pass gradients are summed on the way
first. Both stages are exchanges over fewer ranks than the expert group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.dispatch.all_to_all import exchange_rows
from etr.moe.dispatch.base import Dispatcher, Steps
from etr.moe.exchange import Traffic, arrive, depart, exchange_evenly
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import ExpertParallel, Peers
from etr.moe.routing import Routing, Selection, count_experts
from etr.moe.rows import GatherRows, SumRows
from etr.moe.select import selection_of

Stages = tuple[tuple[Peers, Peers], tuple[Tensor, Tensor]]
"""Peers on the way and peers behind each of them; the place of each expert, see `relay`."""


class Relay(Dispatcher):
    """Base of the two-stage dispatchers."""

    def stages(self, node: Peers, cross: Peers, expert: Tensor) -> Stages:
        """Who passes rows on to whom.

        Args:
            node: ranks of this rank's node.
            cross: ranks in this rank's place on every node.
            expert: number of every expert, int64 [E].
        """
        raise NotImplementedError

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        node, cross = traffic.parallel.node_peers, traffic.parallel.cross_peers
        assert node is not None
        assert cross is not None
        expert = torch.arange(routing.num_experts, device=x.device)
        stages = self.stages(node, cross, expert)
        return relay(x, routing, selection, backend, params, traffic, *stages)

    def check(self, parallel: ExpertParallel) -> None:
        if parallel.node_peers is None:
            raise ValueError(
                f"dispatch={self.name!r} needs the same number of ranks of the expert group on "
                "every node, node after node; their nodes are "
                f"{parallel.expert_peers.node_of_rank}"
            )


def relay(
    x: Tensor,
    routing: Routing,
    selection: Selection,
    backend: ExpertBackend,
    params: ExpertParams,
    traffic: Traffic,
    stages: tuple[Peers, Peers],
    place: tuple[Tensor, Tensor],
) -> Steps:
    """Dispatch over two stages.

    Args:
        stages: peers on the way, and the peers of each of those that hold the experts.
        place: of each expert, int64 [E]: the peer on the way, and the expert's number among
            those behind it (rank-major).
    """
    first, second = stages
    plan = _plan(routing, selection, first, place[0], traffic)
    yield
    rows = GatherRows.apply(x, *plan.rows)
    there = depart(rows, *plan.row_splits, first, traffic)
    weight = depart(selection.combine_weight[plan.pair], *plan.pair_splits, first, traffic)
    expert = place[1][routing.expert[plan.pair]]
    behind = torch.stack((plan.row_of_pair, expert), dim=1).to(torch.int32)
    behind_there = depart(behind, *plan.pair_splits, first, traffic)
    yield
    rows, weight_here, behind = arrive(there), arrive(weight), arrive(behind_there).long()
    token = behind[:, 0] + plan.first_row.repeat_interleave(
        plan.arriving_pairs, output_size=len(behind)
    )
    inner = _pairs(token, behind[:, 1], weight_here, len(rows), routing.num_experts // first.size)
    chosen = selection_of(inner, inner.valid, weight_here)
    total = yield from exchange_rows(rows, inner, chosen, backend, params, second, traffic)
    back = depart(total, *plan.row_splits[::-1], first, traffic)
    yield
    return SumRows.apply(arrive(back), None, *plan.rows)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Rows and pairs of the first stage; both stand by peer, and then by token.

    Args:
        rows: token of each row, rows by token, and where each token's begin; see `DispatchHandle`.
        pair: numbers of the kept pairs in the order in which they travel, int64.
        row_of_pair: the row of each, counted from the first to the same peer.
        row_splits, pair_splits: to and from each peer.
        first_row: where each peer's rows begin among those that arrive.
        arriving_pairs: pairs from each peer.
    """

    rows: tuple[Tensor, Tensor, Tensor]
    pair: Tensor
    row_of_pair: Tensor
    row_splits: tuple[list[int], list[int]]
    pair_splits: tuple[list[int], list[int]]
    first_row: Tensor
    arriving_pairs: Tensor


def _plan(
    routing: Routing, selection: Selection, peers: Peers, way_of_expert: Tensor, traffic: Traffic
) -> _Plan:
    way = F.pad(way_of_expert, (0, 1), value=peers.size)[routing.expert]
    way = torch.where(selection.kept, way, peers.size)  # [P]
    # A row for each token and peer with a kept pair between them.
    needed = way.new_zeros(peers.size + 1, routing.num_tokens, dtype=torch.bool)
    needed[way, routing.token] = True
    needed = needed[: peers.size]
    number = needed.flatten().cumsum(0).view(needed.shape) - 1
    leaving = torch.stack((needed.sum(1), count_experts(way, peers.size)), dim=1)
    arriving = exchange_evenly(leaving, peers, traffic)
    # The host waits here: splits are numbers on the host.
    sends, pair_sends, receives, pair_receives = torch.cat((leaving, arriving), 1).T.tolist()
    pair = way.argsort(stable=True)[: sum(pair_sends)]
    first_sent = leaving[:, 0].cumsum(0) - leaving[:, 0]
    return _Plan(
        rows=(
            needed.nonzero()[:, 1],
            number.T[needed.T],
            F.pad(needed.sum(0).cumsum(0), (1, 0)),
        ),
        pair=pair,
        row_of_pair=number[way[pair], routing.token[pair]] - first_sent[way[pair]],
        row_splits=(sends, receives),
        pair_splits=(pair_sends, pair_receives),
        first_row=arriving[:, 0].cumsum(0) - arriving[:, 0],
        arriving_pairs=arriving[:, 1],
    )


def _pairs(token: Tensor, expert: Tensor, gate: Tensor, num_rows: int, num_experts: int) -> Routing:
    """Pairs of received rows with the experts behind this rank."""
    return Routing(
        token=token,
        expert=expert,
        score=None,
        gate=gate,
        valid_mask=torch.ones(num_rows, dtype=torch.bool, device=token.device),
        scores=None,
        logits=None,
        probs=None,
        num_experts=num_experts,
        top_k=1,
    )
