"""Experts of low rank with some whole rows beside it (arXiv 2310.01334, 2306.11222)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe.checked import check_count, meanings
from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.low_rank import LowRankExperts
from etr.moe.experts.runs import numbers_of
from etr.moe.experts.weights import ExpertParams
from etr.moe.learner import Learner, Step
from etr.moe.rows import Index

BETA = 0.85
"""Part of a row's score that survives an optimizer step."""
STARTS, ENDS = 0.1, 0.7
"""Shares of training between which rows go, as a cube: most of them early."""


@dataclass(frozen=True, kw_only=True)
class LowRankRows(BankConfig):
    """Experts whose matrices are L R + S, of which S has some whole rows and is 0 elsewhere.

    Where it is told to leave fewer rows, training makes those 0 that the loss misses least.
    """

    name = "low_rank_rows"
    summary = "experts of low rank, and whole rows beside it, of which training leaves some"
    undivided = "rows of all experts are one tensor"

    rank: int = 1
    """Rank of L R, of every matrix."""
    rows: str = ""
    """Rows of S of all experts, for the gate (where there is one), up and down projection, as runs
    of equal numbers: ``2x96+40``. Empty: all."""
    of: str = ""
    """Which weights each choice means, numbers joined by +: 0+1+0+2. Empty: its own."""
    left: float = 1.0
    """Share of the numbers of S that training leaves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must be at least 0")
        if not 0 <= self.left <= 1:
            raise ValueError(f"left={self.left} must be a share of the rows, from 0 to 1")
        numbers_of(self.rows, "rows")
        meanings(self.of, "of")

    def check(self, num_experts: int, hidden_size: int) -> None:
        check_count(meanings(self.of, "of"), num_experts, f"of={self.of!r}")

    def build(self, sizes: ExpertSizes) -> Bank:
        if sizes.bias:
            raise ValueError("experts='low_rank_rows': experts with biases are not taken")
        return LowRankRowsExperts(sizes, self)


class LowRankRowsExperts(LowRankExperts):
    """Factors as `LowRankExperts` has them, without a base, for D different experts.

    Beside them, for each matrix [O, I], ``gate_rows`` [n, I] and ``gate_index`` int32 [n], which
    says where they belong among the D * O rows of all experts.

    Args:
        sizes: of the experts, as many as choices.
        config: of the bank.
    """

    def __init__(self, sizes: ExpertSizes, config: LowRankRows) -> None:
        nn.Module.__init__(self)
        self.activation, self.clamp = sizes.activation, sizes.clamp
        of = meanings(config.of, "of") or list(range(sizes.num_experts))
        count = max(of) + 1
        self.add_factors(sizes, [config.rank] * count, of)
        self.index = Index(of)
        most = [count * rows for rows, _ in self.shapes.values()]
        counts = numbers_of(config.rows, "rows") or most
        if len(counts) != len(most) or any(n > m for n, m in zip(counts, most, strict=True)):
            raise ValueError(
                f"rows={config.rows!r} must be a number for each of {', '.join(self.shapes)}, up "
                f"to {', '.join(map(str, most))}"
            )
        for (name, (_, columns)), rows in zip(self.shapes.items(), counts, strict=True):
            self.register_parameter(f"{name}_rows", nn.Parameter(torch.empty(rows, columns)))
            self.register_buffer(f"{name}_index", torch.arange(rows, dtype=torch.int32))
        self.pruner = RowPruner(self.rows, config.left) if config.left < 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, (_, columns) in self.shapes.items():
            nn.init.normal_(self.get_parameter(f"{name}_left"), std=columns**-0.5)
            nn.init.zeros_(self.get_parameter(f"{name}_right"))
        for value in self.rows().values():
            nn.init.normal_(value, std=value.shape[1] ** -0.5)

    def rows(self) -> dict[str, nn.Parameter]:
        """S of each matrix, [n, I]."""
        return {name: self.get_parameter(f"{name}_rows") for name in self.shapes}

    @property
    def size_of_one(self) -> float:
        """Of the matrices that run."""
        return float(sum(math.prod(shape) for shape in self.shapes.values()))

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def parameters_of_a_token(self, top_k: int) -> float:
        """With as many rows as an expert has on average."""
        count, factors = len(self.ranks), sum(map(sum, self.shapes.values()))
        rows = sum(value.numel() for value in self.rows().values()) / count
        return (rows + factors * self.ranks[0]) * min(top_k, count)

    def params(self, dtype: torch.dtype) -> ExpertParams:
        up = torch.cat([self._whole(name, dtype) for name in self.halves], dim=1)
        down = self._whole("down", dtype)
        return ExpertParams(up=up, down=down, activation=self.activation, clamp=self.clamp)

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """One matrix of every choice, [E, O, I]."""
        found = torch.stack(self.products(name, dtype))
        index, rows = self.get_buffer(f"{name}_index"), self.get_parameter(f"{name}_rows")
        flat = found.flatten(0, 1).index_add(0, index, rows.to(dtype))
        every = flat.view_as(found)
        return every if len(every) == len(self.of) else every[self.index.on(every.device)]


class RowPruner(Learner):
    """Makes rows 0 over training, those first that the loss misses least.

    A row's score is the mean of its numbers' |weight * gradient|, as a running mean over optimizer
    steps; rows of all experts and matrices of a layer compete. A row that a step moves from 0 again
    may come back.

    Args:
        rows: gives the rows, [n, I] of each matrix by name.
        left: share of their numbers that is left at the end.
    """

    def __init__(self, rows: Callable[[], Mapping[str, nn.Parameter]], left: float) -> None:
        super().__init__()
        self._rows, self._left = rows, left
        for name, value in rows().items():
            self.register_state(f"{name}_score", (len(value),), 0.0)

    def after_step(self, step: Step) -> None:
        for name, value in self._rows().items():
            if value.grad is not None:
                new = (value * value.grad).abs().mean(1)
                self.get_buffer(f"{name}_score").mul_(BETA).add_((1 - BETA) * new)

    @torch.no_grad()
    def set_progress(self, progress: float) -> None:
        share, rows = share_at(progress, self._left), self._rows()
        scores = torch.cat([self.get_buffer(f"{name}_score") for name in rows])
        if share >= 1 or not scores.any():  # nothing is known of them yet
            return
        cost = torch.cat([scores.new_full((len(v),), v.shape[1]) for v in rows.values()]).double()
        order = scores.argsort(descending=True, stable=True)
        stays = cost[order].cumsum(0) <= share * cost.sum() + 1e-6
        mask = torch.empty_like(stays).scatter(0, order, stays)
        for value, kept in zip(
            rows.values(), mask.split([len(v) for v in rows.values()]), strict=True
        ):
            value.masked_fill_(~kept[:, None], 0.0)


def share_at(progress: float, left: float) -> float:
    """Share of S that is left at a progress of training, from 0 to 1."""
    to_go = 1 - (progress - STARTS) / (ENDS - STARTS)
    return left + (1 - left) * min(1.0, max(0.0, to_go)) ** 3
