"""What experts keep of what tokens want: capacity and selection as one stage.

Over ranks that feed the same micro-batch every expert sees all of its choosers. Each expert has one
owner in the selection group. Choosers' scores travel to it, it applies the capacity policy and
selects as one rank with all tokens would (rank-major order), and the answers travel back. No
gradient: gradients flow through the kept combine weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.calibration import Calibration
from etr.moe.capacity import CapacityPolicy
from etr.moe.exchange import Traffic, arrive, depart, exchange_evenly
from etr.moe.ranks import Peers
from etr.moe.routing import Kept, Limit, Routing, Selection, count_experts
from etr.moe.select import ExpertPool, Normalize, RankBy, select


@dataclass(frozen=True, kw_only=True)
class Order:
    """How experts rank choosers, and tokens weigh experts.

    Args:
        rank_by: order of an expert's queue: score, or position in the batch.
        pool: whom an expert ranks: its choosers, or all tokens.
        normalize: divide weights by the sum over the token's chosen or kept experts.
        num_weighed: how many experts, the first, normalisation counts; None for all.
        scale: factor on all combine weights, after any normalisation.
    """

    rank_by: RankBy
    pool: ExpertPool = "choosers"
    normalize: Normalize = "none"
    num_weighed: int | None = None
    scale: float = 1.0

    def scaled(self, selection: Selection) -> Selection:
        """A selection with its combine weights scaled."""
        if self.scale == 1:
            return selection
        return replace(selection, combine_weight=selection.combine_weight * self.scale)


def keep(
    routing: Routing,
    limit: Limit | None,
    policy: CapacityPolicy,
    learned: Calibration,
    order: Order,
    traffic: Traffic | None = None,
    *,
    gather: bool = False,
) -> Kept:
    """Keep what a capacity policy allows.

    Args:
        routing: what this rank's tokens want.
        limit: what is allowed instead of what the policy says; sets no capacity.
        policy: says how many of its choosers an expert keeps.
        learned: thresholds that the policy may use.
        order: how experts rank choosers, and tokens weigh experts.
        traffic: the ranks whose tokens compete; None for this rank's alone.
        gather: bring choosers to their experts' owners, also where no capacity needs it.
    """

    def allowed(choosers: Routing) -> Limit:
        return policy.limit(choosers, learned.threshold, learned.affinity_p99)

    limit = allowed(routing) if limit is None else limit
    peers = None if traffic is None else traffic.parallel.selection_peers
    choosers, among = routing, None
    if traffic is not None and peers is not None:
        score, prob = order.rank_by == "score", policy.needs_probs
        meet = partial(_gather, score=score, prob=prob, peers=peers, traffic=traffic)
        if limit.capacity is not None:
            choosers, limit, among = _owners_keep(routing, allowed, order, peers, meet)
        elif gather or not routing.tokens_choose:
            choosers, _ = meet(routing)
    selection = select(
        routing,
        limit if among is None else Limit(buffer_size=limit.buffer_size),
        rank_by=order.rank_by,
        normalize=order.normalize,
        expert_pool=order.pool,
        among=among,
        num_weighed=order.num_weighed,
    )
    queued = among is None and limit.min_score is None and order.pool == "choosers"

    if routing.tokens_choose:

        def count() -> tuple[Tensor, Tensor]:
            return _asked_for(routing, limit, selection, queued)
    else:  # now: what was learned may change before it is read
        counted = _taken(selection, limit, choosers, policy, learned, peers)

        def count() -> tuple[Tensor, Tensor]:
            return counted

    return Kept(selection=order.scaled(selection), limit=limit, choosers=choosers, count=count)


def _asked_for(
    routing: Routing, limit: Limit, selection: Selection, queued: bool
) -> tuple[Tensor, Tensor]:
    """Choices of each expert, int64 [E], and choices of all tokens, int64 [].

    Args:
        queued: every choice stood in its expert's queue, whose length is then the count.
    """
    if not queued:
        choices = routing.num_choices_per_expert()
    elif limit.capacity is not None:
        choices = selection.bounds[1:] - selection.bounds[:-1]
    else:
        choices = selection.num_tokens_per_expert
    if not routing.fixed_k:
        return choices, choices.sum()
    return choices, routing.num_valid_tokens() * routing.top_k


def _taken(
    selection: Selection,
    limit: Limit,
    choosers: Routing,
    policy: CapacityPolicy,
    learned: Calibration,
    peers: Peers | None,
) -> tuple[Tensor, Tensor]:
    """What each expert that chooses took, int64 [E], and the places that there were, int64 [].

    Places under thresholds are those of the capacity that they imitate; until it is known, what was
    chosen.
    """
    taken = selection.num_tokens_per_expert
    if limit.capacity is not None:
        return taken, limit.capacity.sum()
    room = policy.imitated_limit(choosers, learned.threshold, learned.affinity_p99).capacity
    assert room is not None  # a policy without a limit goes with no such router
    return taken, torch.where(learned.num_updates == 0, taken.sum(), _owned(room, peers).sum())


@dataclass(frozen=True, kw_only=True)
class _Choosers(Routing):
    """The group's pairs for the experts that this rank owns; the tables are elsewhere.

    Args:
        prob: probability of each pair, float [P], or None where the policy needs none.
    """

    prob: Tensor | None

    def pair_probs(self) -> Tensor:
        if self.prob is None:
            raise ValueError("the capacity policy did not ask for probabilities")
        return self.prob


def _owners(num_experts: int, peers: Peers, device: torch.device) -> Tensor:
    """Rank of the selection group that selects for each expert, int64 [E].

    Experts are spread evenly over the group. In an expert group by itself that is the rank which
    holds the expert; replicas of an expert share the work.
    """
    return torch.arange(num_experts, device=device) * peers.size // num_experts


def _owned(capacity: Tensor, peers: Peers | None) -> Tensor:
    """Capacities of the experts that this rank owns, 0 for others, [E]."""
    if peers is None:
        return capacity
    own = _owners(len(capacity), peers, capacity.device) == peers.rank
    return torch.where(own, capacity, 0)


@torch.no_grad()
def _owners_keep(
    routing: Routing,
    allowed: Callable[[Routing], Limit],
    order: Order,
    peers: Peers,
    meet: Callable[[Routing], tuple[Routing, Callable[[Tensor], Tensor]]],
) -> tuple[Routing, Limit, Tensor]:
    """What came here, what is allowed, and which of this rank's pairs owners keep, bool [P]."""
    everyone = order.pool == "all"
    asked = _all_pairs(routing) if everyone else routing
    choosers, answer = meet(asked)
    limit = allowed(choosers)
    kept = answer(select(choosers, limit, rank_by=order.rank_by).kept)
    if everyone:  # the best of all tokens, and of those the choosers
        expert = routing.expert.clamp_max(routing.num_experts - 1)
        kept = kept.view(-1, routing.num_experts)[routing.token, expert] & routing.valid
    size = routing.num_tokens
    if limit.buffer_size is not None:
        size = min(size, limit.buffer_size)
    capacity = None if limit.capacity is None else _owned(limit.capacity, peers)
    return choosers, Limit(capacity=capacity, buffer_size=size), kept


