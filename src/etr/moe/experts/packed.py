"""Experts of few bits: codes in bytes, a scale and a lowest value of each row (2406.08155)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe.experts.activation import GATED
from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.runs import numbers_of
from etr.moe.experts.uniform import Experts
from etr.moe.experts.weights import ExpertParams

BITS = (2, 4, 8)
"""Bits of a code that fill bytes."""
WHOLE = 16
"""Stands for a matrix that is kept as it is."""


@dataclass(frozen=True, kw_only=True)
class Packed(BankConfig):
    """Experts whose matrices are stored as codes of 2, 4 or 8 bits."""

    name = "packed"
    summary = "experts whose matrices have codes of few bits, which are weights while they run"
    undivided = "codes of experts differ in length"

    bits: str = ""
    """Bits of each matrix, as runs of equal ones: ``12x4+36x2``; of each expert the gate's (where
    there is one), the up and the down projection's. 16: kept as it is. Empty: 8 each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [bits for bits in self.of() if bits not in (*BITS, WHOLE)]
        if wrong:
            raise ValueError(f"bits={self.bits!r} must be 2, 4, 8 or 16 for each matrix")

    def of(self) -> list[int]:
        """Bits of each matrix; none where they are all 8."""
        return numbers_of(self.bits, "bits")

    def check(self, num_experts: int, hidden_size: int) -> None:
        if self.bits and len(self.of()) not in (2 * num_experts, 3 * num_experts):
            raise ValueError(
                f"bits={self.bits!r} names {len(self.of())} matrices; num_experts={num_experts} "
                "have 3 each, or 2 without a gate"
            )

    def build(self, sizes: ExpertSizes) -> Bank:
        matrices = (3 if sizes.activation in GATED else 2) * sizes.num_experts
        if self.bits and len(self.of()) != matrices:
            raise ValueError(f"bits={self.bits!r} must name {matrices} matrices")
        if sizes.bias:
            raise ValueError("experts='packed': experts with biases are not taken")
        return PackedExperts(sizes, self.of() or [8] * matrices)


class PackedExperts(Experts):
    """Buffers ``codes`` uint8 [bytes] and ``grid`` int32 [rows, 2], and ``kept`` [weights].

    Matrices follow each other, each from a byte of its own. A row's scale and lowest value are
    float32 whose bits `grid` holds as integers, so that no conversion of the model rounds them.
    Codes do not learn.

    Args:
        sizes: of the experts.
        bits: of each matrix.
    """

    codes: Tensor
    grid: Tensor

    def __init__(self, sizes: ExpertSizes, bits: list[int]) -> None:
        nn.Module.__init__(self)
        self.activation, self.clamp, self.bits = sizes.activation, sizes.clamp, bits
        wide, narrow = sizes.hidden_size, sizes.intermediate_size
        one = [(narrow, wide)] * (2 if sizes.activation in GATED else 1) + [(wide, narrow)]
        self.shapes = one * sizes.num_experts
        self.count = sizes.num_experts
        pairs = list(zip(self.shapes, bits, strict=True))
        few = [(shape, width) for shape, width in pairs if width != WHOLE]
        whole = sum(a * b for (a, b), width in pairs if width == WHOLE)
        codes = torch.zeros(sum(num_bytes(a * b, w) for (a, b), w in few), dtype=torch.uint8)
        self.register_buffer("codes", codes)
        grid = torch.zeros(sum(rows for (rows, _), _ in few), 2, dtype=torch.int32)
        self.register_buffer("grid", grid)
        self.kept = nn.Parameter(torch.zeros(whole))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.kept)

    @property
    def num_experts(self) -> int:
        return self.count

    @property
    def size_of_one(self) -> float:
        """Weights that run."""
        return sum(rows * columns for rows, columns in self.shapes) / self.count

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def parameters_of_a_token(self, top_k: int) -> float:
        return self.size_of_one * min(top_k, self.count)

    def params(self, dtype: torch.dtype) -> ExpertParams:
        found = self._matrices(dtype)
        each = len(found) // self.count
        experts = [found[start : start + each] for start in range(0, len(found), each)]
        return ExpertParams(
            up=torch.stack([torch.cat(matrices[:-1]) for matrices in experts]),
            down=torch.stack([matrices[-1] for matrices in experts]),
            activation=self.activation,
            clamp=self.clamp,
        )

    def _matrices(self, dtype: torch.dtype) -> list[Tensor]:
        found, code, row, whole = [], 0, 0, 0
        for (rows, columns), bits in zip(self.shapes, self.bits, strict=True):
            size = rows * columns
            if bits == WHOLE:
                found.append(self.kept[whole : whole + size].view(rows, columns).to(dtype))
                whole += size
                continue
            length = num_bytes(size, bits)
            numbers = unpacked(self.codes[code : code + length], bits, size).view(rows, columns)
            grid = self.grid[row : row + rows].view(torch.float32)
            found.append(on_grid(numbers, grid).to(dtype))
            code, row = code + length, row + rows
        return found


def num_bytes(size: int, bits: int) -> int:
    """Bytes of as many codes."""
    return -(-size * bits // 8)


def grid_of(weight: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Round each row to 2^bits even steps from its lowest value to its highest, half to even.

    Args:
        weight: float [O, I].
        bits: of a code.
        clip: share of both ends that the steps reach; what lies beyond is cut.
    Returns:
        Codes uint8 [O, I], and the rows' scale and lowest value, float32 [O, 2].
    """
    value = weight.float()
    low, high = clip * value.amin(1), clip * value.amax(1)
    scale = (high - low).clamp_min(1e-9) / (2**bits - 1)
    codes = ((value - low[:, None]) / scale[:, None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), torch.stack([scale, low], dim=1)


def on_grid(codes: Tensor, grid: Tensor) -> Tensor:
    """What codes [O, I] mean, float32."""
    return codes.float() * grid[:, :1] + grid[:, 1:]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes in bytes, the first in the lowest bits; uint8 [bytes]."""
    each = 8 // bits
    flat = codes.flatten()
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % each)]).view(-1, each)
    shift = bits * torch.arange(each, device=codes.device)
    return (flat.int() << shift).sum(1).to(torch.uint8)


def unpacked(data: Tensor, bits: int, size: int) -> Tensor:
    """Inverse of `packed`, uint8 [size]."""
    shift = bits * torch.arange(8 // bits, device=data.device)
    codes = (data.int()[:, None] >> shift) & (2**bits - 1)
    return codes.flatten()[:size].to(torch.uint8)
