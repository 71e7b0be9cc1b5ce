"""Every choice is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.calibration import Calibration
from etr.moe.context import RouterInput
from etr.moe.routers import Router
from etr.moe.routing import Limit, Routing
from etr.moe.serving.base import Serving


@dataclass(frozen=True, kw_only=True)
class Dropless(Serving):
    """Tokens choose, also where experts do in training, and nothing is dropped."""

    name = "dropless"
    summary = "every choice is kept"

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, Limit]:
        return router(x, inputs, tokens_choose=True), Limit()
