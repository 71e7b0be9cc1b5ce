"""Routers: one file each, one line each in `ROUTERS`."""

from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routers.etr import EtrPaper, EtrRouter
from etr.moe.routers.expert_choice import ExpertChoice
from etr.moe.routers.hash import Hash
from etr.moe.routers.locmoe import LocMoERouter
from etr.moe.routers.random import Random
from etr.moe.routers.token_choice import Baseline, TokenChoice

ROUTERS: dict[str, type[RouterConfig]] = {
    "etr": EtrRouter,
    "etr_paper": EtrPaper,
    "token_choice": TokenChoice,
    "baseline": Baseline,
    "locmoe": LocMoERouter,
    "expert_choice": ExpertChoice,
    "hash": Hash,
    "random": Random,
}
"""Routers by name."""

__all__ = [
    "ROUTERS",
    "Baseline",
    "EtrPaper",
    "EtrRouter",
    "ExpertChoice",
    "Hash",
    "LocMoERouter",
    "Random",
    "Router",
    "RouterConfig",
    "RouterTraits",
    "TokenChoice",
]
