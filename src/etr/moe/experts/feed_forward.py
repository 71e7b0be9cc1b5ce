"""The expert feed-forward as one autograd function, whatever runs it.

    y = sum over a token's rows of  weight * down(activate(up(x) + up_bias))

For the backward pass it keeps the input and the pre-activation ("hidden") alone, next to the
weights. Gathered rows are gathered again, the activation is computed again, and the experts'
outputs are not needed: with ``g = dy @ down`` the gradient of a row's combine weight is
``<g, activate(hidden)>``, and that of its activation ``weight * g``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from etr.moe.experts.activation import CLAMP, Activation, Clamp
from etr.moe.rows import gather_rows, sum_rows


@dataclass(frozen=True)
class Route:
    """Which token each row belongs to, and how it weighs; fields as in `DispatchHandle`."""

    weight_of_row: Tensor
    token_of_row: Tensor
    rows_by_token: Tensor
    start_of_token: Tensor
    padded: bool = True

    def gather(self, x: Tensor) -> Tensor:
        """Rows [R, H] of tokens [T, H]."""
        return gather_rows(x, self.token_of_row, self.padded)

    def sum(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Tokens [T, H] as sums of rows [R, H]."""
        return sum_rows(rows, weight, self.rows_by_token, self.start_of_token)


@dataclass(frozen=True)
class Problem:
    """One call of the experts.

    Args:
        source: tokens [T, H] with a route, else rows [R, H] in expert order.
        route: how tokens become rows and back, or None for rows in, rows out.
        counts: rows of each expert, int64 [E].
        up: [E, 2I, H] where gated, else [E, I, H].
        down: [E, H, I].
        up_bias: [E, 2I] or [E, I], or None.
        activation: name in `ACTIVATIONS`.
        clamp: numbers of a clamped activation.
    """

    source: Tensor
    route: Route | None
    counts: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    activation: Activation
    clamp: Clamp = CLAMP

    @property
    def num_rows(self) -> int:
        """R."""
        return (self.source if self.route is None else self.route.token_of_row).shape[0]


class Grads(NamedTuple):
    """Gradients of a problem's inputs; None where not wanted."""

    source: Tensor | None
    weight_of_row: Tensor | None
    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None


class Engine(Protocol):
    """What runs a problem. An engine sees neither autograd nor the rest of the layer."""

    def forward(self, problem: Problem, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Result [T, H] or [R, H], and hidden [R, 2I or I] if it is to be kept."""

    def backward(self, problem: Problem, hidden: Tensor, grad: Tensor, wanted: Grads) -> Grads:
        """Gradients; those wanted are the ones that are not None in `wanted`."""


def feed_forward(engine: Engine, problem: Problem) -> Tensor:
    """Run a problem, recording its gradient where one is wanted.

    The gradient itself cannot be differentiated again: torch raises a RuntimeError.

    Returns:
        [T, H] with a route, else [R, H].
    """
    tensors, *options = flat(problem)
    inputs = (tensor for tensor in tensors[: len(Grads._fields)] if tensor is not None)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return engine.forward(problem, keep=False)[0]
    return _FeedForward.apply(*tensors, engine, options)


def flat(problem: Problem) -> tuple[list[Tensor | None], Activation, list[float], bool]:
    """A problem as what autograd and compilers hand on, for `problem_of`.

    Returns:
        Tensors, those that may have a gradient first, in the order of `Grads`; the activation; the
        numbers of its clamp; whether there may be empty rows.
    """
    route = problem.route
    weight: Tensor | None = None
    index: tuple[Tensor | None, ...] = (None, None, None)
    if route is not None:
        weight = route.weight_of_row
        index = (route.token_of_row, route.rows_by_token, route.start_of_token)
    tensors = [problem.source, weight, problem.up, problem.down, problem.up_bias, problem.counts]
    padded = route is not None and route.padded
    return [*tensors, *index], problem.activation, [*problem.clamp], padded


def problem_of(
    tensors: Sequence[Any], activation: Any, clamp: list[float], padded: bool
) -> Problem:
    """The problem that `flat` took apart."""
    source, weight, up, down, up_bias, counts, token_of_row, by_token, start = tensors
    route = None if weight is None else Route(weight, token_of_row, by_token, start, padded)
    return Problem(source, route, counts, up, down, up_bias, activation, Clamp(*clamp))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, engine, options = args
        result, hidden = engine.forward(problem_of(tensors, *options), keep=True)
        ctx.save_for_backward(*tensors, hidden)
        ctx.engine, ctx.options = engine, options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, hidden = ctx.saved_tensors
        wanted = zip(tensors[:5], ctx.needs_input_grad[:5], strict=True)
        grads = ctx.engine.backward(
            problem_of(tensors, *ctx.options),
            hidden,
            grad.contiguous(),
            Grads(*(tensor if needed else None for tensor, needed in wanted)),
        )
        return *grads, *([None] * 6)
