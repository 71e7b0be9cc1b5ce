"""st-moe-pytorch, in groups of at most 1024 tokens, as it takes batches of sequences."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.systems.base import Built, Problem, SwiGLU, System, seen_by

GROUP = 1024
MOST_BYTES = 8e9


def build(problem: Problem) -> Built:
    """Its layer with SwiGLU experts; capacity of the largest load and no random second choice,
    so that it routes like the others."""
    from st_moe_pytorch import MoE

    case = problem.case
    group = group_of(case)
    experts = nn.ModuleList(
        SwiGLU(up, down) for up, down in zip(problem.up, problem.down, strict=True)
    )
    moe = MoE(
        dim=case.hidden_size,
        num_experts=case.num_experts,
        experts=experts,
        gating_top_n=case.top_k,
        threshold_train=0.0,
        capacity_factor_train=(problem.max_load(group) + 0.5) * case.num_experts / group,
        straight_through_dispatch_tensor=False,
    )
    moe.gate.to_gates.weight = problem.gate
    moe.to(problem.x.dtype).train()

    def grouped(x: Tensor) -> Tensor:
        return x.view(-1, min(group, x.shape[0]), case.hidden_size)

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        y, seen = seen_by(moe.gate, lambda: moe(grouped(x)).outputs)
        return y.reshape(x.shape), seen[1].sum(-1).flatten(0, 1)

    return Built(
        call=lambda x: moe(grouped(x)).outputs.view_as(x),
        traced=traced,
        up=[expert.get_parameter("up") for expert in experts],
        down=[expert.get_parameter("down") for expert in experts],
        other=[problem.gate],
    )


def group_of(case: Case) -> int:
    """Tokens that are routed together."""
    return min(case.num_tokens, GROUP)


def refuses(case: Case) -> str:
    """It has no top-1, and multiplies out tables [k, T, E, C]."""
    if case.top_k < 2:
        return "takes top-2 and above"
    load = 1.4 * group_of(case) * case.top_k / case.num_experts
    need = 4 * 4 * case.top_k * case.num_tokens * case.num_experts * load
    return f"would need {need / 1e9:.0f} GB of one-hot tables" if need > MOST_BYTES else ""


ST_MOE = System(
    name="st-moe-pytorch",
    kind="rival",
    summary=f"one-hot einsums over groups of at most {GROUP} tokens",
    build=build,
    requires=("st_moe_pytorch",),
    package="st-moe-pytorch",
    refuses=refuses,
)
