"""EASY-EP: keep the experts whose outputs turn the residual stream of the text (2504.06792)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.experts import Calibrated, best, check_numbers, lists_of, taken
from etr.model.transform import Stats
from etr.moe.config import MoEConfig
from etr.moe.view import LayerView


@dataclass(frozen=True, kw_only=True)
class EasyEp(Calibrated):
    """Keeps the same number of experts in each layer: those that change the text's tokens most.

    An expert's score is the sum over its tokens of weight times length of its output times how far
    the layer turns the token: 1 - cosine of the residual stream before and after.
    """

    name = "easy_ep"
    summary = "prune experts: those stay whose outputs turn the tokens of your text"
    needs = ("rows", "residual")

    keep: float = 0.5
    """Share of the experts of each layer that stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a share of the experts, over 0 and up to 1")

    def changes_function(self) -> str | None:
        return None if self.keep == 1 else f"keep={self.keep} leaves experts out"

    def observe(self, view: LayerView) -> Stats:
        if view.rows is None or view.residual is None:
            raise ValueError("transform 'easy_ep' looks at rows of experts and the residual stream")
        routing, kept = view.routing, view.selection.kept
        scores = scores_of(
            view.residual.double(),
            view.rows.double(),
            view.selection.combine_weight.double() * kept,
            routing.token,
            routing.expert,
            routing.num_experts,
        )
        return {"score": scores, "tokens": view.selection.num_tokens_per_expert}

    def count(self, layer: MoEConfig) -> int:
        """Experts of a layer that stay: what the share makes, to whole ones in every group."""
        groups = layer.router_config.traits.num_groups
        return max(1, round(self.keep * layer.num_experts / groups)) * groups

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        tokens, scores = ([one[name] for one in stats] for name in ("tokens", "score"))
        keep = []
        for score, layer in zip(self.judged(tokens, scores, layers), layers, strict=True):
            groups = layer.router_config.traits.num_groups
            each = self.count(layer) // groups
            chosen = [best(group, each) for group in score.view(groups, -1)]
            keep.append(torch.cat(chosen).nonzero().flatten().tolist())
        return {
            "keep": keep,
            "score": [score.tolist() for score in scores],
            "tokens": [count.tolist() for count in tokens],
        }

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        kept, total = sum(map(len, plan["keep"])), sum(layer.num_experts for layer in layers)
        return f"keeps {kept} of {total} experts"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, (keep, layer) in enumerate(
            zip(lists_of(plan, "keep", layers), layers, strict=True)
        ):
            check_numbers(keep, layer.num_experts, f"kept experts of layer {place}")
            traits = layer.router_config.traits
            if len(keep) < layer.num_experts and traits.numbered:
                raise ValueError(
                    f"router {layer.router_config.name!r} sends tokens to experts by their "
                    "numbers: none can be left out"
                )
            if len(keep) < layer.top_k:
                raise ValueError(
                    f"the plan keeps {len(keep)} experts of layer {place}, whose tokens choose "
                    f"top_k={layer.top_k}"
                )
            size = layer.num_experts // traits.num_groups
            groups = torch.tensor(keep).sort().values.div(size, rounding_mode="floor")
            if len(groups.bincount(minlength=traits.num_groups).unique()) > 1:
                raise ValueError(
                    f"the plan keeps unequal numbers of the {traits.num_groups} groups of layer "
                    f"{place}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        (num_experts, *_) = tensors["experts.down_proj"].shape
        keep = sorted(plan["keep"][place])
        return tensors if len(keep) == num_experts else taken(tensors, keep, num_experts)

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        return replace(layer, num_experts=len(plan["keep"][place]))


def scores_of(
    before: Tensor, rows: Tensor, weight: Tensor, token: Tensor, expert: Tensor, num_experts: int
) -> Tensor:
    """Score of each expert, [E].

    Args:
        before: residual stream, [T, H].
        rows: outputs of experts before they are weighed, [P, H].
        weight: of each, 0 where it does not count, [P].
        token, expert: of each, int64 [P]; what is not used has expert E.
        num_experts: E.
    """
    after = before.index_add(0, token, rows * weight[:, None])
    turned = (1 - cosine_similarity(before, after, dim=-1)).clamp_min(0)
    score = weight * rows.norm(dim=-1) * turned[token]
    return score.new_zeros(num_experts + 1).index_add(0, expert, score)[:-1]


CARD = Card(
    name="easy_ep",
    title="EASY-EP",
    summary="prunes experts to those whose outputs turn the residual stream of a text",
    paper="2504.06792",
    level="model",
    branch="pruning",
    rows=(Row(table=TRANSFORMS, kind=EasyEp),),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Two of 4 experts that are made near dead (outputs times 1e-4) but are chosen as often as "
        "before have the 2 lowest scores, where the sum of gates alone does not tell them; keeping "
        "all experts is the identity, bit for bit."
    ),
    departs=(
        "Where tokens choose among groups of experts, the best of each group stay, equally many. "
        "An expert that the text does not show stays; unseen=drop takes it out first."
    ),
)
