"""Megatron-Core's MoE layer on one rank."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.systems.base import Built, Problem, System, seen_by


def build(problem: Problem) -> Built:
    """Its layer, dropless: grouped GEMMs of Transformer Engine where that is, else a loop."""
    one_rank(problem.x.device.type)
    layer = layer_of(problem)
    layer.router.weight = problem.gate
    up, down = give_weights(layer.experts, problem)

    def call(x: Tensor) -> Tensor:
        y: Tensor = layer(x[:, None])[0]
        return y[:, 0]

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        y, (weight, _) = seen_by(layer.router, lambda: call(x))
        return y, weight

    return Built(call=call, traced=traced, up=up, down=down, other=[problem.gate])


def one_rank(device_type: str) -> None:
    """The process groups that Megatron-Core reads, of this process alone; once."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()


def layer_of(problem: Problem) -> Any:
    """A MoELayer of the case's sizes, in training mode."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import experts
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if problem.x.is_cuda and importlib.util.find_spec("transformer_engine") is not None:
        from megatron.core.extensions import transformer_engine as te

        kind, first, second = (
            experts.TEGroupedMLP,
            te.TEColumnParallelGroupedLinear,
            te.TERowParallelGroupedLinear,
        )
    else:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.moe import moe_utils

        # 0.16 reads this name, and sets it only where Transformer Engine is.
        vars(moe_utils).setdefault("te_general_gemm", None)
        kind, first, second = experts.SequentialMLP, ColumnParallelLinear, RowParallelLinear
    case, dtype = problem.case, problem.x.dtype
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden_size,
        num_attention_heads=1,
        num_moe_experts=case.num_experts,
        moe_router_topk=case.top_k,
        moe_router_pre_softmax=case.top_k == 1,  # else weights sum to 1 over the chosen
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=case.intermediate_size,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=kind is not experts.SequentialMLP,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    module = ModuleSpec(module=kind, submodules=MLPSubmodules(linear_fc1=first, linear_fc2=second))
    submodules = MoESubmodules(router=TopKRouter, experts=module)
    return MoELayer(config, submodules, layer_number=1).to(problem.x.device, dtype)


def give_weights(experts: Any, problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Put the problem's weights into its experts, and return the leaves, one an expert."""
    leaves: tuple[list[Tensor], list[Tensor]] = ([], [])
    one_by_one = getattr(experts, "local_experts", None)
    for e in range(problem.case.num_experts):
        owner, name = (one_by_one[e], "weight") if one_by_one else (experts, f"weight{e}")
        for found, part, value in zip(
            leaves, ("linear_fc1", "linear_fc2"), (problem.up[e], problem.down[e]), strict=True
        ):
            leaf = nn.Parameter(value.detach().clone())
            setattr(getattr(owner, part), name, leaf)
            found.append(leaf)
    return leaves


MEGATRON = System(
    name="Megatron-Core",
    kind="rival",
    summary="megatron.core's MoELayer on one rank, dropless",
    build=build,
    requires=("megatron",),
    package="megatron-core",
    cuda=True,
)
