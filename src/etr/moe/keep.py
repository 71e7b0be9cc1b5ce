"""Selection over ranks that feed the same micro-batch: every expert sees all of its choosers.

Each expert has one owner in the selection group. Choosers' scores travel to it, it applies the
capacity policy and selects as one rank with all tokens would (rank-major order), and the answers
travel back. No gradient: gradients flow through the kept combine weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.exchange import Traffic, arrive, depart, exchange_evenly
from etr.moe.ranks import Peers
from etr.moe.routing import Limit, Routing, count_experts
from etr.moe.select import select

if TYPE_CHECKING:
    from etr.moe.layer import MoE


@dataclass(frozen=True, kw_only=True)
class Choosers(Routing):
    """The group's pairs for the experts that this rank owns; the tables are elsewhere.

    Args:
        prob: probability of each pair, float [P], or None where the policy needs none.
    """

    prob: Tensor | None

    def pair_probs(self) -> Tensor:
        if self.prob is None:
            raise ValueError("the capacity policy did not ask for probabilities")
        return self.prob


def owners(num_experts: int, peers: Peers, device: torch.device) -> Tensor:
    """Rank of the selection group that selects for each expert, int64 [E].

    Experts are spread evenly over the group. In an expert group by itself that is the rank which
    holds the expert; replicas of an expert share the work.
    """
    return torch.arange(num_experts, device=device) * peers.size // num_experts


def owned(capacity: Tensor, traffic: Traffic | None) -> Tensor:
    """Capacities of the experts that this rank owns, 0 for others, so that ranks add up; [E]."""
    peers = None if traffic is None else traffic.parallel.selection_peers
    if peers is None:
        return capacity
    own = owners(len(capacity), peers, capacity.device) == peers.rank
    return torch.where(own, capacity, 0)


@torch.no_grad()
def limit_over_group(layer: MoE, routing: Routing, limit: Limit, traffic: Traffic | None) -> Limit:
    """What the owners let this rank's pairs keep, where experts have a capacity.

    Args:
        limit: what the policy says of this rank's tokens alone; final if it sets no capacity.
        traffic: the ranks; None for one.
    Returns:
        Limit with `kept`, `choosers`, and the capacity of the experts that this rank owns.
    """
    peers = None if traffic is None else traffic.parallel.selection_peers
    if traffic is None or peers is None or limit.capacity is None:
        return limit
    pool = layer.expert_pool
    asked = _all_pairs(routing) if pool == "all" else routing
    choosers, answer = gather_choosers(layer, asked, peers, traffic)
    limit = layer.capacity.limit(
        choosers, layer.calibration.threshold, layer.calibration.affinity_p99
    )
    kept = answer(select(choosers, limit, rank_by=layer.rank_by).kept)
    if pool == "all":  # the best of all tokens, and of those the choosers
        expert = routing.expert.clamp_max(routing.num_experts - 1)
        kept = kept.view(-1, routing.num_experts)[routing.token, expert] & routing.valid
    size = routing.num_tokens
    if limit.buffer_size is not None:
        size = min(size, limit.buffer_size)
    capacity = limit.capacity if limit.capacity is None else owned(limit.capacity, traffic)
    return Limit(kept=kept, capacity=capacity, buffer_size=size, choosers=choosers)


@torch.no_grad()
def gather_choosers(
    layer: MoE, routing: Routing, peers: Peers, traffic: Traffic
) -> tuple[Choosers, Callable[[Tensor], Tensor]]:
    """Bring every pair to the owner of its expert. The host waits for the counts.

    Returns:
        The pairs that came here, in global token order; and a function that takes one bool for
        each of them and returns one for each of this rank's own pairs.
    """
    owner = owners(routing.num_experts, peers, routing.expert.device)
    owner = F.pad(owner, (0, 1), value=peers.size)[routing.expert]
    leaving = count_experts(owner, peers.size)
    tokens = leaving.new_tensor([routing.num_tokens]).expand(peers.size)
    valid = routing.num_valid_tokens().expand(peers.size)
    found = exchange_evenly(torch.stack((leaving, tokens, valid), dim=1), peers, traffic)
    sends, receives, num_tokens, num_valid = torch.cat((leaving[None], found.T)).tolist()
    order = owner.argsort(stable=True)[: sum(sends)]  # unused pairs stay here

    kind = routing.gate.dtype  # float32 or float64: expert numbers are exact in both
    columns = [routing.expert.to(kind)]
    if layer.rank_by == "score" and routing.score is not None:
        columns.append(routing.score)
    if layer.capacity.needs_probs:
        columns.append(routing.pair_probs())
    sent = depart(torch.stack(columns, dim=1)[order], sends, receives, peers, traffic)
    expert, *values = arrive(sent).unbind(1)
    score = values.pop(0) if layer.rank_by == "score" and routing.score is not None else None
    choosers = Choosers(
        token=torch.zeros_like(expert, dtype=torch.int64),  # nothing asks whose pair it is
        expert=expert.long(),
        score=score,
        gate=torch.zeros_like(expert),
        valid_mask=torch.arange(sum(num_tokens), device=expert.device) < sum(num_valid),
        scores=None,
        logits=None,
        probs=None,
        prob=values.pop(0) if values else None,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        tokens_choose=routing.tokens_choose,
    )

    def answer(kept: Tensor) -> Tensor:
        back = arrive(depart(kept.to(torch.uint8), receives, sends, peers, traffic))
        own = torch.zeros_like(routing.expert, dtype=torch.bool)
        own[order] = back.bool()
        return own

    return choosers, answer


def _all_pairs(routing: Routing) -> Routing:
    """Every valid token with every expert, by score without any bonus; pairs [T * E]."""
    assert routing.scores is not None
    shape = routing.scores.shape
    expert = torch.arange(shape[1], device=routing.expert.device).expand(shape)
    return replace(
        routing,
        expert=torch.where(routing.valid_mask[:, None], expert, shape[1]).flatten(),
        score=routing.scores.flatten(),
        gate=routing.scores.flatten(),
    )


def choosers_of(layer: MoE, routing: Routing, limit: Limit, traffic: Traffic | None) -> Routing:
    """The group's choosers of the experts that this rank owns; without a group, `routing`."""
    peers = None if traffic is None else traffic.parallel.selection_peers
    if traffic is None or peers is None:
        return routing
    return limit.choosers or gather_choosers(layer, routing, peers, traffic)[0]


def token_offset(index: Tensor, traffic: Traffic | None) -> Tensor | int:
    """How many tokens stand before this rank's in its selection group, int64 [].

    Args:
        index: numbers of this rank's tokens, int64 [T].
    """
    peers = None if traffic is None else traffic.parallel.selection_peers
    if traffic is None or peers is None:
        return 0
    own = index.new_full((peers.size, 1), len(index))
    return exchange_evenly(own, peers, traffic)[: peers.rank].sum()
