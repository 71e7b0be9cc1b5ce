"""D2MoE: nested bits for experts, of which each token may choose how many it reads (2504.15299)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.experts import OfExperts, Values, lists_of, rebuilt
from etr.moe.affinity import arithmetic, router_dtype, without_autocast
from etr.moe.config import MoEConfig
from etr.moe.context import RoutingContext
from etr.moe.experts import BANKS, ExpertParams, ExpertSizes
from etr.moe.experts.bank import Dispatch
from etr.moe.experts.nested import Nested, NestedExperts, buffers_of, empty_buffers
from etr.moe.experts.packed import WHOLE
from etr.moe.losses import mean_over_valid
from etr.moe.routing import Routing, Selection
from etr.moe.select import queue_positions, selection_of

BITS = "bits a weight"
"""What the bank counts: bits of the weights that a kept pair reads."""


@dataclass(frozen=True, kw_only=True)
class RoutedBits(Nested):
    """Experts of nested bits, before each of which a router chooses how many levels a token reads.

    A softmax over levels; the most probable one runs, in eval mode for each token by itself.
    Training runs all levels, so that the gradient of the choice compares them.
    """

    name = "routed_bits"
    summary = "experts of nested bits, of which each token reads as many as a router chooses"

    alpha: float = 0.0
    """Weight of the expected bits, mean over tokens and layers, in the loss that trains them."""
    shares: str = ""
    """Most of an expert's tokens that each level takes in training, lowest first: 0.3+0.4+0.3. The
    most probable ones have room; what is over skips the expert. Empty: all have room."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be >= 0 and finite")
        levels, shares = self.use or self.levels, self.rooms()
        if shares and (len(shares) != levels or not all(0 <= share <= 1 for share in shares)):
            raise ValueError(
                f"shares={self.shares!r} must be a share from 0 to 1 for each of {levels} levels, "
                "joined by +, such as 0.3+0.4+0.3"
            )

    def rooms(self) -> list[float]:
        """The shares as numbers; NaN where one is none."""
        try:
            return [float(share) for share in self.shares.split("+")] if self.shares else []
        except ValueError:
            return [float("nan")]

    def build(self, sizes: ExpertSizes) -> RoutedExperts:
        super().build(sizes)  # refuses what it does not take
        return RoutedExperts(sizes, self)


