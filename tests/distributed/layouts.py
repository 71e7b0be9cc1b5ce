"""Ranks arranged in several ways, and a layer run on them and on one rank for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from etr.moe import ExpertParallel, MoE, RoutingContext, Topology

E = 4
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
WHOLE = ("experts.constants", "experts.stand_in.")
"""Parameters of a bank that every rank holds whole."""


@dataclass(frozen=True)
class Layout:
    """A mesh over all ranks, and how many tokens each rank has (twins the same)."""

    id: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    nodes: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.nodes)

    def place(self, rank: int, dim: str) -> int:
        """Coordinate of a rank; 0 in a dimension that the mesh lacks."""
        if dim not in self.dims:
            return 0
        grid = torch.arange(self.world).view(self.shape)
        return int((grid == rank).nonzero()[0, self.dims.index(dim)])

    @property
    def holders(self) -> list[int]:
        """Ranks whose tokens count: the first of each tensor group."""
        return [rank for rank in range(self.world) if self.place(rank, "tensor") == 0]

    def holder(self, rank: int) -> int:
        """Which of the holders has the tokens of a rank."""
        for number, other in enumerate(self.holders):
            if all(self.place(rank, d) == self.place(other, d) for d in ("data", "expert")):
                return number
        raise AssertionError(rank)


LAYOUTS = (
    Layout("2 ranks", ("expert",), (2,), (0, 1), (11, 5)),
    Layout("2 ranks, one empty", ("expert",), (2,), (0, 0), (12, 0)),
    Layout("2 replicas", ("data", "expert"), (2, 1), (0, 1), (7, 9)),
    Layout("2 twins", ("expert", "tensor"), (1, 2), (0, 0), (9,)),
    Layout("4 ranks", ("expert",), (4,), (0, 0, 1, 1), (7, 0, 9, 4)),
    Layout("4 ranks, no token", ("expert",), (4,), (0, 0, 1, 1), (0, 0, 0, 0)),
    Layout("2x2 data", ("data", "expert"), (2, 2), (0, 1, 0, 1), (3, 8, 1, 6)),
    Layout("2x2 twins", ("expert", "tensor"), (2, 2), (0, 0, 1, 1), (11, 5)),
)


@cache
def parallel(layout: Layout) -> ExpertParallel:
    """The groups of a layout, on a rank."""
    mesh = init_device_mesh("cpu", layout.shape, mesh_dim_names=layout.dims)
    return ExpertParallel.create(mesh, Topology(layout.nodes), E)


@dataclass(frozen=True)
class Batch:
    """Tokens, cotangents, vocabulary ids and mask of one micro-batch."""

    x: Tensor
    cotangent: Tensor
    token_ids: Tensor
    valid_mask: Tensor

    @classmethod
    def make(cls, num_tokens: int, width: int, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x, cotangent = torch.randn(2, num_tokens, width, dtype=torch.float64, generator=generator)
        x[:, : width // E] += 0.5
        return cls(
            x,
            cotangent,
            torch.randint(0, 1000, (num_tokens,), generator=generator),
            torch.rand(num_tokens, generator=generator) > 0.15,
        )

    def of(self, layout: Layout, rank: int) -> Batch:
        """What one rank has of it."""
        number = layout.holder(rank)
        tensors = (self.x, self.cotangent, self.token_ids, self.valid_mask)
        return Batch(*(tensor.split(layout.sizes)[number] for tensor in tensors))

    def context(self, **fields: Any) -> RoutingContext:
        return RoutingContext(valid_mask=self.valid_mask, token_ids=self.token_ids, **fields)


def run(layer: MoE, batch: Batch, num_holders: int = 1, **fields: Any) -> dict[str, Tensor]:
    """Output, losses, gradients and counters of one forward and backward."""
    x = batch.x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x, batch.context(**fields))
    losses = sum(output.losses.values(), start=torch.zeros((), dtype=x.dtype))
    # The losses of ranks average to that of one rank, what belongs to tokens adds up.
    ((output.hidden_states * batch.cotangent).sum() + losses / num_holders).backward()
    assert x.grad is not None
    found = {"y": output.hidden_states.detach(), "x.grad": x.grad, "losses": losses.detach()}
    for name, weight in layer.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        found[name] = grad.to_local() if hasattr(grad, "to_local") else grad
    return found | {f"stats.{name}": value for name, value in output.stats.items()}


def run_here(layer: MoE, layout: Layout, batch: Batch, **fields: Any) -> dict[str, Tensor]:
    """`run` on this rank, with its part of the batch; the layer is distributed already."""
    part = batch.of(layout, dist.get_rank())
    return run(layer, part, len(layout.holders), **fields)


def assert_one_rank(
    found: list[dict[str, Tensor]], want: dict[str, Tensor], layout: Layout
) -> None:
    """What the ranks found together is what one rank found with all tokens."""
    holders = layout.holders
    for name, value in want.items():
        parts = [part[name] for part in found]
        if name in ("y", "x.grad"):
            got = torch.cat([parts[rank] for rank in holders])
            for rank, part in enumerate(parts):  # twins hold the same
                torch.testing.assert_close(part, parts[holders[layout.holder(rank)]], **CLOSE)
        elif name.startswith("experts.") and not name.startswith(WHOLE):
            by_place: dict[int, Tensor] = {}
            for rank, part in enumerate(parts):
                place = layout.place(rank, "expert")
                by_place[place] = by_place.get(place, torch.zeros_like(part)) + part
            got = torch.cat([by_place[place] for place in sorted(by_place)])
        elif name == "losses":
            got = torch.stack([parts[rank] for rank in holders]).mean()
        elif name.startswith("stats."):
            got = torch.stack(parts).sum(0)
            if not value.is_floating_point():
                assert torch.equal(got, value), name
        else:
            got = torch.stack([parts[rank] for rank in holders]).sum(0)
        torch.testing.assert_close(got, value.to(got), **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
