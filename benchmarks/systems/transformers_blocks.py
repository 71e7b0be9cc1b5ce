"""The blocks of Hugging Face transformers that the layer replaces."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.systems.base import Built, Problem, System, dense_weight, seen_by


def build(problem: Problem, implementation: str) -> Built:
    """Mixtral for a few experts; Qwen3-MoE for many, and for top-1, where Mixtral's weights are
    all 1."""
    return built_from(block_of(problem, implementation), problem)


def block_of(problem: Problem, implementation: str) -> Any:
    """The block that goes with the case, with uninitialised weights."""
    few = problem.case.num_experts <= 8 and problem.case.top_k > 1
    return mixtral(problem, implementation) if few else qwen(problem, implementation)


def built_from(block: Any, problem: Problem) -> Built:
    """A block on the problem's own weights."""
    block.gate.weight = problem.gate
    block.experts.gate_up_proj, block.experts.down_proj = problem.up, problem.down
    block.train()

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        y, (_, weight, index) = seen_by(block.gate, lambda: block(x[None])[0])
        return y, dense_weight(index, weight, problem.case.num_experts)

    return Built(
        call=lambda x: block(x[None])[0],
        traced=traced,
        up=[problem.up],
        down=[problem.down],
        other=[problem.gate],
    )


def mixtral(problem: Problem, implementation: str) -> Any:
    """A Mixtral block with uninitialised weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=problem.case.hidden_size,
        intermediate_size=1,
        num_local_experts=problem.case.num_experts,
        num_experts_per_tok=problem.case.top_k,
    )
    config._experts_implementation = implementation
    return MixtralSparseMoeBlock(config)


def qwen(problem: Problem, implementation: str) -> Any:
    """A Qwen3-MoE block with uninitialised weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=problem.case.hidden_size,
        moe_intermediate_size=1,
        num_experts=problem.case.num_experts,
        num_experts_per_tok=problem.case.top_k,
        norm_topk_prob=problem.case.top_k > 1,
    )
    config._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(config)


BLOCKS = tuple(
    System(
        name=f"transformers {implementation}",
        kind="rival",
        summary=f"Mixtral block (8 experts top-2), else Qwen3-MoE block, {text}",
        build=partial(build, implementation=implementation),
        requires=("transformers",),
        package="transformers",
    )
    for implementation, text in (
        ("grouped_mm", "sorted rows and grouped_mm, its default"),
        ("eager", "a loop over experts"),
    )
)