class RoutedExperts(NestedExperts):
    """``level_weight`` [E, K, H] and ``level_bias`` [E, K] beside the codes: logits of K levels.

    At first tokens read all levels. What watches experts sees them with all.

    Args:
        sizes: of the experts.
        config: of the bank.
    """

    config: RoutedBits
    counted = (BITS,)

    def __init__(self, sizes: ExpertSizes, config: RoutedBits) -> None:
        super().__init__(sizes, config)
        shape = (sizes.num_experts, self.num_levels)
        self.level_weight = nn.Parameter(torch.empty(*shape, sizes.hidden_size))
        self.level_bias = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, value in start_of(*self.level_weight.shape).items():
            self.get_parameter(name).data.copy_(value)

    def parameters_of_a_token(self, top_k: int) -> float:
        beside = sum(value.numel() for value in self.whole())
        return super().parameters_of_a_token(top_k) + beside

    def probs(self, x: Tensor, routing: Routing) -> Tensor:
        """Of each pair, the probability of each level, [P, K]; unused pairs read expert E - 1.

        Args:
            x: tokens, float [T, H].
            routing: their pairs.
        """
        with without_autocast(x):
            x = router_dtype(x)
            weight = self.level_weight.to(x.dtype).flatten(0, 1)
            logits = (x @ weight.T).view(len(x), *self.level_bias.shape) + self.level_bias
        expert = routing.expert.clamp_max(self.num_experts - 1)
        return logits.softmax(-1)[routing.token, expert]

    def run(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        params: Sequence[ExpertParams],
        dispatch: Dispatch,
    ) -> Tensor:
        count = self.num_levels
        probs = self.probs(x, routing)
        level = probs.argmax(-1)
        below = (self.params(x.dtype, use) for use in range(1, count))
        runs = one_hot(level, count) * self.with_room(level, probs, routing, selection)[:, None]
        weight = selection.combine_weight
        y = x * 0.0
        for number, experts in enumerate((*below, *params)):
            if self.training:  # what runs has weight 1, and every level the gradient of its share
                share = runs[:, number] + (probs - probs.detach())[:, number]
                pairs = replace(selection, combine_weight=weight * share)
            else:
                mine = runs[:, number] > 0
                alone = torch.where(mine, weight, 0.0)
                pairs = selection_of(routing, mine, alone, selection.buffer_size)
            y = y + dispatch(x, routing, pairs, experts)
        return y

    def with_room(
        self, level: Tensor, probs: Tensor, routing: Routing, selection: Selection
    ) -> Tensor:
        """Which kept pairs their level has room for, bool [P]; all in eval mode.

        Args:
            level: of each pair, int64 [P].
            probs: of levels, [P, K].
        """
        shares = self.config.rooms()
        if not self.training or not shares:
            return selection.kept
        count = self.num_experts * self.num_levels
        queue = torch.where(selection.kept, routing.expert * self.num_levels + level, count)
        place = queue_positions(queue, probs.detach().amax(-1), count)
        tokens = selection.num_tokens_per_expert.double()
        room = (tokens[:, None] * tokens.new_tensor(shares) - 1e-6).ceil().flatten()
        return selection.kept & (place < pad(room, (0, 1))[queue])

    def bits(self) -> Tensor:
        """Of each level, float [K]."""
        levels = torch.arange(self.num_levels, device=self.level_bias.device)
        return (self.config.base + levels).to(arithmetic(self.level_bias.dtype))

    def losses(
        self, x: Tensor, routing: Routing, selection: Selection, context: RoutingContext
    ) -> dict[str, Tensor]:
        if not self.config.alpha:
            return {}
        expected = (self.probs(x, routing) * self.bits()).sum(-1) * selection.kept
        tokens = expected.new_zeros(routing.num_tokens).index_add(0, routing.token, expected)
        mean = mean_over_valid(tokens / routing.top_k, routing, context.data_group)
        return {"bits": self.config.alpha * mean}

    def counters(self, x: Tensor, routing: Routing, selection: Selection) -> dict[str, Tensor]:
        level = self.probs(x, routing).argmax(-1)
        return {BITS: (self.bits()[level] * selection.kept).sum()}


def start_of(num_experts: int, levels: int, hidden_size: int) -> Values:
    """The router of bits as it starts: every token reads all levels."""
    bias = one_hot(torch.tensor(levels - 1), levels).float().expand(num_experts, -1)
    return {
        "level_weight": torch.zeros(num_experts, levels, hidden_size),
        "level_bias": bias.contiguous(),
    }


