"""Selection: who is chosen and who is kept. Pure functions of scores and limits.

Every order is total and the same on every device: ties between experts go to the lower expert,
ties between tokens to the lower token index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from etr.moe.routing import Limit, Routing, Selection, count_experts

RankBy = Literal["score", "position"]
Normalize = Literal["none", "chosen", "kept"]
ExpertPool = Literal["choosers", "all"]


def top_experts(scores: Tensor, k: int) -> Tensor:
    """Choose each token's k best experts (token choice).

    Args:
        scores: float [T, E].
        k: experts per token, at most E.
    Returns:
        int64 [T, k], best first; equal scores go to the lower expert.
    """
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    if scores.dtype == torch.float64:
        # `topk` leaves the order of ties open; a stable sort does not.
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    num_experts = scores.shape[-1]
    lower_first = torch.arange(num_experts - 1, -1, -1, device=scores.device)
    return ((_order_key(scores) << 32) | lower_first).topk(k, dim=-1).indices


def token_pairs(expert: Tensor, valid_mask: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Flatten choices [T, k] to token-major pairs; those of padding become unused.

    Returns:
        token int64 [T * k], expert int64 [T * k].
    """
    num_tokens, k = expert.shape
    token = torch.arange(num_tokens, device=expert.device).repeat_interleave(k)
    expert = torch.where(valid_mask[:, None], expert, num_experts).flatten()
    return token, expert


def queue_positions(expert: Tensor, score: Tensor | None, num_experts: int) -> Tensor:
    """Place of every pair in its expert's queue.

    Args:
        expert: int64 [P], token-major; ``num_experts`` for unused pairs.
        score: float [P] to order by, highest first, or None for first come, first served.
        num_experts: E.
    Returns:
        int64 [P], from 0 within each expert; unused pairs get places of their own queue.
    """
    order = _expert_order(expert, score)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    start = counts.cumsum(0) - counts
    place = torch.arange(expert.shape[0], device=expert.device) - start[expert[order]]
    return torch.empty_like(place).scatter(0, order, place)


def mass_prefix(routing: Routing, rho: float) -> Tensor:
    """Length of each expert's shortest queue prefix that holds a share `rho` of its probability.

    Choosers stand in order of score; what is summed is their probability, since cosines can be
    negative. A slack of 1e-6 of the mass absorbs rounding.

    Returns:
        int64 [E], tokens.
    """
    if routing.score is None:
        raise ValueError("affinity mass needs selection scores, and this router has none")
    order = _expert_order(routing.expert, routing.score)
    expert = routing.expert[order]
    # Float64, so that the running sum of many small ones does not depend on the device's order.
    prob = routing.pair_probs()[order].double()
    prob = torch.where(expert < routing.num_experts, prob, 0.0)
    running = prob.cumsum(0)
    mass = torch.zeros(routing.num_experts + 1, dtype=prob.dtype, device=prob.device)
    mass = mass.scatter_add(0, expert, prob)
    before_expert = mass.cumsum(0) - mass
    # A token still stands before the goal if what lies strictly before it is short of the goal.
    before_token = running - prob - before_expert[expert]
    goal = (rho - 1e-6) * mass
    return count_experts(expert, routing.num_experts, (prob > 0) & (before_token < goal[expert]))


def select(
    routing: Routing,
    limit: Limit,
    *,
    rank_by: RankBy,
    normalize: Normalize = "none",
    expert_pool: ExpertPool = "choosers",
    among: Tensor | None = None,
    num_weighed: int | None = None,
) -> Selection:
    """Keep, for each expert, the choosers that the limit allows (expert choice).

    arXiv 2406.00023, eq. 6: experts keep their best-scoring choosers; the rest are dropped.

    Args:
        routing: choices of T tokens, P pairs.
        limit: capacity, minimum score, or neither (nothing is dropped).
        rank_by: order of the queue: score, or position in the batch.
        normalize: divide weights by the sum over the token's chosen or kept experts.
        expert_pool: rank a chooser among the expert's choosers, or among all tokens (and drop
            choosers outranked by tokens that did not choose the expert: keeps fewer).
        among: keep nothing else than these pairs, bool [P]; None for any.
        num_weighed: see `combine_weights`.
    Returns:
        Selection over the same P pairs. No gradient flows through the selection itself.
    """
    kept = routing.valid if among is None else routing.valid & among
    with torch.no_grad():
        if limit.min_score is not None:
            kept = kept & (pair_scores(routing) >= _per_pair(limit.min_score, routing, -torch.inf))
        if expert_pool == "all" and limit.capacity is not None:
            rank = _rank_among_all(routing)
            kept = kept & (rank < _per_pair(limit.capacity, routing, 0))
            limit = Limit(buffer_size=limit.buffer_size)
        expert = torch.where(kept, routing.expert, routing.num_experts)
        score = routing.score if rank_by == "score" else None
        position = queue_positions(expert, score, routing.num_experts)
        if limit.capacity is not None:
            kept = kept & (position < _per_pair(limit.capacity, routing, 0))
        counts = count_experts(routing.expert, routing.num_experts, kept)
    return Selection(
        kept=kept,
        position_in_expert=position,
        combine_weight=combine_weights(routing, kept, normalize, num_weighed),
        num_tokens_per_expert=counts,
        buffer_size=routing.num_tokens if limit.buffer_size is None else limit.buffer_size,
    )


