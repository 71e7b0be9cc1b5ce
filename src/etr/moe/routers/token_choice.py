"""Token choice with a learned linear router: Switch at top_k 1, Mixtral at top_k 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from etr.moe.routers.base import Router, RouterConfig, RouterTraits, one_best
from etr.moe.routing import RouterInput, Scores
from etr.moe.score_scale import OddsScale


@dataclass(frozen=True, kw_only=True)
class TokenChoice(RouterConfig):
    """Each token takes its top_k experts by a learned linear score.

    arXiv 2101.03961 (Switch, top_k 1) and 2401.04088 (Mixtral, top_k 2).
    """

    name = "token_choice"
    paper = "2101.03961, 2401.04088"
    summary = "learned linear router, top-k per token (Switch, Mixtral)"

    gate: Literal["softmax", "sigmoid"] = "softmax"
    """Logits to combine weights: softmax over experts, or a sigmoid for each."""

    def __post_init__(self) -> None:
        if self.gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate={self.gate!r} must be 'softmax' or 'sigmoid'")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(rank_by=("position", "score"))

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return LinearRouter(self, hidden_size, num_experts, top_k)


@dataclass(frozen=True, kw_only=True)
class Baseline(TokenChoice):
    """What ETR is measured against: linear softmax top-1, first come first served, factor 1.1."""

    name = "baseline"
    paper = "2101.03961"
    summary = "preset: linear softmax top-1, factor 1.1, dropped by position, padded"

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(rank_by=("position",), padded=True)

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        one_best(self.name, top_k)


class LinearRouter(Router):
    """Scores ``x W^T`` through a softmax or sigmoid; choosers are ranked by the gate."""

    config: TokenChoice

    def __init__(self, config: TokenChoice, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = OddsScale(1 / num_experts if config.gate == "softmax" else 0.5)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.hidden_size**-0.5)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        logits = x @ self.weight.to(x.dtype).T
        if self.config.gate == "softmax":
            gates = probs = logits.softmax(-1)
        else:
            gates = logits.sigmoid()
            # gates / gates.sum(), in a form that does not become 0 / 0 where all gates underflow
            probs = logsigmoid(logits).softmax(-1)
        return Scores(scores=gates, logits=logits, gates=gates, probs=probs)
