"""Floors: the layer's matrix products on kept tokens and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.systems.base import Built, Problem, System, swiglu

DENSE = "dense floor"
PER_EXPERT = "per-expert floor"


def build_dense(problem: Problem) -> Built:
    """One feed-forward over as many rows as pairs are kept."""
    k = problem.case.top_k
    up, down = (t[0].detach().clone().requires_grad_() for t in (problem.up, problem.down))
    rows = problem.x.repeat_interleave(k, 0)
    upstream = problem.upstream.repeat_interleave(k, 0)
    return Built(
        call=lambda x: swiglu(x, up, down), up=[up], down=[down], inputs=([rows], [upstream])
    )


def build_per_expert(problem: Problem) -> Built:
    """A feed-forward for each expert over its own rows, already sorted and in separate tensors."""
    up = [t.detach().requires_grad_() for t in problem.up.detach().unbind()]
    down = [t.detach().requires_grad_() for t in problem.down.detach().unbind()]
    tokens = [torch.where(column)[0] for column in (problem.weight != 0).unbind(1)]
    used = [e for e, index in enumerate(tokens) if len(index)]

    def call(*rows: Tensor) -> Sequence[Tensor]:
        return [swiglu(x, up[e], down[e]) for e, x in zip(used, rows, strict=True)]

    return Built(
        call=call,
        up=up,
        down=down,
        inputs=(
            [problem.x[tokens[e]] for e in used],
            [problem.upstream[tokens[e]] for e in used],
        ),
    )


FLOORS = (
    System(
        name=DENSE,
        kind="floor",
        summary="one dense feed-forward of the same multiplications on the kept pairs",
        build=build_dense,
    ),
    System(
        name=PER_EXPERT,
        kind="floor",
        summary="each expert's feed-forward on its own rows, sorted beforehand",
        build=build_per_expert,
    ),
)
