"""Training over many ranks: meshes, sharding, gradients, storage in parts."""

from etr.parallel.config import ParallelConfig
from etr.parallel.gradients import clip_gradients, gradient_norms, local_part, sum_gradients
from etr.parallel.launch import is_launched, process_group
from etr.parallel.ranks import Ranks
from etr.parallel.sharding import build_mesh, distribute
from etr.parallel.storage import LoadPlanner

__all__ = [
    "LoadPlanner",
    "ParallelConfig",
    "Ranks",
    "build_mesh",
    "clip_gradients",
    "distribute",
    "gradient_norms",
    "is_launched",
    "local_part",
    "process_group",
    "sum_gradients",
]
