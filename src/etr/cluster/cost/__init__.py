"""A cost model: seconds and bytes of a training step, from descriptions, without a model."""

from etr.cluster.cost.described import known, read_described
from etr.cluster.cost.links import Line, Links, fit_line, layer_seconds
from etr.cluster.cost.memory import Memory, memory_of, peak_memory
from etr.cluster.cost.pipeline import chrome_trace, draw
from etr.cluster.cost.routing import RoutingShape, Rows, expected_rows, routing_of_trace
from etr.cluster.cost.shapes import Cluster, Device, Layout, ModelShape
from etr.cluster.cost.step import Step, layer_time, step_of
from etr.cluster.cost.travel import Journey, journey

__all__ = [
    "Cluster",
    "Device",
    "Journey",
    "Layout",
    "Line",
    "Links",
    "Memory",
    "ModelShape",
    "RoutingShape",
    "Rows",
    "Step",
    "chrome_trace",
    "draw",
    "expected_rows",
    "fit_line",
    "journey",
    "known",
    "layer_seconds",
    "layer_time",
    "memory_of",
    "peak_memory",
    "read_described",
    "routing_of_trace",
    "step_of",
]
