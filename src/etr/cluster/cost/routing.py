"""What a router makes of the tokens, and the rows that follow from it between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from etr.cluster.cost.described import check_units
from etr.moe.dispatch import Dispatcher, parse_dispatcher


@dataclass(frozen=True, kw_only=True)
class RoutingShape:
    """A router and dispatcher as far as time and memory go."""

    name: str
    """Shown in tables."""
    dispatch: str = "all_to_all"
    """Dispatcher with options, as the layer takes it."""
    top_k: int | None = None
    """Experts that a token chooses; the model's where it is not given."""
    capacity: tuple[tuple[float, ...], ...] = ()
    """Pairs of progress in training, 0 to 1, and the capacity factor there; none: no limit. A
    padded dispatcher sends buffers of this size."""
    kept_share: tuple[tuple[float, ...], ...] = ()
    """Pairs of progress and the share of choices that is kept; without them what capacity leaves
    of the load."""
    local_share: float | None = None
    """Share of kept choices whose expert is on the token's node; by placement where not given. It
    changes who sends, not what experts get: an uneven load limits it, see `between_nodes`."""
    load: tuple[float, ...] = (1.0,)
    """Relative loads of experts, in any order and number: a distribution, which the model's experts
    take at equal quantiles, dealt to ranks at random but always alike."""

    def __post_init__(self) -> None:
        check_units(self)
        parse_dispatcher(self.dispatch)
        for name in ("capacity", "kept_share"):
            pairs = getattr(self, name)
            at = [pair[0] for pair in pairs if len(pair) == 2]
            if (
                len(at) != len(pairs)
                or at != sorted(at)
                or any(p < 0 for pair in pairs for p in pair)
            ):
                raise ValueError(
                    f"{name}={pairs} must be pairs of rising progress, 0 to 1, and "
                    f"{'a share' if name == 'kept_share' else 'a factor'}"
                )
        if any(pair[1] > 1 for pair in self.kept_share):
            raise ValueError(f"kept_share={self.kept_share} must hold shares between 0 and 1")
        if not self.load or min(self.load) < 0 or not sum(self.load) > 0:
            raise ValueError(f"load={self.load} must hold relative loads, not all of them 0")
        if self.padded and not self.capacity:
            raise ValueError(f"dispatch={self.dispatch!r} pads buffers: capacity must be given")

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher."""
        return parse_dispatcher(self.dispatch)

    @property
    def padded(self) -> bool:
        """Whether unused places of a buffer travel and are computed."""
        return self.dispatcher.needs_ranks and self.dispatcher.padded

    def factor_at(self, progress: float) -> float:
        """Capacity factor, infinite where there is none."""
        return _at(self.capacity, progress) if self.capacity else float("inf")

    def load_of(self, num_experts: int) -> np.ndarray:
        """Share of the choices that each expert gets, [E]."""
        place = (np.arange(num_experts) + 0.5) / num_experts
        known = (np.arange(len(self.load)) + 0.5) / len(self.load)
        dealt = np.random.default_rng(0).permutation(np.interp(place, known, np.sort(self.load)))
        return dealt / dealt.sum()

    def kept_at(self, progress: float, num_experts: int) -> np.ndarray:
        """Share of all choices that each expert gets and keeps, [E]."""
        load = self.load_of(num_experts)
        if self.kept_share:
            return load * _at(self.kept_share, progress)
        return np.minimum(load, self.factor_at(progress) / num_experts)


def _at(pairs: Sequence[Sequence[float]], progress: float) -> float:
    at, value = np.array(pairs).T
    return float(np.interp(progress, at, value))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that N ranks have for each other, ranks of a node side by side.

    Args:
        tokens: of each rank, [N].
        pairs: kept (token, expert) pairs from each rank to each rank, [N, N].
        by_place: tokens of each rank with a pair to the p-th rank of any node, [N, node size].
        by_node: tokens of each rank with a pair to any rank of a node, [N, nodes].
        to_expert: kept pairs from each rank to each expert, [N, E].
        slots: places of each rank's buffer for an expert, [N].
        experts_per_rank: experts that each rank holds.
    """

    tokens: np.ndarray
    pairs: np.ndarray
    by_place: np.ndarray
    by_node: np.ndarray
    to_expert: np.ndarray
    slots: np.ndarray
    experts_per_rank: int

    @property
    def node_size(self) -> int:
        """Ranks of a node."""
        return self.by_place.shape[1]


