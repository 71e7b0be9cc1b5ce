"""Default MoE: the mean output of an expert stands in where it does not run (arXiv 2504.12463)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.experts import BANKS, BankConfig, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.learner import Learner, Seen, Step
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class Defaults(BankConfig):
    """Equal experts; where one does not run for a token, its running mean output is added instead.

    It is weighed by the router's probability, through which the router learns of experts that did
    not run. The vectors have no gradient; they move once per optimizer step, by the tokens of all
    layers and inner steps that share the bank, for which training runs the chosen experts a second
    time.
    """

    name = "defaults"
    summary = "equal experts, whose mean outputs stand in where they do not run"
    undivided = "the mean outputs of all experts are taken where the tokens are"
    of_gates = "weighs what does not run by probabilities, so that experts must weigh theirs"

    decay: float = 0.9
    """Part of a mean output that survives one optimizer step in which its expert ran."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1)")

    @property
    def needs(self) -> dict[str, str]:
        why = "weighs experts that do not run by their probability"
        return dict.fromkeys(("has_probs", "gates_are_probs"), why)

    def build(self, sizes: ExpertSizes) -> DefaultExperts:
        return DefaultExperts(sizes, self.decay)


class MeanOutputs(Learner):
    """Running mean output of each expert, float32 [E, H]; 0 before it first runs.

    Args:
        num_experts: E.
        hidden_size: H.
        decay: part that survives one step.
    """

    mean: Tensor
    known: Tensor

    def __init__(self, num_experts: int, hidden_size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_state("mean", (num_experts, hidden_size), 0.0)
        self.register_state("known", (num_experts,), 0, torch.int64)

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        if seen.output_sums is None:
            raise ValueError(
                "experts='defaults' learns from what experts make: give `stats` the tokens x, or "
                "learns=False"
            )
        return {"output_sums": seen.output_sums()}

    def after_step(self, step: Step) -> None:
        ran = step.counters["num_tokens_per_expert"][:, None]
        found = step.counters["output_sums"] / ran.clamp_min(1)
        moved = self.decay * self.mean + (1 - self.decay) * found
        moved = torch.where(self.known[:, None] > 0, moved, found)
        self.mean.copy_(torch.where(ran > 0, moved, self.mean))
        self.known += ran[:, 0] > 0


class DefaultExperts(Experts):
    """Experts, and what stands in for them.

    Args:
        sizes: of the experts.
        decay: see `MeanOutputs`.
    """

    def __init__(self, sizes: ExpertSizes, decay: float) -> None:
        super().__init__(sizes)
        self.default = MeanOutputs(sizes.num_experts, sizes.hidden_size, decay)

    def idle(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor:
        assert routing.probs is not None
        absent = ~selection.selection_map(routing) & routing.valid_mask[:, None]
        weight = torch.where(absent, routing.probs, 0.0).to(x.dtype)
        return weight @ self.default.mean.to(x.dtype)


CARD = Card(
    name="default_moe",
    title="Default MoE",
    summary="every expert has a gradient: its running mean output stands in where it does not run",
    paper="2504.12463",
    level="model",
    branch="training",
    rows=(Row(table=BANKS, kind=Defaults),),
    options={
        "experts": "defaults",
        "router": "token_choice",
        "normalize": "none",
        "capacity": "none",
    },
    against="token_choice/capacity=none",
    moves=("loss", "load"),
    claim=(
        "In a model trained by top_k = 1 or 2 of 8 alone the router's gradient with mean outputs "
        "is nearer to that with all experts run: its cosine is higher than without, in each of 3 "
        "seeds."
    ),
    departs=(
        "An expert's first mean is taken whole, and means move after the optimizer step, from the "
        "sums of all ranks and micro-batches. No gain of the loss is claimed: none was seen, and "
        "where a model trains with them the cosine is not higher either."
    ),
)
