"""What the cost model says of a timed row."""

from __future__ import annotations

from typing import Any

import torch

from etr.cluster.bench.plan import BenchConfig, nodes_of
from etr.cluster.cost import Line, Links, layer_seconds
from etr.cluster.network import parse_rate
from etr.moe.dispatch import parse_dispatcher


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
    links = links_of(config, curve)
    nodes, chunks = nodes_of(timed["shape"]), getattr(parse_dispatcher(dispatch), "chunks", 1)
    total = 0.0
    for rows in torch.tensor(timed["rows"], dtype=torch.float64):
        there = links.exchange_seconds(rows * timed["row_bytes"], nodes)
        back = links.exchange_seconds(rows.T * timed["row_bytes"], nodes)
        compute = float(rows.sum(0).max()) * config.seconds_per_row()
        total += layer_seconds(there, compute, back, chunks)
        total += layer_seconds(back, 2 * compute, there, chunks)
    return total


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
