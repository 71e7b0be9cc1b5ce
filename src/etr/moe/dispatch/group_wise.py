"""Ranks that hold the same tokens share the exchange: a part each, and a gather completes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from etr.moe.dispatch.all_to_all import AllToAll
from etr.moe.dispatch.base import Dispatcher, Steps, pairs_per_token, part_of
from etr.moe.exchange import Traffic
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import ExpertParallel, Peers
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class GroupWise(Dispatcher):
    """Each of the tensor group's M ranks dispatches 1/M of the tokens that all of them hold.

    Every rank gets the whole result, and the whole gradient of tokens and combine weights. Experts
    see each token on one of the M ranks alone, so their gradients are to be summed over the group.
    """

    name = "group_wise"
    summary = "tensor-parallel ranks carry a part of the tokens each; a gather completes it"

    wrapped: Dispatcher = field(default_factory=AllToAll)
    """The dispatcher of a part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wrapped.name in (self.name, "chunked", "permute"):
            raise ValueError(
                f"wrapped={self.wrapped.name!r}: parts of the tokens need a plain dispatcher "
                "across ranks; to overlap too, use 'chunked:group_wise'"
            )

    @property
    def padded(self) -> bool:
        return self.wrapped.padded

    def check(self, parallel: ExpertParallel) -> None:
        if parallel.tensor_group is None:
            raise ValueError(
                "dispatch='group_wise' needs ranks that hold the same tokens: a mesh with a "
                "dimension 'tensor'"
            )
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
        peers, num_tokens = traffic.parallel.tensor_peers, x.shape[0]
        assert peers is not None
        size = -(-num_tokens // peers.size)
        start = min(peers.rank * size, num_tokens)
        stop = min(start + size, num_tokens)
        weight = selection.combine_weight.view(-1, pairs_per_token(routing))
        weight = _TakeShare.apply(weight, start, stop, size, peers).flatten()
        part = part_of(routing, selection, weight, start, stop)
        share = _TakeShare.apply(x, start, stop, size, peers)
        share = yield from self.wrapped.steps(share, *part, backend, params, traffic)
        sent = [size] * peers.size
        traffic.count(sent, x.shape[1] * x.element_size(), peers)
        return _Complete.apply(share, start, stop, size, num_tokens, peers)


def _gather(share: Tensor, size: int, num_tokens: int, peers: Peers) -> Tensor:
    """All tokens from everybody's share, of at most `size` tokens."""
    share = F.pad(share, (0, 0, 0, size - share.shape[0]))
    whole = share.new_empty(peers.size * size, share.shape[1])
    dist.all_gather(list(whole.chunk(peers.size)), share.contiguous(), group=peers.group)
    return whole[:num_tokens]


class _TakeShare(torch.autograd.Function):
    """This rank's tokens; in the backward pass, the gradient of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int, size: int, peers: Peers) -> Tensor:
        ctx.rest = size, x.shape[0], peers
        return x[start:stop]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gather(grad, *ctx.rest), None, None, None, None


class _Complete(torch.autograd.Function):
    """All tokens; in the backward pass, the gradient of this rank's."""

    @staticmethod
    def forward(
        ctx: Any, share: Tensor, start: int, stop: int, size: int, num_tokens: int, peers: Peers
    ) -> Tensor:
        ctx.span = start, stop
        return _gather(share, size, num_tokens, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        start, stop = ctx.span
        return grad[start:stop], None, None, None, None, None
