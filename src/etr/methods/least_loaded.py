"""Least-loaded expert parallelism: what a rank has too much of runs elsewhere (2601.17111)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.dispatch import DISPATCHERS, Dispatcher
from etr.moe.dispatch.all_to_all import by_expert
from etr.moe.dispatch.base import Steps
from etr.moe.dispatch.permute import Permute
from etr.moe.exchange import Traffic, arrive, depart, exchange_evenly
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import Peers
from etr.moe.routing import Routing, Selection
from etr.moe.rows import GatherRows


def spill(
    loads: Sequence[int], num_ranks: int, alpha: float = 1.0, chunk: int = 1
) -> list[list[int]]:
    """How many tokens of each expert each rank runs, [E][R].

    The expert with the most tokens comes first. Its home fills up to a cap, alpha times the mean
    load of ranks; the rest goes in chunks to the least loaded others, up to their cap, and where no
    rank takes a chunk to the least loaded of all.

    Args:
        loads: tokens of each expert; ranks are at home with equal blocks of consecutive experts.
        num_ranks: R.
        alpha: the cap over the mean load.
        chunk: tokens that are worth sending an expert's weights for.
    """
    block, cap = len(loads) // num_ranks, math.ceil(alpha * sum(loads) / num_ranks - 1e-6)
    plan = [[0] * num_ranks for _ in loads]
    load = [sum(loads[r * block : (r + 1) * block]) for r in range(num_ranks)]
    for expert in sorted(range(len(loads)), key=lambda e: -loads[e]):
        home, rest = expert // block, loads[expert]
        load[home] -= rest
        placed = [min(rest, max(cap - load[home], 0))]
        hosts, others = [home], [rank for rank in range(num_ranks) if rank != home]
        load[home] += placed[0]
        rest -= placed[0]
        while rest:
            rank = min(others, key=lambda r: (load[r], r), default=home)
            size = min(rest, cap - load[rank])
            if size < min(chunk, rest):  # no other rank has more room
                rank, size = min(range(num_ranks), key=lambda r: (load[r], r)), rest
            hosts.append(rank)
            placed.append(size)
            load[rank] += size
            rest -= size
        for rank, size in zip(hosts, placed, strict=True):
            plan[expert][rank] += size
    return plan


@dataclass(frozen=True)
class Moves:
    """Who sends what to whom, known to every rank; numbers on the host.

    Args:
        rows: of each expert that each source sends to each rank, int64 [R, E, R].
        guests: experts that each rank runs for others, ascending.
        block: experts of a rank.
    """

    rows: Tensor
    guests: list[list[int]]
    block: int

    @classmethod
    def of(cls, counts: Tensor, plan: list[list[int]]) -> Moves:
        """Divide every expert's tokens, in the order of source ranks, among who runs it.

        Args:
            counts: tokens of each source for each expert, int64 [R, E].
            plan: see `spill`; the home's part comes first.
        """
        num_ranks, num_experts = counts.shape
        block = num_experts // num_ranks
        rows = torch.zeros(num_ranks, num_experts, num_ranks, dtype=torch.int64)
        for expert, shares in enumerate(plan):
            home, number = expert // block, 0
            left = counts[:, expert].tolist()
            for rank in (home, *(r for r in range(num_ranks) if r != home)):
                room = shares[rank]
                while room:
                    size = min(room, left[number])
                    rows[number, expert, rank] += size
                    left[number] -= size
                    room -= size
                    number += not left[number]
        ranks = range(num_ranks)
        away = [[e for e, s in enumerate(plan) if s[r] and e // block != r] for r in ranks]
        return cls(rows, away, block)

    def hosted(self, rank: int) -> list[int]:
        """Experts that a rank runs, its own first."""
        return [*range(rank * self.block, (rank + 1) * self.block), *self.guests[rank]]

    def order(self, own: int) -> Tensor:
        """Rows of a source, which lie by expert, by rank that they go to and there by expert."""
        rows = self.rows[own]  # [E, R]
        start = rows.sum(1).cumsum(0) - rows.sum(1)
        sent = torch.zeros(len(rows), dtype=torch.int64)
        parts = {}
        for expert in range(len(rows)):
            home = expert // self.block
            for rank in (home, *(r for r in range(rows.shape[1]) if r != home)):
                first, size = int(start[expert] + sent[expert]), int(rows[expert, rank])
                parts[rank, expert] = torch.arange(first, first + size)
                sent[expert] += size
        ranks = range(rows.shape[1])
        return torch.cat([parts[rank, expert] for rank in ranks for expert in self.hosted(rank)])


@dataclass(frozen=True, kw_only=True)
class LeastLoaded(Dispatcher):
    """Ranks that have too many rows lend experts to those that have few.

    Rows go to who runs them, with the weights of the expert if it is a guest there; its gradients
    go home in the backward pass. Outputs and gradients are those of any other dispatch.
    """

    name = "least_loaded"
    summary = "what exceeds a rank's share runs on the least loaded one, with borrowed weights"

    alpha: float = 1.0
    """Most rows of a rank over the mean, where chunks allow it."""
    chunk: int = 1
    """Rows that are worth sending an expert's weights for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 1:
            raise ValueError(f"alpha={self.alpha} must be at least 1")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 row")

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        peers, local = traffic.parallel.expert_peers, Permute()
        handle = local.plan(routing, selection, padded=False)
        own = selection.num_tokens_per_expert.expand(peers.size, -1)
        counts = exchange_evenly(own, peers, traffic).cpu()
        loads = counts.sum(0).tolist()
        moves = Moves.of(counts, spill(loads, peers.size, self.alpha, self.chunk))
        yield
        if any(moves.guests):
            there = depart(*lent(moves, params, peers, x), peers, traffic)
            yield
            params = borrowed(params, arrive(there))
        rows = GatherRows.apply(x, handle.token_of_row, handle.rows_by_token, handle.start_of_token)
        order = moves.order(peers.rank).to(x.device)
        sends = moves.rows[peers.rank].sum(0).tolist()
        receives = moves.rows[:, :, peers.rank].sum(1).tolist()
        there = depart(rows[order], sends, receives, peers, traffic)
        yield
        rows = arrive(there)
        arriving = moves.rows[:, moves.hosted(peers.rank), peers.rank].to(x.device)
        out = backend.run_routed(rows, by_expert(arriving, rows), params)
        back = depart(out, receives, sends, peers, traffic)
        yield
        rows = arrive(back)[torch.empty_like(order).scatter(0, order, _numbers(order))]
        return local.combine(rows, handle)


