"""Experts' matrices of fewer bits: rounded where they are, or as the bank `packed` stores them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from etr.model.experts import Values, rebuilt
from etr.model.transform import LayerTensors
from etr.moe.experts.packed import WHOLE, grid_of, num_bytes, on_grid, packed


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
