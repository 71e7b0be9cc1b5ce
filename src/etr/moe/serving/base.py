"""What every serving policy is: a frozen config that routes where nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from etr.moe.calibration import Calibration
from etr.moe.checked import check_types
from etr.moe.context import RouterInput
from etr.moe.routers import Router, RouterTraits
from etr.moe.routing import Limit, Routing
from etr.moe.select import RankBy
from etr.moe.table import config_to_text


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What a policy may ask of a layer before it serves it.

    Args:
        traits: of the layer's router.
        rank_by: order in which the layer's experts fill up.
        calibrated: whether thresholds were learned; None: not asked, since the host would have to
            wait for the device.
    """

    traits: RouterTraits
    rank_by: RankBy
    calibrated: bool | None = None

    @property
    def ranks_by_score(self) -> bool:
        """Whether experts rank tokens by a score, on which a threshold can be put."""
        return self.rank_by == "score" and self.traits.has_scores


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Base of the serving policies; fields are options, as in ``name:option=value``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    causal: ClassVar[bool] = True
    """What a token gets depends neither on later tokens nor on the batch's other rows."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def text(self) -> str:
        """The policy as text: its name, and options that are not at their defaults."""
        return config_to_text(self)

    def refuses(self, facts: LayerFacts) -> str | None:
        """Why it cannot serve a layer, which then drops nothing; completes a sentence. Or None."""
        return None

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, Limit | None]:
        """What tokens want, and what experts may keep of it.

        Args:
            router: the layer's.
            x: tokens, float [T, H].
            inputs: everything that is not the hidden state.
            learned: the layer's thresholds.
        Returns:
            Routing over the T tokens; and the limit, which sets no capacity, or None for what the
            layer's capacity policy says.
        """
        raise NotImplementedError
