"""Matrices of experts as factors of low rank, and whole rows beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from etr.model.bits import num_matrices
from etr.model.experts import EXPERTS, Values, check_numbers, lists_of, matrices_of
from etr.model.transform import LayerTensors, Stats, Transform
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.low_rank_rows import LowRankRows, LowRankRowsExperts
from etr.moe.experts.runs import text_of
from etr.moe.layer import MoE


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of a matrix [O, R] and one [R, I] to a matrix [O, I]."""
    left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
    root = values[:rank].sqrt()
    found = left[:, :rank] * root, root[:, None] * right[:rank]
    return found[0].to(difference.dtype), found[1].to(difference.dtype)


def rank_of(ratio: float, rows: int, columns: int) -> int:
    """Rank at which two factors have a share of a matrix's numbers, or just more."""
    return math.ceil(ratio * rows * columns / (rows + columns) - 1e-9)


def with_rows(values: Values, rank: int, *, every: bool) -> Values:
    """Experts as `LowRankRows` stores them: the nearest L R, and S with every row or with none.

    Args:
        values: of D experts; on the meta device shapes alone are made.
        rank: of L R.
        every: whether S has every row, so that L R + S is the matrix.
    """
    found = {}
    for name, matrices in matrices_of(values).items():
        count, rows, columns = matrices.shape
        if matrices.is_meta:
            left = matrices.new_empty(rows, count * rank)
            right = matrices.new_empty(count * rank, columns)
            rest = matrices
        else:
            pairs = [factors(matrix, rank) for matrix in matrices]
            left = torch.cat([one for one, _ in pairs], dim=1)
            right = torch.cat([other for _, other in pairs])
            near = torch.stack([one.double() @ other.double() for one, other in pairs])
            rest = (matrices.double() - near).to(matrices.dtype)
        size = count * rows if every else 0
        found[f"{name}_left"], found[f"{name}_right"] = left, right
        found[f"{name}_rows"] = rest.flatten(0, 1)[:size]
        found[f"{name}_index"] = torch.arange(size, dtype=torch.int32, device=matrices.device)
    return found


@dataclass(frozen=True, kw_only=True)
class DropRows(Transform):
    """Stores no more of what `mc_smoe:ratio=...` made than training left: rows that are 0 go.

    The function stays the same; layers of other experts stay as they are.
    """

    name = "drop_rows"
    summary = (
        "store no row of S that training made 0, after mc_smoe with a ratio: the same function"
    )

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        assert isinstance(layer, MoE)
        if not isinstance(layer.bank, LowRankRowsExperts):
            return {}
        return {name: (rows != 0).any(1) for name, rows in layer.bank.rows().items()}

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        left = [
            {name: mask.nonzero().flatten().tolist() for name, mask in s.items()} for s in stats
        ]
        return {"left": left, "of": [{k: len(mask) for k, mask in s.items()} for s in stats]}

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        left = sum(len(rows) for layer in plan["left"] for rows in layer.values())
        return f"keeps {left} of {sum(n for layer in plan['of'] for n in layer.values())} rows"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        sizes = lists_of(plan, "of", layers)
        for place, (left, layer) in enumerate(
            zip(lists_of(plan, "left", layers), layers, strict=True)
        ):
            names = ("gate", "up", "down")[-num_matrices(layer) :]
            wanted = names if isinstance(layer.bank_config, LowRankRows) else ()
            if not all(
                isinstance(one, dict) and {*one} == {*wanted} for one in (left, sizes[place])
            ):
                raise ValueError(
                    f"the plan's rows of layer {place} must be of {', '.join(wanted) or 'nothing'}"
                )
            for name, rows in left.items():
                check_numbers(rows, sizes[place][name], f"rows of {name} of layer {place}")

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        found = {k: t for k, t in tensors.items() if not k.startswith(f"{EXPERTS}pruner.")}
        for name, rows in plan["left"][place].items():
            for key in (f"{EXPERTS}{name}_rows", f"{EXPERTS}{name}_index"):
                shape = (len(rows), *found[key].shape[1:])
                found[key] = found[key].then(partial(_rows_of, rows), shape=shape)
        return found

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        bank, left = layer.bank_config, plan["left"][place]
        if not isinstance(bank, LowRankRows):
            return layer
        rows = text_of(len(left[name]) for name in ("gate", "up", "down") if name in left)
        return replace(layer, experts=replace(bank, rows=rows, left=1.0))


def _rows_of(rows: Sequence[int], value: Tensor) -> Tensor:
    return value[torch.tensor(rows, dtype=torch.int64, device=value.device)]
