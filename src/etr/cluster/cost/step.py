"""Time of one training step: layers, exchanges, the pipeline, the reduction, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etr.cluster.cost.links import layer_seconds
from etr.cluster.cost.memory import expert_tokens, stage_parameters, stages_of
from etr.cluster.cost.pipeline import Event, run_pipeline
from etr.cluster.cost.routing import RoutingShape, expected_rows
from etr.cluster.cost.shapes import Cluster, Layout, ModelShape
from etr.cluster.cost.travel import Journey, journey


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer's forward pass of a micro-batch, on the busiest rank."""

    attention_seconds: float
    """Projections and attention; the router too."""
    tensor_seconds: float
    """What tensor ranks gather and sum, rows of experts that they share included."""
    dense_seconds: float
    """Dense feed-forward, or shared experts."""
    expert_seconds: float = 0.0
    """Products of the routed experts."""
    dispatch_seconds: float = 0.0
    """Exchanges: counts, rows to their experts and back."""
    num_chunks: int = 1
    """Parts that travel while others are computed."""

    def total_seconds(self, compute_factor: float = 1.0) -> float:
        """Forward; with a factor of 2, the backward pass, which sends the same rows."""
        rest = compute_factor * (self.attention_seconds + self.dense_seconds) + self.tensor_seconds
        half = self.dispatch_seconds / 2
        experts = compute_factor * self.expert_seconds
        return rest + layer_seconds(half, experts, half, self.num_chunks)

    def exposed_seconds(self, compute_factor: float = 1.0) -> float:
        """Exchange that nothing hides."""
        experts = compute_factor * self.expert_seconds
        half = self.dispatch_seconds / 2
        return layer_seconds(half, experts, half, self.num_chunks) - experts


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step."""

    seconds: float
    """From its begin to the last device's end."""
    parts: dict[str, float]
    """Seconds of the slowest stage by what it does; they sum to `seconds`."""
    bytes_between_nodes: float
    """Bytes of exchanges of rows between nodes, of all devices and all passes of the step."""
    events: list[Event]
    """What each stage does."""


def exchange_seconds(cluster: Cluster, layout: Layout, journeys: Journey) -> tuple[float, float]:
    """Time of a layer's exchanges one way and back, and bytes between nodes of a group."""
    group = layout.ranks("expert", cluster.devices_per_node)
    node_of_rank = np.arange(group.size) // group.per_node
    every = (*journeys.counts, *journeys.there, *journeys.back)
    far = node_of_rank[:, None] != node_of_rank
    if group.size == 1 or not every:
        return 0.0, 0.0
    # Each chunk is a message of its own: its latency and messages count again.
    start = cluster.links.latency_seconds + (group.size - 1) * cluster.links.message_seconds
    seconds = (journeys.chunks - 1) * len(every) * start
    for traffic in every:
        seconds += cluster.links.exchange_seconds(traffic, node_of_rank, group.groups_per_node)
    return seconds, float(sum((traffic * far).sum() for traffic in every))


def expert_layer(
    model: ModelShape, cluster: Cluster, layout: Layout, routing: RoutingShape, progress: float
) -> tuple[float, float, float, float, int]:
    """Seconds of experts, exchanges and tensor ranks' part of them; bytes between nodes; chunks."""
    group = layout.ranks("expert", cluster.devices_per_node)
    tokens = expert_tokens(routing, layout)
    rows, computed = expected_rows(
        routing,
        num_experts=model.num_experts,
        top_k=routing.top_k or model.top_k,
        tokens_per_rank=tokens,
        num_ranks=group.size,
        node_size=group.per_node,
        progress=progress,
    )
    divided, share = tokens < layout.tokens, layout.expert_tensor
    itemsize, hidden, width = layout.activation_bytes, model.hidden_size, model.expert_size / share
    row_bytes = float(hidden * itemsize)
    lent = 3 * hidden * width * layout.weight_bytes
    found = journey(routing.dispatcher, rows, row_bytes, itemsize, lent)
    by_rank = computed.reshape(group.size, -1) if found.computed is None else found.computed.T
    by_rank = by_rank * (share if divided else 1)
    device = cluster.device
    products = device.product_seconds(by_rank, 2 * width, hidden, itemsize)
    products = products + device.product_seconds(by_rank, hidden, width, itemsize)
    experts = float(products.sum(1).max())
    network, far = exchange_seconds(cluster, layout, found)
    busiest = float(by_rank.sum(1).max())
    shared = layout.ranks("expert_tensor", cluster.devices_per_node)
    tensor = 2 * cluster.links.ring_seconds(busiest * row_bytes, *shared)
    if found.gathered_tokens and not layout.sequence_parallel:
        twins = layout.ranks("tensor", cluster.devices_per_node)
        tensor += cluster.links.ring_seconds(layout.tokens * row_bytes, *twins)
    return experts, network, tensor, far, found.chunks


def layer_time(
    model: ModelShape,
    cluster: Cluster,
    layout: Layout,
    routing: RoutingShape,
    *,
    dense: bool = False,
    progress: float = 1.0,
) -> tuple[LayerTime, float]:
    """Forward pass of a micro-batch through one layer, and its group's bytes between nodes."""
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
    forward = product(2 * size / tensor, model.hidden_size) if size else 0.0
    forward += product(model.hidden_size, size / tensor) if size else 0.0
    # A gather and a scatter of the tokens around attention, and around a feed-forward.
    ranks = layout.ranks("tensor", cluster.devices_per_node)
    ring = cluster.links.ring_seconds(tokens * float(model.hidden_size * itemsize), *ranks)
    shared = 2 * ring * (2 if size else 1)
    if dense:
        found = LayerTime(attention_seconds=attention, tensor_seconds=shared, dense_seconds=forward)
        return found, 0.0
    attention += product(model.num_experts, model.hidden_size) / tensor
    experts, network, more, far, chunks = expert_layer(model, cluster, layout, routing, progress)
    found = LayerTime(
        attention_seconds=attention,
        tensor_seconds=shared + more,
        dense_seconds=forward,
        expert_seconds=experts,
        dispatch_seconds=network,
        num_chunks=chunks,
    )
    return found, far


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
    sparse, far = layer_time(model, cluster, layout, routing, progress=progress)
    first, _ = (
        layer_time(model, cluster, layout, routing, dense=True)
        if model.dense_size
        else (
            sparse,
            0.0,
        )
    )
    stages = stages_of(model, layout.pipeline)
    by_stage = [
        [first if n < model.num_dense_layers else sparse for n in stage] for stage in stages
    ]
    head = _head_seconds(model, cluster, layout)
    forward = [sum(layer.total_seconds() for layer in layers) for layers in by_stage]
    again = 1 if layout.recompute else 0
    backward = [
        sum(layer.total_seconds(2) + again * layer.total_seconds() for layer in layers)
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
    sent = groups * (2 + again) * count * (model.num_layers - model.num_dense_layers)
    return Step(
        seconds=ended + reduction + optimizer,
        parts=parts,
        bytes_between_nodes=far * sent,
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
            layer.exposed_seconds(2) + (passes - 1) * layer.exposed_seconds() for layer in layers
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
    links, per_node = cluster.links, cluster.devices_per_node
    if layout.num_devices <= per_node:
        return links.latency_seconds + sent / links.within_bytes_per_second
    sharing = min(per_node, layout.tensor * layout.data)
    return links.latency_seconds + sent * sharing / links.between_bytes_per_second


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
