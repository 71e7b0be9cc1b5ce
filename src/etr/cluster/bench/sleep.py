"""Experts whose computation is emulated: they sleep for each row and give it back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etr.moe.experts import EXPERT_BACKENDS, ExpertBackend, ExpertParams
from etr.moe.rows import DispatchHandle


@dataclass(frozen=True, kw_only=True)
class SleepingExperts(ExpertBackend):
    """Rows in, the same rows out, after a time in proportion to their number."""

    seconds_per_row: float
    """Seconds of the forward pass; the backward pass takes twice as long."""

    def run(self, rows: Tensor, num_tokens_per_expert: Tensor, params: ExpertParams) -> Tensor:
        number = rows[..., 0].numel()
        slept: Tensor = _Sleep.apply(rows, number * self.seconds_per_row)
        return slept

    def run_routed(self, x: Tensor, handle: DispatchHandle, params: ExpertParams) -> Tensor:
        return self.run(x, handle.num_tokens_per_expert, params)


def add_sleeping_experts(name: str, seconds_per_row: float) -> None:
    """Put them among the backends of this process."""
    EXPERT_BACKENDS[name] = SleepingExperts(
        name=name,
        padded=False,
        engine=lambda problem: EXPERT_BACKENDS["loop"].engine(problem),
        summary="emulated: sleeps for each row",
        seconds_per_row=seconds_per_row,
    )


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None
