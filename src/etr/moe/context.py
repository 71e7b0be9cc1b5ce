"""The one way in: everything about a call of the layer that is not the hidden state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from etr.moe.collector import Collector
from etr.moe.moved import moved
from etr.moe.topology import ExpertPlacement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__getattr__ = moved(
    __name__, dict.fromkeys(("EVAL_SELECTIONS", "EvalSelection"), "etr.moe.serving")
)

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.int64,
)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PER_TOKEN = {
    "valid_mask": ((torch.bool,), "bool, True = real token"),
    **dict.fromkeys(("token_ids", "block", "task", "labels"), (_INTEGERS, "integers")),
    "time": (_FLOATS, "floating numbers"),
}
"""Fields of a context with one value per token: their dtypes, also in words."""


def _are_ranks(ranks: Any) -> bool:
    whole = isinstance(ranks, Sequence) and not isinstance(ranks, str)
    if not whole or not all(type(rank) is int and rank >= 0 for rank in ranks):
        return False
    return 0 < len(ranks) == len(set(ranks))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Recorded choices to use instead of the router's own (its gates and losses stay live).

    A layer checks them in each forward, which waits for the device, unless `checked` did it once.

    Args:
        expert: chosen experts, integers [T, k], or [B, S, k] of T = B * S tokens; k need not be the
            layer's own. -1 and ``num_experts`` mark an unused place. An expert that a token names
            twice counts once.
        num_experts: E that they were checked for; None before.
    """

    expert: Tensor
    num_experts: int | None = None

    def checked(self, num_experts: int, name: str = "replay.expert") -> Replay:
        """The same choices, int64 [T, k], with ``num_experts`` in unused places.

        Args:
            num_experts: E of the layer.
            name: what errors call them.
        Raises:
            TypeError: not a tensor.
            ValueError: another dtype or shape, or experts that there are not.
        """
        expert = self.expert
        if not isinstance(expert, Tensor):
            raise TypeError(f"{name} is {type(expert).__name__}; it must be a tensor of integers")
        if expert.dtype not in _INTEGERS:
            raise ValueError(f"{name} has dtype {expert.dtype}; it must be a tensor of integers")
        if expert.dim() not in (2, 3) or not 1 <= expert.shape[-1] <= num_experts:
            raise ValueError(
                f"{name} has shape {tuple(expert.shape)}; it must be [T, k] or [B, S, k], with k "
                f"from 1 to num_experts={num_experts}"
            )
        expert = expert.long().flatten(0, -2)
        if expert.numel():
            low, high = torch.stack(expert.aminmax()).tolist()
            if low < -1 or high > num_experts:
                wrong = low if low < -1 else high
                raise ValueError(
                    f"{name} holds {wrong}; experts are 0 to {num_experts - 1}, and -1 or "
                    f"{num_experts} marks an unused place"
                )
        ordered, place = expert.sort(dim=1, stable=True)
        again = torch.zeros_like(expert, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        unused = (expert < 0) | again.scatter(1, place, again)
        return Replay(
            expert=expert.masked_fill(unused, num_experts),
            num_experts=num_experts,
        )


@dataclass(frozen=True, kw_only=True)
class RoutingContext:
    """The one way in for everything that is not the hidden state. All fields are optional.

    Args:
        valid_mask: True = real token, bool, shape of the input without its last dimension.
        token_ids: vocabulary ids, int64, same shape; needed by the `hash` router.
        block: number of the block of each token, int64, same shape; what decides for several tokens
            together does so for those of a block.
        task: number of the task of each token, int64, same shape.
        time: how far each token's example is noised, or another time, float, same shape.
        labels: class of each token's example, int64, same shape.
        global_token_offset: index of this call's first token in the global batch (rank-major).
            None: counted over the layer's selection group, 0 without one.
        placement: where experts live; needed by the locality loss and `local_bonus`. A layer that
            is distributed knows its own, and the groups below too.
        rank: this rank in the placement.
        data_group: ranks that share the balance statistics (aux mode `ranks`).
        node_group: ranks of this node (locality loss).
        replay: choices by MoE layer index, to use instead of the router's own.
        ranks: which of a token's choices run, 0 for the best, e.g. ``(0,)`` or ``range(1, k)``; the
            others are as if the token had not chosen them. Where experts choose, a token's ranks
            go by its scores. None for all.
        logit_delta: added to the logits of each layer's router before anything is made of them, by
            MoE layer index, float [E], or [T, E] of all tokens; gradients flow into it.
        logits: logits [T, E] of earlier MoE layers in this forward of the model, by their index, of
            routers that read them; each such layer adds its own. None: such a router reads none.
        serving: route as eval mode does, by this policy (or its text), whatever the layer's mode
            and its own `serving`; nothing is learned from the call. None: as the mode says.
        selection: the old name of `serving`.
        collector: receives losses and statistics; closes when the model's forward returns.
    """

    valid_mask: Tensor | None = None
    token_ids: Tensor | None = None
    block: Tensor | None = None
    task: Tensor | None = None
    time: Tensor | None = None
    labels: Tensor | None = None
    global_token_offset: int | None = None
    placement: ExpertPlacement | None = None
    rank: int = 0
    data_group: ProcessGroup | None = None
    node_group: ProcessGroup | None = None
    replay: dict[int, Replay] | None = None
    ranks: Sequence[int] | None = None
    logit_delta: Mapping[int, Tensor] | None = None
    logits: dict[int, Tensor] | None = None
    serving: Any = None  # str | Serving | None; serving stands above the context
    collector: Collector | None = None
    selection: InitVar[Any] = None

    def __post_init__(self, selection: Any) -> None:
        if selection is not None:
            object.__setattr__(self, "serving", selection)

    @classmethod
    def of(cls, given: RoutingContext | None) -> RoutingContext:
        """What a layer was given, or an empty one.

        Raises:
            TypeError: it is something else, e.g. a bare mask.
        """
        if given is None:
            return cls()
        if not isinstance(given, RoutingContext):
            raise TypeError(
                f"context is {type(given).__name__}; it must be a RoutingContext. A mask is passed "
                "as RoutingContext(valid_mask=mask)"
            )
        return given

    def check(self, shape: torch.Size) -> None:
        """Refuse a mask or ids of another type or shape than the tokens'.

        Raises:
            TypeError: names the field, its type and what would be right.
            ValueError: names the field, its shape or dtype and what would be right.
        """
        for name, (dtypes, what) in _PER_TOKEN.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"context.{name} is {type(value).__name__}; it must be a tensor of {what}"
                )
            if value.shape != shape:
                raise ValueError(
                    f"context.{name} has shape {tuple(value.shape)}; it must be "
                    f"{tuple(shape)}, one value per token"
                )
            if value.dtype not in dtypes:
                raise ValueError(f"context.{name} has dtype {value.dtype}; it must be {what}")
        for name, what in (("replay", "a Replay"), ("logit_delta", "a tensor")):
            value = getattr(self, name)
            if not isinstance(value, Mapping | None):
                raise TypeError(
                    f"context.{name} is {type(value).__name__}; it must be a dictionary from the "
                    f"index of a MoE layer to {what}"
                )
        ranks = self.ranks
        if ranks is not None and not _are_ranks(ranks):
            raise ValueError(
                f"context.ranks={ranks!r} must be numbers of a token's choices, each once, 0 for "
                "the best, e.g. (0,) or range(1, 3)"
            )


