"""The bases under test: tiny models, with sizes as transformers' own testers have them."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from etr.hf import EtrConfig

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 48, "head_dim": 8}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 48, "intermediate_size": 40, "head_dim": 8},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "moe_intermediate_size": 48,
            "intermediate_size": 40,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_mtp_layers": 0,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            "num_local_experts": 4,
            "intermediate_size": 48,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
"""Config class and sizes of each base by its model type."""


def etr_config(base: str) -> EtrConfig:
    """Config of a tiny model of a base, with everything of the layer at its default."""
    config_class, extra = BASES[base]
    return EtrConfig.from_base(config_class(**{**SIZES, **extra}))
