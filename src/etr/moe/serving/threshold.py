"""Thresholds that training calibrated: an expert keeps choosers whose score reaches its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.calibration import Calibration
from etr.moe.context import RouterInput
from etr.moe.routers import Router
from etr.moe.routing import Limit, Routing
from etr.moe.serving.base import LayerFacts, Serving


@dataclass(frozen=True, kw_only=True)
class Threshold(Serving):
    """Keep a chooser if its score is at least the expert's threshold."""

    name = "threshold"
    summary = "choosers whose score reaches their expert's threshold, calibrated in training"

    def refuses(self, facts: LayerFacts) -> str | None:
        if not facts.ranks_by_score:
            return "its experts do not rank tokens by a score, on which a threshold could be put"
        if facts.calibrated is False:
            return "its thresholds are not calibrated (train it, or run `etr calibrate`)"
        return None

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, Limit]:
        # Thresholds that nothing was learned for are -inf, which keeps every choice. Where experts
        # choose they would take every token: the device then lets tokens choose.
        alone = router.traits.tokens_choose or learned.num_updates == 0
        routing = router(x, inputs, tokens_choose=alone)
        return routing, Limit(min_score=learned.threshold)