def _numbers(order: Tensor) -> Tensor:
    return torch.arange(len(order), device=order.device)


def lent(
    moves: Moves, params: ExpertParams, peers: Peers, x: Tensor
) -> tuple[Tensor, list[int], list[int]]:
    """Weights of this rank's experts that are guests elsewhere, a row each, by rank they go to.

    Returns:
        Rows, and how many go to and come from each rank.
    """
    home = peers.rank
    leaving = [
        [e - home * moves.block for e in g if e // moves.block == home] for g in moves.guests
    ]
    coming = [e // moves.block for e in moves.guests[home]]
    which = torch.tensor([e for some in leaving for e in some], dtype=torch.int64, device=x.device)
    rows = torch.cat([value[which].flatten(1) for value in _tensors(params).values()], dim=1)
    return rows, [len(some) for some in leaving], [coming.count(r) for r in range(peers.size)]


def borrowed(params: ExpertParams, rows: Tensor) -> ExpertParams:
    """This rank's experts, and behind them those whose weights came as rows."""
    own = _tensors(params)
    parts = rows.split([value[:1].numel() for value in own.values()], dim=1)
    both: dict[str, Any] = {
        name: torch.cat([value, part.view(-1, *value.shape[1:])])
        for (name, value), part in zip(own.items(), parts, strict=True)
    }
    return replace(params, **both)


def _tensors(params: ExpertParams) -> dict[str, Tensor]:
    names = ("up", "down", "up_bias", "down_bias")
    return {name: value for name in names if (value := getattr(params, name)) is not None}


CARD = Card(
    name="least_loaded",
    title="Least-loaded expert parallelism",
    summary=LeastLoaded.summary,
    paper="2601.17111",
    level="system",
    branch="parallelism",
    rows=(Row(table=DISPATCHERS, kind=LeastLoaded),),
    options={"dispatch": "least_loaded"},
    against="etr",
    moves=("bytes", "memory"),
    claim=(
        "Where all tokens of 4 ranks take one expert, no rank runs more than its mean share of "
        "rows (alpha = 1), and outputs and gradients are those of plain expert parallelism within "
        "1e-9."
    ),
    departs=(
        "Rows of an expert are divided in the order of the ranks that they come from. Lent weights "
        "are sent anew in every forward, and not kept for the next."
    ),
)
