"""The model families whose MoE blocks can be swapped: one file each, data wherever possible."""

from __future__ import annotations

from transformers import PreTrainedConfig

from etr.hf.families import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    granitemoe,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from etr.hf.families.base import Family, Key

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        mixtral,
        qwen2_moe,
        qwen3_moe,
        olmoe,
        deepseek_v2,
        deepseek_v3,
        gpt_oss,
        granitemoe,
    )
}
"""Families by model type."""


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a base config.

    Raises:
        ValueError: the family is not in the table.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} of the base config is not a known family; choose "
            f"one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


__all__ = ["FAMILIES", "Family", "Key", "family_of"]
