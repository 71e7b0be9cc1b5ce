"""A layer's routing as the dense tables that other engines take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe import MoE, MoEConfig, MoEOutput, RoutingContext


@dataclass(frozen=True, kw_only=True)
class DenseRouting:
    """What each token's experts are, after capacity."""

    probs: Tensor
    """Combine weights, float [T, E]; 0 where not kept."""
    routing_map: Tensor
    """Kept pairs, bool [T, E]."""
    losses: dict[str, Tensor]
    """Scaled router losses by name, in training."""


class DenseRouter(nn.Module):
    """Router, capacity and selection of a MoE layer whose experts live in another engine.

    `moe` inside is an ordinary `MoE` without experts: `etr.attach`, `after_step` and
    `set_progress` find it in the engine's model. Counters go to the open `Collector`; the losses
    are the caller's to add.

    Args:
        config: as for `MoE`; its intermediate_size does not matter.
        layer_index: number of this MoE layer in its model.
    Raises:
        ValueError: a loss needs the weights of the experts, or these run in several steps.
    """

    def __init__(self, config: MoEConfig, layer_index: int = 0) -> None:
        super().__init__()
        for row in config.loss_rows:
            if row.needs_experts:
                raise ValueError(
                    f"loss {row.name!r} needs the weights of the experts, which are another "
                    "engine's here; leave it out"
                )
        if config.inner_steps > 1:
            raise ValueError(
                f"inner_steps={config.inner_steps} runs the experts again, which are another "
                "engine's here; leave it out"
            )
        # One unit wide and removed at once: the engine has the experts.
        self.moe = MoE(dataclasses.replace(config, intermediate_size=1), layer_index)
        del self.moe.experts

    def forward(self, x: Tensor, valid_mask: Tensor | None = None) -> DenseRouting:
        """Route tokens and select.

        Args:
            x: tokens, float [T, H].
            valid_mask: True = real token, bool [T]; None for all.
        """
        moe, context = self.moe, RoutingContext(valid_mask=valid_mask)
        moe.note_training(moe.collector)
        if valid_mask is not None:
            x = x.masked_fill(~valid_mask[:, None], 0.0)
        routing, limit = moe.route(x, context)
        kept = moe.keep(routing, limit)
        collector = moe.collector
        if collector is not None:
            stats = moe.stats(routing, kept)
            collector.add(moe, MoEOutput(hidden_states=x, stats=stats), learns=moe.training)
        weight, shape = kept.selection.combine_weight, (routing.num_tokens, routing.num_experts + 1)
        probs = weight.new_zeros(shape).index_put((routing.token, routing.expert), weight)
        return DenseRouting(
            probs=probs[:, : routing.num_experts],
            routing_map=kept.selection.selection_map(routing),
            losses=moe.losses(x, routing, kept, context, collector, moe.loss_rows())
            if self.training
            else {},
        )


def total_loss(losses: dict[str, Tensor]) -> Tensor | None:
    """Sum of the losses, or None where there is none."""
    return torch.stack(list(losses.values())).sum() if losses else None
