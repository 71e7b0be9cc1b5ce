"""Time of one training step: layers, exchanges, the pipeline, the reduction, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from etr.cluster.cost.links import layer_seconds
from etr.cluster.cost.memory import stage_parameters, stages_of
from etr.cluster.cost.pipeline import Event, run_pipeline
from etr.cluster.cost.routing import RoutingShape
from etr.cluster.cost.shapes import Cluster, Layout, ModelShape
from etr.cluster.cost.travel import layer_journey


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer's forward pass of a micro-batch, on the busiest rank."""

    attention_seconds: float = 0.0
    """Projections and attention; the router too."""
    tensor_seconds: float = 0.0
    """What tensor ranks gather and sum, rows of experts that they share included."""
    dense_seconds: float = 0.0
    """Dense feed-forward, or shared experts."""
    expert_seconds: float = 0.0
    """Products of the routed experts."""
    counts_seconds: float = 0.0
    """Exchanges of counts, which the backward pass does not need again."""
    rows_seconds: float = 0.0
    """Exchanges of rows, to their experts and back."""
    counts_far_bytes: float = 0.0
    """Bytes of counts between nodes, of an expert group."""
    rows_far_bytes: float = 0.0
    """Bytes of rows between nodes, of an expert group."""
    num_chunks: int = 1
    """Parts that travel while others are computed."""

    def total_seconds(self, *, backward: bool = False) -> float:
        """A pass; the backward one computes twice as much."""
        factor = 2 if backward else 1
        products = self.attention_seconds + self.dense_seconds + self.expert_seconds
        return factor * products + self.tensor_seconds + self.exposed_seconds(backward=backward)

    def exposed_seconds(self, *, backward: bool = False) -> float:
        """Exchange that nothing hides: counts go before any row, rows overlap with experts."""
        experts = (2 if backward else 1) * self.expert_seconds
        half = self.rows_seconds / 2
        shown = layer_seconds(half, experts, half, self.num_chunks) - experts
        return shown if backward else self.counts_seconds + shown


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step."""

    seconds: float
    """From its begin to the last device's end."""
    parts: dict[str, float]
    """Seconds of the slowest stage by what it does; they sum to `seconds`."""
    bytes_between_nodes: float
    """Bytes of exchanges between nodes, of all devices and all passes of the step."""
    events: list[Event]
    """What each stage does."""


def _exchange(
    cluster: Cluster, layout: Layout, parts: tuple[np.ndarray, ...], chunks: int
) -> tuple[float, float]:
    """Seconds of exchanges one after the other, and their bytes between nodes."""
    group = layout.ranks("expert", cluster.devices_per_node)
    if group.size == 1:
        return 0.0, 0.0
    node = np.arange(group.size) // group.per_node
    seconds = sum(
        cluster.links.exchange_seconds(traffic, node, group.groups_per_node, chunks)
        for traffic in parts
    )
    return seconds, float(sum(traffic[node[:, None] != node].sum() for traffic in parts))


def _expert_time(
    model: ModelShape, cluster: Cluster, layout: Layout, routing: RoutingShape, progress: float
) -> LayerTime:
    """The routed experts of a layer alone, with what their tensor ranks gather and sum."""
    per_node, itemsize, hidden = (
        cluster.devices_per_node,
        layout.activation_bytes,
        model.hidden_size,
    )
    node_size = layout.ranks("expert", per_node).per_node
    found = layer_journey(model, layout, routing, node_size, progress)
    width = model.expert_size / layout.expert_tensor
    products = cluster.device.feed_forward_seconds(found.computed, hidden, width, itemsize)
    counts, far_counts = _exchange(cluster, layout, found.counts, found.chunks)
    rows, far_rows = _exchange(cluster, layout, (*found.there, *found.back), found.chunks)
    busiest = float(found.computed.sum(1).max()) * hidden * itemsize
    links = cluster.links
    tensor = 2 * links.ring_seconds(busiest, *layout.ranks("expert_tensor", per_node))
    if found.gathered_tokens and not layout.sequence_parallel:
        gathered = float(layout.tokens * hidden * itemsize)
        tensor += links.ring_seconds(gathered, *layout.ranks("tensor", per_node))
    return LayerTime(
        tensor_seconds=tensor,
        expert_seconds=float(products.sum(1).max()),
        counts_seconds=counts,
        rows_seconds=rows,
        counts_far_bytes=far_counts,
        rows_far_bytes=far_rows,
        num_chunks=found.chunks,
    )


def layer_time(
    model: ModelShape,
    cluster: Cluster,
    layout: Layout,
    routing: RoutingShape,
    *,
    dense: bool = False,
    progress: float = 1.0,
) -> LayerTime:
    """Forward pass of a micro-batch through one layer."""
    device, tensor, tokens = cluster.device, layout.tensor, layout.tokens
    itemsize = layout.activation_bytes

    def product(width: float, depth: float) -> float:
        return float(device.product_seconds(np.array(tokens), width, depth, itemsize))

    attention = sum(product(b / tensor, a) for a, b in model.attention_matrices())
    # Scores and their sum of values, half of both masked; a product for each head.
    head = model.head_size + model.rotary_size / 2
    per_head = device.product_seconds(
        np.array(layout.sequence_length), layout.sequence_length, head, itemsize
    )
    attention += float(per_head) * model.num_heads / tensor * layout.sequences
    size = model.dense_size if dense else model.shared_size
    shape = np.array(tokens), model.hidden_size, size / tensor, itemsize
    forward = float(device.feed_forward_seconds(*shape)) if size else 0.0
    # A gather and a scatter of the tokens around attention, and around a feed-forward.
    ranks = layout.ranks("tensor", cluster.devices_per_node)
    ring = cluster.links.ring_seconds(tokens * float(model.hidden_size * itemsize), *ranks)
    shared = 2 * ring * (2 if size else 1)
    found = LayerTime() if dense else _expert_time(model, cluster, layout, routing, progress)
    if not dense:
        attention += product(model.num_experts, model.hidden_size) / tensor
    return replace(
        found,
        attention_seconds=attention,
        dense_seconds=forward,
        tensor_seconds=shared + found.tensor_seconds,
    )