def run_ranks(routing: Routing, ranks: Sequence[int]) -> Routing:
    """The routing with those of each token's choices alone that have one of these ranks.

    Tokens rank their choices in the order in which they made them, best first; where experts
    choose, a token's ranks go by its scores, and ties to the lower expert.

    Args:
        ranks: from 0.
    Raises:
        ValueError: no token can have that many choices.
    """
    most = routing.token.shape[0] // max(routing.num_tokens, 1)
    if routing.num_tokens and max(ranks) >= most:
        raise ValueError(
            f"ranks={tuple(ranks)} must lie below {most}, the most choices that a token can have"
        )
    queue = torch.where(routing.valid, routing.token, routing.num_tokens)
    score = None if routing.tokens_choose else routing.score
    place = queue_positions(queue, score, routing.num_tokens)
    runs = torch.stack([place == rank for rank in ranks]).any(0)
    return replace(routing, expert=torch.where(runs, routing.expert, routing.num_experts))


def selection_of(
    routing: Routing, kept: Tensor, combine_weight: Tensor, buffer_size: int | None = None
) -> Selection:
    """Selection of given pairs, which queue in their order.

    Args:
        kept: bool [P].
        combine_weight: float [P], zero where not kept.
        buffer_size: as in `Selection`; None for every token.
    """
    expert = torch.where(kept, routing.expert, routing.num_experts)
    return Selection(
        kept=kept,
        position_in_expert=queue_positions(expert, None, routing.num_experts),
        combine_weight=combine_weight,
        num_tokens_per_expert=count_experts(expert, routing.num_experts),
        buffer_size=routing.num_tokens if buffer_size is None else buffer_size,
    )


def combine_weights(
    routing: Routing, kept: Tensor, normalize: Normalize, num_weighed: int | None = None
) -> Tensor:
    """Combine weight of each pair; zero where not kept, so a token with no kept pair gets 0.

    Args:
        num_weighed: normalisation counts the first so many experts alone, and others, which add
            nothing, get 0; None for all.

    Returns:
        float [P], with the gates' gradient.
    """
    weight = torch.where(kept, routing.gate, 0.0)
    if normalize == "none":
        return weight
    counted = routing.valid if normalize == "chosen" else kept
    if num_weighed is not None:
        weighed = routing.expert < num_weighed
        counted, weight = counted & weighed, torch.where(weighed, weight, 0.0)
    gate = torch.where(counted, routing.gate, 0.0)
    total = torch.zeros(routing.num_tokens, dtype=gate.dtype, device=gate.device)
    total = total.index_add(0, routing.token, gate)[routing.token]
    # The inner `where` keeps 0 / 0 out of the backward pass too.
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)


def _expert_order(expert: Tensor, score: Tensor | None) -> Tensor:
    """Permutation that sorts pairs by expert, then by falling score, then by index."""
    if score is None:
        return expert.to(torch.int32).argsort(stable=True)
    if score.dtype == torch.float64:
        by_score = score.detach().argsort(descending=True, stable=True)
        return by_score[expert[by_score].argsort(stable=True)]
    return ((expert << 32) - _order_key(score.detach())).argsort(stable=True)


def _order_key(score: Tensor) -> Tensor:
    """Int64 in the order of float32 scores, within 32 bits: one integer sort can then do for two.

    Equal scores, zeros of both signs too, give equal keys.
    """
    bits = (score.float() + 0.0).view(torch.int32).long()  # adding 0 makes -0 into 0
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


def _rank_among_all(routing: Routing) -> Tensor:
    """Rank of each pair's token in its expert's column of all valid tokens, int64 [P]."""
    if routing.scores is None:
        raise ValueError("expert_pool='all' needs a full score table, and this router has none")
    table = routing.scores.detach().masked_fill(~routing.valid_mask[:, None], -torch.inf)
    order = table.argsort(dim=0, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(
        0, order, torch.arange(table.shape[0], device=table.device)[:, None].expand_as(order)
    )
    return rank[routing.token, routing.expert.clamp_max(routing.num_experts - 1)]


def pair_scores(routing: Routing) -> Tensor:
    """Score of each pair without any locality bonus, float [P]; unused pairs read expert E - 1.

    Raises:
        ValueError: the router has no scores.
    """
    if routing.scores is None:
        raise ValueError("thresholds need selection scores, and this router has none")
    expert = routing.expert.clamp_max(routing.num_experts - 1)
    return routing.scores.detach()[routing.token, expert]


def _per_pair(values: Tensor, routing: Routing, unused: float) -> Tensor:
    """Look up an [E] table by each pair's expert; unused pairs read `unused`."""
    return torch.nn.functional.pad(values, (0, 1), value=unused)[routing.expert]
