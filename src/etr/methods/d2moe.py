"""D2MoE: nested bits for experts, and an order in which to load them (2504.15299)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.experts import OfExperts, Values, lists_of, rebuilt
from etr.moe.config import MoEConfig
from etr.moe.experts.nested import Nested, buffers_of, empty_buffers
from etr.moe.experts.packed import WHOLE


@dataclass(frozen=True, kw_only=True)
class D2Moe(OfExperts):
    """Stores each expert's matrices as a few bits and further bits one by one.

    One folder then serves at several widths: the bank's `use` says how many levels are read, and a
    level is bit for bit the same whatever lies above it.
    """

    name = "d2moe"
    summary = "experts of nested bits: one folder, read at several widths"

    base: int = 2
    """Bits of the lowest level: 1, 2, 4 or 8; 16 leaves the model as it is."""
    levels: int = 3
    """Levels that are stored; each above the lowest adds a bit to every weight."""
    group: int = 128
    """Weights of a row that share scales, at most."""
    use: int | None = None
    """Levels that the new model reads. None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base != WHOLE:
            self.bank()
        if self.protect:
            raise ValueError(f"protect={self.protect!r}: all experts of a layer have as many bits")

    def bank(self) -> Nested:
        """The bank that holds the result."""
        return Nested(base=self.base, levels=self.levels, group=self.group, use=self.use)

    def changes_function(self) -> str | None:
        if self.base == WHOLE:
            return None
        bits = self.base + (self.use or self.levels) - 1
        return f"experts have {bits} bits a weight"

    def plan(self, stats: Sequence[Any], layers: Sequence[MoEConfig]) -> Any:
        return {"use": [self.use or self.levels for _ in layers]}

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        if self.base == WHOLE:
            return "stores the experts as they are"
        stored = self.base + self.levels - 1
        used = ", ".join(str(self.base + use - 1) for use in dict.fromkeys(plan["use"]))
        return f"stores {stored} bits a weight of the experts and their scales; reads {used}"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, (use, layer) in enumerate(
            zip(lists_of(plan, "use", layers), layers, strict=True)
        ):
            if layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases are not taken")
            if type(use) is not int or not 1 <= use <= self.levels:
                raise ValueError(
                    f"the plan's use of layer {place} must lie between 1 and levels={self.levels}: "
                    f"{use!r}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        return tensors if self.base == WHOLE else rebuilt(tensors, self._stored, self._like)

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        if self.base == WHOLE:
            return layer
        return replace(layer, experts=replace(self.bank(), use=plan["use"][place]))

    def _stored(self, values: Values) -> Values:
        return {
            f"{short}_{key}": value
            for short, weights in _both(values).items()
            for key, value in buffers_of(weights, self.bank()).items()
        }

    def _like(self, values: Values) -> Values:
        found: Values = {}
        for short, weights in _both(values).items():
            count, rows, columns = weights.shape
            made = empty_buffers(count, rows, columns, self.bank())
            found |= {f"{short}_{key}": value for key, value in made.items()}
        return found


def _both(values: Values) -> Values:
    """Matrices [E, O, I] by the names that the bank has for them."""
    up = values["gate_up_proj"] if "gate_up_proj" in values else values["up_proj"]
    return {"up": up, "down": values["down_proj"]}


Item = tuple[int, int]
"""An expert, and one of its levels from 0."""


def loading_order(tokens: Sequence[Sequence[int]]) -> list[Item]:
    """Highest expected bits first: who is loaded when, by how many tokens need it.

    Each expert's levels wait in order, since a level says nothing without those below; the one at
    the head that most tokens need goes next. Levels that nobody needs are not loaded.

    Args:
        tokens: of each expert, how many need each level or a higher one, which falls.
    """
    order: list[Item] = []
    heads = [0] * len(tokens)
    while True:
        waiting = [
            (-counts[head], expert)
            for expert, (counts, head) in enumerate(zip(tokens, heads, strict=True))
            if head < len(counts) and counts[head] > 0
        ]
        if not waiting:
            return order
        _, expert = min(waiting)
        order.append((expert, heads[expert]))
        heads[expert] += 1


def makespan(
    order: Sequence[Item],
    tokens: Sequence[Sequence[int]],
    loads: Sequence[float],
    compute: float,
) -> float:
    """When all is done where items are loaded one after another, and computed in that order.

    Args:
        order: items, each once.
        tokens: as in `loading_order`; an item's work is those that need its level or a higher one.
        loads: time to load each level.
        compute: time of one token.
    """
    loaded = done = 0.0
    for expert, level in order:
        loaded += loads[level]
        done = max(done, loaded) + compute * tokens[expert][level]
    return done


CARD = Card(
    name="d2moe",
    title="D2MoE",
    summary="experts of nested bits, read at several widths, and the order in which to load them",
    paper="2504.15299",
    level="model",
    branch="quantization",
    rows=(Row(table=TRANSFORMS, kind=D2Moe),),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Of Gaussian weights each of 3 levels has at most 0.4 of the error of the one below, and "
        "is the same bit for bit where those above are missing; loading by need ends no later than "
        "expert by expert in 200 of 200 cases, and at 12.4 where that ends at 12.8."
    ),
    departs=(
        "Rounded without compensation. Levels are chosen for a layer, not for a token: there is no "
        "trained bit router, and the order of loading is a function, not a server."
    ),
)
