"""Routers: one file each, one line each in `ROUTERS`."""

from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routers.etr import EtrPaper, EtrRouter
from etr.moe.routers.expert_choice import ExpertChoice
from etr.moe.routers.hash import Hash
from etr.moe.routers.locmoe import LocMoERouter
from etr.moe.routers.projection import Projection
from etr.moe.routers.random import Random
from etr.moe.routers.token_choice import Baseline, TokenChoice
from etr.moe.table import Table

ROUTERS: Table[RouterConfig] = Table(
    "router",
    (
        EtrRouter,
        EtrPaper,
        TokenChoice,
        Baseline,
        LocMoERouter,
        ExpertChoice,
        Hash,
        Random,
        Projection,
    ),
)
"""Routers by name."""

__all__ = [
    "ROUTERS",
    "Baseline",
    "EtrPaper",
    "EtrRouter",
    "ExpertChoice",
    "Hash",
    "LocMoERouter",
    "Projection",
    "Random",
    "Router",
    "RouterConfig",
    "RouterTraits",
    "TokenChoice",
]
