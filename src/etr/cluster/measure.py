"""The all-to-all curve of the machine it runs on: bytes per rank against seconds.

Every rank runs it, started by torchrun: on a real cluster, on one machine, or inside
`etr cluster emulate`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from etr.cluster.cost import Line, fit_line

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is sent, and how often."""

    out: str = "runs/cluster-curve"
    """Folder for the curve as JSON and SVG."""
    sizes: tuple[int, ...] = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
    """Bytes that each rank sends in an exchange, in equal parts to all others."""
    rounds: int = 5
    """Times that each size is measured; the median counts."""
    most_pairs: int = 64
    """Pairs of ranks measured one by one, at most, evenly spread over all pairs."""

    def __post_init__(self) -> None:
        if len(set(self.sizes)) < 2 or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} must be at least two different numbers of bytes")
        for name in ("rounds", "most_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class NetworkCurve:
    """What was measured."""

    node_of_rank: tuple[int, ...]
    """Node of each rank."""
    sizes: tuple[int, ...]
    """Bytes that each rank sent in an all-to-all."""
    seconds: tuple[float, ...]
    """Seconds of each, median over the rounds, until the last rank was done."""
    line: Line
    """Line that is fitted to them."""
    pairs: tuple[tuple[int, int, float], ...]
    """(sender, receiver, bytes per second) of single messages of the largest size."""
    within: Line | None
    """Line fitted to single messages inside a node; None where there is no such pair."""
    between: Line | None
    """Line fitted to single messages between nodes; None where there is no such pair."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        lines = {"line": self.line, "within": self.within, "between": self.between}
        return {**vars(self), **{k: v and vars(v) for k, v in lines.items()}}


def measure_curve(config: MeasureConfig) -> NetworkCurve:
    """Measure; every rank of the initialised process group calls it and gets the same curve.

    Raises:
        ValueError: fewer than two ranks.
    """
    if dist.get_world_size() < 2:
        raise ValueError("world_size=1: an exchange needs at least two ranks")
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")
    nodes = [0] * dist.get_world_size()
    dist.all_gather_object(nodes, int(os.environ.get("GROUP_RANK", "0")))
    seconds = [_all_to_all(size, config.rounds, device) for size in config.sizes]
    pairs = _pairs(config.most_pairs)
    messages = {
        pair: [_message(*pair, size, config.rounds, device) for size in config.sizes]
        for pair in pairs
    }
    return NetworkCurve(
        node_of_rank=tuple(nodes),
        sizes=config.sizes,
        seconds=tuple(seconds),
        line=fit_line(config.sizes, seconds),
        pairs=tuple((*pair, config.sizes[-1] / times[-1]) for pair, times in messages.items()),
        within=_fit_pairs(config, [t for p, t in messages.items() if nodes[p[0]] == nodes[p[1]]]),
        between=_fit_pairs(config, [t for p, t in messages.items() if nodes[p[0]] != nodes[p[1]]]),
    )


def join_group() -> None:
    """Initialise the process group from the launcher's environment.

    Raises:
        ValueError: there is none, so no launcher started this process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "this must be started once per rank: torchrun --nproc-per-node 4 -m etr cluster "
            "measure, or etr cluster emulate -- etr cluster measure"
        )
    if _on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if _on_gpu() else "gloo", timeout=TIMEOUT)


def _on_gpu() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _all_to_all(size: int, rounds: int, device: torch.device) -> float:
    world, rank = dist.get_world_size(), dist.get_rank()
    splits = [max(size // (world - 1), 1)] * world
    splits[rank] = 0
    sent = torch.zeros(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return _timed(lambda: dist.all_to_all_single(received, sent, splits, splits), rounds, device)


def _message(sender: int, receiver: int, size: int, rounds: int, device: torch.device) -> float:
    """One way: the receiver's answer of a byte is part of it."""
    data = torch.zeros(size, dtype=torch.uint8, device=device)

    def once() -> None:
        if dist.get_rank() == sender:
            dist.send(data, receiver)
            dist.recv(data[:1], receiver)
        elif dist.get_rank() == receiver:
            dist.recv(data, sender)
            dist.send(data[:1], sender)

    return _timed(once, rounds, device)


def _timed(work: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median over the rounds of the time until the last rank is done; a first round warms up."""
    found = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        found.append(float(taken))
    return statistics.median(found[1:])


def _pairs(most: int) -> list[tuple[int, int]]:
    """Pairs of ranks, each in one direction, evenly spread where there are more than `most`."""
    world = dist.get_world_size()
    pairs = [(a, b) for a in range(world) for b in range(a + 1, world)]
    count = min(most, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def _fit_pairs(config: MeasureConfig, times: list[list[float]]) -> Line | None:
    if not times:
        return None
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return fit_line(config.sizes, medians)