@torch.no_grad()
def _gather(
    routing: Routing, *, score: bool, prob: bool, peers: Peers, traffic: Traffic
) -> tuple[_Choosers, Callable[[Tensor], Tensor]]:
    """Bring every pair to the owner of its expert. The host waits for the counts.

    Args:
        score, prob: whether the pairs' scores and probabilities travel along.

    Returns:
        The pairs that came here, in global token order; and a function that takes one bool for
        each of them and returns one for each of this rank's own pairs.
    """
    owner = _owners(routing.num_experts, peers, routing.expert.device)
    owner = F.pad(owner, (0, 1), value=peers.size)[routing.expert]
    leaving = count_experts(owner, peers.size)
    tokens = leaving.new_tensor([routing.num_tokens]).expand(peers.size)
    valid = routing.num_valid_tokens().expand(peers.size)
    found = exchange_evenly(torch.stack((leaving, tokens, valid), dim=1), peers, traffic)
    sends, receives, num_tokens, num_valid = torch.cat((leaving[None], found.T)).tolist()
    order = owner.argsort(stable=True)[: sum(sends)]  # unused pairs stay here

    kind = routing.gate.dtype  # float32 or float64: expert numbers are exact in both
    sent = [routing.expert.to(kind)]
    if score and routing.score is not None:
        sent.append(routing.score)
    if prob:
        sent.append(routing.pair_probs())
    under_way = depart(torch.stack(sent, dim=1)[order], sends, receives, peers, traffic)
    expert, *values = arrive(under_way).unbind(1)
    choosers = _Choosers(
        token=torch.zeros_like(expert, dtype=torch.int64),  # nothing asks whose pair it is
        expert=expert.long(),
        score=values.pop(0) if score and routing.score is not None else None,
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
