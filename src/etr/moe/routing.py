"""The values that the stages of the layer hand to each other.

    x [T, H] --router--> Routing --capacity--> Selection --dispatch, experts, combine--> y [T, H]

`T` counts every token of the flattened input, padding included; `P` counts (token, expert) pairs.
Shapes are static: an unused or invalid pair has ``expert == num_experts`` and is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from etr.moe.moved import moved

__getattr__ = moved(
    __name__, dict.fromkeys(("Replay", "RouterInput", "RoutingContext"), "etr.moe.context")
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

    def gates_of(self, expert: Tensor) -> Tensor:
        """Gates of given experts, int64 [T, k]; all that is asked of a router without scores."""
        # `gather` has a cheaper backward than indexing with two index tensors.
        return self.gates.gather(1, expert)


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
        fixed_k: False where a token asks for any number of experts.
        counters: what the router counted while it chose, by name, for its own learners: summable
            over micro-batches and ranks.
        full: whether it is known, without asking the device, that every token is real and every
            pair in use. What `dataclasses.replace` makes of a routing says no.
        unbiased: the same of ``score``, that it is what ``scores`` holds.
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
    fixed_k: bool = True
    counters: Mapping[str, Tensor] = field(default_factory=dict)
    full: bool = field(default=False, init=False)
    unbiased: bool = field(default=False, init=False)
    _num_valid: Tensor | None = field(default=None, init=False)

    def known(self, *, full: bool, unbiased: bool) -> Self:
        """The same routing, of which this is known."""
        object.__setattr__(self, "full", full)
        object.__setattr__(self, "unbiased", unbiased)
        return self

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
        if self._num_valid is None:
            size = self.expert.new_full((), self.num_tokens) if self.full else self.valid_mask.sum()
            object.__setattr__(self, "_num_valid", size)
        assert self._num_valid is not None
        return self._num_valid

    def by_token(self, values: Tensor) -> Tensor:
        """Values of pairs [P] as those of each token, [T, P / T]."""
        return values.view(self.num_tokens, values.shape[0] // max(self.num_tokens, 1))

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
        return self.of_pairs(self.probs)

    def of_pairs(self, table: Tensor) -> Tensor:
        """What a table [T, E] holds for the pairs, [P]; no gradient. Unused read expert E - 1."""
        expert = self.expert if self.full else self.expert.clamp_max(self.num_experts - 1)
        return table.detach().gather(1, self.by_token(expert)).flatten()

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
        order: pairs by expert, in each expert's queue by rank, int64 [P].
        bounds: where queues begin and end in `order`, int64 [E + 1]; of expert e's, which is
            ``order[bounds[e] : bounds[e + 1]]``, the first `num_tokens_per_expert` are kept.
        combine_weight: weight of the expert's output in the token's sum, float [P]; zero where
            not kept.
        num_tokens_per_expert: kept pairs, int64 [E].
        buffer_size: static upper bound of tokens per expert for padded backends.
        in_order: which of `order` are kept: as many of the first, int64 [], or those where it is
            True, bool [P]. A number: every pair, as is known without asking the device.
    """

    kept: Tensor
    order: Tensor
    bounds: Tensor
    combine_weight: Tensor
    num_tokens_per_expert: Tensor
    buffer_size: int
    in_order: int | Tensor

    @property
    def all_kept(self) -> bool:
        """Whether it is known, without asking the device, that every pair is kept."""
        return isinstance(self.in_order, int)

    def pairs_by_expert(self) -> Tensor:
        """The kept pairs in order, int64 [R]; the host waits for R, unless all are kept."""
        which = self.in_order
        if isinstance(which, Tensor) and which.dtype == torch.bool:
            return self.order[which]
        return self.order[: int(which)]

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
    """

    capacity: Tensor | None = None
    min_score: Tensor | None = None
    buffer_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What experts keep, and of what they were told to.

    Args:
        selection: over this rank's pairs.
        limit: what was allowed. Over a group a capacity is that of the experts which this rank
            owns, and 0 for others, so that ranks add up.
        choosers: pairs of the experts that this rank owns, if they were gathered; else this rank's.
        count: finds the two numbers below; called once, and where nobody reads them never.
    """

    selection: Selection
    limit: Limit
    choosers: Routing
    count: Callable[[], tuple[Tensor, Tensor]]
    _counted: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    @property
    def num_choices_per_expert(self) -> Tensor:
        """This rank's pairs that ask for each expert, int64 [E].

        Where experts choose, what they take is the choice.
        """
        return self._counts[0]

    @property
    def num_slots(self) -> Tensor:
        """Pairs that could have been kept, int64 []; over a group, by the experts owned here."""
        return self._counts[1]

    @property
    def _counts(self) -> tuple[Tensor, Tensor]:
        if self._counted is None:  # what functools.cached_property does, does not compile
            object.__setattr__(self, "_counted", self.count())
        assert self._counted is not None
        return self._counted


@dataclass(frozen=True, kw_only=True)
class MoEOutput:
    """Result of the layer.

    Args:
        hidden_states: same shape and dtype as the input.
        losses: already scaled scalars by name, see `etr.moe.losses`; add their sum to the loss.
        stats: detached counters on the device by name, see `etr.moe.stats`. Where nothing is
            learned from them they are counted when they are read.
    """

    hidden_states: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)


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
