"""Backends of the expert feed-forward, behind one table.

A ragged backend takes rows [R, H] sorted by expert; a padded one takes [E, C, H]. All take the
number of rows of each expert, int64 [E].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.dispatch.rows import DispatchHandle
from etr.moe.experts.feed_forward import Engine, Problem, Route, feed_forward
from etr.moe.experts.fused import Fused, kernels_run, why_unavailable
from etr.moe.experts.one_by_one import OneByOne
from etr.moe.experts.products import Batched, Grouped
from etr.moe.experts.weights import ExpertParams
from etr.moe.experts.whole import Whole


@dataclass(frozen=True, kw_only=True)
class ExpertBackend:
    """One way to run all experts.

    Args:
        name: key in `EXPERT_BACKENDS`.
        padded: takes [E, C, H] instead of sorted rows [R, H].
        engine: what runs a problem of its kind.
        summary: one line for tables.
        unavailable: why it cannot run on this machine, or None.
    """

    name: str
    padded: bool
    engine: Callable[[Problem], Engine]
    summary: str
    unavailable: Callable[[], str | None] = lambda: None

    def run(self, rows: Tensor, num_tokens_per_expert: Tensor, params: ExpertParams) -> Tensor:
        """Rows in, rows out: what a dispatcher needs whose rows come from other ranks.

        Args:
            rows: [R, H] sorted by expert, or [E, C, H] for a padded backend.
            num_tokens_per_expert: rows in use of each expert, int64 [E].
            params: weights of the same dtype as the rows.
        Returns:
            The same shape; rows of a padded buffer that are not in use hold anything finite.
        """
        flat = rows.flatten(0, -2)
        problem = _problem(flat, None, num_tokens_per_expert, params)
        return feed_forward(self.engine(problem), problem).view_as(rows)

    def run_routed(self, x: Tensor, handle: DispatchHandle, params: ExpertParams) -> Tensor:
        """Gather, experts and weighted sum at once: tokens [T, H] in, tokens [T, H] out.

        Args:
            x: tokens, float [T, H].
            handle: a plan made with the same `padded`.
            params: weights of the same dtype as the tokens.
        """
        route = Route(
            handle.weight_of_row.to(x.dtype),
            handle.token_of_row,
            handle.rows_by_token,
            handle.start_of_token,
        )
        problem = _problem(x, route, handle.num_tokens_per_expert, params)
        return feed_forward(self.engine(problem), problem)


def _problem(source: Tensor, route: Route | None, counts: Tensor, params: ExpertParams) -> Problem:
    return Problem(source, route, counts, params.up, params.down, params.activation)


LOOP = OneByOne()
BATCHED = Whole(lambda problem: Batched(problem.up.shape[0]))
FUSED = Fused()
GROUPED = Whole(lambda problem: Grouped(problem.counts.cumsum(0).to(torch.int32)))


def grouped_mm_runs(problem: Problem) -> bool:
    """Whether torch's grouped_mm takes these inputs.

    It has no float64, wants row strides in multiples of 16 bytes, and, compiled for CPU, runs in
    bfloat16 alone. No rows at all is left to the loop as well.
    """
    source = problem.source
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not problem.num_rows:
        return False
    on_cpu = source.device.type == "cpu"
    if torch.compiler.is_compiling() and on_cpu and source.dtype != torch.bfloat16:
        return False
    widths = (problem.up.shape[1], problem.up.shape[2], problem.down.shape[2])
    return all(width * source.element_size() % 16 == 0 for width in widths)


def fused_engine(problem: Problem) -> Engine:
    """The kernels, or the loop for what they do not take: float64, and no rows at all.

    Raises:
        ValueError: Triton cannot run here.
    """
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(f"backend='triton' cannot run: {reason}; choose another, or 'auto'")
    return FUSED if kernels_run(problem) else LOOP


EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    backend.name: backend
    for backend in (
        ExpertBackend(
            name="loop",
            padded=False,
            engine=lambda problem: LOOP,
            summary="one expert after another, in buffers that stay in the cache",
        ),
        ExpertBackend(
            name="bmm",
            padded=True,
            engine=lambda problem: BATCHED,
            summary="padded batched GEMMs, static shapes, no host synchronisation",
        ),
        ExpertBackend(
            name="grouped_mm",
            padded=False,
            engine=lambda problem: GROUPED if grouped_mm_runs(problem) else LOOP,
            summary="ragged grouped GEMMs; the loop where torch has none (float64, odd widths)",
        ),
        ExpertBackend(
            name="triton",
            padded=False,
            engine=fused_engine,
            summary="grouped GEMMs with gather, activation and combine weights fused in (GPU)",
            unavailable=why_unavailable,
        ),
    )
}
"""Expert backends by name."""

LOOP_ROWS = 128
"""Rows an expert usually has from which, on a CPU, the loop is at least as fast as grouped_mm."""


def auto_backend(device_type: str, rows_per_expert: float, padded: bool) -> str:
    """What backend "auto" means. Measured on a CPU; a GPU gets torch's own kernels.

    1. `bmm` where the router's preset asks for padded buffers and a capacity bounds them: static
       shapes, nothing read by the host, and at a factor near 1 little is wasted.
    2. On a CPU, `loop` from `LOOP_ROWS` rows an expert: its buffers stay in the cache and little
       fresh memory is touched. Below, and while compiling, the calls themselves cost too much.
    3. Else `grouped_mm`. `triton` runs where it is asked for by name.

    Args:
        device_type: of the tokens, such as "cpu".
        rows_per_expert: pairs over experts, before any is dropped.
        padded: rule 1 holds.
    Returns:
        A name in `EXPERT_BACKENDS`.
    """
    if padded:
        return "bmm"
    if device_type == "cpu" and rows_per_expert >= LOOP_ROWS and not torch.compiler.is_compiling():
        return "loop"
    return "grouped_mm"
