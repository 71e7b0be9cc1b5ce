"""Expert-Token Resonance: orthogonal cosine affinity, both sides choose."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from etr.moe.affinity import (
    arithmetic,
    block_directions,
    block_width,
    cosine_affinity,
    grap_affinity,
    learned_block_affinity,
    router_dtype,
    token_norm,
)
from etr.moe.context import RouterInput
from etr.moe.polar import (
    condition_number,
    known_factor,
    known_parts,
    orthonormal_start,
    polar_factor,
)
from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routing import Routing, Scores
from etr.moe.score_scale import CosineScale, OddsScale, ScoreScale
from etr.moe.select import ExpertPool

MAX_CONDITION = 1e3


@dataclass(frozen=True, kw_only=True)
class EtrRouter(RouterConfig):
    """Tokens choose experts by cosine affinity; experts keep the choosers that resonate most.

    arXiv 2406.00023, eqs. 2-6, with the defaults that lost least in measurements
    (docs/results/quality.md): dense orthonormal directions, a learned temperature, choosers ranked
    by gate, and a capacity that rises over training. `EtrPaper` is the published one.
    """

    name = "etr"
    paper = "2406.00023"
    summary = "cosine affinity to orthonormal expert directions; both sides choose"
    preset_capacity: ClassVar[str] = "schedule:start_factor=0.4,end_factor=1.1"

    frame: Literal["fixed", "learned", "orthonormal"] = "orthonormal"
    """Expert directions. fixed: block vectors without parameters (the paper's eq. 3). learned: one
    number per dimension on the same blocks. orthonormal: dense learned orthonormal directions."""
    choice: Literal["both", "token", "expert"] = "both"
    """Who chooses. both: tokens, then experts among their choosers. token: overflow is dropped by
    position. expert: experts pick from all tokens."""
    expert_pool: ExpertPool = "choosers"
    """With choice=both, experts rank their choosers, or all tokens (keeps fewer)."""
    temperature: float | None = None
    """Scale of the affinity before the softmax, no unit; at sqrt(hidden_size) an isotropic token
    has logits of standard deviation 1. None: just that."""
    learn_temperature: bool = True
    """Train the temperature (its logarithm), starting from `temperature`."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """Affinity to combine weight: softmax over experts, or a sigmoid for each, with a learned
    offset. Under a sigmoid a token that resonates with no expert weighs little, so that dropping it
    costs little."""
    score: Literal["cosine", "prob"] = "prob"
    """What experts rank their choosers by: the affinity, or its softmax over experts, which is high
    where a token resonates with one expert alone."""
    norm: Literal["token", "assumed"] = "token"
    """Norm that makes the product with a direction a cosine. token: each token's own. assumed:
    sqrt(hidden_size), that of RMS-normalised tokens; the router is then linear, and engines that
    know only linear routers can serve it as it is (`etr export --plain`). Needs score=prob."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} must be > 0, or None for sqrt(hidden_size)"
            )
        if self.norm == "assumed" and self.score != "prob":
            raise ValueError(
                f"norm='assumed' with score={self.score!r}: scores would be no cosines; use "
                "score='prob'"
            )
        if self.expert_pool == "all" and self.choice != "both":
            raise ValueError(
                f"expert_pool='all' needs choice='both': with choice={self.choice!r} there is no "
                "second choice to rank for"
            )

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            has_directions=True,
            causal=self.choice != "expert",
            fixed_load=self.choice == "expert",
            tokens_choose=self.choice != "expert",
            gates_are_probs=self.gate == "softmax",
            has_cosine=self.score == "cosine",
            rank_by=("position",) if self.choice == "token" else ("score",),
            expert_pool=self.expert_pool,
            default_capacity=self.preset_capacity,
            numbered=self.frame != "orthonormal",
        )

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        if self.frame != "orthonormal":
            block_width(hidden_size, num_experts)
        elif num_experts > hidden_size:
            raise ValueError(
                f"num_experts={num_experts} exceeds hidden_size={hidden_size}: there are at most "
                "hidden_size orthonormal directions"
            )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _EtrRouter(self, hidden_size, num_experts, top_k)