def step_of(
    model: ModelShape,
    cluster: Cluster,
    layout: Layout,
    routing: RoutingShape,
    *,
    progress: float = 1.0,
) -> Step:
    """Predict a step.

    Args:
        model, cluster, layout, routing: what is trained where, and how.
        progress: in training, 0 to 1, for capacity and kept share.
    Raises:
        ValueError: they do not fit together.
    """
    layout.check(model, cluster)
    sparse = first = layer_time(model, cluster, layout, routing, progress=progress)
    if model.dense_size:
        first = layer_time(model, cluster, layout, routing, dense=True)
    stages = stages_of(model, layout.pipeline)
    by_stage = [
        [first if n < model.num_dense_layers else sparse for n in stage] for stage in stages
    ]
    head = _head_seconds(model, cluster, layout)
    forward = [sum(layer.total_seconds() for layer in layers) for layers in by_stage]
    again = 1 if layout.recompute else 0
    backward = [
        sum(layer.total_seconds(backward=True) + again * layer.total_seconds() for layer in layers)
        for layers in by_stage
    ]
    forward[-1], backward[-1] = forward[-1] + head, backward[-1] + 2 * head
    hop, count = _hop_seconds(model, cluster, layout), layout.micro_batches
    events = run_pipeline(forward, backward, hop, count)
    busy = [count * (f + b) for f, b in zip(forward, backward, strict=True)]
    slowest = int(np.argmax(busy))
    ended = max(event.end_seconds for event in events)
    reduction, optimizer = _ends(model, cluster, layout, slowest)
    for stage in range(layout.pipeline):
        events += [
            Event(stage, "reduction", -1, ended, ended + reduction),
            Event(stage, "optimizer", -1, ended + reduction, ended + reduction + optimizer),
        ]
    parts = _parts(by_stage[slowest], layout, head if slowest == layout.pipeline - 1 else 0.0)
    parts["pipeline bubble"] = ended - busy[slowest]
    parts |= {"gradient reduction": reduction, "optimizer": optimizer}
    groups = layout.num_devices / layout.pipeline / layout.expert
    passes = (1 + again) * sparse.counts_far_bytes + (2 + again) * sparse.rows_far_bytes
    sent = groups * count * (model.num_layers - model.num_dense_layers)
    return Step(
        seconds=ended + reduction + optimizer,
        parts=parts,
        bytes_between_nodes=passes * sent,
        events=events,
    )


def _parts(layers: list[LayerTime], layout: Layout, head: float) -> dict[str, float]:
    """Seconds of a stage by what it does, all micro-batches, forward and backward."""
    times = 4 if layout.recompute else 3  # in units of a forward pass's products
    passes = 3 if layout.recompute else 2
    found = {
        "attention": times * sum(layer.attention_seconds for layer in layers),
        "dense": times * sum(layer.dense_seconds for layer in layers) + 3 * head,
        "experts": times * sum(layer.expert_seconds for layer in layers),
        "exposed exchange": sum(
            layer.exposed_seconds(backward=True) + (passes - 1) * layer.exposed_seconds()
            for layer in layers
        ),
        "tensor ranks": passes * sum(layer.tensor_seconds for layer in layers),
    }
    return {name: layout.micro_batches * seconds for name, seconds in found.items()}


def _head_seconds(model: ModelShape, cluster: Cluster, layout: Layout) -> float:
    width = model.vocab_size / layout.tensor
    rows = np.array(layout.tokens)
    return float(
        cluster.device.product_seconds(rows, width, model.hidden_size, layout.activation_bytes)
    )


def _hop_seconds(model: ModelShape, cluster: Cluster, layout: Layout) -> float:
    """Of passing a micro-batch on; stages of more than a node share the uplink with their node."""
    if layout.pipeline == 1:
        return 0.0
    sent = layout.tokens * model.hidden_size * layout.activation_bytes / layout.tensor
    links, stage = cluster.links, layout.tensor * layout.data
    if layout.num_devices <= cluster.devices_per_node:
        return float(links.seconds(1, 0.0, sent * (stage if links.within_is_shared else 1)))
    return float(links.seconds(1, sent * min(cluster.devices_per_node, stage), 0.0))


def _ends(model: ModelShape, cluster: Cluster, layout: Layout, stage: int) -> tuple[float, float]:
    """Seconds of the reduction of gradients that shows, and of the optimizer."""
    dense, experts = stage_parameters(model, layout, stage)
    links, per_node = cluster.links, cluster.devices_per_node
    reduction = links.ring_seconds(dense * layout.gradient_bytes, *layout.ranks("data", per_node))
    reduction += links.ring_seconds(
        experts * layout.gradient_bytes, *layout.ranks("expert_data", per_node)
    )
    # Back come the sums, or the updated weights where the optimizer is sharded.
    share = layout.weight_bytes / layout.gradient_bytes if layout.shard_optimizer else 1.0
    reduction *= (1 + share) * (1 - layout.overlapped_reduction_share)
    held = dense / (layout.data if layout.shard_optimizer else 1)
    held += experts / (layout.expert_data if layout.shard_optimizer else 1)
    touched = layout.gradient_bytes + 2 * layout.optimizer_bytes + layout.weight_bytes
    return reduction, held * touched / cluster.device.memory_bytes_per_second
