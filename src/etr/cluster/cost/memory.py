"""What training keeps on a device: parameters, gradients, optimizer state, activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from etr.cluster.cost.routing import RoutingShape
from etr.cluster.cost.shapes import Layout, ModelShape
from etr.cluster.cost.travel import layer_journey


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    parameter_bytes: float
    """Weights."""
    gradient_bytes: float
    """Their gradients."""
    optimizer_bytes: float
    """State of the optimizer."""
    activation_bytes: float
    """What the forward passes under way keep for their backward passes."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        parts = self.parameter_bytes, self.gradient_bytes, self.optimizer_bytes
        return sum(parts) + self.activation_bytes


def stages_of(model: ModelShape, pipeline: int) -> list[range]:
    """Layers of each stage; the first stages have one more where they do not divide."""
    return [
        range(part[0], part[-1] + 1) for part in np.array_split(range(model.num_layers), pipeline)
    ]


def stage_parameters(model: ModelShape, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters on one device of a stage: all but experts, and experts."""
    layers = stages_of(model, layout.pipeline)[stage]
    dense = float(sum(model.dense_parameters(layer) for layer in layers))
    sparse = sum(layer >= model.num_dense_layers for layer in layers)
    table = model.vocab_size * model.hidden_size
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        dense += table
    if last:
        dense += model.hidden_size + (table if not (first and model.tied_embeddings) else 0)
    experts = sparse * model.expert_parameters / (layout.expert * layout.expert_tensor)
    return dense / layout.tensor, experts


def layer_numbers(
    model: ModelShape, layout: Layout, rows: float, sent_rows: float, *, dense: bool
) -> float:
    """Numbers that a layer keeps for its backward pass, on one device, for one micro-batch.

    Attention keeps queries, keys, values and its result (no table of scores), a norm its copies,
    a feed-forward what goes into its activation; what enters experts over a network is kept too.

    Args:
        rows: that the experts compute.
        sent_rows: that arrived over the network and came back.
        dense: whether the layer has a dense feed-forward.
    """
    tokens, tensor = layout.tokens, layout.tensor
    outside = tokens / (tensor if layout.sequence_parallel else 1)
    heads = model.num_heads * model.head_size
    keys = model.num_key_value_heads * model.head_size
    rotary = model.num_heads * model.rotary_size
    ranks = model.query_rank + model.key_value_rank + model.rotary_size
    attention = tokens * (2 * heads + 2 * keys + 2 * rotary) / tensor + outside * ranks
    attention += tokens * model.num_heads / tensor  # the logarithm of each sum
    if layout.recompute:
        return outside * model.hidden_size
    norms = 2 * layout.norm_copies * outside * model.hidden_size
    if dense:
        return norms + attention + tokens * 2 * model.dense_size / tensor
    shared = tokens * 2 * model.shared_size / tensor
    scores = outside * model.num_experts
    experts = rows * 2 * model.expert_size / layout.expert_tensor
    return norms + attention + shared + scores + experts + 2 * sent_rows * model.hidden_size


def memory_of(
    model: ModelShape,
    layout: Layout,
    routing: RoutingShape,
    *,
    stage: int = 0,
    progress: float = 1.0,
) -> Memory:
    """What one device of a stage holds at the step's fullest moment; the busiest expert rank's.

    The output layer's logits are float32; a recomputed layer is whole once, while it runs.
    """
    dense, experts = stage_parameters(model, layout, stage)
    layers = stages_of(model, layout.pipeline)[stage]
    computed = layer_journey(model, layout, routing, 1, progress).computed
    rows = float(computed.sum(1).max())
    sent = rows if routing.dispatcher.needs_ranks else 0.0
    per_layer = [
        layer_numbers(model, layout, rows, sent, dense=layer < model.num_dense_layers)
        for layer in layers
    ]
    in_flight = min(layout.micro_batches, layout.pipeline - stage)
    numbers = in_flight * sum(per_layer)
    if layout.recompute:
        whole = replace(layout, recompute=False)
        numbers += max(
            layer_numbers(model, whole, rows, sent, dense=layer < model.num_dense_layers)
            for layer in layers
        )
    activations = numbers * layout.activation_bytes
    if stage == layout.pipeline - 1:
        outside = layout.tokens / (layout.tensor if layout.sequence_parallel else 1)
        activations += layout.norm_copies * outside * model.hidden_size * layout.activation_bytes
        activations += layout.tokens * model.vocab_size / layout.tensor * 4
    state = dense / (layout.data if layout.shard_optimizer else 1)
    state += experts / (layout.expert_data if layout.shard_optimizer else 1)
    return Memory(
        parameter_bytes=(dense + experts) * layout.weight_bytes,
        gradient_bytes=(dense + experts) * layout.gradient_bytes,
        optimizer_bytes=state * layout.optimizer_bytes,
        activation_bytes=activations,
    )


def peak_memory(
    model: ModelShape, layout: Layout, routing: RoutingShape, progress: float = 1.0
) -> Memory:
    """Of the stage that holds most."""
    stages = range(layout.pipeline)
    found = [memory_of(model, layout, routing, stage=s, progress=progress) for s in stages]
    return max(found, key=lambda memory: memory.total_bytes)
