"""What training does: tokens of a batch compete, so later ones change earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.calibration import Calibration
from etr.moe.context import RouterInput
from etr.moe.routers import Router
from etr.moe.routing import Routing
from etr.moe.serving.base import Serving


@dataclass(frozen=True, kw_only=True)
class Batch(Serving):
    """The layer's capacity policy over the batch, for diagnosis."""

    name = "batch"
    summary = "the training policy, in which later tokens change earlier ones: for diagnosis"
    causal = False

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, None]:
        return router(x, inputs), None
