"""Tutel's MoE layer on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.systems.base import Built, Problem, System, dense_weight, linear_routing


def build(problem: Problem) -> Built:
    """Its layer with its Llama experts and a capacity that is just enough (factor 0).

    It takes the router's weight, so the common routing holds; it cannot be read from outside.
    """
    from tutel import moe as tutel_moe

    case = problem.case
    layer = tutel_moe.moe_layer(
        gate_type={"type": "top", "k": case.top_k, "capacity_factor": 0, "fp32_gate": True},
        model_dim=case.hidden_size,
        experts={
            "type": "llama_ffn",
            "num_experts_per_device": case.num_experts,
            "hidden_size_per_expert": case.intermediate_size,
        },
    ).to(problem.x.device, problem.x.dtype)
    gate, value = problem.up.detach().chunk(2, dim=1)
    with torch.no_grad():
        layer.gates[0].wg.weight = torch.nn.Parameter(problem.gate.detach().float())
        for name, given in (("W_fc1", gate), ("W_fc2", value), ("W_fc3", problem.down.detach())):
            getattr(layer.experts, name).copy_(given.transpose(1, 2).reshape(-1))
    experts = layer.experts

    def call(x: Tensor) -> Tensor:
        return layer(x)

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        index, weight = linear_routing(x, layer.gates[0].wg.weight, case.top_k)
        return call(x), dense_weight(index, weight, case.num_experts)

    def read_grads(up: Sequence[Tensor], down: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        narrow = (case.num_experts, case.hidden_size, case.intermediate_size)
        parts = [part.view(narrow).transpose(1, 2) for part in up]
        wide = (case.num_experts, case.intermediate_size, case.hidden_size)
        return torch.cat(parts, dim=1), down[0].view(wide).transpose(1, 2)

    return Built(
        call=call,
        traced=traced,
        up=[experts.W_fc1, experts.W_fc2],
        down=[experts.W_fc3],
        other=[layer.gates[0].wg.weight],
        read_grads=read_grads,
    )


TUTEL = System(
    name="Tutel",
    kind="rival",
    summary="tutel.moe.moe_layer with its llama_ffn experts, capacity just enough",
    build=build,
    requires=("tutel",),
    package="tutel",
)
