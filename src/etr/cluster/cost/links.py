"""What an exchange costs: a latency, the busiest link, and what overlaps.

How far it is from what was measured stands beside every prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from etr.cluster.cost.described import check_units


@dataclass(frozen=True, kw_only=True)
class Line:
    """``seconds = latency_seconds + bytes / bytes_per_second``."""

    latency_seconds: float
    """Time of an empty message, seconds (alpha)."""
    bytes_per_second: float
    """Rate of long messages, bytes per second (1 / beta)."""

    def seconds(self, num_bytes: float) -> float:
        """Time of a message."""
        return self.latency_seconds + num_bytes / self.bytes_per_second


def fit_line(num_bytes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the least squared relative errors; its latency is never negative.

    Args:
        num_bytes: sizes of messages, at least two different ones.
        seconds: time of each, > 0.
    Raises:
        ValueError: lengths differ, fewer than two sizes, or a time that is not positive.
    """
    if len(num_bytes) != len(seconds) or len(set(num_bytes)) < 2:
        raise ValueError(
            f"{len(set(num_bytes))} sizes and {len(seconds)} times given: a line needs at least "
            "two different sizes and a time for each"
        )
    if min(seconds) <= 0:
        raise ValueError(f"seconds hold {min(seconds)}: every time must be positive")
    y, x = np.array(seconds, dtype=np.float64), np.array(num_bytes, dtype=np.float64)
    design = np.stack([1 / y, x / y], axis=1)
    latency, slope = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0].tolist()
    if latency < 0:
        latency, slope = 0.0, float((x / y).sum() / np.square(x / y).sum())
    return Line(latency_seconds=latency, bytes_per_second=1 / max(slope, 1e-18))


@dataclass(frozen=True, kw_only=True)
class Links:
    """What the network of a cluster gives. A node's uplink carries what all its ranks send."""

    latency_seconds: float
    """Latency of one exchange among all ranks, seconds."""
    within_bytes_per_second: float
    """Rate inside a node: shared by its ranks, or each one's own."""
    between_bytes_per_second: float
    """Rate of a node's uplink, in each direction."""
    within_is_shared: bool = True
    """Whether the ranks of a node share one link inside it, or each has its own, full duplex."""
    message_seconds: float = 0.0
    """What a rank spends on each message to another rank, one after the other, seconds."""

    def __post_init__(self) -> None:
        check_units(self)

    def seconds(self, messages: Any, between_bytes: Any, within_bytes: Any, chunks: int = 1) -> Any:
        """Time of an exchange: the latency, a rank's messages, and the busiest link.

        Args:
            messages: of the rank that sends most of them, one after the other.
            between_bytes, within_bytes: over the busiest uplink, and over the busiest link inside.
            chunks: parts that it is sent in, each with a latency and messages of its own.
        """
        start = self.latency_seconds + messages * self.message_seconds
        return chunks * start + np.maximum(
            between_bytes / self.between_bytes_per_second,
            within_bytes / self.within_bytes_per_second,
        )

    def exchange_seconds(
        self, traffic: Any, node_of_rank: Any, groups_per_node: float = 1, chunks: int = 1
    ) -> float:
        """Time of an exchange among ranks; see `seconds`.

        Args:
            traffic: bytes from each rank (row) to each rank (column), [N, N], of all chunks.
            node_of_rank: node of each rank.
            groups_per_node: such exchanges that share a node's links at the same time.
            chunks: parts that it is sent in.
        """
        node = np.asarray(node_of_rank)
        moved = np.asarray(traffic, dtype=np.float64).copy()
        np.fill_diagonal(moved, 0)  # what stays on its rank travels nowhere
        member = (node[:, None] == np.unique(node)).astype(np.float64)
        to_node, from_node = moved @ member, member.T @ moved
        near = moved * (node[:, None] == node)
        between = np.maximum(
            (member.T @ to_node).sum(1) - (member.T @ to_node).diagonal(),
            (from_node @ member).sum(0) - (from_node @ member).diagonal(),
        )
        if self.within_is_shared:
            within = groups_per_node * (member.T @ near.sum(1)).max()
        else:
            within = max(near.sum(0).max(), near.sum(1).max())
        messages = (moved > 0).sum(1).max()
        return float(self.seconds(messages, groups_per_node * between.max(), within, chunks))

    def ring_seconds(
        self, num_bytes: float, size: int, per_node: int, groups_per_node: int
    ) -> float:
        """Time of an all-gather or a reduce-scatter in a ring; an all-reduce is two.

        Args:
            num_bytes: of the whole tensor, on each rank.
            size: ranks of the ring.
            per_node: how many of them stand on one node.
            groups_per_node: rings that share a node's links at the same time.
        """
        if size == 1:
            return 0.0
        part = num_bytes / size
        within = part * (per_node * groups_per_node if self.within_is_shared else 1)
        between = part * groups_per_node if size > per_node else 0.0
        return float((size - 1) * self.seconds(1, between, within))


def layer_seconds(
    dispatch_seconds: float, compute_seconds: float, combine_seconds: float, num_chunks: int = 1
) -> float:
    """Time of a layer whose chunks travel while others are computed.

    The network and the experts are one resource each; the first chunk's way there and the last
    one's way back overlap with nothing.

    Args:
        dispatch_seconds, compute_seconds, combine_seconds: of all chunks together.
        num_chunks: 1 for no overlap.
    """
    network = dispatch_seconds + combine_seconds
    if num_chunks == 1:
        return network + compute_seconds
    return max(network + compute_seconds / num_chunks, compute_seconds + network / num_chunks)
