"""All experts at once: every step is one operation over all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.experts.activation import activate, activation_grad, activation_grad_out
from etr.moe.experts.feed_forward import Grads, Problem
from etr.moe.experts.products import Products, sum_rows_of_experts


@dataclass(frozen=True)
class Whole:
    """Engine over the `Products` of a backend."""

    products: Callable[[Problem], Products]

    def forward(self, problem: Problem, keep: bool) -> tuple[Tensor, Tensor | None]:
        products, route = self.products(problem), problem.route
        rows = problem.source if route is None else route.gather(problem.source)
        hidden = products.times(rows, problem.up.transpose(1, 2))
        del rows
        if problem.up_bias is not None:
            hidden = hidden + products.spread(problem.up_bias, len(hidden))
        active = activate(hidden, problem.activation, problem.clamp).contiguous()
        out = products.times(active, problem.down.transpose(1, 2))
        if route is not None:
            out = route.sum(out, route.weight_of_row)
        return out, hidden if keep else None

    def backward(self, problem: Problem, hidden: Tensor, grad: Tensor, wanted: Grads) -> Grads:
        products, route = self.products(problem), problem.route
        grad_rows = grad if route is None else route.gather(grad)
        grad_active = products.times(grad_rows, problem.down)
        active = activate(hidden, problem.activation, problem.clamp)
        grad_weight = grad_down = grad_up = grad_source = grad_bias = None
        if route is not None:
            if wanted.weight_of_row is not None:
                grad_weight = (grad_active * active).sum(-1)
            grad_active = grad_active * route.weight_of_row[:, None]
            active = active * route.weight_of_row[:, None]
        if wanted.down is not None:
            grad_down = products.outer(grad_rows, active.contiguous())
        del grad_rows, active
        if torch.compiler.is_compiling():  # which fuses this, and refuses to write into halves
            grad_hidden = activation_grad(hidden, grad_active, problem.activation, problem.clamp)
        else:
            grad_hidden = activation_grad_out(
                hidden, grad_active, problem.activation, torch.empty_like(hidden), problem.clamp
            )
        del grad_active
        if wanted.up_bias is not None:
            grad_bias = sum_rows_of_experts(products, grad_hidden)
        if wanted.up is not None:
            rows = problem.source if route is None else route.gather(problem.source)
            grad_up = products.outer(grad_hidden, rows)
            del rows
        if wanted.source is not None:
            grad_source = products.times(grad_hidden, problem.up)
            if route is not None:
                grad_source = route.sum(grad_source)
        return Grads(grad_source, grad_weight, grad_up, grad_down, grad_bias)
