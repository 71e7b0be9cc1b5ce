"""The benchmark on an emulated cluster: what docs/results/cluster.md reports, and a short one."""

from __future__ import annotations

from etr.cluster.bench import BenchConfig

FULL = BenchConfig()
"""Three seeds, both shapes, all rows."""

SMOKE = BenchConfig(
    out="runs/cluster-smoke",
    seeds=(0,),
    steps=8,
    hidden_size=32,
    rows_per_rank=2,
    replay_rows=4,
    replay_batches=2,
    rounds=1,
    sequence_length=32,
    shapes=("2x2",),
    other_ratios=(2.0,),
    max_bytes_per_domain=60_000,
    eval_tokens_per_domain=256,
)
"""The whole path on a few steps: for tests, not for conclusions."""
