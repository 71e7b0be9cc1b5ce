"""Backends of the expert feed-forward, behind one table.

A ragged backend takes rows [R, H] sorted by expert; a padded one takes [E, C, H]. All take the
number of rows of each expert, int64 [E].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.experts.feed_forward import Engine, Problem, Route, feed_forward
from etr.moe.experts.fused import Fused, kernels_run, why_unavailable
from etr.moe.experts.one_by_one import OneByOne
from etr.moe.experts.products import Batched, ByRow, Grouped
from etr.moe.experts.sonic import Pairs, run_sonic, sonic_runs, why_no_sonic
from etr.moe.experts.weights import ExpertParams
from etr.moe.experts.whole import Whole
from etr.moe.rows import DispatchHandle, expert_of_row


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
        out = feed_forward(self.engine(problem), problem)
        if params.down_bias is not None:
            expert = self._expert_of_row(problem)
            out = out + params.down_bias[expert]
        return out.view_as(rows)

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
            handle.padded,
        )
        problem = _problem(x, route, handle.num_tokens_per_expert, params)
        out = feed_forward(self.engine(problem), problem)
        if params.down_bias is not None:
            # The bias weighs as its expert does: a table of weights times the biases.
            index = (route.token_of_row, self._expert_of_row(problem))
            table = x.new_zeros(x.shape[0] + 1, problem.counts.shape[0])  # a row for unused ones
            table = table.index_put(index, route.weight_of_row, accumulate=True)
            out = out + table[:-1] @ params.down_bias
        return out

    def _expert_of_row(self, problem: Problem) -> Tensor:
        """Expert that each row belongs to, int64 [R]."""
        if self.padded:
            expert = torch.arange(problem.up.shape[0], device=problem.counts.device)
            return expert.repeat_interleave(problem.num_rows // problem.up.shape[0])
        return expert_of_row(problem.counts, problem.num_rows)


@dataclass(frozen=True, kw_only=True)
class SonicBackend(ExpertBackend):
    """SonicMoE does its own gathering and its own backward pass, so it is no engine."""

    def run(self, rows: Tensor, num_tokens_per_expert: Tensor, params: ExpertParams) -> Tensor:
        self._check()
        if not sonic_runs(params, rows.shape[0]):
            return super().run(rows, num_tokens_per_expert, params)
        return run_sonic(rows, Pairs.of_rows(rows, num_tokens_per_expert), params)

    def run_routed(self, x: Tensor, handle: DispatchHandle, params: ExpertParams) -> Tensor:
        self._check()
        if not sonic_runs(params, handle.token_of_row.shape[0]):
            return super().run_routed(x, handle, params)
        return run_sonic(x, Pairs.of(handle), params)

    def _check(self) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise ValueError(f"backend={self.name!r} cannot run: {reason}; choose another")


def _problem(source: Tensor, route: Route | None, counts: Tensor, params: ExpertParams) -> Problem:
    return Problem(
        source,
        route,
        counts,
        params.up,
        params.down,
        params.up_bias,
        params.activation,
        params.clamp,
    )


LOOP = OneByOne()
BATCHED = Whole(lambda problem: Batched(problem.up.shape[0]))
BY_ROW = Whole(lambda problem: ByRow(problem.counts))
FUSED = Fused()
GROUPED = Whole(
    lambda problem: Grouped(problem.counts, problem.counts.cumsum(0, dtype=torch.int32))
)


def grouped_mm_runs(problem: Problem) -> bool:
    """Whether torch's grouped_mm takes these inputs.

    It has no float64, and wants row strides in multiples of 16 bytes. No rows at all is left to the
    loop too.
    """
    source = problem.source
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not problem.num_rows:
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
            name="by_row",
            padded=False,
            engine=lambda problem: BY_ROW,
            summary="each row beside a copy of its expert's weights: for many experts of width 1",
        ),
        ExpertBackend(
            name="triton",
            padded=False,
            engine=fused_engine,
            summary="grouped GEMMs with gather, activation and combine weights fused in (GPU)",
            unavailable=why_unavailable,
        ),
        SonicBackend(
            name="sonic",
            padded=False,
            engine=lambda problem: GROUPED if grouped_mm_runs(problem) else LOOP,
            summary="SonicMoE's kernels in half precision, where it is installed; else grouped_mm",
            unavailable=why_no_sonic,
        ),
    )
}
"""Expert backends by name."""


def auto_backend(device_type: str, padded: bool) -> str:
    """What backend "auto" means: one rule a device, from measurements (docs/results/speed.md).

    - On a CPU `grouped_mm`: of the three it is fastest or nearly so at every size. `bmm` multiplies
      empty rows, and `loop` gains nothing that an allocator which keeps its memory does not give.
    - Elsewhere, and while compiling, `bmm` where the router's preset asks for padded buffers and a
      capacity bounds them: static shapes, nothing read by the host. Otherwise `grouped_mm`.

    `triton` and `sonic` run where they are asked for by name.

    Args:
        device_type: of the tokens, such as "cpu".
        padded: buffers of a fixed capacity are wanted and bounded.
    Returns:
        A name in `EXPERT_BACKENDS`.
    """
    static = device_type != "cpu" or torch.compiler.is_compiling()
    return "bmm" if padded and static else "grouped_mm"
