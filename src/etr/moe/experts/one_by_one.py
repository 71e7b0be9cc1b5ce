"""One expert after another, in buffers that stay in the cache.

Fresh memory costs a CPU more than the work on it, so rows, activations and their gradients live in
buffers of the largest expert's size; only what must outlive an expert is written at full size.

A compiler sees one operator of `torch.library` each way, since it cannot trace a loop over counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.experts.activation import activate_out, activation_grad_out
from etr.moe.experts.feed_forward import Grads, Problem, flat, problem_of


class _Buffer:
    """Memory for the largest expert, handed out at the size of the present one."""

    def __init__(self, problem: Problem, largest: int) -> None:
        self.problem, self.largest = problem, largest
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, size: int, width: int) -> Tensor:
        if name not in self.held:
            self.held[name] = self.problem.source.new_empty(self.largest, width)
        return self.held[name][:size]


@dataclass(frozen=True)
class OneByOne:
    """Engine that loops over experts. Reads the counts on the host. Any dtype."""

    def forward(self, problem: Problem, keep: bool) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            out, *kept = _forward(*flat(problem), keep)
            return out, kept[0] if keep else None
        source, up, down = problem.source, problem.up, problem.down
        out = source.new_empty(problem.num_rows, down.shape[1])
        hidden = source.new_empty(problem.num_rows, up.shape[1]) if keep else None
        counts = problem.counts.tolist()
        buffer = _Buffer(problem, max(counts))
        for e, rows in _spans(counts):
            size = rows.stop - rows.start
            mine = buffer.take("hidden", size, up.shape[1]) if hidden is None else hidden[rows]
            torch.mm(_rows(problem, source, rows, buffer, "rows"), up[e].T, out=mine)
            if problem.up_bias is not None:
                mine.add_(problem.up_bias[e])
            active = buffer.take("active", size, down.shape[2])
            activate_out(mine, problem.activation, active, problem.clamp)
            torch.mm(active, down[e].T, out=out[rows])
        route = problem.route
        return (out if route is None else route.sum(out, route.weight_of_row)), hidden

    def backward(self, problem: Problem, hidden: Tensor, grad: Tensor, wanted: Grads) -> Grads:
        if torch.compiler.is_compiling():
            asked = [one is not None for one in wanted]
            found = iter(_backward(*flat(problem), hidden, grad, asked))
            return Grads(*(next(found) if one else None for one in asked))
        source, up, down, route = problem.source, problem.up, problem.down, problem.route
        grad_source = None if wanted.source is None else source.new_empty(len(hidden), up.shape[2])
        grad_weight = None if wanted.weight_of_row is None else hidden.new_empty(len(hidden))
        grad_up = None if wanted.up is None else torch.empty_like(up)
        grad_down = None if wanted.down is None else torch.empty_like(down)
        grad_bias = None if wanted.up_bias is None else torch.empty_like(wanted.up_bias)
        counts = problem.counts.tolist()
        buffer = _Buffer(problem, max(counts))
        for e in (e for e, count in enumerate(counts) if count == 0):
            for full in (grad_up, grad_down, grad_bias):
                if full is not None:
                    full[e].zero_()
        for e, rows in _spans(counts):
            size = rows.stop - rows.start
            grad_rows = _rows(problem, grad, rows, buffer, "grad_rows")
            grad_active = buffer.take("grad_active", size, down.shape[2])
            torch.mm(grad_rows, down[e], out=grad_active)
            active = buffer.take("active", size, down.shape[2])
            activate_out(hidden[rows], problem.activation, active, problem.clamp)
            if route is not None:
                if grad_weight is not None:
                    grad_weight[rows] = (grad_active * active).sum(-1)
                grad_active.mul_(route.weight_of_row[rows, None])
                active.mul_(route.weight_of_row[rows, None])
            if grad_down is not None:
                torch.mm(grad_rows.T, active, out=grad_down[e])
            grad_hidden = buffer.take("grad_hidden", size, up.shape[1])
            activation_grad_out(
                hidden[rows], grad_active, problem.activation, grad_hidden, problem.clamp
            )
            if grad_bias is not None:
                torch.sum(grad_hidden, 0, out=grad_bias[e])
            if grad_up is not None:
                own = _rows(problem, source, rows, buffer, "rows")
                torch.mm(grad_hidden.T, own, out=grad_up[e])
            if grad_source is not None:
                torch.mm(grad_hidden, up[e], out=grad_source[rows])
        if grad_source is not None and route is not None:
            grad_source = route.sum(grad_source)
        return Grads(grad_source, grad_weight, grad_up, grad_down, grad_bias)


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and where these stand."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def _rows(problem: Problem, values: Tensor, rows: slice, buffer: _Buffer, name: str) -> Tensor:
    """An expert's rows of `values`: a slice, or gathered from tokens into a buffer."""
    if problem.route is None:
        return values[rows]
    index = problem.route.token_of_row[rows]
    return torch.index_select(values, 0, index, out=buffer.take(name, len(index), values.shape[1]))


Tensors = list[Tensor | None]


@torch.library.custom_op("etr::one_by_one", mutates_args=())
def _forward(
    tensors: Tensors, activation: str, clamp: list[float], padded: bool, keep: bool
) -> list[Tensor]:
    out, hidden = OneByOne().forward(problem_of(tensors, activation, clamp, padded), keep)
    return [out] if hidden is None else [out, hidden]


@_forward.register_fake
def _(
    tensors: Tensors, activation: str, clamp: list[float], padded: bool, keep: bool
) -> list[Tensor]:
    problem = problem_of(tensors, activation, clamp, padded)
    source, up, down = problem.source, problem.up, problem.down
    out = source.new_empty(source.shape[0], down.shape[1])
    return [out, source.new_empty(problem.num_rows, up.shape[1])] if keep else [out]


@torch.library.custom_op("etr::one_by_one_backward", mutates_args=())
def _backward(
    tensors: Tensors,
    activation: str,
    clamp: list[float],
    padded: bool,
    hidden: Tensor,
    grad: Tensor,
    asked: list[bool],
) -> list[Tensor]:
    wanted = Grads(*(one if yes else None for one, yes in zip(tensors, asked, strict=False)))
    problem = problem_of(tensors, activation, clamp, padded)
    return [one for one in OneByOne().backward(problem, hidden, grad, wanted) if one is not None]


@_backward.register_fake
def _(
    tensors: Tensors,
    activation: str,
    clamp: list[float],
    padded: bool,
    hidden: Tensor,
    grad: Tensor,
    asked: list[bool],
) -> list[Tensor]:
    given = zip(tensors, asked, strict=False)
    return [torch.empty_like(one) for one, yes in given if one is not None and yes]
