"""Mixtral: softmax over all experts, weights normalised over the chosen ones."""

from etr.hf.families.base import Family, Key, expert_keys

FAMILY = Family(
    model_type="mixtral",
    num_experts="num_local_experts",
    jitter="router_jitter_noise",
    keys=(
        Key(
            ours="router.weight",
            theirs=("block_sparse_moe.gate.weight",),
            fused="mlp.gate.weight",
        ),
        *expert_keys("block_sparse_moe.experts", "w1", "w3", "w2", "mlp.experts"),
    ),
)
