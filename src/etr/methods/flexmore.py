"""FlexMoRE: experts as a shared base and differences of low rank (2602.08818)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.experts import OfExperts, Values, lists_of, matrices_of, rebuilt
from etr.model.low_rank import factors
from etr.moe.config import MoEConfig
from etr.moe.experts.low_rank import LowRank
from etr.moe.experts.runs import numbers_of, text_of


@dataclass(frozen=True, kw_only=True)
class FlexMoRe(OfExperts):
    """Stores each expert as the difference from one of them, of the rank that is given.

    Each of an expert's matrices keeps the largest singular values of its difference; the base is
    stored once.
    """

    name = "flexmore"
    summary = "experts as one base and low-rank differences from it, each of its own rank"

    base: int = 0
    """Expert that is the base."""
    rank: int = 8
    """Rank of every other expert's difference; as many as there are make it exact, and 0 makes the
    expert the base."""
    ranks: str = ""
    """Rank of each expert, as runs of equal ones, such as 4x8+2x32; instead of `rank`."""
    store: Literal["low_rank", "full"] = "low_rank"
    """low_rank: base and differences. full: their sum, which families of transformers can hold, but
    is not smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("base", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        numbers_of(self.ranks, "ranks")
        if self.store not in ("low_rank", "full"):
            raise ValueError(f"store={self.store!r} must be low_rank or full")

    def changes_function(self) -> str | None:
        return f"differences of experts are of rank {self.ranks or self.rank}"

    def plan(self, stats: Sequence[Any], layers: Sequence[MoEConfig]) -> Any:
        """The rank of each expert; that of the base is 0, and none is over what is full."""
        protected, ranks = self.protected(layers), []
        for place, layer in enumerate(layers):
            full = min(layer.hidden_size, layer.intermediate_size)
            wanted = numbers_of(self.ranks, "ranks") or [self.rank] * layer.num_experts
            if len(wanted) != layer.num_experts:
                raise ValueError(
                    f"ranks={self.ranks!r} names {len(wanted)} experts; layer {place} has "
                    f"{layer.num_experts}"
                )
            own = [full if e in protected[place] else min(r, full) for e, r in enumerate(wanted)]
            ranks.append([0 if e == self.base else r for e, r in enumerate(own)])
        return {"base": self.base, "ranks": ranks}

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        small = big = 0
        for ranks, layer in zip(plan["ranks"], layers, strict=True):
            one = 3 * (layer.hidden_size + layer.intermediate_size)
            small += sum(ranks) * one
            big += (layer.num_experts - 1) * 3 * layer.hidden_size * layer.intermediate_size
        return f"differences from expert {plan['base']} have {small:,} numbers; {big:,} in full"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, (ranks, layer) in enumerate(
            zip(lists_of(plan, "ranks", layers), layers, strict=True)
        ):
            full = min(layer.hidden_size, layer.intermediate_size)
            if layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases are not taken")
            base = plan.get("base")
            if type(base) is not int or not 0 <= base < layer.num_experts:
                raise ValueError(
                    f"base={base} is not an expert of layer {place}, which has {layer.num_experts}"
                )
            fine = isinstance(ranks, list) and len(ranks) == layer.num_experts
            if not fine or not all(type(r) is int and 0 <= r <= full for r in ranks):
                raise ValueError(
                    f"the plan's ranks of layer {place} must be {layer.num_experts} numbers up to "
                    f"{full}: {ranks!r}"
                )

    def _unchanged(self, ranks: Sequence[int], base: int, full: int) -> bool:
        """Whether every difference is stored in full, so that nothing is to be done."""
        return all(rank == full or expert == base for expert, rank in enumerate(ranks))

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        ranks, base = plan["ranks"][place], plan["base"]
        full = min(tensors["experts.down_proj"].shape[1:])
        if self._unchanged(ranks, base, full):
            return tensors
        if self.store == "full":
            return rebuilt(tensors, lambda values: summed_up(values, ranks, base), lambda v: v)
        return rebuilt(
            tensors,
            lambda values: differences(values, ranks, base),
            lambda values: _shapes(values, ranks),
        )

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        ranks = plan["ranks"][place]
        full = min(layer.hidden_size, layer.intermediate_size)
        if self.store == "full" or self._unchanged(ranks, plan["base"], full):
            return layer
        return replace(layer, experts=LowRank(ranks=text_of(ranks)))


def differences(values: Values, ranks: Sequence[int], base: int) -> Values:
    """Base and differences of all experts, as `LowRank` stores them.

    Args:
        values: of E experts.
        ranks: of each; its difference from the base is left out where it is 0.
        base: number of the expert that is the base.
    """
    found = {name: value[base : base + 1] for name, value in values.items()}
    for name, matrices in matrices_of(values).items():
        pairs = [
            factors(matrix - matrices[base], rank)
            for matrix, rank in zip(matrices, ranks, strict=True)
        ]
        found[f"{name}_left"] = torch.cat([left for left, _ in pairs], dim=1)
        found[f"{name}_right"] = torch.cat([right for _, right in pairs], dim=0)
    return found


def _shapes(values: Values, ranks: Sequence[int]) -> Values:
    """Tensors of the shapes of `differences`."""
    found = {name: value[:1] for name, value in values.items()}
    for name, matrices in matrices_of(values).items():
        _, rows, columns = matrices.shape
        found[f"{name}_left"] = matrices.new_empty(rows, sum(ranks))
        found[f"{name}_right"] = matrices.new_empty(sum(ranks), columns)
    return found


def summed_up(values: Values, ranks: Sequence[int], base: int) -> Values:
    """Experts that are the base and their difference, in full."""
    made = {}
    for name, matrices in matrices_of(values).items():
        experts = []
        for matrix, rank in zip(matrices, ranks, strict=True):
            left, right = factors(matrix - matrices[base], rank)
            experts.append(matrices[base] + left @ right)
        made[name] = torch.stack(experts)
    if "gate" in made:
        return {
            "gate_up_proj": torch.cat([made["gate"], made["up"]], dim=1),
            "down_proj": made["down"],
        }
    return {"up_proj": made["up"], "down_proj": made["down"]}


CARD = Card(
    name="flexmore",
    title="FlexMoRE",
    summary="experts as a shared base and low-rank differences, of a rank of their own",
    paper="2602.08818",
    level="model",
    branch="decomposition",
    rows=(Row(table=TRANSFORMS, kind=FlexMoRe),),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Of experts that are tuned on code and on JSON from a small language model of English, "
        "differences of rank 8 (a third of the numbers) keep at least 0.8 of what tuning gains on "
        "code; on both the loss is lower with rank 8 than with 4, and falls with the rank within "
        "0.01."
    ),
    departs=(
        "Takes a model that has its experts already, one of which is the base; it trains none, and "
        "leaves the router as it is. Without the paper's choice of ranks by domain: that another "
        "rank suits another domain was not seen. On JSON 0.75 of the gain is kept here (one "
        "model), where at least 0.8 was looked for."
    ),
)
