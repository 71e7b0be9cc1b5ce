"""Training over many ranks: meshes, sharding, gradients, storage in parts."""

from etr.parallel.config import ParallelConfig
from etr.parallel.gradients import gradient_norms, local_part, scale_gradients, sum_gradients
from etr.parallel.launch import is_launched, process_group
from etr.parallel.ranks import Ranks
from etr.parallel.sharding import build_mesh, distribute
from etr.parallel.storage import LoadPlanner

__all__ = [
    "LoadPlanner",
    "ParallelConfig",
    "Ranks",
    "build_mesh",
    "distribute",
    "gradient_norms",
    "is_launched",
    "local_part",
    "process_group",
    "scale_gradients",
    "sum_gradients",
]
