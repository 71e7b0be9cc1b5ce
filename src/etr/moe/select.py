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
from torch.nn import functional as F

from etr.moe.routing import Limit, Routing, Selection, count_experts

RankBy = Literal["score", "position"]
Normalize = Literal["none", "chosen", "kept"]
ExpertPool = Literal["choosers", "all"]
FEW = 1 << 10
"""Scores for which sorting them is cheaper than making one key of what they are sorted by."""


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
    if _sorts(scores):
        # `topk` leaves the order of ties open; a stable sort does not.
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    num_experts = scores.shape[-1]
    lower_first = torch.arange(num_experts - 1, -1, -1, device=scores.device)
    return ((_order_key(scores).long() << 32) | lower_first).topk(k, dim=-1).indices


def until_mass(probs: Tensor, mass: float | Tensor) -> Tensor:
    """Which experts a token takes, one after the other, until they hold a probability.

    Args:
        probs: of each token's experts in the order in which it takes them, float [T, E].
        mass: probability to reach; infinity takes all.
    Returns:
        bool [T, E]; the first is always taken.
    """
    # In float64, so that running sums of many do not depend on the device's order.
    before = F.pad(probs.double().cumsum(-1)[:, :-1], (1, 0))
    takes = before < mass - 1e-6
    takes[:, 0] = True
    return takes


