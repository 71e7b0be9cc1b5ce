"""Activations of the experts, and their gradients in closed form."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["swiglu", "clamped_swiglu", "gelu", "relu2", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "clamped_swiglu", "gelu", "relu2", "silu")
GATED: tuple[Activation, ...] = ("swiglu", "clamped_swiglu")
"""Those that multiply two halves of their input."""


class Clamp(NamedTuple):
    """Numbers of clamped_swiglu, ``(clamp(up) + 1) * g * sigmoid(alpha * g)``, g = clamp(gate).

    Args:
        limit: the gate is cut above it, the other half on both sides.
        alpha: gain inside the sigmoid.
    """

    limit: float = 7.0
    alpha: float = 1.702


CLAMP = Clamp()

_ops = torch.ops.aten


def activate(hidden: Tensor, activation: Activation, clamp: Clamp = CLAMP) -> Tensor:
    """Apply the activation to the last dimension: gated ones halve it, the others keep it."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "clamped_swiglu":
        gate, up = _clamped(hidden, clamp)
        return F.silu(clamp.alpha * gate) / clamp.alpha * (up + 1)
    if activation == "gelu":
        return F.gelu(hidden)
    if activation == "silu":
        return F.silu(hidden)
    return F.relu(hidden).square()


def activate_out(
    hidden: Tensor, activation: Activation, out: Tensor, clamp: Clamp = CLAMP
) -> Tensor:
    """`activate` without a gradient, written to `out`."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return _ops.silu.out(gate, out=out).mul_(up)
    if activation == "clamped_swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        torch.clamp_max(gate, clamp.limit, out=out).mul_(clamp.alpha)
        _ops.silu.out(out, out=out).div_(clamp.alpha)
        return out.mul_(up.clamp(-clamp.limit, clamp.limit).add_(1))
    if activation == "gelu":
        return _ops.gelu.out(hidden, out=out)
    if activation == "silu":
        return _ops.silu.out(hidden, out=out)
    return torch.clamp_min(hidden, 0, out=out).square_()


def activation_grad(
    hidden: Tensor, grad: Tensor, activation: Activation, clamp: Clamp = CLAMP
) -> Tensor:
    """Gradient of `activate` with respect to `hidden`.

    Args:
        hidden: what was activated, [R, 2I] where gated, else [R, I].
        grad: gradient of the activated values, [R, I].
    Returns:
        The shape of `hidden`.
    """
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return torch.cat((_ops.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)
    if activation == "clamped_swiglu":
        return torch.cat(_clamped_grads(hidden, grad, clamp), dim=-1)
    if activation == "gelu":
        return _ops.gelu_backward(grad, hidden)
    if activation == "silu":
        return _ops.silu_backward(grad, hidden)
    return 2 * F.relu(hidden) * grad


def activation_grad_out(
    hidden: Tensor, grad: Tensor, activation: Activation, out: Tensor, clamp: Clamp = CLAMP
) -> Tensor:
    """`activation_grad` written to `out`, of the shape of `hidden`; overwrites `grad`."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        _ops.silu.out(gate, out=grad_up).mul_(grad)
        _ops.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return out
    if activation == "clamped_swiglu":
        return torch.cat(_clamped_grads(hidden, grad, clamp), dim=-1, out=out)
    if activation == "gelu":
        return _ops.gelu_backward.grad_input(grad, hidden, grad_input=out)
    if activation == "silu":
        return _ops.silu_backward.grad_input(grad, hidden, grad_input=out)
    return torch.clamp_min(hidden, 0, out=out).mul_(grad.mul_(2))


def _clamped(hidden: Tensor, clamp: Clamp) -> tuple[Tensor, Tensor]:
    gate, up = hidden.chunk(2, dim=-1)
    return gate.clamp_max(clamp.limit), up.clamp(-clamp.limit, clamp.limit)


def _clamped_grads(hidden: Tensor, grad: Tensor, clamp: Clamp) -> tuple[Tensor, Tensor]:
    """Gradients of the two halves; what was cut gets none."""
    before_gate, before_up = hidden.chunk(2, dim=-1)
    gate, up = _clamped(hidden, clamp)
    scaled = clamp.alpha * gate
    of_gate = _ops.silu_backward(grad * (up + 1), scaled)
    of_up = grad * F.silu(scaled) / clamp.alpha
    return of_gate * (gate == before_gate), of_up * (up == before_up)
