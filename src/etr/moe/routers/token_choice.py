"""Token choice with a learned linear router: Switch at top_k 1, Mixtral at top_k 2."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from etr.moe.affinity import arithmetic, product
from etr.moe.context import RouterInput
from etr.moe.learner import Learner, Step
from etr.moe.routers.base import Router, RouterConfig, RouterTraits, one_best
from etr.moe.routing import Scores
from etr.moe.score_scale import OddsScale
from etr.moe.select import top_experts

BiasUpdate = Literal["none", "sign", "proportional", "decaying"]


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
    bias: bool = False
    """Add a learned bias to the logits."""
    selection_bias: bool = False
    """Add a bias to the scores by which tokens choose, not to the combine weights. It is state
    outside the gradient, which checkpoints bring along (arXiv 2412.19437) or `bias_update` moves.
    """
    bias_update: BiasUpdate = "none"
    """How the selection bias moves after each optimizer step, so that loads even out without a loss
    (arXiv 2408.15664). none: it stands still. sign: by bias_rate, up where an expert has less than
    the mean load and down where it has more. proportional: by bias_rate for each choice that it has
    too few or too many (arXiv 2512.03915). decaying: the same over the square root of the steps
    done. Any but none adds the bias by itself."""
    bias_rate: float = 0.001
    """Step of the selection bias, in units of the scores (for each choice, unless by sign)."""
    num_groups: int = 1
    """Groups of neighbouring experts, of which a token chooses some before it chooses experts."""
    top_groups: int = 1
    """Groups that a token may choose from."""
    group_score: Literal["best", "best_two"] = "best"
    """A group counts as much as its best expert, or as the sum of its two best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.bias_rate < math.inf:
            raise ValueError(f"bias_rate={self.bias_rate} must be > 0 and finite")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"top_groups={self.top_groups} must lie between 1 and num_groups={self.num_groups}"
            )

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} must divide num_experts={num_experts}")
        size = num_experts // self.num_groups
        if top_k > self.top_groups * size:
            raise ValueError(
                f"top_groups={self.top_groups} groups of {size} experts hold fewer than "
                f"top_k={top_k}"
            )
        if self.num_groups > 1 and self.group_score == "best_two" and size < 2:
            raise ValueError(
                f"group_score='best_two' needs two experts a group: num_groups={self.num_groups} "
                f"leaves {size}"
            )

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            has_directions=True,
            gates_are_probs=self.gate == "softmax",
            rank_by=("position", "score"),
            num_groups=self.num_groups,
        )

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
        return replace(super().traits, rank_by=("position",), padded=True)

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().check(hidden_size, num_experts, top_k)
        one_best(self.name, top_k)


class SelectionBias(Learner):
    """What makes an expert more or less likely to be chosen, float32 [E].

    Args:
        num_experts: E.
        update, rate: how it moves, see `TokenChoice`.
    """

    bias: Tensor

    def __init__(self, num_experts: int, update: BiasUpdate = "none", rate: float = 0.0) -> None:
        super().__init__()
        self.update, self.rate = update, rate
        self.register_state("bias", (num_experts,), 0.0)

    @property
    def moves(self) -> bool:
        return self.update != "none"

    def after_step(self, step: Step) -> None:
        if self.update == "none":
            return
        load = step.counters["num_choices_per_expert"].double()
        missing = load.mean() - load
        if self.update == "sign":
            missing = missing.sign()
        elif self.update == "decaying":
            missing = missing / step.number.double().sqrt()
        self.bias.copy_(self.bias + self.rate * missing)


class LinearRouter(Router):
    """Scores ``x W^T`` through a softmax or sigmoid; choosers are ranked by the gate."""

    config: TokenChoice
    takes_any_dtype = True
    made_of_logits = True

    def __init__(self, config: TokenChoice, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = OddsScale(1 / num_experts if config.gate == "softmax" else 0.5)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.selection: SelectionBias | None = None
        if config.selection_bias or config.bias_update != "none":
            self.selection = SelectionBias(num_experts, config.bias_update, config.bias_rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.hidden_size**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        logits = product(x, self.weight.to(arithmetic(x.dtype)))
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return self.of_logits(logits)

    def of_logits(self, logits: Tensor) -> Scores:
        if self.config.gate == "softmax":
            gates = probs = logits.softmax(-1)
        else:
            gates = logits.sigmoid()
            # gates / gates.sum(), in a form that does not become 0 / 0 where all gates underflow
            probs = logsigmoid(logits).softmax(-1)
        return Scores(scores=gates, logits=logits, gates=gates, probs=probs)

    def preferences(self, scores: Scores) -> Tensor:
        table = super().preferences(scores)
        if self.selection is not None:
            table = table + self.selection.bias.to(table.dtype)
        if self.config.num_groups > 1:
            table = self._within_best_groups(table)
        return table

    def _within_best_groups(self, table: Tensor) -> Tensor:
        """`table` [T, E] with minus infinity outside each token's best groups."""
        groups = table.unflatten(-1, (self.config.num_groups, -1))
        best = groups.topk(2 if self.config.group_score == "best_two" else 1, dim=-1).values
        chosen = top_experts(best.sum(-1), self.config.top_groups)
        outside = torch.ones(groups.shape[:2], dtype=torch.bool, device=table.device)
        outside = outside.scatter(1, chosen, False)
        return groups.masked_fill(outside[:, :, None], -torch.inf).flatten(1)
