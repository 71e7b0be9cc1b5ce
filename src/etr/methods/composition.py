"""Composition of Experts: a prompt's category, and a language model for each (arXiv 2412.01868)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.model.composition import (
    COMPOSITIONS,
    Learned,
    PromptComposition,
    Prompts,
    check_shapes,
)
from etr.moe.checked import check_types
from etr.systems.program import Program

SECONDS = 60.0
"""Most time for the integer program."""
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class CompositionOfExperts(PromptComposition):
    """Two steps: a category router over a prompt's tokens, then the model of that category.

    Which model is best for one prompt is a noisy label; the mean over a category is not. The map
    from categories to models has the best mean score of all whose models fit the budget together.
    """

    name = "composition"
    summary = "a prompt goes to the language model of its category; models fit a budget together"

    budget: float | None = None
    """Most bytes of the weights of all kept models together, MB (10^6). None: no bound."""
    max_entropy: float | None = None
    """Entropy of a prompt's category, nats, above which the kept model that is best on the whole
    answers. None: never."""
    penalty: float = 0.01
    """Of the squared weights of the category router, a logistic regression on how often each token
    stands in a prompt."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("budget", "max_entropy", "penalty"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must be >= 0")

    def learn(
        self, prompts: Prompts, scored: Prompts, sizes: Tensor, vocab_size: int
    ) -> tuple[list[int], Learned]:
        assert scored.score is not None  # members were run on these
        mean, count = means(scored.score.double(), scored.category)
        budget = None if self.budget is None else self.budget * MB
        member = best_map(mean, count, sizes, budget)
        kept = member.unique()
        overall = (count[:, None] * mean).sum(0)[kept]
        x = features(prompts.ids, torch.ones_like(prompts.ids, dtype=torch.bool), vocab_size)
        weight, bias = logistic(x, prompts.category, len(count), self.penalty)
        learned = {"weight": weight, "bias": bias, "member": torch.searchsorted(kept, member)}
        return kept.tolist(), {**learned, "general": overall.argmax()}

    def choose(self, learned: Learned, ids: Tensor, valid: Tensor) -> Tensor:
        x = features(ids, valid, learned["weight"].shape[1])
        logits = x @ learned["weight"].T + learned["bias"]
        member = learned["member"][logits.argmax(-1)]
        if self.max_entropy is None:
            return member
        unsure = torch.special.entr(logits.softmax(-1)).sum(-1) > self.max_entropy
        return member.where(~unsure, learned["general"])

    def check(self, learned: Learned, num_members: int, vocab_size: int) -> None:
        count = len(learned.get("bias", ()))
        shapes = {"weight": (count, vocab_size), "bias": (count,), "member": (count,)}
        check_shapes(learned, {**shapes, "general": ()})
        for name in ("member", "general"):
            found = learned[name].unique().tolist()
            if not set(found) <= set(range(num_members)):
                raise ValueError(f"learned tensor {name!r} names members {found} of {num_members}")


def features(ids: Tensor, valid: Tensor, vocab_size: int) -> Tensor:
    """Square roots of how often each token stands in a prompt, rows of length 1, float64 [N, V].

    Args:
        ids: int64 [N, S].
        valid: False on padding, bool [N, S].
    """
    counts = torch.zeros(len(ids), vocab_size, dtype=torch.float64)
    counts.scatter_add_(1, ids.where(valid, 0), valid.double())
    return F.normalize(counts.sqrt(), dim=-1)


def logistic(x: Tensor, label: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weights [C, F] and biases [C], float64.

    Args:
        x: float64 [N, F].
        label: int64 [N].
        penalty: of half the squared weights, beside the summed cross-entropy.
    """
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = F.cross_entropy(x @ weight.T + bias, label, reduction="sum")
        found = nats + penalty / 2 * weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def means(score: Tensor, category: Tensor) -> tuple[Tensor, Tensor]:
    """Mean scores of each category, [C, M], and its number of prompts, int64 [C].

    Args:
        score: of each member on each prompt, [N, M].
        category: int64 [N]; none is without a prompt.
    """
    count = torch.bincount(category)
    total = score.new_zeros(len(count), score.shape[1]).index_add(0, category, score)
    return total / count[:, None], count


def best_map(score: Tensor, count: Tensor, sizes: Tensor, budget: float | None) -> Tensor:
    """The member of each category, int64 [C], of the best score that a budget allows.

    Args:
        score: mean of each member in each category, float64 [C, M].
        count: prompts of each category, [C].
        sizes: of each member, [M].
        budget: most size of all members that are kept, in the same unit; None for no bound.
    Raises:
        ValueError: the smallest member is greater than the budget.
    """
    if budget is None or budget >= float(sizes.sum()):
        return score.argmax(1)
    if budget < float(sizes.min()):
        raise ValueError(
            f"budget={budget / MB:g} MB is less than the smallest model takes, "
            f"{float(sizes.min()) / MB:g} MB"
        )
    program = Program()
    kept = program.choices(len(sizes))
    chosen = program.choices(*score.shape, costs=-count[:, None] * score)
    for row in chosen:
        program.sums_to(row, 1)
        for variable, member in zip(row, kept, strict=True):
            program.row([(variable, 1.0), (member, -1.0)], high=0.0)
    unit = float(sizes.max())  # or bytes would be too great beside the ones of the other rows
    program.row(zip(kept, (sizes / unit).tolist(), strict=True), high=budget / unit)
    found = program.solve(SECONDS)
    if found is None:
        raise ValueError(f"no map of {len(count)} categories was found in {SECONDS:.0f} s")
    return score.masked_fill(found[kept] < 0.5, -torch.inf).argmax(1)


CARD = Card(
    name="composition",
    title="Composition of Experts",
    summary=CompositionOfExperts.summary,
    paper="2412.01868",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=COMPOSITIONS, kind=CompositionOfExperts),),
    moves=("loss", "memory"),
    claim=(
        "In the worked table budgets 2, 9, 11 and 18 give 0.525, 0.7, 0.7875 and 0.8125, and the "
        "program's map has the value of the best of all subsets in 20 random ones; where scores "
        "are noisy, two steps beat labels of single prompts by 0.01 and the best single model by "
        "0.05 or more, over 10 seeds; and four models of one built-in domain each, chosen by "
        "prompts of 128 bytes, lose 0.02 nats or less to the model of each text's own domain."
    ),
    departs=(
        "Scores are minus the loss of what follows a prompt, not a judge's; the category router "
        "sees how often each token stands in a prompt, not an embedding; members share one "
        "vocabulary. Models are in memory together: serving from three tiers is not covered."
    ),
)
