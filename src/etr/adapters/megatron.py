"""A router for Megatron-Core: ``MoESubmodules(router=megatron_router(...))``.

Megatron-Core keeps its dispatchers, experts, process groups and loss tracking; this decides which
tokens go where, with which weight, and which are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from etr.adapters.dense import DenseRouter, total_loss
from etr.moe import MoEConfig
from etr.moe.options import LayerOptions


def megatron_router(
    router: str = "etr",
    capacity: str | None = None,
    **options: Any,
) -> Callable[..., MegatronRouter]:
    """What builds the router of each layer, for the field `router` of ``MoESubmodules``.

    Number of experts, top-k and width come from Megatron's TransformerConfig, which must have
    ``moe_expert_capacity_factor`` set (to any number) where this drops tokens: its dispatchers
    count the kept pairs only then, and take one row per choice otherwise.

    Args:
        router: with options, such as ``etr:frame=fixed``.
        capacity: policy with options, such as ``factor:capacity_factor=0.6``; None for the
            router's own. Capacity counts this rank's tokens.
        options: other fields of `LayerOptions`.
    """
    chosen = LayerOptions(router=router, capacity=capacity, **options)

    def build(*, config: Any, pg_collection: Any = None) -> MegatronRouter:
        moe = MoEConfig(
            hidden_size=config.hidden_size,
            intermediate_size=1,
            num_experts=config.num_moe_experts,
            top_k=config.moe_router_topk,
            **chosen.options(),
        )
        return MegatronRouter(moe, config)

    return build


class MegatronRouter(nn.Module):
    """Megatron-Core's router interface over `DenseRouter`.

    Args:
        moe: the layer's choices.
        config: Megatron's TransformerConfig.
    Raises:
        ValueError: tokens may be dropped, and the config does not let the dispatcher count them.
    """

    def __init__(self, moe: MoEConfig, config: Any) -> None:
        super().__init__()
        if moe.capacity_config.name != "none" and config.moe_expert_capacity_factor is None:
            raise ValueError(
                f"capacity {moe.capacity_config.name!r} drops tokens, and Megatron-Core's "
                "dispatchers count what is kept only with moe_expert_capacity_factor set: set it "
                "to 1.0 (it limits nothing here)"
            )
        self.config = config
        self.router = DenseRouter(moe)
        for parameter in self.parameters():
            # Megatron sums these gradients over the tensor ranks, which each saw other tokens.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Number of the transformer layer, from 1; part of the seed of `hash` and `random`."""
        self.router.moe.layer_index = self.router.moe.place = layer_number - 1

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            input: hidden states, float [S, B, H].
            padding_mask: True = real token, bool [S, B], as Megatron-Core passes it.
        Returns:
            probs, of the input's dtype where ``moe_router_dtype`` is None, else float32 (float64
            for such an input); and routing_map, bool. Both [S * B, E].
        """
        x = input.reshape(-1, input.shape[-1])
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        found = self.router(x, mask)
        probs, loss = found.probs, total_loss(found.losses)
        if loss is not None:
            from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

            if self.config.calculate_per_token_loss:  # the gradient is divided by it later
                loss = loss * (x.shape[0] if mask is None else mask.sum())
            probs = MoEAuxLossAutoScaler.apply(probs, loss)
        if self.config.moe_router_dtype is None:
            probs = probs.to(input.dtype)
        return probs, found.routing_map
