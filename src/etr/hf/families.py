"""The model families whose MoE blocks can be swapped: one row each, data only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from etr.moe.experts import Activation

GATED_ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu"}
"""The layer's activation for each gated activation of transformers."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to find the MoE blocks of one transformers model type, and their options.

    The last five fields name attributes of the family's config.

    Args:
        model_type: as in the family's config.
        block: attribute of a decoder layer that holds its MoE block; a layer whose block has no
            experts is dense and stays as it is.
        num_experts: experts.
        top_k: experts a token may choose.
        intermediate_size: width inside each expert.
        activation: name of the activation.
        aux_coefficient: weight of the family's own balance loss.
    """

    model_type: str
    block: str = "mlp"
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    intermediate_size: str = "intermediate_size"
    activation: str = "hidden_act"
    aux_coefficient: str = "router_aux_loss_coef"

    def sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """The sizes of `MoEConfig` that the family's config determines."""
        return {
            "hidden_size": config.hidden_size,
            "intermediate_size": getattr(config, self.intermediate_size),
            "num_experts": getattr(config, self.num_experts),
            "top_k": getattr(config, self.top_k),
        }

    def layer_activation(self, config: PreTrainedConfig) -> Activation:
        """The layer's name for the family's activation.

        Raises:
            ValueError: the layer has no such activation.
        """
        name = getattr(config, self.activation)
        if name not in GATED_ACTIVATIONS:
            raise ValueError(
                f"{self.activation}={name!r} of the base config has no counterpart among the "
                f"experts' activations; known: {', '.join(GATED_ACTIVATIONS)}. Name one by "
                "activation=..."
            )
        return GATED_ACTIVATIONS[name]

    def aux_alpha(self, config: PreTrainedConfig) -> float:
        """`LossConfig.aux_alpha` that weighs the balance loss as the family does.

        The family's loss is top_k where this project's is 1, hence the factor.
        """
        return getattr(config, self.aux_coefficient) * getattr(config, self.top_k)

    def is_moe(self, layer: nn.Module) -> bool:
        """Whether a decoder layer of the family holds experts."""
        return hasattr(getattr(layer, self.block), "experts")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="mixtral", num_experts="num_local_experts"),
        Family(model_type="qwen3_moe", intermediate_size="moe_intermediate_size"),
        Family(model_type="olmoe"),
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
