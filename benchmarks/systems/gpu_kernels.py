"""Layers with kernels of their own, which run on CUDA alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.systems import transformers_blocks
from benchmarks.systems.base import Built, Problem, System, dense_weight, linear_routing


def build_liger(problem: Problem) -> Built:
    """A transformers block with the experts of liger-kernel."""
    from liger_kernel.transformers.swiglu import LigerExperts

    block = transformers_blocks.block_of(problem, "eager")
    # Its constructor reads sizes alone; the block hands over the shared weights afterwards.
    block.experts = LigerExperts(block_config(problem)).to(problem.x.device)
    return transformers_blocks.built_from(block, problem)


def block_config(problem: Problem) -> Any:
    """Sizes under the names that transformers gives them."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=problem.case.hidden_size,
        moe_intermediate_size=problem.case.intermediate_size,
        num_experts=problem.case.num_experts,
    )


def build_scattermoe(problem: Problem) -> Built:
    """ScatterMoE's gated MLP; it takes the routing as given. It wants the gate half last."""
    from scattermoe.mlp import GLUMLP

    case = problem.case
    mlp = GLUMLP(
        case.hidden_size, case.intermediate_size, case.num_experts, case.top_k, activation=nn.SiLU()
    )
    mlp.experts.weight = nn.Parameter(swap_halves(problem.up.detach()))
    mlp.output_experts.weight = nn.Parameter(problem.down.detach())

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = linear_routing(x, problem.gate, case.top_k)
        return mlp(x, weight.to(x.dtype), index), dense_weight(index, weight, case.num_experts)

    return Built(
        call=lambda x: traced(x)[0],
        traced=traced,
        up=[mlp.experts.weight],
        down=[mlp.output_experts.weight],
        other=[problem.gate],
        read_grads=lambda up, down: (swap_halves(up[0]), down[0]),
    )


def swap_halves(up: Tensor) -> Tensor:
    """The two halves of the first projection in the other order."""
    return torch.cat(up.chunk(2, dim=1)[::-1], dim=1)


def build_sonicmoe(problem: Problem) -> Built:
    """SonicMoE's layer. Rows of gate and value alternate; weights are a softmax over the chosen,
    so 1 at top-1, which is a routing of its own."""
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    case = problem.case
    moe = MoE(
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to(problem.x.device, problem.x.dtype)
    moe.router.weight = problem.gate
    moe.c_fc.weight = nn.Parameter(interleave(problem.up.detach()))
    moe.c_proj.weight = nn.Parameter(problem.down.detach())

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        _, weight, index = moe._compute_routing_weights(x)
        return moe(x)[0], dense_weight(index.long(), weight, case.num_experts)

    def read_grads(up: Sequence[Tensor], down: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cat((up[0][:, ::2], up[0][:, 1::2]), dim=1), down[0]

    return Built(
        call=lambda x: moe(x)[0],
        traced=traced,
        up=[moe.c_fc.weight],
        down=[moe.c_proj.weight],
        other=[problem.gate],
        read_grads=read_grads,
    )


def interleave(up: Tensor) -> Tensor:
    """Rows of the gate and of the value in turn, from one after the other."""
    return torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2)


GPU_KERNELS = (
    System(
        name="liger-kernel",
        kind="rival",
        summary="a transformers block with LigerExperts",
        build=build_liger,
        requires=("liger_kernel", "transformers"),
        package="liger-kernel",
        cuda=True,
    ),
    System(
        name="ScatterMoE",
        kind="rival",
        summary="scattermoe.mlp.GLUMLP, routing given",
        build=build_scattermoe,
        requires=("scattermoe",),
        package="scattermoe",
        cuda=True,
    ),
    System(
        name="SonicMoE",
        kind="rival",
        summary="sonicmoe.MoE",
        build=build_sonicmoe,
        requires=("sonicmoe",),
        package="sonic-moe",
        cuda=True,
    ),
)
