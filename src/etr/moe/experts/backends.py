"""Backends of the expert feed-forward, behind one table.

A ragged backend takes rows [R, H] sorted by expert; a padded one takes [E, C, H]. Both take the
number of rows of each expert, int64 [E], and return rows of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.experts.weights import ExpertParams, activate


@dataclass(frozen=True, kw_only=True)
class ExpertBackend:
    """One way to run all experts.

    Args:
        name: key in `EXPERT_BACKENDS`.
        padded: takes [E, C, H] instead of sorted rows [R, H].
        run: (rows, num_tokens_per_expert, params) -> rows.
        summary: one line for tables.
    """

    name: str
    padded: bool
    run: Callable[[Tensor, Tensor, ExpertParams], Tensor]
    summary: str


def run_loop(rows: Tensor, num_tokens_per_expert: Tensor, params: ExpertParams) -> Tensor:
    """One GEMM pair per expert. Reads the counts on the host. Any dtype."""
    # Unbinding once: indexing inside the loop would build a full-size zero gradient per expert.
    chunks = rows.split(num_tokens_per_expert.tolist())
    out = [
        activate(chunk @ up.T, params.activation) @ down.T
        for chunk, up, down in zip(chunks, params.up.unbind(), params.down.unbind(), strict=True)
    ]
    return torch.cat(out)


def run_bmm(rows: Tensor, num_tokens_per_expert: Tensor, params: ExpertParams) -> Tensor:
    """Batched GEMMs over padded buffers: static shapes, no host synchronisation. Any dtype."""
    hidden = torch.bmm(rows, params.up.transpose(1, 2))
    return torch.bmm(activate(hidden, params.activation), params.down.transpose(1, 2))


def run_grouped_mm(rows: Tensor, num_tokens_per_expert: Tensor, params: ExpertParams) -> Tensor:
    """Ragged grouped GEMMs. Falls back to the loop where `grouped_mm` cannot run (see below)."""
    if not grouped_mm_runs(rows, params):
        return run_loop(rows, num_tokens_per_expert, params)
    ends = num_tokens_per_expert.cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(rows, params.up.transpose(1, 2), offs=ends)
    return F.grouped_mm(
        activate(hidden, params.activation).contiguous(), params.down.transpose(1, 2), offs=ends
    )


def grouped_mm_runs(rows: Tensor, params: ExpertParams) -> bool:
    """Whether torch's grouped_mm takes these inputs.

    It has no float64, wants row strides in multiples of 16 bytes, and, compiled for CPU, runs in
    bfloat16 alone. No rows at all is left to the loop as well.
    """
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16) or rows.shape[0] == 0:
        return False
    if torch.compiler.is_compiling() and rows.device.type == "cpu" and rows.dtype != torch.bfloat16:
        return False
    widths = (params.up.shape[1], params.up.shape[2], params.down.shape[2])
    return all(width * rows.element_size() % 16 == 0 for width in widths)


EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    backend.name: backend
    for backend in (
        ExpertBackend(name="loop", padded=False, run=run_loop, summary="a GEMM pair per expert"),
        ExpertBackend(
            name="bmm", padded=True, run=run_bmm, summary="padded batched GEMMs, static shapes"
        ),
        ExpertBackend(
            name="grouped_mm", padded=False, run=run_grouped_mm, summary="ragged grouped GEMMs"
        ),
    )
}
"""Expert backends by name."""
