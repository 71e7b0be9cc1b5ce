"""Union of Experts: experts are slices of one feed-forward (arXiv 2503.02495)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.methods.card import Card, Row
from etr.moe.experts import BANKS, Bank, BankConfig, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.routers import ROUTERS, TokenChoice
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class Slices(BankConfig):
    """E slices of one feed-forward of width E I, cut as tensor parallelism cuts it."""

    name = "slices"
    summary = "slices of one feed-forward, which starts as that does and has one bias of outputs"

    def build(self, sizes: ExpertSizes) -> Bank:
        return SlicedExperts(sizes)


class SlicedExperts(Experts):
    """Experts whose outputs are parts of a sum; with biases ``output_bias`` [H], once a token.

    Args:
        sizes: of the slices.
    """

    num_slices = 1
    output_bias: Tensor | None

    def __init__(self, sizes: ExpertSizes) -> None:
        super().__init__(sizes)
        self.register_parameter("down_proj_bias", None)
        value = nn.Parameter(torch.empty(sizes.hidden_size)) if sizes.bias else None
        self.register_parameter("output_bias", value)
        self.num_slices = sizes.num_experts
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `Experts`, but for the second projection: its fan-in is that of all slices."""
        super().reset_parameters()
        width = self.down_proj.shape[-1] * self.num_slices
        nn.init.normal_(self.down_proj, std=width**-0.5)

    def idle(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor | None:
        """The bias of outputs, for tokens that any slice keeps."""
        if self.output_bias is None:
            return None
        kept = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        kept = kept.index_add(0, routing.token, selection.kept.long())
        return torch.where(kept[:, None] > 0, self.output_bias.to(x.dtype), 0.0)


CARD = Card(
    name="union_of_experts",
    title="Union of Experts (feed-forward)",
    summary="slices of one feed-forward as experts, weighed so that even gates are 1",
    paper="2503.02495",
    level="model",
    branch="expert design",
    rows=(Row(table=BANKS, kind=Slices), Row(table=ROUTERS, kind=TokenChoice)),
    options={
        "router": "token_choice",
        "experts": "slices",
        "top_k": "4",
        "normalize": "chosen",
        "routed_scale": "4",
        "capacity": "none",
    },
    against="token_choice/top_k=4/capacity=none",
    moves=("loss", "load"),
    claim=(
        "All slices on with even gates are the dense feed-forward within 1e-12 in float64, its "
        "output bias once; k of E slices cost k / E of its operations, and for k >= 2 the gate has "
        "a gradient."
    ),
    departs=(
        "The feed-forward alone, routed by token, which is causal. A chosen slice weighs p k / "
        "(sum of chosen p), by normalize=chosen and routed_scale = top_k; in the released code the "
        "gate has no gradient."
    ),
)
