"""Capacity policies: how many tokens each expert may keep. One file each, one line in `CAPACITIES`.

A policy looks at a Routing and returns a Limit; no router computes a capacity.
"""

from __future__ import annotations

from etr.moe.capacity.affinity_mass import AffinityMass
from etr.moe.capacity.base import CapacityConfig, CapacityPolicy, capacity_tokens
from etr.moe.capacity.factor import Factor, NoLimit
from etr.moe.capacity.locmoe import LocMoE
from etr.moe.capacity.schedule import Schedule
from etr.moe.capacity.threshold import Threshold
from etr.moe.table import Table

CAPACITIES: Table[CapacityConfig] = Table(
    "capacity", (NoLimit, Factor, Schedule, AffinityMass, Threshold, LocMoE), wrapped="target"
)
"""Capacity policies by name; ``threshold:factor,target.capacity_factor=0.6`` imitates a factor."""


__all__ = [
    "CAPACITIES",
    "AffinityMass",
    "CapacityConfig",
    "CapacityPolicy",
    "Factor",
    "LocMoE",
    "NoLimit",
    "Schedule",
    "Threshold",
    "capacity_tokens",
]
