"""Expert-router coupling: an expert answers its own router row more than others (2512.23447)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.moe.experts import GATED
from etr.moe.losses import LOSSES, Loss, LossInput, whole_over_group
from etr.moe.routers import ROUTERS, TokenChoice
from etr.moe.routers.hashing import mix


@dataclass(frozen=True, kw_only=True)
class RouterCoupling(Loss):
    """How much more an expert's gate answers rows of the router than `alpha` times its own.

    A row stands for the expert's tokens, and is perturbed within half the way to the nearest other
    row; the perturbation is another in each step, and the same on every rank. What it costs does
    not grow with the batch.
    """

    name = "router_coupling"
    own = 1.0
    needs = ("has_directions",)
    needs_experts = True

    alpha: float = 1.0
    """Share of an expert's answer to its own row that any other answer may reach, no unit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} of loss {self.name!r} must be >= 0")

    @property
    def is_mean(self) -> bool:
        return True  # whatever the batch

    @property
    def needs_past(self) -> bool:
        return True  # the step's perturbation

    def __call__(self, given: LossInput) -> Tensor:
        params = given.experts
        assert params is not None
        width = params.down.shape[-1]
        gate = params.up[:, :width] if params.activation in GATED else params.up
        rows = given.router.directions(gate.dtype)[: given.num_experts].to(gate.device)  # type: ignore[operator]
        noise = _noise(rows, given.step, given.layer_index)
        rows = rows * (1 + noise * reach(rows)[:, None])
        own = vector_norm(torch.einsum("jfh,ih->ijf", gate, rows), dim=-1)
        after = len(rows) - given.first_expert - own.shape[1]
        answers = F.pad(own, (given.first_expert, after))  # of the experts on other ranks: 0
        return coupling(whole_over_group(answers, given.expert_group), self.alpha)


def reach(rows: Tensor) -> Tensor:
    """How far, relative to its length, each row [E, H] is from halfway to the nearest other, [E].

    0 for a zero row, and for the only one.
    """
    if len(rows) < 2:
        return rows.new_zeros(len(rows))
    alone = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    apart = vector_norm(rows[:, None] - rows, dim=-1).masked_fill(alone, torch.inf).amin(-1)
    length = vector_norm(rows, dim=-1)
    return torch.where(length > 0, apart / (2 * torch.where(length > 0, length, 1.0)), 0.0)


def coupling(answers: Tensor, alpha: float) -> Tensor:
    """Excess of answers over `alpha` times an expert's own, over E squared.

    Args:
        answers: how much expert j answers row i, [E, E].
    Returns:
        scalar; 0 for a single expert.
    """
    own = alpha * answers.diagonal()[:, None]
    excess = (answers - own).relu() + (answers.T - own).relu()
    return (excess.sum() - excess.diagonal().sum()) / len(answers) ** 2


def _noise(rows: Tensor, step: Tensor | int, layer_index: int) -> Tensor:
    """Even noise in [-1, 1), [E, H], that (step, layer, place) alone decide."""
    place = torch.arange(rows.numel(), device=rows.device).view(rows.shape)
    start = torch.as_tensor(step, device=rows.device)
    salt = mix(start * 1000003, layer_index * 104729)
    return mix(place, salt).to(rows.dtype) / 2**30 - 1


CARD = Card(
    name="router_coupling",
    title="Expert-router coupling",
    summary="a loss by which experts answer their own row of the router more than others do",
    paper="2512.23447",
    level="model",
    branch="training",
    rows=(Row(table=LOSSES, kind=RouterCoupling), Row(table=ROUTERS, kind=TokenChoice)),
    options={"router": "token_choice", "losses": "balance,router_coupling"},
    moves=("loss", "load"),
    claim=(
        "The loss is 0 where no answer exceeds alpha times the expert's own, and 0.75 for 4 "
        "experts that answer every row alike at alpha = 0.5; it is the same for every batch, and "
        "training on it alone lowers it, at alpha = 0.5 and at 1."
    ),
    departs=(
        "With block vectors, which are fixed, those are the rows, and experts alone learn. In 40 "
        "steps on it alone the loss fell from 0.48 to 0.65 to 0 at alpha = 0.5, and from 0.16 to "
        "0.22 to 0 at 1 (3 seeds)."
    ),
)
