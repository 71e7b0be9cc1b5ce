"""The Mixture-of-Experts layer. Imports torch alone."""

from etr.moe import capacity
from etr.moe.capacity import CAPACITIES
from etr.moe.collector import Collector
from etr.moe.config import MoEConfig
from etr.moe.context import RoutingContext
from etr.moe.dispatch import DISPATCHERS
from etr.moe.experts import BANKS, EXPERT_BACKENDS
from etr.moe.layer import MoE
from etr.moe.layers import moe_layers, reconfigured, selecting, set_eval_selection
from etr.moe.losses import LOSSES, LossConfig
from etr.moe.notice import EtrWarning
from etr.moe.ranks import ExpertParallel
from etr.moe.routers import (
    ROUTERS,
    Baseline,
    EtrPaper,
    EtrRouter,
    ExpertChoice,
    Hash,
    LocMoERouter,
    Random,
    TokenChoice,
)
from etr.moe.routing import MoEOutput, Routing, Selection
from etr.moe.rules import support_table
from etr.moe.serving import SERVING
from etr.moe.state import reset_states
from etr.moe.topology import ExpertPlacement, Topology
from etr.moe.training import after_step, attach, set_progress

__all__ = [
    "BANKS",
    "CAPACITIES",
    "DISPATCHERS",
    "EXPERT_BACKENDS",
    "LOSSES",
    "ROUTERS",
    "SERVING",
    "Baseline",
    "Collector",
    "EtrPaper",
    "EtrRouter",
    "EtrWarning",
    "ExpertChoice",
    "ExpertParallel",
    "ExpertPlacement",
    "Hash",
    "LocMoERouter",
    "LossConfig",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "Random",
    "Routing",
    "RoutingContext",
    "Selection",
    "TokenChoice",
    "Topology",
    "after_step",
    "attach",
    "capacity",
    "moe_layers",
    "reconfigured",
    "reset_states",
    "selecting",
    "set_eval_selection",
    "set_progress",
    "support_table",
]
