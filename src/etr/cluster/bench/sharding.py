"""Documents given to the node whose experts they use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from etr.data import Batch, TokenLoader
from etr.moe import moe_layers, selecting
from etr.moe.watch import LayerView, watch
from etr.train.loop import Trainer


class Sharded(Iterator[Batch]):
    """The batches that a loader would give, with their rows dealt to the ranks by a table.

    Args:
        whole: gives the global batch to every rank.
        rows: rows of this rank in each of the batches to come, int64 [batches, rows].
    """

    def __init__(self, whole: TokenLoader, rows: Tensor) -> None:
        self._whole, self._rows = whole, iter(rows)
        self.tokens_per_batch = whole.tokens_per_batch

    def __next__(self) -> Batch:
        batch, rows = next(self._whole), next(self._rows)
        return Batch(**{name: value[rows] for name, value in vars(batch).items()})


def sharded_by_routing(
    trainer: Trainer, start: TokenLoader, count: int, nodes: tuple[int, ...]
) -> Sharded:
    """Record where the tokens of the batches to come would go, and deal the rows accordingly.

    Every rank traces its own rows, all learn the table, and each batch is dealt so that as many
    tokens as possible find their expert on their node, with equal numbers of rows for all ranks.

    Args:
        trainer: between two steps; every rank calls this at the same one.
        start: a loader of the global batch, where the batches begin; it is moved on.
        count: batches to deal.
        nodes: node of each rank.
    """
    state, rank = start.state_dict(), dist.get_rank()
    rows = start.batch_size // len(nodes)
    own = slice(rank * rows, (rank + 1) * rows)
    shares = torch.stack(
        [_node_shares(trainer, batch.input_ids[own], nodes) for batch in islice(start, count)]
    )
    found = [torch.empty_like(shares) for _ in nodes]
    dist.all_gather(found, shares)
    table = torch.cat(found, dim=1)  # [batches, rows of the global batch, nodes]
    start.load_state_dict(state)
    return Sharded(start, torch.stack([deal(rows, nodes)[rank] for rows in table]))


def deal(shares: Tensor, nodes: tuple[int, ...]) -> Tensor:
    """Rows of each rank so that the shares on their nodes sum to the most, int64 [ranks, rows].

    Args:
        shares: of each row's tokens whose expert is on each node, [rows, nodes].
        nodes: node of each rank; divides the number of rows.
    """
    per_rank = shares.shape[0] // len(nodes)
    rank_of_place = np.repeat(np.arange(len(nodes)), per_rank)
    gain = shares.numpy()[:, np.array(nodes)[rank_of_place]]
    rows, places = linear_sum_assignment(gain, maximize=True)
    row_of_place = torch.empty(len(rows), dtype=torch.int64)
    row_of_place[torch.from_numpy(places)] = torch.from_numpy(rows)
    return row_of_place.view(len(nodes), per_rank).sort(1).values


@torch.no_grad()
def _node_shares(trainer: Trainer, input_ids: Tensor, nodes: tuple[int, ...]) -> Tensor:
    """Share of each row's choices on each node, over all layers, [rows, nodes]."""
    layers = moe_layers(trainer.model)
    experts = layers[0].config.num_experts
    node = torch.tensor([nodes[e * len(nodes) // experts] for e in range(experts)])
    rows, length = input_ids.shape
    shares = torch.zeros(rows, max(nodes) + 1)

    def see(layer: int, view: LayerView) -> None:
        valid = view.routing.valid
        row, where = view.routing.token[valid] // length, node[view.routing.expert[valid]]
        shares.index_put_((row, where), torch.ones(len(row)), accumulate=True)

    with selecting(trainer.model, "dropless"), watch(trainer.model, see):
        trainer.model(input_ids=input_ids)
    return shares / shares.sum(1, keepdim=True).clamp_min(1)
