"""What is measured: one file a group of cases."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import Case
from benchmarks.measures.few import measure_few
from benchmarks.measures.generate import measure_generate
from benchmarks.measures.layer import measure_growth, measure_layer
from benchmarks.measures.memory import measure_memory
from benchmarks.measures.router import measure_router
from benchmarks.measures.routing import measure_routing
from benchmarks.measures.training import measure_training
from benchmarks.results import Row
from benchmarks.settings import Settings

OnNote = Callable[[str], None]
MEASURES: dict[str, Callable[[Case, Settings, OnNote], list[Row]]] = {
    "layer": measure_layer,
    "routing": measure_routing,
    "router": measure_router,
    "growth": measure_growth,
    "memory": measure_memory,
    "training": measure_training,
    "generate": measure_generate,
    "few": measure_few,
}
"""By group of the case: (case, settings, what to tell about progress) -> rows."""
