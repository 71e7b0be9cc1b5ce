"""Granite-MoE: softmax over the chosen experts, scaled residuals and logits."""

from etr.hf.families.base import Family, Key

FAMILY = Family(
    model_type="granitemoe",
    block="block_sparse_moe",
    router_name="router",
    num_experts="num_local_experts",
    logits_divisor="logits_scaling",
    keys=(
        Key(
            ours="router.weight",
            theirs=("block_sparse_moe.router.layer.weight",),
            fused="block_sparse_moe.router.weight",
        ),
        Key(
            ours="experts.gate_up_proj",
            theirs=("block_sparse_moe.input_linear.weight",),
            fused="block_sparse_moe.experts.gate_up_proj",
        ),
        Key(
            ours="experts.down_proj",
            theirs=("block_sparse_moe.output_linear.weight",),
            fused="block_sparse_moe.experts.down_proj",
        ),
    ),
)
