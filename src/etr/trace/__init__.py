"""Routing traces: which token went to which expert of which layer, as a Parquet file.

    SCHEMA           columns and metadata                        etr.trace.schema
    read_trace       file -> Trace, a layer as arrays            etr.trace.reader
    TraceWriter      tokens and routing -> file                  etr.trace.writer
    SRP, SCH         do neighbouring tokens use the same experts etr.systems.consistency
    RoutingRecorder  what a model's routers decide               etr.trace.recorder
    SampledRows      which held-out text                         etr.trace.sampling
    record_trace     model, text -> file                         etr.trace.record
    record_fill      model that fills blocks, prompts -> file    etr.trace.steps

What is imported here needs pyarrow and NumPy; import the last four, which run models, by their
full names.
"""

from etr.systems.consistency import (
    segment_cache_best_hit_rate,
    segment_routing_best_performance,
)
from etr.trace.reader import NO_EXPERT, LayerTrace, Trace, read_trace
from etr.trace.schema import LayerRouting, TokenRows, TraceInfo
from etr.trace.writer import TraceWriter

__all__ = [
    "NO_EXPERT",
    "LayerRouting",
    "LayerTrace",
    "TokenRows",
    "Trace",
    "TraceInfo",
    "TraceWriter",
    "read_trace",
    "segment_cache_best_hit_rate",
    "segment_routing_best_performance",
]
