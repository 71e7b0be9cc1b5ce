"""The machines under a model: integers in, plans and counts out. Stands alone; torch alone.

    PLANNERS   choices to the rank of each expert                etr.systems.plan
    CACHES     choices to hits of a memory that holds a few      etr.systems.cache
    SRP, SCH   do neighbouring tokens use the same experts       etr.systems.consistency

Choices are those of a trace: experts of N tokens in each of L MoE layers, int64 [L, N, K], negative
where a token has fewer than K.
"""

from etr.systems.cache import CACHES, Cache, FastMemory, Replayed, replay
from etr.systems.consistency import (
    segment_cache_best_hit_rate,
    segment_routing_best_performance,
)
from etr.systems.plan import PLANNERS, Demand, Devices, Plan, Planner, Travel, travel

__all__ = [
    "CACHES",
    "PLANNERS",
    "Cache",
    "Demand",
    "Devices",
    "FastMemory",
    "Plan",
    "Planner",
    "Replayed",
    "Travel",
    "replay",
    "segment_cache_best_hit_rate",
    "segment_routing_best_performance",
    "travel",
]
