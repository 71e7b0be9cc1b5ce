"""Mixed-integer programs, built variable by variable and row by row; SciPy's HiGHS solves them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class Program:
    """A cost to minimise over variables that are at least 0 and at most 1, or without an end."""

    def __init__(self) -> None:
        self._cost: list[float] = []
        self._whole: list[bool] = []
        self._entries: list[tuple[int, int, float]] = []  # row, variable, factor
        self._bounds: list[tuple[float, float]] = []

    def choices(self, *shape: int, costs: Tensor | None = None) -> Tensor:
        """Variables that are 0 or 1: their numbers, int64 of that shape.

        Args:
            costs: of each, of that shape; None for 0.
        """
        found = self._add(shape, whole=True, cost=0.0)
        if costs is not None:
            self._cost[int(found.flatten()[0]) :] = costs.flatten().tolist()
        return found

    def amounts(self, *shape: int, cost: float = 0.0) -> Tensor:
        """Variables from 0 on, each with a cost."""
        return self._add(shape, whole=False, cost=cost)

    def row(
        self,
        terms: Iterable[tuple[Tensor | int, float]],
        low: float = -math.inf,
        high: float = math.inf,
    ) -> None:
        """The sum of variables times factors lies in [low, high]."""
        number = len(self._bounds)
        self._bounds.append((low, high))
        self._entries += [(number, int(variable), factor) for variable, factor in terms]

    def sums_to(self, variables: Tensor, low: float, high: float | None = None) -> None:
        """The sum of some variables is `low`, or lies in [low, high]."""
        self.row([(v, 1.0) for v in variables.flatten()], low, low if high is None else high)

    def solve(self, seconds: float, gap: float = 0.0) -> Tensor | None:
        """Values of all variables, float64; the best that was found in time, None where none was.

        Args:
            seconds: most time to take.
            gap: how far from the best is near enough, relative to it.
        """
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        row, column, factor = zip(*self._entries, strict=True)
        low, high = zip(*self._bounds, strict=True)
        whole = np.array(self._whole)
        shape = (len(low), len(whole))
        found = milp(
            np.array(self._cost),
            integrality=whole,
            bounds=Bounds(0, np.where(whole, 1.0, np.inf)),
            constraints=LinearConstraint(csr_array((factor, (row, column)), shape), low, high),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        return None if found.x is None else torch.from_numpy(found.x)

    def _add(self, shape: tuple[int, ...], *, whole: bool, cost: float) -> Tensor:
        first, size = len(self._cost), math.prod(shape)
        self._cost += [cost] * size
        self._whole += [whole] * size
        return torch.arange(first, first + size).view(shape)
