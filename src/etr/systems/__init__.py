"""The machines under a model: integers in, plans and counts out. Stands alone.

It imports torch; an integer program imports SciPy when it is solved.

    PLANNERS   choices to the rank of each expert                etr.systems.plan
    travel     choices and a plan to traffic                     etr.systems.travel
    CACHES     who leaves a memory that holds a few experts      etr.systems.cache
    replay     choices to hits of such a memory                  etr.systems.replay
    MEASURES   choices to a number a layer: SRP, SCH             etr.systems.consistency

Choices are those of a trace: experts of N tokens in each of L MoE layers, int64 [L, N, K], negative
where a token has fewer than K.
"""

from etr.systems.cache import CACHES, Cache, FastMemory, Memory, Replayed
from etr.systems.consistency import (
    MEASURES,
    Measure,
    segment_cache_best_hit_rate,
    segment_routing_best_performance,
)
from etr.systems.plan import PLANNERS, Demand, Devices, Plan, Planner
from etr.systems.replay import counts_of_passes, replay
from etr.systems.travel import Travel, hops, travel

__all__ = [
    "CACHES",
    "MEASURES",
    "PLANNERS",
    "Cache",
    "Demand",
    "Devices",
    "FastMemory",
    "Measure",
    "Memory",
    "Plan",
    "Planner",
    "Replayed",
    "Travel",
    "counts_of_passes",
    "hops",
    "replay",
    "segment_cache_best_hit_rate",
    "segment_routing_best_performance",
    "travel",
]