@dataclass(frozen=True, kw_only=True)
class RouterInput:
    """What a router sees of the context, flattened to tokens.

    Args:
        valid_mask: bool [T].
        token_ids: int64 [T] or None.
        block, task, labels: int64 [T] or None, see `RoutingContext`.
        time: float [T] or None.
        token_index: global index of each token, int64 [T]; None for a router that is
            `position_free`, which does not ask.
        step: optimizer steps done, int64 [] on the device.
        layer_index: number of the MoE layer in the model, inner steps counted.
        place: the same without inner steps, which have that of their layer.
        bonus: added to the selection score of each expert, float [E], or None.
        replay: recorded choices for this layer, or None.
        logit_delta: added to this layer's logits, float [E] or [T, E], or None.
        before: logits of the MoE layer before, [T, E] with gradient, or None.
        gather: brings rows [T, N] of all ranks whose tokens compete, in the order of the global
            batch, for a router that looks at the whole batch; every rank must call it, and run its
            backward pass where rows have a gradient. None where this rank's tokens are the batch.
        all_valid: whether it is known, without asking the device, that every token is real.
        learns: whether the call trains; else what was learned decides in the batch's place.
    """

    valid_mask: Tensor
    token_ids: Tensor | None
    token_index: Tensor | None
    step: Tensor
    layer_index: int
    place: int = 0
    bonus: Tensor | None = None
    replay: Replay | None = None
    logit_delta: Tensor | None = None
    block: Tensor | None = None
    task: Tensor | None = None
    time: Tensor | None = None
    labels: Tensor | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    all_valid: bool = False
    before: Tensor | None = None
    learns: bool = False

    def of_all_ranks(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """A table of all tokens that compete, float [*, N], and which of them are real, bool [*].

        Args:
            table: of this rank's tokens, float [T, N], without gradient; every rank must call it.
        """
        if self.gather is None:
            return table, self.valid_mask
        rows = self.gather(torch.cat((table, self.valid_mask[:, None].to(table)), dim=1))
        return rows[:, :-1], rows[:, -1] > 0
