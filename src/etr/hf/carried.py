"""Router losses in the backward pass, whatever a caller computes its loss from.

`outputs.loss` holds them, and `router_losses` shows them to those who add them to a loss of their
own. A trainer that does neither, and computes its loss from logits or hidden states, would train
without them; so all that a forward returns carries them. Their gradient joins the backward pass
that comes back through any of it, once, however much of it was used, unless that pass also comes

- through ``outputs.loss``, which holds them,
- through one of ``router_losses``: that one has been added already,
- through ``router_logits``: they bring a balance loss of the caller's own, in the place of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etr.moe.loss_scale import LossScale
from etr.moe.losses import Balance

UNKNOWN_SCALE = (
    "a loss that is computed from logits or hidden states under float16 autocast is scaled by a "
    "GradScaler, and the router losses must be too; say by which: etr.attach(..., scaler=scaler), "
    "which etr.hf.callback.EtrCallback does in a Trainer (GradScaler(enabled=False) if by none)"
)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The order of the tensors that go through `_Carry`: the router losses, then these."""

    names: tuple[str, ...]
    """Names of the router losses."""
    has_loss: bool
    """Whether the output's loss, which holds them, comes next."""
    num_router_logits: int
    """Tensors that come next; all others follow."""
    scale_is_known: bool
    """Whether there is a scaler, or no need of one; False under float16 autocast without it."""
    by_value: bool
    """Whether a compiled backward pass fills in zeros for what was not used."""


def carry(
    fields: dict[str, Any], losses: dict[str, Tensor], scale: LossScale | None
) -> dict[str, Any]:
    """`fields` of an output with the same values, which carry router losses.

    Args:
        fields: tensors, tuples or dictionaries of tensors, or others, by name, among them `loss`,
            `router_losses` (just `losses`) and `router_logits` where the output has them.
        losses: of the forward that made them, by name.
        scale: how a loss that is computed from the fields is scaled; None for not at all.
    Raises:
        ValueError: float16 autocast, no loss among the fields, and no scaler is known. With a loss,
            a backward pass that does not come through it raises this.
    """
    if not any(loss.requires_grad for loss in losses.values()):
        return fields
    loss, router_logits = fields.get("loss"), fields.get("router_logits") or ()
    one = torch.ones_like(next(iter(losses.values())))
    plan = _Plan(
        names=tuple(losses),
        has_loss=loss is not None,
        num_router_logits=len(router_logits),
        scale_is_known=(scale is not None and scale.scaler is not None) or not _is_half(one),
        by_value=torch.compiler.is_compiling(),
    )
    if loss is None and not plan.scale_is_known:
        raise ValueError(UNKNOWN_SCALE)
    first = [*losses.values(), *([] if loss is None else [loss]), *router_logits]
    known = {id(tensor) for tensor in first}
    every = [tensor for value in fields.values() for tensor in _floats(value)]
    others = {id(x): x for x in every if id(x) not in known}  # each once
    before = [*first, *others.values()]
    after = _Carry.apply(plan, one if scale is None else scale(one), *before)
    found = {id(old): new for old, new in zip(before, after, strict=True)}
    return {name: _replaced(value, found) for name, value in fields.items()}


class _Carry(torch.autograd.Function):
    """Tensors as they are, whose backward pass gives a router loss the gradient `weight`."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not plan.by_value:
            ctx.set_materialize_grads(False)  # None then says that nothing came back that way
        ctx.plan = plan
        ctx.save_for_backward(weight)
        return tuple(tensor.detach() for tensor in tensors)  # no views: callers may write into them

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan, (weight,) = ctx.plan, ctx.saved_tensors
        n = len(plan.names)
        own, loss, others = grads[:n], grads[n : n + plan.has_loss], grads[n + plan.has_loss :]
        router_logits = others[: plan.num_router_logits]
        joined = [
            _joined(grad, [*loss, *(router_logits if name == Balance.key else ())], weight, plan)
            for name, grad in zip(plan.names, own, strict=True)
        ]
        return (None, None, *joined, *loss, *others)


def _joined(
    own: Tensor | None, ways: Sequence[Tensor | None], weight: Tensor, plan: _Plan
) -> Tensor | None:
    """Gradient of a router loss: what its user gave it, else `weight`, unless it came otherwise."""
    if plan.by_value:
        assert own is not None
        unused = [(way == 0).all() for way in (own, *ways) if way is not None]
        return own + weight * torch.stack(unused).all()
    if own is not None or any(way is not None for way in ways):
        return own
    if not plan.scale_is_known:
        raise ValueError(UNKNOWN_SCALE)
    return weight


def _floats(value: Any) -> Iterator[Tensor]:
    """Tensors that a gradient may come back through."""
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, tuple | list | dict) else (value,):
        if isinstance(item, Tensor) and item.is_floating_point():
            yield item


def _replaced(value: Any, found: dict[int, Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: found.get(id(item), item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(found.get(id(item), item) for item in value)
    return found.get(id(value), value)


def _is_half(like: Tensor) -> bool:
    device = like.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
