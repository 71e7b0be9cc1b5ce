"""Who is timed: one file a system or family, one line here."""

from __future__ import annotations

from benchmarks.systems.base import Built, Problem, System, make_problem
from benchmarks.systems.deepspeed_moe import DEEPSPEED
from benchmarks.systems.floors import FLOORS
from benchmarks.systems.gpu_kernels import GPU_KERNELS
from benchmarks.systems.gshard import GSHARD
from benchmarks.systems.layer import LAYERS
from benchmarks.systems.megatron_layer import MEGATRON
from benchmarks.systems.st_moe import ST_MOE
from benchmarks.systems.transformers_blocks import BLOCKS
from benchmarks.systems.tutel_moe import TUTEL

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        *(*FLOORS, *LAYERS, *BLOCKS, GSHARD, ST_MOE, DEEPSPEED, TUTEL, MEGATRON),
        *GPU_KERNELS,
    )
}
"""Systems by name, in the order of the page."""

__all__ = ["SYSTEMS", "Built", "Problem", "System", "make_problem"]
