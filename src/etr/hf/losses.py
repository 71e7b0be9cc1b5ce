"""Losses beside the cross-entropy, as transformers and its Trainer want them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from etr.hf.backbone import valid_mask
from etr.hf.config import EtrConfig
from etr.hf.layer_options import balanced_sizes


def aux_loss(
    config: EtrConfig,
    router_logits: Any,
    attention_mask: Tensor | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Any:
    """The balance loss as transformers' families compute it: top_k where the load is even.

    Args:
        config: of the model.
        router_logits: of each MoE layer, [B * S, E]; the loss is None without them.
        attention_mask, input_ids, inputs_embeds: as the forward was given them.
    Raises:
        ValueError: layers differ in their numbers of experts or of choices.
    """
    if router_logits is None:
        return None
    num_experts, top_k = balanced_sizes(config.layer_configs(len(router_logits)))
    mask = valid_mask(attention_mask, input_ids, inputs_embeds)
    return load_balancing_loss_func(router_logits, num_experts, top_k, mask)


def share_of_step(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor | float:
    """Weight of this micro-batch's router losses, so that over a step they make up a mean.

    Args:
        labels: of the micro-batch.
        num_items_in_batch: targets of the whole step; None where the loss is a mean already.
        shift_labels: labels that are shifted already, in place of `labels`.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != -100).sum() / num_items_in_batch