def token_pairs(
    expert: Tensor, valid_mask: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Flatten choices [T, k] to token-major pairs; those of padding become unused.

    Args:
        valid_mask: True for real tokens, bool [T]; None for all.
    Returns:
        token int64 [T * k], expert int64 [T * k].
    """
    k = expert.shape[1]
    token = torch.arange(expert.numel(), device=expert.device)
    token = token if k == 1 else token.div(max(k, 1), rounding_mode="floor")
    if valid_mask is not None:
        expert = torch.where(valid_mask[:, None], expert, num_experts)
    return token, expert.flatten()


def queues(expert: Tensor, score: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """The pairs of every expert in the order in which they stand.

    Args:
        expert: int64 [P], token-major; ``num_experts`` for unused pairs.
        score: float [P] to order by, highest first, or None for first come, first served.
        num_experts: E.
    Returns:
        order int64 [P] and bounds int64 [E + 1], see `Selection`; unused pairs come last.
    """
    if score is None or _sorts(score):
        number = torch.arange(num_experts + 1, device=expert.device)
        if score is None:
            ordered, order = expert.sort(stable=True)
        else:
            by_score = score.detach().argsort(descending=True, stable=True)
            ordered, place = expert[by_score].sort(stable=True)
            order = by_score[place]
        return order, torch.searchsorted(ordered, number)
    # One key for both, so that one sort does.
    key, order = ((expert << 32) - _order_key(score.detach())).sort(stable=True)
    least = torch.arange(-(1 << 31), num_experts << 32, 1 << 32, device=expert.device)
    return order, torch.searchsorted(key, least)


def queue_positions(expert: Tensor, score: Tensor | None, num_experts: int) -> Tensor:
    """Place of every pair in its expert's queue, see `queues`.

    Returns:
        int64 [P], from 0 within each expert; unused pairs get places of their own queue.
    """
    order, bounds = queues(expert, score, num_experts)
    place = torch.arange(expert.shape[0], device=expert.device) - bounds[expert[order]]
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
    order, _ = queues(routing.expert, routing.score, routing.num_experts)
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
    # The order of a queue says who is kept, and in which order gradients are summed.
    ranked = rank_by == "score" and (limit.capacity is not None or torch.is_grad_enabled())
    with torch.no_grad():
        kept = _reaching(routing, limit, expert_pool, among)
        dropped = None if kept is None else ~kept
        expert = routing.expert
        if dropped is not None:
            expert = expert.masked_fill(dropped, routing.num_experts)
        order, bounds = queues(expert, routing.score if ranked else None, routing.num_experts)
        counts = bounds[1:] - bounds[:-1]
        in_order: int | Tensor
        if limit.capacity is not None and expert_pool == "choosers":
            counts = torch.minimum(counts, limit.capacity)
            end = F.pad(bounds[:-1] + counts, (0, 1))[expert[order]]
            in_order = torch.arange(len(order), device=order.device) < end
            kept = torch.empty_like(in_order).scatter(0, order, in_order)
            dropped = ~kept
        elif kept is None and routing.full:
            kept, in_order = torch.ones_like(expert, dtype=torch.bool), len(order)
        else:
            in_order = bounds[-1]
            if kept is None:
                kept = routing.valid
                dropped = ~kept
    return Selection(
        kept=kept,
        order=order,
        bounds=bounds,
        combine_weight=combine_weights(routing, dropped, normalize, num_weighed),
        num_tokens_per_expert=counts,
        buffer_size=routing.num_tokens if limit.buffer_size is None else limit.buffer_size,
        in_order=in_order,
    )


def _reaching(
    routing: Routing, limit: Limit, pool: ExpertPool, among: Tensor | None
) -> Tensor | None:
    """Pairs that may be kept before any queue is cut, bool [P]; None for all in use."""
    if limit.min_score is not None:
        reach = pair_scores(routing) >= _per_pair(limit.min_score, routing, torch.inf)
        among = reach if among is None else among & reach
    if limit.capacity is not None and pool == "all":
        reach = _rank_among_all(routing) < _per_pair(limit.capacity, routing, 0)
        among = reach if among is None else among & reach
    return among if among is None or routing.full else among & routing.valid


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
    order, bounds = queues(expert, None, routing.num_experts)
    return Selection(
        kept=kept,
        order=order,
        bounds=bounds,
        combine_weight=combine_weight,
        num_tokens_per_expert=bounds[1:] - bounds[:-1],
        in_order=bounds[-1],
        buffer_size=routing.num_tokens if buffer_size is None else buffer_size,
    )


def combine_weights(
    routing: Routing, dropped: Tensor | None, normalize: Normalize, num_weighed: int | None = None
) -> Tensor:
    """Combine weight of each pair; zero where not kept, so a token with no kept pair gets 0.

    Args:
        dropped: pairs that are not kept, bool [P]; None where there are none.
        num_weighed: normalisation counts the first so many experts alone, and others, which add
            nothing, get 0; None for all.

    Returns:
        float [P], with the gates' gradient.
    """
    if normalize == "none":
        return routing.gate if dropped is None else routing.gate.masked_fill(dropped, 0.0)
    gate, expert = routing.by_token(routing.gate), routing.by_token(routing.expert)
    dropped = None if dropped is None else routing.by_token(dropped)
    if num_weighed is not None:
        idle = expert >= num_weighed  # unused pairs too
        dropped = idle if dropped is None else dropped | idle
    elif not routing.full and normalize == "chosen":
        idle = expert == routing.num_experts
    else:
        idle = None
    counted = dropped if normalize == "kept" else idle
    total = (gate if counted is None else gate.masked_fill(counted, 0.0)).sum(1, keepdim=True)
    nothing = ~(total > 0)
    if torch.is_grad_enabled():  # 0 / 0 must not come into the backward pass either
        total = total.masked_fill(nothing, 1.0)
    share = gate / total
    return share.masked_fill(nothing if dropped is None else dropped | nothing, 0.0).flatten()


def _sorts(score: Tensor) -> bool:
    """Whether scores are sorted as they are: few, or of more bits than a key has room for."""
    few = not torch.compiler.is_compiling() and score.numel() <= FEW
    return few or score.dtype == torch.float64


def _order_key(score: Tensor) -> Tensor:
    """Int32 in the order of float32 scores: one integer sort can then do for two.

    Equal scores, zeros of both signs too, give equal keys.
    """
    bits = score.float().view(torch.int32)  # a sign and a magnitude
    return torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)


def _rank_among_all(routing: Routing) -> Tensor:
    """Rank of each pair's token in its expert's column of all valid tokens, int64 [P]."""
    if routing.scores is None:
        raise ValueError("expert_pool='all' needs a full score table, and this router has none")
    table = routing.scores.detach().masked_fill(~routing.valid_mask[:, None], -torch.inf)
    order = table.argsort(dim=0, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(
        0, order, torch.arange(table.shape[0], device=table.device)[:, None].expand_as(order)
    )
    return routing.of_pairs(rank)


def pair_scores(routing: Routing) -> Tensor:
    """Score of each pair without any locality bonus, float [P]; unused pairs read expert E - 1.

    Raises:
        ValueError: the router has no scores.
    """
    if routing.scores is None:
        raise ValueError("thresholds need selection scores, and this router has none")
    if routing.unbiased and routing.score is not None:
        return routing.score
    return routing.of_pairs(routing.scores)


def _per_pair(values: Tensor, routing: Routing, unused: float) -> Tensor:
    """Look up an [E] table by each pair's expert; unused pairs read `unused`."""
    values = values if routing.full else F.pad(values, (0, 1), value=unused)
    return values.index_select(0, routing.expert)
