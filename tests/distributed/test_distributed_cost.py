"""The cost model's bytes are those that a layer counts, for every dispatcher, rank by rank."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, E, Layout, parallel

from etr.cluster.cost import Rows, journey
from etr.moe import DISPATCHERS, ExpertParallel, MoE, MoEConfig, RoutingContext
from etr.moe.capacity import Factor
from etr.moe.dispatch import parse_dispatcher
from etr.moe.exchange import Traffic

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

H = 16
BY_ID = {layout.id: layout for layout in LAYOUTS}
ACROSS = [name for name, kind in DISPATCHERS.items() if kind.needs_ranks]
CASES = [
    *((name, "2x2 twins" if name == "group_wise" else "4 ranks") for name in ACROSS),
    ("chunked:all_to_all_padded,chunks=3", "4 ranks"),
    ("chunked:dedup,chunks=3", "4 ranks"),
    ("chunked:group_wise,chunks=2", "2x2 twins"),
]


def counted(dispatch: str, layout: Layout) -> dict[str, Any]:
    """What a rank's layer sent and kept, with capacity counted on the rank alone."""
    group: ExpertParallel = dataclasses.replace(parallel(layout), selection_group=None)
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=H, intermediate_size=8, num_experts=E, top_k=2, router="token_choice",
        capacity=Factor(capacity_factor=0.8), dispatch=dispatch,
    )  # fmt: skip
    layer = MoE(config).double().distribute(group)
    holder = layout.holder(dist.get_rank())
    x = torch.randn(16 + 3 * holder, H, dtype=torch.float64) + holder
    stats = layer(x).stats
    traffic = Traffic(group)
    routing, limit = layer.route(x, RoutingContext(), traffic)
    selection = layer.keep(routing, limit, traffic).selection
    return {
        "sent": [int(stats["bytes_within_node"]), int(stats["bytes_between_nodes"])],
        "expert": routing.expert.view(len(x), -1),
        "kept": selection.kept.view(len(x), -1),
        "slot": selection.buffer_size,
    }


def count_rows(
    experts: list[np.ndarray], kept: list[np.ndarray], node_size: int, slots: list[int]
) -> Rows:
    """The rows of a routing that is known, choice by choice.

    Args:
        experts: of each rank's tokens, int [T, K], negative where a token has fewer.
        kept: bool [T, K].
        node_size: ranks of a node.
        slots: places of each rank's buffer for an expert.
    """
    num_ranks = len(experts)
    pairs, places, nodes, singles = [], [], [], []
    for chosen, keep in zip(experts, kept, strict=True):
        used = keep & (chosen >= 0)
        to = np.where(used, chosen, E) // (E // num_ranks)
        hit = (to[..., None] == np.arange(num_ranks)).sum(1)  # [T, N]
        grid = hit.reshape(len(hit), num_ranks // node_size, node_size)
        pairs.append(hit.sum(0))
        singles.append(np.bincount(chosen[used], minlength=E))
        places.append(grid.any(1).sum(0))
        nodes.append(grid.any(2).sum(0))
    return Rows(
        tokens=np.array([len(chosen) for chosen in experts]),
        pairs=np.array(pairs),
        by_place=np.array(places),
        by_node=np.array(nodes),
        to_expert=np.array(singles),
        slots=np.array(slots),
        experts_per_rank=E // num_ranks,
    )


def on_rank(world: int) -> dict[str, Any]:
    if world != 4:
        return {}
    return {"cost": {case: counted(case[0], BY_ID[case[1]]) for case in CASES}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bytes_are_those_that_a_layer_counts(ranks: Any, case: tuple[str, str]) -> None:
    dispatch, layout = case[0], BY_ID[case[1]]
    parts = [rank["cost"][case] for rank in ranks(4)]
    twins = "tensor" in layout.dims
    expert = [part["expert"].numpy() for part in parts]
    kept = [part["kept"].numpy() for part in parts]
    found = np.zeros((4, 4))
    # Twins hold the same tokens, and each sends its share of every chunk.
    for twin in range(2 if twins else 1):
        group = [0 + twin, 2 + twin] if twins else [0, 1, 2, 3]
        chunks = getattr(parse_dispatcher(dispatch), "chunks", 1)
        own = [_share(len(expert[r]), chunks, twin) if twins else slice(None) for r in group]
        rows = count_rows(
            [expert[r][s] for r, s in zip(group, own, strict=True)],
            [kept[r][s] for r, s in zip(group, own, strict=True)],
            node_size=1 if twins else 2,
            slots=[parts[r]["slot"] for r in group],
        )
        sent = journey(parse_dispatcher(dispatch), rows, H * 8, 8, 3 * H * 8 * 8)
        found[np.ix_(group, group)] += sent.total_bytes()
        for rank in group if twins else ():
            size = sum(-(-n // 2) for n in _chunks(len(expert[rank]), chunks))
            found[rank, rank ^ 1] += size * H * 8
    node = np.array(layout.nodes)
    near = node[:, None] == node
    for rank, part in enumerate(parts):
        assert part["sent"] == [found[rank][near[rank]].sum(), found[rank][~near[rank]].sum()]


def _chunks(tokens: int, chunks: int) -> list[int]:
    ends = [tokens * i // chunks for i in range(chunks + 1)]
    return [b - a for a, b in pairwise(ends)]


def _share(tokens: int, chunks: int, twin: int) -> list[int]:
    """Tokens of a twin: the first or second half of each chunk."""
    found, start = [], 0
    for size in _chunks(tokens, chunks):
        half = -(-size // 2)
        found += list(range(start + twin * half, start + min((twin + 1) * half, size)))
        start += size
    return found
