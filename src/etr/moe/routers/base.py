"""What every router is: a frozen config that builds a module with `scores` and `choose`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.moe.affinity import router_dtype, without_autocast
from etr.moe.checked import check_types
from etr.moe.context import Replay, RouterInput
from etr.moe.routing import Routing, Scores
from etr.moe.score_scale import OddsScale, ScoreScale
from etr.moe.select import ExpertPool, Normalize, RankBy, token_pairs, top_experts


@dataclass(frozen=True, kw_only=True)
class RouterTraits:
    """Facts about a configured router that the layer, the tables and the tests rely on.

    Args:
        causal: in training, a token's kept experts do not depend on later tokens as far as the
            router is concerned (a capacity may still drop by rivals).
        fixed_load: every expert gets the same number of tokens by construction.
        tokens_choose: tokens ask for experts; False where experts pick among all tokens.
        fixed_k: a token asks for `top_k` experts; False where its scores say for how many, and
            `top_k` is what capacities and reports expect.
        normalize: how combine weights are normalised where no option says so; None: as
            `LayerOptions.normalize` has it.
        has_scores: gives selection scores, so choosers can be ranked and thresholds calibrated.
        has_probs: gives a distribution over experts, so a balance loss is defined.
        gates_are_probs: what weighs a chosen expert is its probability, before any normalisation.
        has_directions: has a direction of every choice in the space of tokens.
        has_cosine: scores are cosines, so the capacity lower bound applies.
        sparse_gates: gates are 0 where a token does not take the expert, and a loss on them, which
            the router's `pressure` weighs, closes more.
        rank_by: orders in which experts may fill up; the first is the default.
        expert_pool: whom experts rank: their choosers, or all tokens.
        default_capacity: policy used when none is named, perhaps with options.
        position_free: the choice does not depend on where the token stands in the batch.
        reads_before: the logits of the MoE layer before are part of its own.
        padded: the preset pads its buffers, so backend "auto" picks a padded one.
        numbered: an expert's number decides what comes to it, so experts cannot change numbers.
        num_groups: equal groups of neighbouring experts that tokens choose among first.
        ternary: null choices, the last, after one of each sign for every expert; None: no gate is
            negative.
    """

    causal: bool = True
    fixed_load: bool = False
    tokens_choose: bool = True
    fixed_k: bool = True
    normalize: Normalize | None = None
    has_scores: bool = True
    has_probs: bool = True
    gates_are_probs: bool = True
    has_directions: bool = False
    has_cosine: bool = False
    sparse_gates: bool = False
    rank_by: tuple[RankBy, ...] = ("score", "position")
    expert_pool: ExpertPool = "choosers"
    default_capacity: str = "factor"
    position_free: bool = True
    reads_before: bool = False
    padded: bool = False
    numbered: bool = False
    num_groups: int = 1
    ternary: int | None = None

    @property
    def can_balance(self) -> bool:
        """Whether a balance loss is defined: its load is not even by construction."""
        return self.has_probs and self.tokens_choose


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of the router configs."""

    name: ClassVar[str]
    paper: ClassVar[str]
    """arXiv id, or empty."""
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def traits(self) -> RouterTraits:
        """Facts about this configuration."""
        return RouterTraits()

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        """Refuse sizes that the router cannot work with.

        Raises:
            ValueError: names the field, its value and what would be right.
        """

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        """Make the router's module."""
        raise NotImplementedError


if TYPE_CHECKING:
    _KeptFromDecay = nn.Module
else:
    _KeptFromDecay = nn.LayerNorm


