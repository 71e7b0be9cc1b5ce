"""`etr cache`: a trace in a fast memory that holds a few experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from rich.console import Console

from etr.cli._options import WithImports, parse
from etr.cli._progress import track
from etr.cli._tables import make_table
from etr.systems import CACHES, replay
from etr.trace import read_trace


@dataclass(frozen=True, kw_only=True)
class CacheConfig(WithImports):
    """Which trace to replay, and in which memories."""

    trace: Annotated[str, tyro.conf.Positional]
    """File that etr trace wrote."""
    caches: tuple[str, ...] = field(default_factory=lambda: tuple(CACHES))
    """Policies: who leaves when another expert must come in. oracle knows what comes: a bound."""
    sizes: tuple[int, ...] = ()
    """Experts that a memory holds; by default 1, 2, 4, ... up to all of them."""
    shared: bool = False
    """One memory for all layers, and not one each."""
    expert_bytes: int | None = None
    """Size of an expert, to print bytes and not only how many were moved."""

    def __post_init__(self) -> None:
        for name in self.caches:
            CACHES.parse(name)
        for size in (*self.sizes, *(() if self.expert_bytes is None else (self.expert_bytes,))):
            if size < 1:
                raise ValueError(f"sizes and expert_bytes must be at least 1, not {size}")


def run(arguments: list[str]) -> int:
    """Replay, and print hits and what was moved for every policy and size."""
    config = parse(CacheConfig, "cache", arguments)
    trace = read_trace(config.trace)
    choices = torch.from_numpy(trace.choices()[0])
    experts = trace.info.num_experts
    largest = experts * (trace.info.num_layers if config.shared else 1)
    sizes = config.sizes or (*_doubling(largest), largest)
    cells = [(size, name) for size in sizes for name in config.caches]
    moved = "experts moved" if config.expert_bytes is None else "MB moved"
    table = make_table("experts held", "policy", "hits", moved, words=("policy",))
    for size, name in track(cells, "replaying", total=len(cells)):
        found = replay(choices, CACHES.parse(name), size, num_experts=experts, shared=config.shared)
        amount = f"{found.loads:,}"
        if config.expert_bytes is not None:
            amount = f"{found.bytes_moved(config.expert_bytes) / 1e6:,.1f}"
        table.add_row(str(size), name, f"{found.hit_rate:.1%}", amount)
    Console().print(table)
    where = "one memory for all layers" if config.shared else "a memory for each layer"
    print(
        f"{trace.num_tokens:,} tokens in decoding order, {trace.info.num_layers} layers of "
        f"{experts} experts, {where}, empty at first"
    )
    return 0


def _doubling(end: int) -> list[int]:
    """1, 2, 4, ... below `end`."""
    return [2**power for power in range(end.bit_length()) if 2**power < end]
