"""Communication behind computation: one chunk of the tokens travels while another is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from etr.moe.dispatch.all_to_all import AllToAll
from etr.moe.dispatch.base import Dispatcher, Steps, pairs_per_token, part_of
from etr.moe.exchange import Traffic
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import ExpertParallel
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class Chunked(Dispatcher):
    """Another dispatcher on consecutive chunks of the tokens, each one step behind the last.

    The backward pass runs the same steps in reverse, so there too a chunk travels while its
    neighbour is computed.
    """

    name = "chunked"
    summary = "another dispatcher, chunk by chunk: one travels while the last is computed"

    wrapped: Dispatcher = field(default_factory=AllToAll)
    """The dispatcher of a chunk."""
    chunks: int = 4
    """Chunks of each rank's tokens; the same on every rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1:
            raise ValueError(f"chunks={self.chunks} must be at least 1")
        if isinstance(self.wrapped, Chunked) or not self.wrapped.needs_ranks:
            raise ValueError(
                f"wrapped={self.wrapped.name!r}: only what sends rows, and is not chunked itself, "
                "can be cut into chunks"
            )

    @property
    def padded(self) -> bool:
        return self.wrapped.padded

    def check(self, parallel: ExpertParallel) -> None:
        self.wrapped.check(parallel)

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        ends = [x.shape[0] * i // self.chunks for i in range(self.chunks + 1)]
        spans = list(pairwise(ends))
        sizes = [stop - start for start, stop in spans]
        width = pairs_per_token(routing)
        weights = selection.combine_weight.split([size * width for size in sizes])
        chunks = [
            self.wrapped.steps(
                part, *part_of(routing, selection, weight, *span), backend, params, traffic
            )
            for part, weight, span in zip(x.split(sizes), weights, spans, strict=True)
        ]
        for chunk in chunks:
            next(chunk)  # the counts of all chunks first: later they would queue behind rows
        yield
        return torch.cat(in_turns(chunks))


def in_turns(chunks: Sequence[Steps]) -> list[Tensor]:
    """Results of all, each chunk one step behind the one before it.

    In every round the latest chunk moves first, so that its rows depart before those that have
    arrived are computed.
    """
    found: list[Tensor | None] = [None] * len(chunks)
    waiting = list(range(len(chunks)))
    moving: list[int] = []
    while waiting or moving:
        moving = waiting[:1] + moving
        del waiting[:1]
        for number in list(moving):
            try:
                next(chunks[number])
            except StopIteration as end:
                found[number] = end.value
                moving.remove(number)
    return [part for part in found if part is not None]
