"""Projection: the choice whose directions hold most of a token; nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.checked import check_count, meanings
from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routing import Scores
from etr.moe.rows import Index
from etr.moe.score_scale import CosineScale


@dataclass(frozen=True, kw_only=True)
class Projection(RouterConfig):
    """Each token takes the experts whose input directions hold most of it; nothing is learned.

    A score is the cosine of a token and its projection onto the directions of what a choice means,
    over several sets of directions the root of its mean square. Every weight is 1.
    """

    name = "projection"
    paper = "2604.22464"
    summary = "cosine of a token and its projection onto each expert's directions; not learned"

    rank: int = 1
    """Directions of a set."""
    sets: int = 1
    """Sets of directions of each choice: of each matrix that takes tokens one."""
    of: str = ""
    """Which directions each choice means, numbers joined by +: 0+1+0+2. Empty: its own."""
    follow: bool = False
    """Take a choice that was best in the MoE layer before, where that says so; of several the
    nearest here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "sets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        meanings(self.of, "of")

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        if self.rank > hidden_size:
            raise ValueError(f"rank={self.rank} must not exceed hidden_size={hidden_size}")
        check_count(meanings(self.of, "of"), num_experts, f"of={self.of!r}")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            normalize="none",
            has_probs=False,
            has_cosine=True,
            default_capacity="none",
            numbered=bool(self.of),
            reads_before=self.follow,
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _ProjectionRouter(self, hidden_size, num_experts, top_k)


class _ProjectionRouter(Router):
    """``basis`` [D, sets, rank, H], orthonormal rows in each set."""

    config: Projection
    basis: Tensor

    def __init__(self, config: Projection, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = CosineScale(hidden_size)
        self.of = meanings(config.of, "of") or list(range(num_experts))
        self.index = Index(self.of)
        shape = (max(self.of) + 1, config.sets, config.rank, hidden_size)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("basis", torch.empty(shape, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.basis.is_meta:
            random = torch.randn_like(self.basis, dtype=torch.float32)
            self.basis.copy_(torch.linalg.qr(random.mT).Q.mT)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        found = cosines(x, self.basis)
        if self.config.of:
            found = found[:, self.index.on(found.device)]
        if self.config.follow and inputs.before is not None:
            best = inputs.before >= inputs.before.amax(-1, keepdim=True)
            found = torch.where(best, found, -1.0)
        return Scores(scores=found, logits=found, gates=torch.ones_like(found), probs=None)


def cosines(x: Tensor, basis: Tensor) -> Tensor:
    """How much of each token lies in each expert's directions, [T, D] in [0, 1]; 0 for a zero.

    Args:
        x: tokens, float [T, H].
        basis: orthonormal rows of each set, [D, M, R, H].
    """
    inside = (x @ basis.flatten(0, 2).to(x.dtype).T).view(len(x), *basis.shape[:3])
    squares = inside.square().sum(-1).mean(-1)
    whole = x.square().sum(-1, keepdim=True)
    share = squares / torch.where(whole > 0, whole, 1.0)
    return share.clamp_max(1.0).sqrt()
