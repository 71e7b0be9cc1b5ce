"""DeepSpeed's MoE layer on one rank."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from benchmarks.systems.base import Built, Problem, SwiGLU, System, seen_by


def build(problem: Problem) -> Built:
    """Its layer with SwiGLU experts, dropless, without sampling of the second expert."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.moe.layer import MoE

    case = problem.case
    moe = MoE(
        case.hidden_size,
        SwiGLU(problem.up[0, :2], problem.down[0, :, :1]),  # it copies its expert: a small one
        num_experts=case.num_experts,
        k=case.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    experts = moe.deepspeed_moe.experts.deepspeed_experts
    for e, expert in enumerate(experts):
        one = SwiGLU(problem.up[e], problem.down[e])
        expert.up, expert.down = one.up, one.down
    gate = moe.deepspeed_moe.gate
    gate.wg.weight = problem.gate
    moe.train()

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        y, seen = seen_by(gate, lambda: moe(x)[0])
        _, _, num_experts, index, _, weight, _ = seen
        # [k, T]; a negative expert marks a dropped pair
        weight = torch.where(index >= 0, weight, 0.0).T
        table = weight.new_zeros(x.shape[0], num_experts)
        return y, table.scatter_add(1, index.T.long().clamp_min(0), weight)

    return Built(
        call=lambda x: moe(x)[0],
        traced=traced,
        up=[expert.up for expert in experts],
        down=[expert.down for expert in experts],
        other=[problem.gate],
    )


DEEPSPEED = System(
    name="DeepSpeed",
    kind="rival",
    summary="deepspeed.moe.layer.MoE, dropless: experts padded to the largest load, one by one",
    build=build,
    requires=("deepspeed",),
    package="deepspeed",
)