class _EtrRouter(Router):
    config: EtrRouter
    takes_any_dtype = True

    def __init__(self, config: EtrRouter, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.made_of_logits = config.score != "cosine"
        self.score_scale: ScoreScale = CosineScale(hidden_size)
        if config.score == "prob":
            self.score_scale = OddsScale(1 / num_experts)
        self.temperature = config.temperature or math.sqrt(hidden_size)
        self.weight: nn.Parameter | None = None
        self.log_temperature: nn.Parameter | None = None
        self.offset: nn.Parameter | None = None
        if config.frame == "learned":
            self.weight = nn.Parameter(torch.empty(hidden_size))
        elif config.frame == "orthonormal":
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.empty(1))  # FSDP takes none without dimension
        if config.gate == "sigmoid":
            self.offset = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.weight is not None:
            if self.config.frame == "learned":
                self.weight.fill_(self.num_experts / self.hidden_size)
            elif not self.weight.is_meta:
                dtype = torch.promote_types(self.weight.dtype, torch.float32)
                self.weight.copy_(orthonormal_start(self.num_experts, self.hidden_size, dtype))
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.temperature))
        if self.offset is not None:
            self.offset.fill_(0.0)

    def affinity(self, x: Tensor) -> Tensor:
        """Cosine of tokens [T, H] and expert directions, [T, E]."""
        if self.weight is None:
            return grap_affinity(x, self.num_experts)
        if self.config.frame == "learned":
            return learned_block_affinity(x, self.weight, self.num_experts)
        return cosine_affinity(x, self.directions(arithmetic(x.dtype)), unit=True)

    def scaled(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """`affinity` times one number, or one per token [T, 1]."""
        if self.config.frame != "orthonormal":
            return self.affinity(x) * scale
        directions = self.directions(arithmetic(x.dtype))
        return cosine_affinity(x, directions, unit=True, scale=scale)

    def directions(self, dtype: torch.dtype) -> Tensor:
        """Directions [E, H]; orthonormal ones are found once while the weight stays the same.

        So micro-batches and recomputed activations share those of their optimizer step, and calls
        in eval mode, compiled ones too on a CPU. See `known_parts`.
        """
        if self.weight is None or self.config.frame != "orthonormal":
            return block_directions(self.hidden_size, self.num_experts, dtype, self.weight)
        weight, on_cpu = self.weight, self.weight.device.type == "cpu"
        learns = self.training or torch.is_grad_enabled()
        if on_cpu and not learns and torch.compiler.is_compiling():
            return known_factor(weight, dtype)
        # What stands in a parameter's place may be a function's argument, or have no values.
        lasting = on_cpu and type(weight) is nn.Parameter
        if not _comparable(weight) or (learns and not lasting):
            return polar_factor(weight.to(dtype))
        parts = known_parts(weight, dtype)
        return polar_factor(weight.to(dtype), parts) if learns else parts[0]

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        scale: Tensor | float = self.temperature
        if self.log_temperature is not None:
            scale = self.log_temperature.squeeze().to(arithmetic(x.dtype)).exp()
        if self.config.score == "cosine":
            affinity = self.affinity(x)
            found = self.of_logits(affinity * scale)
            return dataclasses.replace(found, scores=affinity)
        if self.config.norm == "assumed":
            scale = scale * (token_norm(router_dtype(x)) / math.sqrt(self.hidden_size))
        return self.of_logits(self.scaled(x, scale))

    def of_logits(self, logits: Tensor) -> Scores:
        gates = probs = logits.softmax(-1)
        if self.offset is not None:
            gates = (logits + self.offset.squeeze().to(logits.dtype)).sigmoid()
        return Scores(scores=probs, logits=logits, gates=gates, probs=probs)

    def choose(self, scores: Scores, inputs: RouterInput) -> Routing:
        if self.config.choice == "expert":
            return self.all_pairs(scores, inputs)
        return super().choose(scores, inputs)

    def report(self) -> list[str]:
        if self.config.frame != "orthonormal" or self.weight is None or self.weight.is_meta:
            return []
        condition = condition_number(self.weight)
        if condition <= MAX_CONDITION:
            return []
        return [
            f"router weight has condition number {condition:.3g} > {MAX_CONDITION:g}: its "
            "directions are no longer orthonormal to float32 precision; lower the learning rate "
            "or start again from its polar factor"
        ]


def _comparable(weight: Tensor) -> bool:
    """Whether the values can be looked at now; not while code is compiled or captured."""
    if torch.compiler.is_compiling() or weight.is_meta:
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True, kw_only=True)
class EtrPaper(EtrRouter):
    """Expert-Token Resonance as published; `etr` differs where measurements say so.

    arXiv 2406.00023: fixed block vectors, top-1 unless asked for more, experts rank choosers by
    cosine, and the capacity moves from token choice to expert choice by a schedule.
    """

    name = "etr_paper"
    summary = "preset: ETR as published (fixed GrAP frame, cosine ranking, capacity schedule)"
    preset_capacity: ClassVar[str] = "schedule"

    frame: Literal["fixed", "learned", "orthonormal"] = "fixed"
    """Expert directions, see `etr`."""
    learn_temperature: bool = False
    """Train the temperature (its logarithm), starting from `temperature`."""
    score: Literal["cosine", "prob"] = "cosine"
    """What experts rank their choosers by, see `etr`."""