@dataclass(frozen=True, kw_only=True)
class D2Moe(OfExperts):
    """Stores each expert's matrices as a few bits and further bits one by one.

    One folder then serves at several widths: the bank's `use` says how many levels are read, and a
    level is bit for bit the same whatever lies above it.
    """

    name = "d2moe"
    summary = "experts of nested bits: one folder, read at several widths"

    base: int = 2
    """Bits of the lowest level: 1, 2, 4 or 8; 16 leaves the model as it is."""
    levels: int = 3
    """Levels that are stored; each above the lowest adds a bit to every weight."""
    group: int = 128
    """Weights of a row that share scales, at most."""
    use: int | None = None
    """Levels that the new model reads. None: all."""
    route: bool = False
    """Each token chooses how many of them it reads of each expert, by a router that starts with all
    and that etr finetune MODEL --teacher SRC trains."""
    alpha: float = 0.0
    """With route, weight of the mean bits in that training: the more, the fewer are read."""
    shares: str = ""
    """With route, most of an expert's tokens that each level takes in training: 0.3+0.4+0.3. Empty:
    all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base != WHOLE:
            self.bank()
        if not self.route and (self.alpha or self.shares):
            raise ValueError(
                f"alpha={self.alpha} and shares={self.shares!r} are of the router of bits: give "
                "route=true"
            )
        if self.protect:
            raise ValueError(f"protect={self.protect!r}: all experts of a layer have as many bits")

    def bank(self) -> Nested:
        """The bank that holds the result."""
        bank = Nested(base=self.base, levels=self.levels, group=self.group, use=self.use)
        if not self.route:
            return bank
        return RoutedBits(**vars(bank), alpha=self.alpha, shares=self.shares)

    def changes_function(self) -> str | None:
        if self.base == WHOLE:
            return None
        bits = self.base + (self.use or self.levels) - 1
        return f"experts have {bits} bits a weight"

    def plan(self, stats: Sequence[Any], layers: Sequence[MoEConfig]) -> Any:
        return {"use": [self.use or self.levels for _ in layers]}

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        if self.base == WHOLE:
            return "stores the experts as they are"
        stored = self.base + self.levels - 1
        used = ", ".join(str(self.base + use - 1) for use in dict.fromkeys(plan["use"]))
        if self.route:
            used = f"{self.base} to {used}, as a router that is to be trained chooses"
        return f"stores {stored} bits a weight of the experts and their scales; reads {used}"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, (use, layer) in enumerate(
            zip(lists_of(plan, "use", layers), layers, strict=True)
        ):
            if layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases are not taken")
            if type(use) is not int or not 1 <= use <= self.levels:
                raise ValueError(
                    f"the plan's use of layer {place} must lie between 1 and levels={self.levels}: "
                    f"{use!r}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        if self.base == WHOLE:
            return tensors
        use = plan["use"][place]
        return rebuilt(
            tensors,
            lambda values: self._stored(values) | self._router(values, use),
            lambda values: self._like(values) | self._router(values, use),
        )

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        if self.base == WHOLE:
            return layer
        return replace(layer, experts=replace(self.bank(), use=plan["use"][place]))

    def _stored(self, values: Values) -> Values:
        return {
            f"{short}_{key}": value
            for short, weights in _both(values).items()
            for key, value in buffers_of(weights, self.bank()).items()
        }

    def _router(self, values: Values, use: int) -> Values:
        """What chooses bits, at its start; nothing where nothing does."""
        if not self.route:
            return {}
        count, hidden_size, _ = values["down_proj"].shape
        dtype = arithmetic(values["down_proj"].dtype)
        return {k: v.to(dtype) for k, v in start_of(count, use, hidden_size).items()}

    def _like(self, values: Values) -> Values:
        found: Values = {}
        for short, weights in _both(values).items():
            count, rows, columns = weights.shape
            made = empty_buffers(count, rows, columns, self.bank())
            found |= {f"{short}_{key}": value for key, value in made.items()}
        return found


def _both(values: Values) -> Values:
    """Matrices [E, O, I] by the names that the bank has for them."""
    up = values["gate_up_proj"] if "gate_up_proj" in values else values["up_proj"]
    return {"up": up, "down": values["down_proj"]}


CARD = Card(
    name="d2moe",
    title="D2MoE",
    summary="experts of nested bits, read at several widths, and the order in which to load them",
    paper="2504.15299",
    level="model",
    branch="quantization",
    rows=(Row(table=TRANSFORMS, kind=D2Moe), Row(table=BANKS, kind=RoutedBits)),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Of Gaussian weights each of 3 levels has at most 0.4 of the error of the one below, and "
        "is the same bit for bit where those above are missing; loading by need ends no later than "
        "expert by expert in 200 of 200 cases, and at 12.4 where that ends at 12.8; of a small "
        "language model, routers that are trained for 40 steps read fewer bits the larger alpha "
        "is, and with alpha = 0.03 fewer than 3 at a loss below that of 3 for all, and at least "
        "0.02 below that of the same levels dealt to other pairs."
    ),
    departs=(
        "Rounded without compensation. Training runs all levels and compares them by the gradient "
        "of what was chosen; a level has room for its share of an expert's tokens, the most "
        "probable ones first, and for all unless shares are given: with the paper's 0.3, 0.4 and "
        "0.3 the loss was 0.04 higher here, at more bits. The order of loading is a function, not "
        "a server."
    ),
)
