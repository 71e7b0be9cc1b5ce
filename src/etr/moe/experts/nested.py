"""Experts of nested bits: more bits of a weight refine what fewer bits say (arXiv 2504.15299)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etr.moe.experts.activation import GATED
from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.packed import grid_of, num_bytes, on_grid, packed, unpacked
from etr.moe.experts.uniform import Experts
from etr.moe.experts.weights import ExpertParams


@dataclass(frozen=True, kw_only=True)
class Nested(BankConfig):
    """Experts whose matrices are stored as a few bits, and further bits one by one.

    A level is read without those above it, and is the same whether they are there or not.
    """

    name = "nested"
    summary = "experts of nested bits, of which a layer reads as many as it is told"
    undivided = "codes of experts are one tensor"

    base: int = 2
    """Bits of the lowest level: 1, 2, 4 or 8."""
    levels: int = 3
    """Levels that are stored; each above the lowest adds a bit."""
    group: int = 128
    """Weights of a row that share scales, at most."""
    use: int | None = None
    """Levels that are read. None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in (1, 2, 4, 8):
            raise ValueError(f"base={self.base} must be 1, 2, 4 or 8 bits")
        for name in ("levels", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.use is not None and not 1 <= self.use <= self.levels:
            raise ValueError(f"use={self.use} must lie between 1 and levels={self.levels}")

    def build(self, sizes: ExpertSizes) -> Bank:
        if sizes.bias:
            raise ValueError("experts='nested': experts with biases are not taken")
        return NestedExperts(sizes, self)


class Levels(NamedTuple):
    """A matrix [O, I] in nested bits.

    Args:
        base: codes of the lowest level, uint8 [O, I].
        signs: whether each further level adds or takes its step, uint8 [levels - 1, O, I].
        grid: of each group, scale and lowest value of the base, and the steps, float32
            [O, groups, 1 + levels].
    """

    base: Tensor
    signs: Tensor
    grid: Tensor


def group_of(columns: int, group: int) -> int:
    """Weights of a row that share scales: the largest divisor of a row that is not over `group`."""
    return next(size for size in range(min(group, columns), 0, -1) if columns % size == 0)


def nested(weight: Tensor, base: int, levels: int, group: int) -> Levels:
    """Round a matrix to even steps in each group, then halve what is left, bit by bit.

    Args:
        weight: float [O, I].
        base: bits of the lowest level.
        levels: how many there are.
        group: weights of a row that share scales, at most.
    """
    rows, columns = weight.shape
    value = weight.float().reshape(rows, -1, group_of(columns, group))
    codes, lowest = grid_of(value.flatten(0, 1), base)
    found = on_grid(codes, lowest).view_as(value)
    signs, grid = [], [*lowest.view(rows, -1, 2).unbind(-1)]
    for _ in range(levels - 1):
        rest = value - found
        sign, step = rest >= 0, rest.abs().mean(-1)
        found = found + torch.where(sign, 1.0, -1.0) * step[..., None]
        signs.append(sign.view(rows, columns))
        grid.append(step)
    none = torch.zeros(0, rows, columns, dtype=torch.bool, device=weight.device)
    more = torch.stack(signs) if signs else none
    return Levels(codes.view(rows, columns), more.to(torch.uint8), torch.stack(grid, dim=-1))


def read(levels: Levels, use: int) -> Tensor:
    """What the lowest `use` levels say, float32 [O, I]."""
    rows, columns = levels.base.shape
    lowest, steps = levels.grid[..., :2], levels.grid[..., 2:].unbind(-1)
    found = on_grid(levels.base.view(lowest.shape[0] * lowest.shape[1], -1), lowest.flatten(0, 1))
    for signs, step in zip(levels.signs[: use - 1], steps, strict=False):
        found = found + (2.0 * signs.float().view_as(found) - 1.0) * step.flatten()[:, None]
    return found.view(rows, columns)


class NestedExperts(Experts):
    """Buffers of all experts' matrices, one after another, for ``up`` and ``down``.

    ``up_base`` uint8 [E, bytes], ``up_signs`` uint8 [levels - 1, E, bytes] and ``up_grid`` int32
    [E, rows, groups, 1 + levels], which holds float32 as integers, so that no conversion of the
    model rounds it; and so for ``down``. Codes do not learn.

    Args:
        sizes: of the experts.
        config: of the bank.
    """

    def __init__(self, sizes: ExpertSizes, config: Nested) -> None:
        nn.Module.__init__(self)
        self.activation, self.clamp, self.config = sizes.activation, sizes.clamp, config
        self.count = sizes.num_experts
        width = (2 if sizes.activation in GATED else 1) * sizes.intermediate_size
        self.shapes = {
            "up": (width, sizes.hidden_size),
            "down": (sizes.hidden_size, sizes.intermediate_size),
        }
        for name, (rows, columns) in self.shapes.items():
            for key, value in empty_buffers(self.count, rows, columns, config).items():
                self.register_buffer(f"{name}_{key}", value)

    def reset_parameters(self) -> None:
        """There is nothing to start."""

    @property
    def num_experts(self) -> int:
        return self.count

    @property
    def size_of_one(self) -> float:
        """Weights that run."""
        return float(sum(math.prod(shape) for shape in self.shapes.values()))

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def parameters_of_a_token(self, top_k: int) -> float:
        return self.size_of_one * min(top_k, self.count)

    @property
    def num_levels(self) -> int:
        """Levels in use."""
        return self.config.use or self.config.levels

    def params(self, dtype: torch.dtype, use: int | None = None) -> ExpertParams:
        up, down = (
            torch.stack([self.matrix(name, expert, use).to(dtype) for expert in range(self.count)])
            for name in ("up", "down")
        )
        return ExpertParams(up=up, down=down, activation=self.activation, clamp=self.clamp)

    def matrix(self, name: str, expert: int, use: int | None = None) -> Tensor:
        """One of an expert's matrices as its lowest levels say, float32; None: those in use."""
        shape = self.shapes[name]
        size, use = math.prod(shape), use or self.num_levels
        base = unpacked(self.get_buffer(f"{name}_base")[expert], self.config.base, size)
        signs = [
            unpacked(level[expert], 1, size).view(shape)
            for level in self.get_buffer(f"{name}_signs")[: use - 1]
        ]
        more = torch.stack(signs) if signs else base.new_zeros(0, *shape)
        grid = self.get_buffer(f"{name}_grid")[expert].view(torch.float32)
        return read(Levels(base.view(shape), more, grid), use)


def empty_buffers(count: int, rows: int, columns: int, config: Nested) -> dict[str, Tensor]:
    """Buffers of one matrix of `count` experts, by the end of their names."""
    groups = columns // group_of(columns, config.group)
    size = rows * columns
    return {
        "base": torch.zeros(count, num_bytes(size, config.base), dtype=torch.uint8),
        "signs": torch.zeros(config.levels - 1, count, num_bytes(size, 1), dtype=torch.uint8),
        "grid": torch.zeros(count, rows, groups, 1 + config.levels, dtype=torch.int32),
    }


def buffers_of(weights: Tensor, config: Nested) -> dict[str, Tensor]:
    """What `NestedExperts` stores of matrices [E, O, I], by the end of the names."""
    found = [nested(weight, config.base, config.levels, config.group) for weight in weights]
    signs = [
        torch.stack([packed(one.signs[level], 1) for one in found])
        for level in range(config.levels - 1)
    ]
    size = num_bytes(weights[0].numel(), 1)
    none = torch.zeros(0, len(found), size, dtype=torch.uint8, device=weights.device)
    return {
        "base": torch.stack([packed(one.base, config.base) for one in found]),
        "signs": torch.stack(signs) if signs else none,
        "grid": torch.stack([one.grid for one in found]).view(torch.int32),
    }
