"""The fastest layout that fits in memory, for several routers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from etr.cluster.cost import (
    Cluster,
    Layout,
    Memory,
    ModelShape,
    RoutingShape,
    Step,
    peak_memory,
    read_described,
    routing_of_trace,
    step_of,
)

GIVEN = ("tensor", "pipeline", "data", "expert", "expert_tensor")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned, and what is given of its layout."""

    model: str = "mixtral-8x7b"
    """Model that comes with the library, or a JSON or TOML file."""
    cluster: str = "h100"
    """Cluster that comes with the library, or a file."""
    routings: tuple[str, ...] = ("padded", "unpadded", "etr", "etr_paper")
    """Routings that come with the library, or files; the first is what others are compared with."""
    trace: str | None = None
    """File that etr trace wrote, for load, kept share and local share of all routings."""
    sequence_length: int = 4096
    """Tokens of a sequence."""
    batch: int = 256
    """Sequences of a step."""
    tensor: int | None = None
    """Ranks that share attention and dense layers. None: the fastest number."""
    pipeline: int | None = None
    """Stages. None: the fastest number."""
    data: int | None = None
    """Replicas. None: what the other numbers leave of the devices."""
    expert: int | None = None
    """Ranks that the experts of a layer are spread over. None: the fastest number."""
    expert_tensor: int | None = None
    """Ranks that share one expert. None: 1, or as many as share attention."""
    recompute: bool | None = None
    """Whether layers are computed again in the backward pass. None: as is faster and fits."""
    out: str = "runs/cluster-plan"
    """Folder for plan.json, and the timeline: timeline.svg, and trace.json for trace viewers."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch", *GIVEN):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.routings:
            raise ValueError("routings=() needs at least one")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A routing on its fastest layout."""

    routing: RoutingShape
    layout: Layout
    steps: tuple[Step, ...]
    """At the moments of `progress_of`."""
    memory: Memory
    """Of the fullest device at the fullest moment."""

    @property
    def seconds(self) -> float:
        """Mean over training."""
        return float(np.mean([step.seconds for step in self.steps]))

    def parts(self) -> dict[str, float]:
        """Seconds by part, means over training."""
        return {
            name: float(np.mean([step.parts[name] for step in self.steps]))
            for name in self.steps[0].parts
        }


def progress_of(routing: RoutingShape) -> tuple[float, ...]:
    """Moments of training whose mean is taken: one where nothing changes."""
    changes = len(routing.capacity) > 1 or len(routing.kept_share) > 1
    return (0.0, 0.5, 1.0) if changes else (1.0,)


def fullest(model: ModelShape, layout: Layout, routing: RoutingShape) -> Memory:
    """Of the fullest device at the fullest moment of training."""
    held = [peak_memory(model, layout, routing, p) for p in progress_of(routing)]
    return max(held, key=lambda memory: memory.total_bytes)


def planned(
    model: ModelShape, cluster: Cluster, layout: Layout, routing: RoutingShape, memory: Memory
) -> Planned:
    """Predict a routing on a layout whose memory is known."""
    moments = progress_of(routing)
    steps = tuple(step_of(model, cluster, layout, routing, progress=p) for p in moments)
    return Planned(routing=routing, layout=layout, steps=steps, memory=memory)


def layouts(config: PlanConfig, model: ModelShape, cluster: Cluster) -> Iterator[Layout]:
    """Layouts that take all devices and divide the model.

    What is not given: tensor ranks, on one node, stages and expert ranks are powers of two and
    replicas what these leave; an expert is whole or shared by all tensor ranks; layers are computed
    again or not. A micro-batch is one sequence.
    """
    devices = cluster.num_devices

    def sizes(given: int | None, most: int) -> list[int]:
        return [given] if given else [1 << n for n in range(most.bit_length()) if 1 << n <= most]

    for tensor in sizes(config.tensor, min(cluster.devices_per_node, model.num_heads)):
        for pipeline in sizes(config.pipeline, min(model.num_layers, devices // tensor)):
            data = config.data or devices // (tensor * pipeline)
            if tensor * pipeline * data != devices or config.batch % data:
                continue
            for shared in sorted({config.expert_tensor or 1, config.expert_tensor or tensor}):
                for expert in sizes(config.expert, min(model.num_experts, tensor * data // shared)):
                    if (tensor * data) % (expert * shared) or model.num_experts % expert:
                        continue
                    for again in [False, True] if config.recompute is None else [config.recompute]:
                        yield Layout(
                            tensor=tensor,
                            pipeline=pipeline,
                            data=data,
                            expert=expert,
                            expert_tensor=shared,
                            sequence_length=config.sequence_length,
                            micro_batches=config.batch // data,
                            recompute=again,
                        )


def plan(config: PlanConfig) -> tuple[ModelShape, Cluster, list[Planned]]:
    """The fastest layout of every routing.

    Raises:
        ValueError: no layout divides the model, or none fits in memory.
    """
    model = read_described(ModelShape, config.model)
    cluster = read_described(Cluster, config.cluster)
    found = []
    for name in config.routings:
        routing = read_described(RoutingShape, name)
        if config.trace is not None:
            routing = routing_of_trace(config.trace, routing, num_nodes=cluster.num_nodes)
        found.append(_fastest(config, model, cluster, routing))
    return model, cluster, found


def _fastest(
    config: PlanConfig, model: ModelShape, cluster: Cluster, routing: RoutingShape
) -> Planned:
    best, least = None, math.inf
    for layout in layouts(config, model, cluster):
        try:
            layout.check(model, cluster)
        except ValueError:
            continue
        memory = fullest(model, layout, routing)
        least = min(least, memory.total_bytes)
        if memory.total_bytes > cluster.device.memory_bytes:
            continue
        tried = planned(model, cluster, layout, routing, memory)
        if best is None or tried.seconds < best.seconds:
            best = tried
    if best is None and least == math.inf:
        raise ValueError(
            f"no layout of {cluster.num_devices} devices divides {model.name} and a batch of "
            f"{config.batch} sequences as asked"
        )
    if best is None:
        raise ValueError(
            f"{model.name} fits in no layout: the smallest takes {least / 1e9:.1f} GB of "
            f"memory_bytes={cluster.device.memory_bytes / 1e9:.1f} GB"
        )
    return best


HEAD = ("routing", "layout", "step (s)", "of first", "memory (GB)", "between nodes (GB)")


def cells(found: list[Planned]) -> list[list[str]]:
    """A row for each routing: whole numbers of the step."""
    return [
        [
            one.routing.name,
            one.layout.name + (" recomputed" if one.layout.recompute else ""),
            f"{one.seconds:.3f}",
            f"{one.seconds / found[0].seconds:.2f}",
            f"{one.memory.total_bytes / 1e9:.1f}",
            f"{np.mean([s.bytes_between_nodes for s in one.steps]) / 1e9:,.0f}",
        ]
        for one in found
    ]


def part_cells(found: list[Planned]) -> list[list[str]]:
    """A row for each part of a step: seconds of every routing."""
    parts = [one.parts() for one in found]
    return [[name, *(f"{p[name]:.3f}" for p in parts)] for name in parts[0]]
