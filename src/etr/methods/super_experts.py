"""Super Experts: the few experts whose outputs are enormous, to be left alone (2507.23279)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.experts import OfExperts, check_numbers, lists_of, rebuilt
from etr.model.transform import Stats, largest
from etr.moe.config import MoEConfig
from etr.moe.view import LayerView


@dataclass(frozen=True, kw_only=True)
class SuperExperts(OfExperts):
    """Finds experts whose largest output stands out; other transforms protect them.

    The largest output of an expert is that of its down projection over the text, before it is
    weighed. Nothing changes, unless the experts found, or as many others, are to be silenced to see
    what they are worth.
    """

    name = "super_experts"
    summary = "find the experts of enormous outputs, which other transforms should protect"
    needs = ("rows",)

    percentile: float = 99.5
    """Of the largest outputs of all experts, which one must exceed."""
    share: float = 0.1
    """Of the largest of all, which it must exceed."""
    median: float = 10.0
    """Times the median of experts that were seen, which it must exceed; without this one expert is
    always found. 0: not asked for, as published."""
    layers: float = 0.75
    """Share of the MoE layers, the first ones, that are looked at."""
    silence: Literal["none", "found", "random"] = "none"
    """Whose outputs become 0: nobody's, those of the experts found, or of as many others."""
    seed: int = 0
    """Of the choice of others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("percentile", 0, 100), ("share", 0, 1), ("layers", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must lie between {low} and {high}")
        if not self.median >= 0:
            raise ValueError(f"median={self.median} must be at least 0")
        if self.silence not in ("none", "found", "random"):
            raise ValueError(f"silence={self.silence!r} must be one of none, found, random")

    def changes_function(self) -> str | None:
        return None if self.silence == "none" else f"experts are silenced: {self.silence}"

    def observe(self, view: LayerView) -> Stats:
        assert view.rows is not None
        routing = view.routing
        peak = view.rows.new_zeros(routing.num_experts + 1)
        peak = peak.scatter_reduce(0, routing.expert, view.rows.abs().amax(-1), "amax")
        return {"largest": peak[:-1].double()}

    def gather(self, total: Stats, more: Stats) -> Stats:
        return largest(total, more)

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        tables = [
            one["largest"][: layer.num_experts] for one, layer in zip(stats, layers, strict=True)
        ]
        found = self.found(tables)
        silenced = found if self.silence == "found" else []
        if self.silence == "random":
            others = [
                [place, expert]
                for place, table in enumerate(tables)
                for expert in range(len(table))
                if [place, expert] not in found
            ]
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(others), generator=generator)[: len(found)]
            silenced = sorted(others[i] for i in order.tolist())
        return {
            "found": found,
            "silenced": [[e for place, e in silenced if place == i] for i in range(len(layers))],
            "largest": [table.tolist() for table in tables],
        }

    def found(self, tables: Sequence[Tensor]) -> list[list[int]]:
        """Layer and expert of those that stand out.

        Args:
            tables: largest output of each expert, [E] for each layer; 0 for unseen ones.
        """
        looked_at = tables[: round(self.layers * len(tables))]
        values = torch.cat([*looked_at, torch.zeros(0)]).double()
        seen = values[values > 0]
        if not len(seen):
            return []
        bound = max(
            float(values.quantile(self.percentile / 100)),
            float(values.max()) * self.share,
            float(seen.quantile(0.5)) * self.median,
        )
        return [
            [place, expert]
            for place, table in enumerate(looked_at)
            for expert, value in enumerate(table.tolist())
            if value > bound
        ]

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        names = "+".join(f"{place}.{expert}" for place, expert in plan.get("found", []))
        return f"super experts (layer.expert): {names or 'none'}" + (
            f"; for other transforms: protect={names}" if names else ""
        )

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        silenced = lists_of(plan, "silenced", layers)
        for numbers, layer in zip(silenced, layers, strict=True):
            check_numbers(numbers, layer.num_experts, "silenced experts of a layer")

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        silenced = plan["silenced"][place]
        if not silenced:
            return tensors

        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            down = {name: value for name, value in values.items() if name.startswith("down_proj")}
            index = torch.tensor(silenced)
            return {
                **values,
                **{k: v.index_fill(0, index.to(v.device), 0.0) for k, v in down.items()},
            }

        return rebuilt(tensors, change)


CARD = Card(
    name="super_experts",
    title="Super Experts",
    summary="experts whose outputs are enormous: found on text, to be protected by other methods",
    paper="2507.23279",
    level="model",
    branch="pruning",
    rows=(Row(table=TRANSFORMS, kind=SuperExperts),),
    claim=(
        "An expert of a small untrained model in which one neuron's weights are planted so that it "
        "fires over 100 times as strongly as any other is found, and found alone; without it "
        "nothing is found, and finding changes no bit of the weights."
    ),
    departs=(
        "All routed tokens count, where the released code looks at the first one's row alone; the "
        "threshold is a tenth of the largest output, not its floor; and an expert must also exceed "
        "10 times the median (median=0 does without), since otherwise one is always found."
    ),
)
