"""The values that the stages of the layer hand to each other.

    x [T, H] --router--> Routing --capacity--> Selection --dispatch, experts, combine--> y [T, H]

`T` counts every token of the flattened input, padding included; `P` counts (token, expert) pairs.
Shapes are static: an unused or invalid pair has ``expert == num_experts`` and is never kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from etr.moe.collector import Collector
    from etr.moe.config import EvalSelection
    from etr.moe.topology import ExpertPlacement

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.int64,
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a router thinks of every (token, expert) pair.

    Args:
        scores: selection score, float [T, E]; higher is better.
        logits: float [T, E] before the gate, or None where a router has none.
        gates: combine weight of each pair before any normalisation, float [T, E].
        probs: the gates as a distribution over experts (rows sum to 1), or None.
    """

    scores: Tensor
    logits: Tensor | None
    gates: Tensor
    probs: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What each token wants: one row per (token, expert) pair, token-major.

    Selection score and combine weight are two tensors: what ranks a pair need not weigh it.

    Args:
        token: index of the pair's token, int64 [P].
        expert: index of the pair's expert, int64 [P]; ``num_experts`` marks an unused pair.
        score: selection score by which experts rank their choosers, float [P], or None where the
            router has none (no gradient flows through it).
        gate: combine weight before normalisation, float [P].
        valid_mask: True for real tokens, bool [T].
        scores, logits, probs: the full [T, E] tables behind the pairs, None where a router has
            none. ``scores`` is free of any locality bonus, so thresholds can be read off it.
        num_experts: E.
        top_k: experts a token may choose.
        tokens_choose: False where experts pick tokens and the pairs are all of [T, E].
    """

    token: Tensor
    expert: Tensor
    score: Tensor | None
    gate: Tensor
    valid_mask: Tensor
    scores: Tensor | None
    logits: Tensor | None
    probs: Tensor | None
    num_experts: int
    top_k: int
    tokens_choose: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return self.valid_mask.shape[0]

    @property
    def valid(self) -> Tensor:
        """True for pairs in use, bool [P]."""
        return self.expert < self.num_experts

    def num_valid_tokens(self) -> Tensor:
        """Real tokens, int64 [] on the device (no synchronisation)."""
        return self.valid_mask.sum()

    def num_choices_per_expert(self) -> Tensor:
        """Pairs that ask for each expert before anything is dropped, int64 [E]."""
        return count_experts(self.expert, self.num_experts)

    def pair_probs(self) -> Tensor:
        """Probability of each pair, float [P]; unused pairs read expert E - 1. No gradient.

        Raises:
            ValueError: the router has no probabilities.
        """
        if self.probs is None:
            raise ValueError("affinity mass needs probabilities, and this router has none")
        return self.probs.detach()[self.token, self.expert.clamp_max(self.num_experts - 1)]

    def routing_map(self) -> Tensor:
        """Dense view, bool [T, E]: True where the token asks for the expert."""
        dense = torch.zeros(
            self.num_tokens, self.num_experts + 1, dtype=torch.bool, device=self.expert.device
        )
        dense[self.token, self.expert] = True
        return dense[:, : self.num_experts]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What each expert keeps, over the pairs of one Routing.

    Args:
        kept: True for pairs that reach their expert, bool [P].
        position_in_expert: place in the expert's queue, int64 [P]; unique among the kept pairs of
            an expert and below ``buffer_size``.
        combine_weight: weight of the expert's output in the token's sum, float [P]; zero where
            not kept.
        num_tokens_per_expert: kept pairs, int64 [E].
        buffer_size: static upper bound of tokens per expert for padded backends.
    """

    kept: Tensor
    position_in_expert: Tensor
    combine_weight: Tensor
    num_tokens_per_expert: Tensor
    buffer_size: int

    def selection_map(self, routing: Routing) -> Tensor:
        """Dense view, bool [T, E]: True where the expert keeps the token."""
        shape = (routing.num_tokens, routing.num_experts + 1)
        dense = torch.zeros(shape, dtype=torch.bool, device=self.kept.device)
        dense.index_put_((routing.token, routing.expert), self.kept)
        return dense[:, : routing.num_experts]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a capacity policy allows.

    Args:
        capacity: most tokens per expert, int64 [E] in tokens, or None for no limit.
        min_score: keep a chooser only if its score is at least this, float32 [E], or None.
        buffer_size: static upper bound of tokens per expert, or None for "every token".
        kept: what the experts' owners in the selection group keep, bool [P]. It is final, and
            `capacity` then holds the experts that this rank owns, and 0 for the others.
        choosers: the group's pairs for the experts that this rank owns, where they were gathered.
    """

    capacity: Tensor | None = None
    min_score: Tensor | None = None
    buffer_size: int | None = None
    kept: Tensor | None = None
    choosers: Routing | None = None


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
        sequence_ids: document number of each token in a packed batch, int64, same shape.
        global_token_offset: index of this call's first token in the global batch (rank-major).
            None: counted over the layer's selection group, 0 without one.
        placement: where experts live; needed by the locality loss and `local_bonus`. A layer that
            is distributed knows its own, and the groups below too.
        rank: this rank in the placement.
        data_group: ranks that share the balance statistics (aux mode `ranks`).
        node_group: ranks of this node (locality loss).
        replay: choices by MoE layer index, to use instead of the router's own.
        selection: route as eval mode does, by this selection, whatever the layer's mode and its own
            `eval_selection`; nothing is learned from the call. None: as the mode says.
        collector: receives losses and statistics; closes when the model's forward returns.
    """

    valid_mask: Tensor | None = None
    token_ids: Tensor | None = None
    sequence_ids: Tensor | None = None
    global_token_offset: int | None = None
    placement: ExpertPlacement | None = None
    rank: int = 0
    data_group: ProcessGroup | None = None
    node_group: ProcessGroup | None = None
    replay: dict[int, Replay] | None = None
    selection: EvalSelection | None = None
    collector: Collector | None = None

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
        for name in ("valid_mask", "token_ids", "sequence_ids"):
            value = getattr(self, name)
            if value is None:
                continue
            dtypes = (torch.bool,) if name == "valid_mask" else _INTEGERS
            what = "bool, True = real token" if name == "valid_mask" else "integers"
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
        if not isinstance(self.replay, Mapping | None):
            raise TypeError(
                f"context.replay is {type(self.replay).__name__}; it must be a dictionary from the "
                "index of a MoE layer to a Replay"
            )