def between_nodes(share: np.ndarray, local_share: float | None) -> np.ndarray:
    """What the tokens of each node keep on each node, [nodes, nodes], per choice.

    The tokens of every node keep as much, and its experts get as much, as without a local share:
    the answer lies on the line through placement and what stays as near as the load allows.

    Args:
        share: what the experts of each node keep of all choices, [nodes].
        local_share: of what is kept, on the token's own node; the nearest on that line where it has
            no such point.
    """
    nodes, total = len(share), share.sum()
    even = np.tile(share, (nodes, 1))
    stay = np.minimum(nodes * share, total)  # the most that can stay
    freedom = stay.sum() - total
    if local_share is None or freedom <= 0:
        return even
    leave, come = total - stay, nodes * share - stay
    near = np.diag(stay) + np.outer(leave, come) / max(leave.sum(), 1e-300)
    weight = total * (nodes * local_share - 1) / freedom
    return even + np.clip(weight, -1 / (nodes - 1), 1) * (near - even)


def expected_rows(
    routing: RoutingShape,
    *,
    num_experts: int,
    top_k: int,
    tokens_per_rank: float,
    num_ranks: int,
    node_size: int,
    progress: float = 1.0,
) -> Rows:
    """What a description gives on average, the same for each rank but for where nodes are near.

    A token's choices are taken as independent draws where those to one node or place are merged.

    Args:
        routing: the description.
        num_experts, top_k: of the layer.
        tokens_per_rank: that a rank dispatches.
        num_ranks, node_size: ranks that hold experts, and how many of them stand on a node.
        progress: in training, 0 to 1.
    """
    per_rank, nodes = num_experts // num_ranks, num_ranks // node_size
    kept = routing.kept_at(progress, num_experts)
    share = kept.reshape(nodes, -1).sum(1)  # [nodes]
    scale = between_nodes(share, routing.local_share) / np.where(share > 0, share, 1)
    node_of = np.arange(num_experts) // (per_rank * node_size)
    per_token = top_k * kept * scale[:, node_of]  # [nodes, E]: rows of a token, by the token's node
    own_node = np.arange(num_ranks) // node_size
    of_token = per_token.reshape(nodes, num_ranks, per_rank).sum(2)[own_node]
    grid = of_token.reshape(num_ranks, nodes, node_size)

    def merged(rows: np.ndarray) -> np.ndarray:
        return tokens_per_rank * (1 - (1 - np.minimum(rows / top_k, 1)) ** top_k)

    slot = 0.0
    if routing.padded:
        slot = np.ceil(routing.factor_at(progress) * tokens_per_rank * top_k / num_experts)
    return Rows(
        tokens=np.full(num_ranks, tokens_per_rank),
        pairs=tokens_per_rank * of_token,
        by_place=merged(grid.sum(1)),
        by_node=merged(grid.sum(2)),
        to_expert=tokens_per_rank * per_token[own_node],
        slots=np.full(num_ranks, slot),
        experts_per_rank=per_rank,
    )


def routing_of_trace(path: str | Path, base: RoutingShape, *, num_nodes: int = 1) -> RoutingShape:
    """A description with the load, kept share and local share that a trace shows.

    Args:
        path: file that `etr trace` wrote.
        base: name, dispatcher and capacity.
        num_nodes: that sequences and experts of the trace are dealt to, in order.
    """
    from etr.trace import read_trace

    trace = read_trace(path)
    info = trace.info
    counts, kept_total, local, total = np.zeros(info.num_experts), 0, 0, 0
    for number in range(info.num_layers):
        layer = trace.layer(number)
        chosen = layer.counts(info.num_experts)
        counts += np.sort(chosen)  # by rank of the load: layers have other favourites
        used = layer.kept
        kept_total += int(used.sum())
        total += int(chosen.sum())
        sequences = int(layer.sequence.max()) + 1
        own = layer.sequence.astype(np.int64) * num_nodes // sequences
        there = layer.experts.astype(np.int64) * num_nodes // info.num_experts
        local += int((used & (own[:, None] == there)).sum())
    return replace(
        base,
        load=tuple((counts / counts.sum() * info.num_experts).tolist()),
        kept_share=((0.0, kept_total / max(total, 1)),),
        local_share=local / max(kept_total, 1) if num_nodes > 1 else None,
    )
