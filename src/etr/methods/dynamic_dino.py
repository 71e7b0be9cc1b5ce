"""Dynamic-DINO's start: copies of one expert in slices, that compute what it did (2507.17436)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors, LazyTensor
from etr.model.experts import EXPERTS, OfExperts, Values, rebuilt, shared_width
from etr.model.transform import SHARED
from etr.moe.config import MoEConfig
from etr.moe.routers.token_choice import TokenChoice


@dataclass(frozen=True, kw_only=True)
class DynamicDino(OfExperts):
    """Makes of a dense feed-forward copies in slices, of which a token takes one copy's.

    Each slice is an expert of an equal part of the width. The rows of the router are drawn for each
    copy and repeated for its slices, so that all slices of a token's best copy are level and a
    token takes exactly these; their weights are then equal and sum up to the number of slices.
    """

    name = "dynamic_dino"
    summary = "a dense model to copies in slices: more experts than a token uses, the same function"

    copies: int = 4
    """Copies N of the feed-forward."""
    slices: int = 2
    """Slices k of each, and experts that a token takes."""
    noise: float = 0.0
    """Normal noise on the router's rows, as a share of their standard deviation, so that slices
    part; 0 keeps the function."""
    seed: int = 0
    """Of the router's rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("copies", "slices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.noise >= 0:
            raise ValueError(f"noise={self.noise} must be at least 0")

    def changes_function(self) -> str | None:
        if self.noise:
            return f"noise={self.noise} may mix slices of several copies"
        if self.slices == 1 and self.copies > 1:
            return "with slices=1 a token's one copy is weighed by its gate, which is below 1"
        return None

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, layer in enumerate(layers):
            if layer.num_experts != 1:
                raise ValueError(
                    f"layer {place} has {layer.num_experts} experts; transform {self.name!r} takes "
                    "a dense model, or one with a single expert in each layer"
                )
            router = layer.router_config
            if not isinstance(router, TokenChoice) or router.gate != "softmax" or router.bias:
                raise ValueError(
                    f"router {router.name!r} may weigh its one expert below 1; transform "
                    f"{self.name!r} takes token_choice with a softmax and no bias"
                )
            if layer.intermediate_size % self.slices:
                raise ValueError(
                    f"slices={self.slices} must divide intermediate_size="
                    f"{layer.intermediate_size} of layer {place}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        if self.copies == self.slices == 1:
            return tensors
        kept = {k: t for k, t in tensors.items() if k.startswith((EXPERTS, *SHARED))}
        router = tensors["router.weight"]
        rows = LazyTensor(
            name=router.name,
            shape=(self.copies * self.slices, router.shape[1]),
            dtype=router.dtype,
            make=partial(self._rows, router.shape[1], router.dtype, place),
        )
        return {**rebuilt(kept, self._sliced), "router.weight": rows}

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        if self.copies == self.slices == 1:
            return layer
        return replace(
            layer,
            num_experts=self.copies * self.slices,
            top_k=self.slices,
            intermediate_size=layer.intermediate_size // self.slices,
            routed_scale=layer.routed_scale * self.slices,
            router=TokenChoice(),
            normalize=None,
            capacity="none",
            shared_intermediate_size=shared_width(layer),
        )

    def _rows(self, hidden_size: int, dtype: torch.dtype, place: int) -> Tensor:
        """Of the router: a copy's for each of its slices, and noise."""
        generator = torch.Generator().manual_seed(self.seed * 2**20 + place)
        rows = torch.randn(self.copies, hidden_size, generator=generator)
        rows = rows.repeat_interleave(self.slices, dim=0)
        if self.noise:
            rows = rows + self.noise * torch.randn(rows.shape, generator=generator)
        return (rows * hidden_size**-0.5).to(dtype)

    def _sliced(self, values: Values) -> Values:
        """Slices of the one expert, for every copy."""
        found = {}
        for name, value in values.items():
            one = value[0]
            if name == "down_proj":
                pieces = list(one.chunk(self.slices, dim=1))
            elif name == "down_proj_bias":
                pieces = [one / self.slices] * self.slices
            else:
                halves = one.chunk(2 if name.startswith("gate_up") else 1)
                parts = zip(*(half.chunk(self.slices) for half in halves), strict=True)
                pieces = [torch.cat(part) for part in parts]
            found[name] = torch.stack(pieces * self.copies)
        return found


CARD = Card(
    name="dynamic_dino",
    title="Dynamic-DINO's exact start",
    summary="a dense model to copies in slices with equal router rows: the same function at first",
    paper="2507.17436",
    level="model",
    branch="expert design",
    rows=(Row(table=TRANSFORMS, kind=DynamicDino),),
    moves=("loss", "bytes", "memory"),
    claim=(
        "A layer of 3 copies in 2 slices computes what the dense one does within 1e-6 in float32, "
        "and every token takes both slices of one copy; without the factor k = 2 on the weights "
        "the output is half of it."
    ),
    departs=(
        "Of the paper the start alone, for language models: no detector. Weights are normalised "
        "over the chosen and multiplied by k. A dense folder of a known family is read as it is."
    ),
)
