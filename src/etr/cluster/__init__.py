"""Emulated clusters, what their network gives, and what an exchange of tokens costs on it."""

from etr.cluster.launch import EmulatedCluster, emulate
from etr.cluster.network import NetworkConfig, remove_leftovers, why_unavailable

__all__ = [
    "EmulatedCluster",
    "NetworkConfig",
    "emulate",
    "remove_leftovers",
    "why_unavailable",
]
