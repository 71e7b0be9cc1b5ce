"""The exchanges of each dispatcher: bytes from each rank to each, as the library counts them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from etr.cluster.cost.routing import RoutingShape, Rows, expected_rows
from etr.cluster.cost.shapes import Layout, ModelShape
from etr.methods.least_loaded import LeastLoaded, Moves, spill
from etr.moe.dispatch import Dispatcher
from etr.moe.dispatch.all_to_all import AllToAll
from etr.moe.dispatch.all_to_all_padded import AllToAllPadded
from etr.moe.dispatch.chunked import Chunked
from etr.moe.dispatch.dedup import Dedup
from etr.moe.dispatch.group_wise import GroupWise
from etr.moe.dispatch.hierarchical import Hierarchical

COUNT_BYTES = 8
"""A count that ranks tell each other."""
PAIR_BYTES = 8
"""Row and expert of a pair that a relay passes on; its weight travels beside them."""


@dataclass(frozen=True, kw_only=True)
class Journey:
    """What one forward pass of a layer sends; the backward pass sends the rows again.

    Args:
        counts: bytes of counts, [N, N] each, before any row.
        there: bytes of rows to their experts, [N, N] for each exchange, one after the other.
        back: bytes of results.
        computed: rows of each expert that each rank runs, padded places too, [N, experts]: a rank's
            own experts, or where ranks lend experts all of them.
        chunks: parts that travel one behind the other.
        gathered_tokens: tokens of each rank that its tensor group gathers afterwards.
    """

    counts: tuple[np.ndarray, ...]
    there: tuple[np.ndarray, ...]
    back: tuple[np.ndarray, ...]
    computed: np.ndarray
    chunks: int = 1
    gathered_tokens: float = 0.0

    def total_bytes(self) -> np.ndarray:
        """From each rank to each, without what stays on its rank, [N, N]."""
        found = np.sum([*self.counts, *self.there, *self.back], axis=0)
        np.fill_diagonal(found, 0)
        return found


def journey(
    dispatcher: Dispatcher,
    rows: Rows,
    row_bytes: float,
    weight_bytes: float,
    expert_bytes: float = 0.0,
) -> Journey:
    """The exchanges of a dispatcher.

    Args:
        dispatcher: of the library.
        rows: between ranks; for `group_wise` those of each rank's own part of the tokens.
        row_bytes: of a token's row.
        weight_bytes: of a combine weight, which relays pass on.
        expert_bytes: of an expert's weights, which `least_loaded` lends, for each chunk anew.
    Raises:
        ValueError: a dispatcher that the model does not know.
    """
    if isinstance(dispatcher, Chunked):
        inner = journey(
            dispatcher.wrapped,
            _chunked(rows, dispatcher.chunks),
            row_bytes,
            weight_bytes,
            expert_bytes * dispatcher.chunks,
        )
        counts = tuple(dispatcher.chunks * part for part in inner.counts)
        return replace(inner, counts=counts, chunks=dispatcher.chunks)
    if isinstance(dispatcher, GroupWise):
        inner = journey(dispatcher.wrapped, rows, row_bytes, weight_bytes, expert_bytes)
        return replace(inner, gathered_tokens=float(rows.tokens.max()))
    if isinstance(dispatcher, Hierarchical | Dedup):
        return _relay(dispatcher, rows, row_bytes, weight_bytes)
    if isinstance(dispatcher, LeastLoaded):
        return _least_loaded(dispatcher, rows, row_bytes, expert_bytes)
    num_ranks, computed = len(rows.tokens), _own_rows(rows)
    if not dispatcher.needs_ranks:
        return Journey(counts=(), there=(), back=(), computed=computed)
    if isinstance(dispatcher, AllToAllPadded):
        computed = np.full_like(computed, rows.slots.sum())
        sent = np.repeat(rows.slots[:, None] * rows.experts_per_rank, num_ranks, axis=1)
        told = np.full((num_ranks, num_ranks), float(COUNT_BYTES))
    elif isinstance(dispatcher, AllToAll):
        sent = rows.pairs
        told = np.full((num_ranks, num_ranks), float(COUNT_BYTES * rows.experts_per_rank))
    else:
        raise ValueError(f"dispatch={dispatcher.name!r} is not one that the cost model knows")
    sent = sent * row_bytes
    return Journey(counts=(told,), there=(sent,), back=(sent.T,), computed=computed)


def _own_rows(rows: Rows) -> np.ndarray:
    """Kept rows of the experts of each rank, [N, experts of a rank]."""
    return rows.to_expert.sum(0).reshape(len(rows.tokens), -1).astype(np.float64)


def expert_tokens(routing: RoutingShape, layout: Layout) -> float:
    """Tokens that a rank dispatches for a micro-batch."""
    dispatcher = routing.dispatcher
    inner = dispatcher.wrapped if isinstance(dispatcher, Chunked) else dispatcher
    divided = layout.sequence_parallel or isinstance(inner, GroupWise)
    return layout.tokens / (layout.tensor if divided else 1)


def layer_journey(
    model: ModelShape, layout: Layout, routing: RoutingShape, node_size: int, progress: float
) -> Journey:
    """The exchanges of a layer for a micro-batch, and the rows that each device computes.

    Args:
        model, layout, routing: what is trained, and how.
        node_size: ranks of an expert group that stand on one node; it changes no computed row.
        progress: in training, 0 to 1.
    """
    tokens, itemsize = expert_tokens(routing, layout), layout.activation_bytes
    rows = expected_rows(
        routing,
        num_experts=model.num_experts,
        top_k=routing.top_k or model.top_k,
        tokens_per_rank=tokens,
        num_ranks=layout.expert,
        node_size=node_size,
        progress=progress,
    )
    row_bytes = float(model.hidden_size * itemsize)
    lent = 3 * model.hidden_size * model.expert_size / layout.expert_tensor * layout.weight_bytes
    found = journey(routing.dispatcher, rows, row_bytes, itemsize, lent)
    # Ranks that share an expert gather their rows first, where each has tokens of its own.
    gathered = layout.expert_tensor if tokens < layout.tokens else 1
    return replace(found, computed=gathered * found.computed)


def _chunked(rows: Rows, chunks: int) -> Rows:
    """The same with buffers that are no larger than a chunk, over all chunks."""
    ends = np.floor(rows.tokens[:, None] * np.arange(chunks + 1) / chunks)
    slots = np.minimum(rows.slots[:, None], np.diff(ends)).sum(1)
    return replace(rows, slots=slots)


def _least_loaded(
    dispatcher: LeastLoaded, rows: Rows, row_bytes: float, expert_bytes: float
) -> Journey:
    """Weights to whoever borrows them, then rows to who runs them."""
    # Whole rows whose sums are those of the experts, however they are spread over ranks.
    ends = np.rint(rows.to_expert.cumsum(0))
    counts = torch.from_numpy(np.diff(ends, axis=0, prepend=0)).long()
    plan = spill(counts.sum(0).tolist(), len(counts), dispatcher.alpha, dispatcher.chunk)
    moves = Moves.of(counts, plan)
    sent = moves.rows.sum(1).numpy().astype(np.float64)
    weights = np.zeros_like(sent)
    for rank, guests in enumerate(moves.guests):
        for expert in guests:
            weights[expert // moves.block, rank] += expert_bytes
    there = (weights, sent * row_bytes) if any(moves.guests) else (sent * row_bytes,)
    return Journey(
        counts=(np.full_like(sent, COUNT_BYTES * counts.shape[1]),),
        there=there,
        back=(sent.T * row_bytes,),
        computed=np.array(plan, dtype=np.float64).T,
    )


def _relay(dispatcher: Dispatcher, rows: Rows, row_bytes: float, weight_bytes: float) -> Journey:
    """Two stages; a token crosses the first once for each rank on its way."""
    num_ranks, size = len(rows.tokens), rows.node_size
    rank = np.arange(num_ranks)
    node, place = rank // size, rank % size
    same_node, same_place = node[:, None] == node, place[:, None] == place
    grid = rows.pairs.reshape(num_ranks, num_ranks // size, size)
    if isinstance(dispatcher, Hierarchical):
        first, second = same_node, same_place
        tokens = same_node * rows.by_place[:, place]
        pairs = same_node * grid.sum(1)[:, place]
        passed = _sum_of_nodes(rows.pairs, size)[node] * same_place
    else:
        first, second = same_place, same_node
        tokens = same_place * rows.by_node[:, node]
        pairs = same_place * grid.sum(2)[:, node]
        # What the ranks in the same place on every node have for each rank of this node.
        by_place = rows.pairs.reshape(-1, size, num_ranks).sum(0)  # [place, N]
        passed = by_place[place] * same_node
    counts = (
        first * float(2 * COUNT_BYTES),
        second * float(COUNT_BYTES * rows.experts_per_rank),
    )
    onward = pairs * (weight_bytes + PAIR_BYTES)
    return Journey(
        counts=counts,
        there=(tokens * row_bytes + onward, passed * row_bytes),
        back=(passed.T * row_bytes, tokens.T * row_bytes),
        computed=_own_rows(rows),
    )


def _sum_of_nodes(pairs: np.ndarray, size: int) -> np.ndarray:
    """Rows of each node's ranks together, [nodes, N]."""
    return pairs.reshape(-1, size, pairs.shape[1]).sum(1)
