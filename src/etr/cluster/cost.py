"""What an exchange of tokens costs: a latency, the busiest link, and what overlaps.

A model of a few lines. How far it is from what was measured stands beside every prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    y = torch.tensor(seconds, dtype=torch.float64)
    x = torch.tensor(num_bytes, dtype=torch.float64)
    design = torch.stack([1 / y, x / y], dim=1)
    latency, slope = torch.linalg.lstsq(design, torch.ones_like(y)[:, None]).solution[:, 0].tolist()
    if latency < 0:
        latency, slope = 0.0, float(((x / y).sum()) / ((x / y).square().sum()))
    return Line(latency_seconds=latency, bytes_per_second=1 / max(slope, 1e-18))


@dataclass(frozen=True, kw_only=True)
class Links:
    """What the network of a cluster gives."""

    latency_seconds: float
    """Latency of one exchange among all ranks, seconds."""
    within_bytes_per_second: float
    """Rate inside a node, shared by its ranks."""
    between_bytes_per_second: float
    """Rate of a node's uplink, in each direction."""

    def exchange_seconds(self, traffic: Tensor, node_of_rank: Sequence[int]) -> float:
        """Time of an exchange: the latency, and the time of the busiest link.

        Args:
            traffic: bytes from each rank (row) to each rank (column), [N, N].
            node_of_rank: node of each rank.
        """
        node = torch.tensor(list(node_of_rank))
        member = torch.nn.functional.one_hot(node).to(torch.float64)
        traffic = traffic.to(torch.float64)
        traffic = traffic - torch.diag(traffic.diag())  # what stays on its rank travels nowhere
        nodes = member.T @ traffic @ member
        within = nodes.diag()
        between = nodes - torch.diag(within)
        busiest = torch.maximum(between.sum(0), between.sum(1)).max() / (
            self.between_bytes_per_second
        )
        return self.latency_seconds + max(
            float(busiest), float(within.max()) / self.within_bytes_per_second
        )


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
