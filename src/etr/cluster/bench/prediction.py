"""What the cost model says of a timed row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from etr.cluster.bench.plan import BenchConfig, nodes_of
from etr.cluster.cost import Line, Links, layer_seconds
from etr.cluster.network import parse_rate
from etr.moe.dispatch import parse_dispatcher


def step_seconds(
    layers: Sequence[np.ndarray],
    compute_seconds: Sequence[float],
    nodes: Sequence[int],
    links: Links,
    *,
    chunks: int = 1,
    start_seconds: float = 0.0,
    rest_seconds: float = 0.0,
) -> float:
    """Time of a forward and a backward pass of layers whose compute is emulated.

    Args:
        layers: bytes from each rank to each, [N, N] for each layer.
        compute_seconds: of the busiest rank's experts in each layer's forward pass.
        nodes: node of each rank.
        links: the network.
        chunks: parts that travel while others are computed.
        start_seconds: of starting the experts, once a chunk.
        rest_seconds: of the rest of a layer, in each direction.
    """
    total, start = 0.0, chunks * start_seconds
    for traffic, compute in zip(layers, compute_seconds, strict=True):
        there = links.exchange_seconds(traffic, nodes, chunks=chunks)
        back = links.exchange_seconds(traffic.T, nodes, chunks=chunks)
        total += layer_seconds(there, compute + start, back, chunks)
        total += layer_seconds(back, 2 * compute + start, there, chunks)
        total += 2 * rest_seconds
    return total


def predict(
    config: BenchConfig, timed: dict[str, Any], curve: dict[str, Any], dispatch: str
) -> float:
    """Seconds of an emulated step.

    Args:
        config: sleep per row, and rates where the curve has no such pair.
        timed: result of a timing, with its rows between ranks.
        curve: measured on the same network.
        dispatch: as timed.
    """
    rows = np.array(timed["rows"], dtype=np.float64)
    return step_seconds(
        list(rows * timed["row_bytes"]),
        busiest_seconds(rows, config.seconds_per_row()),
        nodes_of(timed["shape"]),
        links_of(config, curve),
        chunks=chunks_of(dispatch),
    )


def busiest_seconds(rows: np.ndarray, seconds_per_row: float) -> list[float]:
    """Time of the busiest rank's experts in each layer, for rows between ranks [L, N, N]."""
    return [float(busiest) for busiest in rows.sum(1).max(1) * seconds_per_row]


def chunks_of(dispatch: str) -> int:
    """Parts that a dispatcher sends one behind the other."""
    return getattr(parse_dispatcher(dispatch), "chunks", 1)


def links_of(config: BenchConfig, curve: dict[str, Any]) -> Links:
    """Latency of the measured all-to-all, rates of the measured pairs."""

    def rate(key: str, nominal: str) -> float:
        line = curve[key] and Line(**curve[key])
        return line.bytes_per_second if line else parse_rate(nominal) / 8

    return Links(
        latency_seconds=curve["line"]["latency_seconds"],
        within_bytes_per_second=rate("within", config.intra),
        between_bytes_per_second=rate("between", config.inter),
    )
