"""What comes into a layer: checked, and as its router takes it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from etr.moe.context import RouterInput, RoutingContext
from etr.moe.exchange import Traffic, exchange_evenly, meet, rows_of_all
from etr.moe.notice import warn


def check_input(hidden_states: Tensor, context: RoutingContext, hidden_size: int) -> None:
    """Refuse what is not [..., H] with one value per token beside it.

    Raises:
        TypeError, ValueError: names what is wrong, and what would be right.
    """
    if not isinstance(hidden_states, Tensor):
        raise TypeError(
            f"hidden_states is {type(hidden_states).__name__}; it must be a floating tensor"
        )
    if not hidden_states.is_floating_point():
        raise ValueError(f"hidden_states has dtype {hidden_states.dtype}; it must be floating")
    if hidden_states.shape[-1:] != (hidden_size,):
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}; its last dimension must be "
            f"hidden_size={hidden_size}"
        )
    context.check(hidden_states.shape[:-1])


def check_finite(
    hidden_states: Tensor, context: RoutingContext, layer_index: int, *, ranks: bool
) -> None:
    """Refuse NaN and infinity in valid tokens. The host waits, and with `ranks` for all of them.

    Raises:
        ValueError: on every rank, if they are on any.
    """
    bad = ~torch.isfinite(hidden_states).all(-1)
    if context.valid_mask is not None:
        bad = bad & context.valid_mask
    counts = [(int(bad.sum()), bad.numel())]
    if ranks:
        counts = meet(f"forward, start of MoE layer {layer_index}", counts[0])
    if any(count for count, _ in counts):
        found = [
            f"{count} of {total} tokens" + (f" on rank {rank}" if ranks else "")
            for rank, (count, total) in enumerate(counts)
            if count
        ]
        raise ValueError(
            f"hidden_states of MoE layer {layer_index} holds NaN or infinite values in "
            f"{', '.join(found)}"
        )


def router_input(
    x: Tensor,
    context: RoutingContext,
    traffic: Traffic | None,
    *,
    position_free: bool,
    step: Tensor,
    layer_index: int,
    place: int,
    bonus: Tensor | None,
    learns: bool = False,
) -> RouterInput:
    """What a router sees of the context, for tokens x [T, H].

    Args:
        position_free: the router does not ask where in the batch a token stands.
    """
    mask, ids, offset = context.valid_mask, context.token_ids, context.global_token_offset
    index = None
    if not position_free:
        index = torch.arange(x.shape[0], device=x.device)
        index = index + (_token_offset(index, traffic) if offset is None else offset)
    if mask is None:
        mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    labels = {name: getattr(context, name) for name in ("block", "task", "labels", "time")}
    peers = None if traffic is None else traffic.parallel.selection_peers
    gather = None
    if traffic is not None and peers is not None:
        gather = partial(rows_of_all, peers=peers, traffic=traffic)
    return RouterInput(
        valid_mask=mask.reshape(-1),
        token_ids=None if ids is None else ids.reshape(-1),
        **{name: _flat(value) for name, value in labels.items()},
        token_index=index,
        step=step,
        layer_index=layer_index,
        place=place,
        bonus=bonus,
        replay=(context.replay and context.replay.get(layer_index)) or None,
        logit_delta=None if context.logit_delta is None else context.logit_delta.get(layer_index),
        gather=gather,
        all_valid=context.valid_mask is None,
        before=(context.logits or {}).get(layer_index - 1),
        learns=learns,
    )


def leave_logits(logits: Tensor | None, context: RoutingContext, layer_index: int) -> None:
    """Let the layer after this one read its logits [T, E]; warn of a context that keeps none."""
    if context.logits is None:
        if layer_index and not torch.compiler.is_compiling():
            warn(
                f"MoE layer {layer_index} has a router that reads the logits of the layer before, "
                "and sees none: give all layers one RoutingContext(logits={}), a new one for each "
                "forward of the model"
            )
    elif logits is not None:
        context.logits[layer_index] = logits


def _flat(value: Tensor | None) -> Tensor | None:
    """One value a token, [T]; integers as int64."""
    if value is None:
        return None
    return value.reshape(-1) if value.is_floating_point() else value.reshape(-1).long()


def local_bonus(
    x: Tensor, context: RoutingContext, bonus: float, num_experts: int
) -> Tensor | None:
    """`bonus` for the experts on this rank's node, float32 [E]; None where there is none."""
    if not bonus or context.placement is None:
        return None
    node = context.placement.node_of_rank[context.rank]
    table = torch.zeros(num_experts, dtype=torch.float32, device=x.device)
    table[list(context.placement.experts_on_node(node))] = bonus
    return table


def _token_offset(index: Tensor, traffic: Traffic | None) -> Tensor | int:
    """How many tokens stand before this rank's in its selection group, int64 [].

    Args:
        index: numbers of this rank's tokens, int64 [T].
    """
    peers = None if traffic is None else traffic.parallel.selection_peers
    if traffic is None or peers is None:
        return 0
    own = index.new_full((peers.size, 1), len(index))
    return exchange_evenly(own, peers, traffic)[: peers.rank].sum()
