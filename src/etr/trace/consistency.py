"""SRP and SCH, importable from where they were for one release: see `etr.systems.consistency`."""

from etr.systems.consistency import (
    segment_cache_best_hit_rate,
    segment_routing_best_performance,
)

__all__ = ["segment_cache_best_hit_rate", "segment_routing_best_performance"]
