"""On which sizes: every case of the benchmark, by group."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one comparison.

    Args:
        group: layer, routing, router, growth, memory, training, generate or few; says what is
            measured.
        label: tells cases of the same sizes apart, or empty.
        num_tokens: T.
        hidden_size, intermediate_size: H and I.
        num_experts, top_k: E and k.
        dtype: of weights and tokens.
        budget: seconds for the counted rounds, on a CPU.
    """

    group: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int = 0
    num_experts: int
    top_k: int = 1
    dtype: str = "float32"
    label: str = ""
    budget: float

    @property
    def name(self) -> str:
        """Unique, and what ``--only`` looks into."""
        sizes = f"{self.num_experts} experts top-{self.top_k}, {self.num_tokens} tokens"
        widths = f"d {self.hidden_size}"
        if self.intermediate_size:
            widths += f", ffn {self.intermediate_size}"
        parts = (self.group, self.label, f"{sizes}, {widths}", self.dtype)
        return "/".join(part for part in parts if part)

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())

    @property
    def tokens_each(self) -> float:
        """Mean tokens per expert where nothing is dropped."""
        return self.num_tokens * self.top_k / self.num_experts

    def sizes(self) -> dict[str, Any]:
        """Plain values for the results."""
        return {**dataclasses.asdict(self), "tokens_each": self.tokens_each}

    def small(self) -> Case:
        """The same in a second: to see that everything runs."""
        return dataclasses.replace(
            self,
            num_tokens=max(64, self.num_tokens // 16),
            hidden_size=max(self.num_experts, self.hidden_size // 4),
            intermediate_size=self.intermediate_size // 4,
            budget=self.budget / 50,
        )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Experts and widths that several groups share."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


FEW_TOP_1 = Shape(hidden_size=512, intermediate_size=1408, num_experts=8, top_k=1)
FEW_TOP_2 = Shape(hidden_size=512, intermediate_size=1408, num_experts=8, top_k=2)
MANY = Shape(hidden_size=1024, intermediate_size=512, num_experts=64, top_k=8)
SHAPES = (FEW_TOP_1, FEW_TOP_2, MANY)
BUDGETS = {FEW_TOP_1: 12.0, FEW_TOP_2: 18.0, MANY: 30.0}
"""Seconds for the rounds of 4096 tokens in float32."""


def _of(shape: Shape, **values: Any) -> Case:
    return Case(**dataclasses.asdict(shape), **values)


def layer_cases() -> list[Case]:
    """The layer, forward and backward, against everyone."""
    return [
        _of(
            shape,
            group="layer",
            num_tokens=num_tokens,
            dtype=dtype,
            budget=BUDGETS[shape] * (1 if num_tokens == 4096 else 0.25) * share,
        )
        for shape in SHAPES
        for num_tokens in (256, 4096)
        for dtype, share in zip(DTYPES, (1, 0.75), strict=True)
    ]


def routing_cases() -> list[Case]:
    """What routing takes of the layer."""
    return [
        _of(shape, group="routing", num_tokens=4096, dtype=dtype, budget=BUDGETS[shape] / 3)
        for shape in SHAPES
        for dtype in DTYPES
    ]


def router_cases() -> list[Case]:
    """The router alone: GrAP against a linear router."""
    return [
        Case(
            group="router",
            num_tokens=2048,
            hidden_size=hidden_size,
            num_experts=num_experts,
            dtype=dtype,
            budget=1.5,
        )
        for dtype in DTYPES
        for num_experts in (8, 64, 128, 256)
        for hidden_size in (1024, 2048, 4096, 8192)
    ]


def growth_cases() -> list[Case]:
    """One size grows, the others stand."""
    base = Case(
        group="growth",
        num_tokens=2048,
        hidden_size=256,
        intermediate_size=512,
        num_experts=8,
        top_k=2,
        budget=2.0,
    )
    change = dataclasses.replace
    return [
        *(change(base, label="tokens", num_tokens=n) for n in (512, 1024, 2048, 4096)),
        *(change(base, label="experts", num_experts=n) for n in (8, 16, 32, 64)),
        *(
            change(base, label="width", hidden_size=n, intermediate_size=2 * n)
            for n in (128, 256, 512)
        ),
    ]


def memory_cases() -> list[Case]:
    """Saved and peak bytes of capacities."""
    return [
        _of(shape, group="memory", num_tokens=4096, budget=4.0) for shape in (FEW_TOP_1, FEW_TOP_2)
    ]


def training_cases() -> list[Case]:
    """Training steps of the demo model, whose sizes these are."""
    return [
        Case(
            group="training",
            num_tokens=2048,
            hidden_size=128,
            intermediate_size=256,
            num_experts=8,
            budget=20.0,
        )
    ]


def generate_cases() -> list[Case]:
    """Prefill and decode of a whole model; the tokens of `decode` are sequences."""
    return [
        _of(shape, group="generate", label=label, num_tokens=num_tokens, dtype=dtype, budget=6.0)
        for shape in (FEW_TOP_2, MANY)
        for label, num_tokens in (("prefill", 1024), ("decode", 8), ("compiled decode", 8))
        for dtype in DTYPES
    ]


def few_cases() -> list[Case]:
    """A layer that serves few tokens: what is not a matrix product shows."""
    return [
        _of(shape, group="few", num_tokens=num_tokens, dtype=dtype, budget=3.0)
        for shape in (FEW_TOP_2, MANY)
        for num_tokens in (1, 8, 64)
        for dtype in DTYPES
    ]


def all_cases() -> list[Case]:
    """Every case, in the order in which they run."""
    return [
        *layer_cases(),
        *routing_cases(),
        *router_cases(),
        *growth_cases(),
        *memory_cases(),
        *training_cases(),
        *generate_cases(),
        *few_cases(),
    ]