@dataclass(frozen=True, kw_only=True)
class RouterInput:
    """What a router sees of the context, flattened to tokens.

    Args:
        valid_mask: bool [T].
        token_ids: int64 [T] or None.
        token_index: global index of each token, int64 [T].
        step: optimizer steps done, int64 [] on the device.
        layer_index: number of the MoE layer in the model.
        bonus: added to the selection score of each expert, float [E], or None.
        replay: recorded choices for this layer, or None.
    """

    valid_mask: Tensor
    token_ids: Tensor | None
    token_index: Tensor
    step: Tensor
    layer_index: int
    bonus: Tensor | None = None
    replay: Replay | None = None


@dataclass(frozen=True, kw_only=True)
class MoEOutput:
    """Result of the layer.

    Args:
        hidden_states: same shape and dtype as the input.
        losses: already scaled scalars by name (aux, z, locality, ...); add their sum to the loss.
        stats: detached counters on the device by name; see `etr.moe.stats`.
    """

    hidden_states: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


def count_experts(expert: Tensor, num_experts: int, weight: Tensor | None = None) -> Tensor:
    """Count pairs per expert without synchronising the device.

    Args:
        expert: int64 [P]; values equal to ``num_experts`` are not counted.
        weight: bool or int64 [P] counted instead of 1.
    Returns:
        int64 [E].
    """
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    ones = torch.ones_like(expert) if weight is None else weight.to(torch.int64)
    return counts.scatter_add(0, expert, ones)[:num_experts]
