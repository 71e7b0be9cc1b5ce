"""Experts' matrices of fewer bits: rounded where they are, or as the bank `packed` stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from etr.model.experts import OfExperts, Values, lists_of, rebuilt
from etr.model.transform import LayerTensors
from etr.moe.config import MoEConfig
from etr.moe.experts.activation import GATED
from etr.moe.experts.packed import BITS, WHOLE, Packed, grid_of, num_bytes, on_grid, packed
from etr.moe.experts.runs import text_of


@dataclass(frozen=True, kw_only=True)
class FewBits(OfExperts):
    """A transform that rounds the experts' matrices to as many bits each as its plan says.

    Its plan holds under ``bits`` those of every matrix of a layer, in the order of `matrices`.
    """

    store: Literal["packed", "plain"] = "packed"
    """packed: codes in bytes. plain: weights that were rounded, which families of transformers can
    hold, but are not smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store not in ("packed", "plain"):
            raise ValueError(f"store={self.store!r} must be packed or plain")

    def check_bits(self, *names: str) -> None:
        """Refuse fields that are no number of bits.

        Raises:
            ValueError: names the field.
        """
        for name in names:
            if getattr(self, name) not in self.known_bits:
                words = ", ".join(map(str, self.known_bits))
                raise ValueError(f"{name}={getattr(self, name)} must be one of {words} bits")

    @property
    def known_bits(self) -> tuple[int, ...]:
        """Bits that can be stored."""
        return (*BITS, WHOLE) if self.store == "packed" else (2, 3, 4, 8, WHOLE)

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        known = self.known_bits
        for place, (bits, layer) in enumerate(
            zip(lists_of(plan, "bits", layers), layers, strict=True)
        ):
            if layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases are not taken")
            count = layer.num_experts * num_matrices(layer)
            fine = isinstance(bits, list) and len(bits) == count
            if not fine or not all(type(width) is int and width in known for width in bits):
                raise ValueError(
                    f"the plan's bits of layer {place} must be {count} of "
                    f"{', '.join(map(str, known))}: {bits!r}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        bits = plan["bits"][place]
        if set(bits) == {WHOLE}:
            return tensors
        return with_bits(tensors, bits, self.store == "packed")

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        bits = plan["bits"][place]
        if self.store == "plain" or set(bits) == {WHOLE}:
            return layer
        return replace(layer, experts=Packed(bits=text_of(bits)))


def num_matrices(layer: MoEConfig) -> int:
    """Of each expert: with a gate 3, else 2."""
    return 3 if layer.activation in GATED else 2


def bits_a_weight(plan: Any, layers: Sequence[MoEConfig]) -> float:
    """Bits a weight of the experts under a plan of `FewBits`, scales apart."""
    total = bits = 0
    for widths, layer in zip(plan["bits"], layers, strict=True):
        total += len(widths) * layer.hidden_size * layer.intermediate_size
        bits += sum(widths) * layer.hidden_size * layer.intermediate_size
    return bits / total


def with_bits(tensors: LayerTensors, bits: Sequence[int], as_codes: bool) -> LayerTensors:
    """A layer whose experts' matrices are rounded to a number of bits each.

    Args:
        tensors: of the layer.
        bits: of each matrix, in the order of `matrices`; 16 leaves it as it is.
        as_codes: store them as codes, and not as what these mean.
    """
    if as_codes:
        return rebuilt(tensors, lambda v: codes_of(v, bits), lambda v: _shapes_of(v, bits))
    return rebuilt(tensors, lambda v: rounded(v, bits), lambda v: v)


def matrices(values: Values) -> list[Tensor]:
    """Of each expert the gate's (where there is one), the up and the down projection's."""
    found: list[Tensor] = []
    for expert, down in enumerate(values["down_proj"]):
        if "gate_up_proj" in values:
            found += [*values["gate_up_proj"][expert].chunk(2), down]
        else:
            found += [values["up_proj"][expert], down]
    return found


def rounded(values: Values, bits: Sequence[int]) -> Values:
    """Experts' weights as their codes mean them."""
    made = [
        weight if width == WHOLE else on_grid(*grid_of(weight, width)).to(weight.dtype)
        for weight, width in zip(matrices(values), bits, strict=True)
    ]
    each = 3 if "gate_up_proj" in values else 2
    experts = [made[start : start + each] for start in range(0, len(made), each)]
    name = "gate_up_proj" if each == 3 else "up_proj"
    return {
        name: torch.stack([torch.cat(one[:-1]) for one in experts]),
        "down_proj": torch.stack([one[-1] for one in experts]),
    }


def codes_of(values: Values, bits: Sequence[int]) -> Values:
    """Experts as `Packed` stores them."""
    codes, grids, kept = [], [], []
    for weight, width in zip(matrices(values), bits, strict=True):
        if width == WHOLE:
            kept.append(weight.flatten())
            continue
        numbers, grid = grid_of(weight, width)
        codes.append(packed(numbers, width))
        grids.append(grid.view(torch.int32))
    none = values["down_proj"].new_zeros(0)
    return {"codes": torch.cat(codes), "grid": torch.cat(grids), "kept": torch.cat([*kept, none])}


def _shapes_of(values: Values, bits: Sequence[int]) -> Values:
    """Tensors of the shapes of `codes_of`."""
    pairs = list(zip(matrices(values), bits, strict=True))
    few = [(weight, width) for weight, width in pairs if width != WHOLE]
    down = values["down_proj"]
    return {
        "codes": down.new_empty(
            sum(num_bytes(weight.numel(), width) for weight, width in few), dtype=torch.uint8
        ),
        "grid": down.new_empty(sum(len(weight) for weight, _ in few), 2, dtype=torch.int32),
        "kept": down.new_empty(sum(weight.numel() for weight, width in pairs if width == WHOLE)),
    }
