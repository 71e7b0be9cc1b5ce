"""Experts: their weights, which of them a choice means, and the backends that run them."""

from etr.moe.experts.activation import ACTIVATIONS, GATED, Activation, Clamp, activate
from etr.moe.experts.backends import EXPERT_BACKENDS, ExpertBackend, auto_backend
from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.compressed import Compressed
from etr.moe.experts.low_rank import LowRank
from etr.moe.experts.low_rank_rows import LowRankRows
from etr.moe.experts.merged import Merged
from etr.moe.experts.nested import Nested
from etr.moe.experts.nulls import Nulls
from etr.moe.experts.packed import Packed
from etr.moe.experts.shared import SharedGate, run_shared
from etr.moe.experts.stand_in import StandIn
from etr.moe.experts.tied import Shared
from etr.moe.experts.uniform import Uniform
from etr.moe.experts.weights import ExpertParams, ExpertWeights
from etr.moe.experts.widths import Widths
from etr.moe.table import Table

BANKS: Table[BankConfig] = Table(
    "experts",
    (
        Uniform,
        Nulls,
        Widths,
        Shared,
        Merged,
        LowRank,
        LowRankRows,
        Packed,
        Compressed,
        Nested,
        StandIn,
    ),
    wrapped="wrapped",
)
"""Banks by name. Their texts may name one to wrap, as in ``shared:nulls``."""

__all__ = [
    "ACTIVATIONS",
    "BANKS",
    "EXPERT_BACKENDS",
    "GATED",
    "Activation",
    "Bank",
    "BankConfig",
    "Clamp",
    "ExpertBackend",
    "ExpertParams",
    "ExpertSizes",
    "ExpertWeights",
    "SharedGate",
    "activate",
    "auto_backend",
    "run_shared",
]
