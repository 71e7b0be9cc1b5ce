"""Activations of the experts, and their gradients in closed form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["swiglu", "gelu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "gelu", "relu2")

_ops = torch.ops.aten


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """Apply the activation to the last dimension: swiglu halves it, the others keep it."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(hidden)
    return F.relu(hidden).square()


def activate_out(hidden: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """`activate` without a gradient, written to `out`."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return _ops.silu.out(gate, out=out).mul_(up)
    if activation == "gelu":
        return _ops.gelu.out(hidden, out=out)
    return torch.clamp_min(hidden, 0, out=out).square_()


def activation_grad(hidden: Tensor, grad: Tensor, activation: Activation) -> Tensor:
    """Gradient of `activate` with respect to `hidden`.

    Args:
        hidden: what was activated, [R, 2I] for swiglu, else [R, I].
        grad: gradient of the activated values, [R, I].
    Returns:
        The shape of `hidden`.
    """
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return torch.cat((_ops.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)
    if activation == "gelu":
        return _ops.gelu_backward(grad, hidden)
    return 2 * F.relu(hidden) * grad


def activation_grad_out(
    hidden: Tensor, grad: Tensor, activation: Activation, out: Tensor
) -> Tensor:
    """`activation_grad` written to `out`, of the shape of `hidden`; overwrites `grad`."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        _ops.silu.out(gate, out=grad_up).mul_(grad)
        _ops.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return out
    if activation == "gelu":
        return _ops.gelu_backward.grad_input(grad, hidden, grad_input=out)
    return torch.clamp_min(hidden, 0, out=out).mul_(grad.mul_(2))