class Router(_KeptFromDecay):
    """Base of the routers.

    Subclasses implement `scores`; those whose tokens do not choose their k best experts implement
    `choose_alone` too, and those that look at other tokens for it, or let experts choose, `choose`.
    A router neither drops nor balances nor logs.

    It is a LayerNorm by type alone: by that transformers' Trainer, and what is built on it, knows
    whose parameters weight decay must leave alone. It would pull a learned temperature to 1.

    Args:
        config: the router's options.
        hidden_size: H.
        num_experts: E.
        top_k: experts a token may choose.
    """

    score_scale: ScoreScale = OddsScale(0.5)
    """Places the bins of the threshold calibration where the router's scores crowd."""
    takes_any_dtype: bool = False
    """`scores` converts the tokens itself, so that no full copy of them is made."""
    made_of_logits: bool = False
    """Whether `of_logits` of the logits of `scores` is `scores` once more."""

    def __init__(
        self, config: RouterConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        nn.Module.__init__(self)
        config.check(hidden_size, num_experts, top_k)
        self.config, self.traits = config, config.traits
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k

    def forward(
        self, x: Tensor, inputs: RouterInput, *, tokens_choose: bool | Tensor = False
    ) -> Routing:
        """Route tokens [T, H] in float32 (float64 for float64 inputs), also under autocast.

        Args:
            x: tokens, float [T, H].
            inputs: everything that is not the hidden state.
            tokens_choose: whether each token chooses alone, where experts choose in training or
                the batch decides. As a tensor, bool [], the device says whether tokens choose in
                the place of experts, and the pairs are all of [T, E] either way.
        """
        # Autocast would run the scores in half precision and flip choices.
        with without_autocast(x):
            scores = self.scored(x, inputs)
            if inputs.replay is not None:
                return self.routing_of(scores, self._replayed(inputs.replay, x), inputs)
            if isinstance(tokens_choose, Tensor):
                return self._choose_where(tokens_choose, scores, inputs)
            if tokens_choose:
                return self.choose_alone(scores, inputs)
            return self.choose(scores, inputs)

    def scored(self, x: Tensor, inputs: RouterInput) -> Scores:
        """`scores` of tokens of any dtype; under autocast only where that is switched off.

        Raises:
            ValueError: something is to be added to logits, and the router is not made of them.
        """
        scores = self.scores(x if self.takes_any_dtype else router_dtype(x), inputs)
        delta = inputs.logit_delta
        if delta is None:
            return scores
        logits, shape = scores.logits, ((self.num_experts,), scores.gates.shape)
        if logits is None or not self.made_of_logits:
            raise ValueError(
                f"context.logit_delta: router {self.config.name!r}, as it is set, is not made of "
                "its logits alone; use token_choice, or etr with score=prob"
            )
        if delta.shape not in shape:
            raise ValueError(
                f"context.logit_delta of layer {inputs.layer_index} has shape "
                f"{tuple(delta.shape)}; it must be {shape[0]} or {tuple(shape[1])}"
            )
        return self.of_logits(logits + delta.to(logits.dtype))

    def of_logits(self, logits: Tensor) -> Scores:
        """`scores` of other logits [T, E], for routers that are made of nothing else."""
        raise NotImplementedError

    def _choose_where(self, tokens_choose: Tensor, scores: Scores, inputs: RouterInput) -> Routing:
        routing = self.choose(scores, inputs)
        if routing.tokens_choose:
            return routing
        best = self.choose_alone(scores, inputs).expert
        best = best.view(routing.num_tokens, len(best) // max(routing.num_tokens, 1))
        best = F.pad(best, (0, self.num_experts - best.shape[1]), value=self.num_experts)
        expert = torch.where(tokens_choose, best, routing.expert.view_as(best))
        return replace(self.routing_of(scores, expert, inputs), tokens_choose=False)

    def _replayed(self, replay: Replay, x: Tensor) -> Tensor:
        if replay.num_experts != self.num_experts:
            replay = replay.checked(self.num_experts)
        if replay.expert.shape[0] != x.shape[0]:
            raise ValueError(
                f"replay.expert has {replay.expert.shape[0]} rows; it must have {x.shape[0]}, one "
                "row per token"
            )
        return replay.expert.to(x.device)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        """Score every (token, expert) pair.

        Args:
            x: tokens [T, H], in the router's dtype unless `takes_any_dtype`.
            inputs: everything that is not the hidden state.
        Returns:
            Scores in the router's dtype, whose `scores` lie in [-1, 1].
        """
        raise NotImplementedError

    def choose(self, scores: Scores, inputs: RouterInput) -> Routing:
        """Turn scores into choices, in training; by default as each token does alone."""
        return self.choose_alone(scores, inputs)

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        """What each token chooses whatever the others are; by default its `top_k` best."""
        table = self.preferences(scores)
        if inputs.bonus is not None:
            table = table + inputs.bonus
        return self.routing_of(scores, top_experts(table, self.top_k), inputs, all_used=True)

    def preferences(self, scores: Scores) -> Tensor:
        """What tokens rank experts by, without gradient, [T, E]; by default the selection score."""
        return scores.scores.detach()

    def routing_of(
        self, scores: Scores, expert: Tensor, inputs: RouterInput, *, all_used: bool = False
    ) -> Routing:
        """Routing of given choices.

        Args:
            scores: the full tables.
            expert: chosen experts, int64 [T, k], best first, where k may be any number;
                ``num_experts`` marks an unused place.
            inputs: mask and bonus.
            all_used: no place is unused.
        """
        full = all_used and inputs.all_valid
        mask = None if inputs.all_valid else inputs.valid_mask
        token, flat = token_pairs(expert, mask, self.num_experts)
        index = flat if full else flat.clamp_max(self.num_experts - 1)
        table = index.view(expert.shape)
        has_scores = self.traits.has_scores
        gate, score = scores.gates_of(table).flatten(), None
        if has_scores:
            score = gate.detach()
            if scores.scores is not scores.gates:
                score = scores.scores.detach().gather(1, table).flatten()
            if inputs.bonus is not None:
                score = score + inputs.bonus[index]
        routing = Routing(
            token=token,
            expert=flat,
            score=score,
            gate=gate,
            valid_mask=inputs.valid_mask,
            scores=scores.scores.detach() if has_scores else None,
            logits=scores.logits,
            probs=scores.probs,
            num_experts=self.num_experts,
            top_k=self.top_k,
            fixed_k=self.traits.fixed_k,
        )
        return routing.known(full=full, unbiased=inputs.bonus is None)

    def taking(self, scores: Scores, order: Tensor, takes: Tensor, inputs: RouterInput) -> Routing:
        """Routing of those of a token's experts that it takes.

        Args:
            scores: the full tables.
            order: experts, int64 [T, k], best first.
            takes: which of them, bool [T, k] or [k].
            inputs: as of `routing_of`.
        """
        return self.routing_of(scores, torch.where(takes, order, self.num_experts), inputs)

    def all_pairs(self, scores: Scores, inputs: RouterInput) -> Routing:
        """Routing in which every expert may pick every valid token, pairs [T * E]."""
        every = torch.arange(self.num_experts, device=scores.scores.device)
        every = every.expand(scores.scores.shape)
        routing = self.routing_of(scores, every, inputs, all_used=True)
        found = replace(routing, tokens_choose=False)
        return found.known(full=routing.full, unbiased=routing.unbiased)

    @property
    def num_open(self) -> Tensor | int:
        """How many experts a token may choose among now; int64 [] where that is learned state."""
        return self.num_experts

    def directions(self, dtype: torch.dtype) -> Tensor:
        """The vector of each choice that tokens are compared with, [E, H], with gradient."""
        weight = self.weight
        assert isinstance(weight, Tensor)  # by attribute: what calls functions puts tensors there
        return weight.to(dtype)

    def extra_repr(self) -> str:
        return ""

    def report(self) -> list[str]:
        """Warnings about the router's parameters in plain words. May synchronise the device."""
        return []

    def reset_parameters(self) -> None:
        """Write initial values into the parameters (after a meta-device start)."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load it; in earlier checkpoints single numbers have no dimension."""
        for name, parameter in self.named_parameters(recurse=False):
            value = state_dict.get(prefix + name)
            if parameter.shape == (1,) and isinstance(value, Tensor) and value.dim() == 0:
                state_dict[prefix + name] = value.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def one_best(name: str, top_k: int) -> None:
    """Refuse top_k != 1 for routers defined for one expert per token."""
    if top_k != 1:
        raise ValueError(f"top_k={top_k}: router {name!r} is defined for top_k=1")
