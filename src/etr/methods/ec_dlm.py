"""EC-DLM: experts choose among the tokens of a block, as many as its masks say (2604.01622)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import LinearRouter
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts

SCHEDULES = (
    *("linear", "linear_reverse", "cosine", "cosine_reverse"),
    *("gauss", "gauss_reverse"),
)
SIGMA = 0.22
"""Width of the Gaussian schedules."""


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceByMasks(RouterConfig):
    """Every expert takes equally many tokens of each block: those with the greatest logits for it.

    A block is what the context's `block` says, else all tokens of a call; r is the mean of its
    `time`, the share of its tokens that are masked. Its S tokens take k(r) experts each on average,
    and an expert ``max(1, floor(S k(r) / E))`` tokens; without a time k is `top_k`. So it is in
    training and where selection is "batch"; dropless, each token takes its own `top_k`.
    """

    name = "ec_dlm"
    paper = "2604.01622"
    summary = "learned linear router; experts choose in each block, more where it is less masked"

    schedule: str = "linear_reverse"
    """How k goes with the share r of masks: linear, linear_reverse (1 - r), cosine, cosine_reverse,
    gauss (most at r = 1/2) or gauss_reverse."""
    k_min: int | None = None
    """Least experts a token; None: half of top_k, at least 1."""
    k_max: int | None = None
    """Most experts a token; None: as far above top_k as k_min is below, at most all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        low, high = self.bounds(num_experts, top_k)
        if not 1 <= low <= high <= num_experts:
            raise ValueError(
                f"k_min={low} and k_max={high} must lie in [1, num_experts={num_experts}], the "
                "least first"
            )

    def bounds(self, num_experts: int, top_k: int) -> tuple[int, int]:
        """k_min and k_max of a layer."""
        low = max(1, top_k // 2) if self.k_min is None else self.k_min
        high = max(low, min(num_experts, 2 * top_k - low)) if self.k_max is None else self.k_max
        return low, high

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            causal=False,
            fixed_load=True,
            fixed_k=False,
            normalize="chosen",
            has_scores=False,
            has_probs=False,
            rank_by=("position",),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _ByMasksRouter(self, hidden_size, num_experts, top_k)


def experts_per_token(share: Tensor, low: int, high: int, schedule: str) -> Tensor:
    """k(r) of shares of masks, int64; halves go to the even number.

    Args:
        share: r, float64 in [0, 1].
    """
    r = 1 - share if schedule in ("linear_reverse", "cosine_reverse") else share
    if schedule.startswith("linear"):
        part = r
    elif schedule.startswith("cosine"):
        part = (1 - (math.pi * r).cos()) / 2
    else:
        ends = math.exp(-(0.5**2) / (2 * SIGMA**2))
        part = ((-((r - 0.5) ** 2) / (2 * SIGMA**2)).exp() - ends) / (1 - ends)
        part = 1 - part if schedule == "gauss_reverse" else part
    return (low + (high - low) * part).round().long()


class _ByMasksRouter(LinearRouter):
    config: ExpertChoiceByMasks

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        return self.of_logits(self.logits(x))

    def of_logits(self, logits: Tensor) -> Scores:
        return Scores(scores=logits, logits=logits, gates=logits.softmax(-1), probs=None)

    def choose(self, scores: Scores, inputs: RouterInput) -> Routing:
        logits = self.preferences(scores)
        valid = inputs.valid_mask
        block, number = torch.zeros_like(valid, dtype=torch.int64), 1
        if inputs.block is not None:
            labels, block = torch.unique(inputs.block, return_inverse=True)
            number = len(labels)
        block = block.masked_fill(~valid, number)  # padding stands in a block of its own
        size = block.new_zeros(number + 1).index_add(0, block, torch.ones_like(block))
        takes = (size * self._k(block, size, inputs)).div(self.num_experts, rounding_mode="floor")
        takes = takes.clamp_min(1)
        takes[number] = 0
        chosen = _place(logits, block, size) < takes[block, None]
        order = top_experts(logits, self.num_experts)
        expert = torch.where(chosen.gather(1, order), order, self.num_experts)
        return self.routing_of(scores, expert, inputs)

    def _k(self, block: Tensor, size: Tensor, inputs: RouterInput) -> Tensor:
        """Experts a token of each block, int64 [B]."""
        if inputs.time is None:
            return torch.full_like(size, self.top_k)
        total = torch.zeros(len(size), dtype=torch.float64, device=size.device)
        share = total.index_add(0, block, inputs.time.double()) / size.clamp_min(1)
        low, high = self.config.bounds(self.num_experts, self.top_k)
        return experts_per_token(share.clamp(0, 1), low, high, self.config.schedule)


def _place(logits: Tensor, block: Tensor, size: Tensor) -> Tensor:
    """Place of each token in each expert's queue of the token's block, from 0, int64 [T, E]."""
    by_logit = logits.sort(dim=0, descending=True, stable=True).indices
    by_block = block[by_logit].sort(dim=0, stable=True)
    order = by_logit.gather(0, by_block.indices)
    first = (size.cumsum(0) - size)[by_block.values]
    place = torch.arange(len(block), device=block.device)[:, None] - first
    return torch.empty_like(order).scatter(0, order, place)


CARD = Card(
    name="ec_dlm",
    title="EC-DLM",
    summary=ExpertChoiceByMasks.summary,
    paper=ExpertChoiceByMasks.paper,
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=ExpertChoiceByMasks),),
    options={"router": "ec_dlm", "eval_selection": "batch"},
    against="expert_choice",
    moves=("loss", "load", "experts per token", "FLOPs"),
    claim=(
        "In every block each expert takes max(1, floor(S k(r) / E)) tokens; k(0), k(1/4), k(1/2), "
        "k(1) between 8 and 32 are 32, 26, 20, 8 (linear_reverse), 32, 28, 20, 8 (cosine_reverse) "
        "and 8, 20, 32, 8 (gauss), with means of 20.00, 20.00 and 20.02 over r."
    ),
    departs=(
        "Made for block diffusion, where a row of one block is the paper's sequence "
        "(block_diffusion:block=S,recount=true); in smaller blocks an expert chooses in each. "
        "A block lies on one rank; without blocks each rank's tokens are one. "
        "Evaluate with --selection batch: dropless lets tokens choose. The floor falls short of "
        "k (1.867 for S = 60, E = 16, k = 2), and the 1 exceeds it (1.333 for S = 12, k = 1). No "
        "quality is claimed."
    ),
    ranks="own",
)
