"""Qwen3-MoE: like OLMoE, with dense layers among the MoE layers."""

from etr.hf.families.base import MLP_EXPERTS, MLP_ROUTER, Family

FAMILY = Family(
    model_type="qwen3_moe",
    intermediate_size="moe_intermediate_size",
    options=("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    keys=(MLP_ROUTER, *MLP_EXPERTS),
)
