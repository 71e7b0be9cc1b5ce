"""The benchmark on an emulated cluster: what capacity, locality and overlap save, and cost.

1. `training` trains small language models on four ranks, each in its text, and records what the
   routers of the trained model want of further text.
2. `timing` replays that on an emulated cluster: MoE layers forward and backward, under a clock.
3. `page` writes docs/results/cluster.md from the results, with `targets` and `cells`.
"""

from etr.cluster.bench.plan import BenchConfig
from etr.moe.moved import moved

# A rank that times imports this package too, and need not wait for the trainer.
__getattr__ = moved(__name__, {"bench": "etr.cluster.bench.run"})

__all__ = ["BenchConfig"]
