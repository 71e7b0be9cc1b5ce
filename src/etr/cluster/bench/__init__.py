"""The benchmark on an emulated cluster: what capacity, locality and overlap save, and cost.

1. `training` trains small language models on four ranks, each in its text, and records what the
   routers of the trained model want of further text.
2. `timing` replays that on an emulated cluster: MoE layers forward and backward, under a clock.
3. `page` writes docs/results/cluster.md from the results, with `targets` and `cells`.
"""

from etr.cluster.bench.plan import BenchConfig
from etr.cluster.bench.run import bench

__all__ = ["BenchConfig", "bench"]
