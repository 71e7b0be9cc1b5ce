"""Engine over Triton kernels: gather, activation and combine weights inside the GEMMs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etr.moe.experts.activation import GATED
from etr.moe.experts.feed_forward import Grads, Problem
from etr.moe.experts.products import ONES


def why_unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        return "there is no CUDA device (and Triton's interpreter is off)"
    return None


def kernels_run(problem: Problem) -> bool:
    """Whether the kernels take these inputs: float32, bfloat16 or float16, and any row at all.

    Tokens on a CPU only go to the interpreter, though there may be a GPU beside it.
    """
    import triton

    here = problem.source.is_cuda or triton.knobs.runtime.interpret
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return here and problem.source.dtype in kinds and problem.num_rows > 0


@dataclass(frozen=True)
class Fused:
    """Keeps tokens and hidden for backward; every sum has a fixed order. No synchronisation."""

    def forward(self, problem: Problem, keep: bool) -> tuple[Tensor, Tensor | None]:
        launch = _Launch(problem)
        rows, width, hidden_width = problem.num_rows, problem.down.shape[2], problem.up.shape[1]
        new = problem.source.new_empty
        active = new(rows, width)
        hidden = new(rows, hidden_width) if keep else active
        launch.by_rows(
            "up_kernel",
            width,
            *(problem.source.contiguous(), problem.up.contiguous(), launch.bias),
            *(launch.source, problem.counts),
            *(hidden, active, launch.num_experts, problem.up.shape[2], width),
            *problem.clamp,
            BIAS=problem.up_bias is not None,
            GATED=launch.gated,
            ACTIVATION=problem.activation,
            KEEP=keep,
        )
        out = launch.times(active, problem.down, transposed=True, scaled=True)
        return launch.to_tokens(out), hidden if keep else None

    def backward(self, problem: Problem, hidden: Tensor, grad: Tensor, wanted: Grads) -> Grads:
        launch = _Launch(problem)
        rows, width = problem.num_rows, problem.down.shape[2]
        num_tiles = -(-width // launch.block_n)
        grad_hidden = torch.empty_like(hidden)
        active = problem.source.new_empty(rows, width)
        parts = hidden.new_empty(rows, num_tiles, dtype=torch.float32)
        launch.by_rows(
            "hidden_grad_kernel",
            width,
            *(grad, problem.down.contiguous(), launch.source, launch.scale, problem.counts),
            *(hidden, grad_hidden, active, parts),
            *(launch.num_experts, problem.down.shape[1], width, num_tiles),
            *problem.clamp,
            GATED=launch.gated,
            SCALED=problem.route is not None,
            ACTIVATION=problem.activation,
        )
        grad_weight = grad_up = grad_down = grad_source = grad_bias = None
        if wanted.weight_of_row is not None:
            grad_weight = parts.sum(1).to(wanted.weight_of_row.dtype)
        if wanted.down is not None:
            grad_down = launch.outer(grad, launch.source, active, launch.every)
        del active
        if wanted.up is not None:
            source = problem.source.contiguous()
            grad_up = launch.outer(grad_hidden, launch.every, source, launch.source)
        if wanted.up_bias is not None:
            ones = hidden.new_ones(rows, ONES)
            grad_bias = launch.outer(grad_hidden, launch.every, ones, launch.every)[:, :, 0]
        if wanted.source is not None:
            grad_rows = launch.times(grad_hidden, problem.up, transposed=False, scaled=False)
            grad_source = launch.to_tokens(grad_rows)
        return Grads(grad_source, grad_weight, grad_up, grad_down, grad_bias)


class _Launch:
    """Sizes, indices and options that the launches of one problem share."""

    def __init__(self, problem: Problem) -> None:
        from etr.moe.kernels import triton_experts

        self.kernels: Any = triton_experts
        self.problem = problem
        self.num_experts = problem.up.shape[0]
        self.gated = problem.activation in GATED
        bias = problem.up_bias
        self.bias = problem.up if bias is None else bias.contiguous()  # some tensor, not read
        device = problem.source.device
        self.every = torch.arange(problem.num_rows, device=device)
        self.source, self.scale = self.every, self.every
        if problem.route is not None:
            self.source, self.scale = problem.route.token_of_row, problem.route.weight_of_row
        interpreted = triton_experts.INTERPRETED
        # Tiles of rows no larger than an expert's usual share; the rest as for a dense GEMM.
        share = problem.num_rows // self.num_experts
        self.block_m = 16 if interpreted else 128 if share >= 128 else 64 if share >= 64 else 32
        self.block_n = 16 if interpreted else 64 if self.gated else 128
        tf32 = torch.get_float32_matmul_precision() != "highest"
        self.options: dict[str, Any] = {
            "BLOCK_E": max(2, 1 << (self.num_experts - 1).bit_length()),
            "BLOCK_N": self.block_n,
            "BLOCK_K": 16 if interpreted else 32 if problem.source.dtype == torch.float32 else 64,
            "PRECISION": "tf32" if tf32 else "ieee",
            "UPCAST": interpreted,
            "num_warps": 8 if self.block_m == 128 else 4,
            "num_stages": 3,
        }

    def by_rows(self, name: str, width: int, *arguments: Any, **options: Any) -> None:
        """Launch over tiles of columns and of every expert's rows."""
        # Each expert may leave one tile partly filled: an upper bound that needs no counts.
        tiles = -(-self.problem.num_rows // self.block_m) + self.num_experts
        grid = (-(-width // self.block_n), tiles)
        kernel = getattr(self.kernels, name)
        kernel[grid](*arguments, **options, BLOCK_M=self.block_m, **self.options)

    def times(self, left: Tensor, weight: Tensor, *, transposed: bool, scaled: bool) -> Tensor:
        """Rows times their expert's matrix (or its transpose), scaled by the combine weights."""
        weight = weight.contiguous()
        depth, width = weight.shape[1:][::-1] if transposed else weight.shape[1:]
        strides = (1, depth) if transposed else (width, 1)
        out = left.new_empty(left.shape[0], width)
        self.by_rows(
            "rows_kernel",
            width,
            *(left, weight, self.scale, self.problem.counts, out, self.num_experts),
            *(depth, width, *strides),
            SCALED=scaled and self.problem.route is not None,
        )
        return out

    def outer(self, left: Tensor, left_at: Tensor, right: Tensor, right_at: Tensor) -> Tensor:
        """Sum over each expert's rows of left^T right, [E, left width, right width]."""
        height, width = left.shape[1], right.shape[1]
        out = left.new_empty(self.num_experts, height, width)
        block_m = min(self.block_n, 64)
        grid = (-(-width // self.block_n), -(-height // block_m), self.num_experts)
        self.kernels.outer_kernel[grid](
            *(left, left_at, right, right_at, self.problem.counts, out),
            *(self.num_experts, height, width),
            BLOCK_M=block_m,
            **self.options,
        )
        return out

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Sum rows into tokens, [T, H]; rows as they are without a route."""
        route = self.problem.route
        if route is None:
            return rows
        num_tokens, width = self.problem.source.shape[0], rows.shape[1]
        out = rows.new_empty(num_tokens, width)
        block = 16 if self.kernels.INTERPRETED else min(1024, 1 << (width - 1).bit_length())
        self.kernels.sum_kernel[(num_tokens, -(-width // block))](
            *(rows, route.rows_by_token, route.start_of_token, out, width), BLOCK=block
        )
        return out
