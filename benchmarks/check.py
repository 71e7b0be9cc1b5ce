"""Is it right? Values and gradients against plain loops in float32, on the system's own routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.systems.base import Built

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest error of a row over the mean size of a row: one wrong token or expert gives about 1."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Result of the plain loops.

    Args:
        y, grad_x, grad_weight: [T, H], [T, H] without the path through the router, [T, E].
        grad_up, grad_down: of all experts.
    """

    y: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_up: Tensor
    grad_down: Tensor


def plain_moe(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of SwiGLU experts, one expert at a time.

    Args:
        x: tokens [T, H].
        weight: combine weights [T, E]; 0 where a pair is not kept.
        up, down: [E, 2I, H] (gate first) and [E, H, I].
    """
    y = torch.zeros_like(x)
    for e, (up_e, down_e) in enumerate(zip(up.unbind(), down.unbind(), strict=True)):
        (rows,) = torch.where(weight[:, e] != 0)
        gate, value = (x[rows] @ up_e.T).chunk(2, dim=-1)
        out = (F.silu(gate) * value) @ down_e.T
        y = y.index_add(0, rows, weight[rows, e, None] * out)
    return y


class Reference:
    """The plain loops on one input; keeps results, since many systems route alike."""

    def __init__(self, x: Tensor, upstream: Tensor, up: Tensor, down: Tensor) -> None:
        self.x, self.upstream = x.detach().float(), upstream.float()
        self.up, self.down = up.detach(), down.detach()
        self._known: list[tuple[Tensor, Expected]] = []

    def __call__(self, weight: Tensor) -> Expected:
        """Output and gradients for combine weights [T, E]."""
        weight = weight.detach().float()
        for known, expected in self._known:
            if torch.allclose(known, weight, rtol=1e-5, atol=1e-7):
                return expected
        leaves = [t.float().requires_grad_() for t in (self.x.clone(), weight, self.up, self.down)]
        y = plain_moe(*leaves)
        grads = torch.autograd.grad(y, leaves, self.upstream)
        expected = Expected(
            y=y.detach(),
            grad_x=grads[0],
            grad_weight=grads[1],
            grad_up=grads[2],
            grad_down=grads[3],
        )
        self._known.append((weight, expected))
        return expected


def check(built: Built, x: Tensor, upstream: Tensor, reference: Reference) -> str:
    """Compare a system with the plain loops on the routing that it used in this very call.

    Returns:
        empty, or what differs and by how much.
    """
    assert built.traced is not None
    leaf = x.detach().requires_grad_()
    y, weight = built.traced(leaf)
    leaves = [leaf, *built.up, *built.down]
    grads = torch.autograd.grad(y, leaves, upstream.view_as(y), retain_graph=True)
    expected = reference(weight)
    grad_x = expected.grad_x
    if weight.requires_grad:
        # The system's own router carries the gradient of its weights back to the tokens.
        (through_router,) = torch.autograd.grad(
            weight, leaf, expected.grad_weight.to(weight.dtype), allow_unused=True
        )
        if through_router is not None:
            grad_x = grad_x + through_router.float()
    middle = 1 + len(built.up)
    grad_up, grad_down = built.read_grads(grads[1:middle], grads[middle:])
    errors = {
        "output": row_error(y.view_as(x), expected.y),
        "gradient of the input": row_error(grads[0], grad_x),
        "gradient of the first projection": row_error(grad_up, expected.grad_up),
        "gradient of the second projection": row_error(grad_down, expected.grad_down),
    }
    allowed = TOLERANCE[x.dtype]
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    return "; ".join(f"{name} differs by {error:.2g}" for name, error in wrong.items())


@torch.no_grad()
def row_error(found: Tensor, expected: Tensor) -> float:
    """Largest distance of two rows over the root mean square norm of the expected rows."""
    found, expected = found.float().flatten(1), expected.flatten(1)
    size = expected.norm(dim=1).square().mean().sqrt().clamp_min(1e-30)
    return float((found - expected).norm(dim=1).max() / size)
