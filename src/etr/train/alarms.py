"""What goes wrong in training without raising: named in plain words, once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MetricsRow = dict[str, Any]

DEAD_GRADIENT = 1e-12
"""Norm of a router's gradient under which nothing is learned."""
MAX_EXCESS_DROP = 0.05
"""Share of choices dropped beyond what the capacity explains."""
EVEN_LOSS = 0.05
"""A balance loss this close to its minimum of 1 says that the load is even."""
UNEVEN_LOAD = 1.0
"""A MaxVio that says that it is not: one expert has twice the mean load."""
MAX_KEPT_GAP = 0.02
"""Difference between the shares kept in evaluation and in training."""
REARM = 0.7
"""An alarm is armed again when what raised it has fallen under this part of its limit."""
RECENT_STEPS = 8
"""Steps over which training's kept share is averaged: few, since a schedule moves it."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One alarm."""

    name: str
    """Kind: collapsed_expert, dead_router_gradient, rising_drop_rate, balance_loss_blind or
    thresholds_out_of_date."""
    layer: int | None
    """Number of the MoE layer, or None for the whole model."""
    message: str
    """What happened, in plain words."""


class Alarms:
    """Reads the rows of a run in order and says what is wrong.

    An alarm is raised once, when its condition has held for `patience` rows in a row, and again
    only after it has been clear for as many. State depends on the rows alone, so a resumed run
    reads those it has and goes on.

    Args:
        even_losses: weights of the losses that are 1 where the load is even, by name.
        patience: steps for which a condition must hold; evaluations need one.
    """

    def __init__(self, even_losses: Mapping[str, float], *, patience: int = 20) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1 step")
        self._even_losses, self._patience = even_losses, patience
        self._switches: dict[tuple[Any, ...], _Switch] = {}
        self._drops = _ExcessDrop(patience)
        self._kept: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, row: MetricsRow) -> list[Alarm]:
        """Read the next row of metrics; returns the alarms that it raises."""
        if row.get("kind") == "train" and row.get("layers"):
            self._kept.append(_kept(row, "kept_fraction"))
            return [
                *self._collapsed(row),
                *self._dead(row),
                *self._dropping(row),
                *self._blind(row),
            ]
        if row.get("kind") == "eval" and row.get("selection") == "threshold" and self._kept:
            return self._outdated(row)
        return []

    def _collapsed(self, row: MetricsRow) -> list[Alarm]:
        found = []
        for layer, counts in enumerate(row["layers"]):
            experts = [
                expert
                for expert, count in enumerate(counts["num_tokens_per_expert"])
                if self._rises(("collapsed", layer, expert), count == 0)
            ]
            if experts:
                names = ", ".join(map(str, experts))
                message = (
                    f"layer {layer}: no token reached expert {names} for {self._patience} steps; "
                    "raise the balance loss's weight, or try another seed"
                )
                found.append(Alarm(name="collapsed_expert", layer=layer, message=message))
        return found

    def _dead(self, row: MetricsRow) -> list[Alarm]:
        found = []
        for layer, values in enumerate(row["layers"]):
            norm = values.get("router_grad_norm")
            if norm is None:  # a frame without parameters has nothing to learn
                continue
            if self._rises(("dead", layer), norm < DEAD_GRADIENT):
                message = (
                    f"layer {layer}: the router's gradient was 0 for {self._patience} steps, so "
                    "it learns nothing; check normalize, top_k and frozen parameters"
                )
                found.append(Alarm(name="dead_router_gradient", layer=layer, message=message))
        return found

    def _dropping(self, row: MetricsRow) -> list[Alarm]:
        excess = self._drops.update(row)
        if excess is None:
            return []
        if not self._rises(
            ("drop",), excess > MAX_EXCESS_DROP, excess < REARM * MAX_EXCESS_DROP, patience=1
        ):
            return []
        message = (
            f"{row['drop_rate']:.1%} of choices are dropped, about {excess:.1%} more than the "
            "capacity explains: experts' load has become less even"
        )
        return [Alarm(name="rising_drop_rate", layer=None, message=message)]

    def _blind(self, row: MetricsRow) -> list[Alarm]:
        found = []
        for name, weight in self._even_losses.items():
            if name not in row["losses"]:
                continue
            loss, violation = row["losses"][name] / weight, row["max_violation"]
            if self._rises(
                ("blind", name),
                abs(loss - 1) < EVEN_LOSS and violation > UNEVEN_LOAD,
                abs(loss - 1) > EVEN_LOSS / REARM or violation < REARM * UNEVEN_LOAD,
            ):
                message = (
                    f"the balance loss is {loss:.2f}, as if the load were even, but the most "
                    f"loaded expert has {1 + violation:.1f} times the mean: probabilities are too "
                    "flat for the loss to see it; raise its weight or the router's temperature"
                )
                found.append(Alarm(name="balance_loss_blind", layer=None, message=message))
        return found

    def _outdated(self, row: MetricsRow) -> list[Alarm]:
        training = sum(self._kept) / len(self._kept)
        served = _kept(row, "kept_fraction_eval")
        gap = abs(served - training)
        if not self._rises(
            ("thresholds",), gap > MAX_KEPT_GAP, gap < REARM * MAX_KEPT_GAP, patience=1
        ):
            return []
        message = (
            f"evaluation keeps {served:.3f} pairs per choice where training keeps {training:.3f}: "
            "thresholds lag behind the weights, or the held-out text differs; "
            "`etr calibrate` sets them anew"
        )
        return [Alarm(name="thresholds_out_of_date", layer=None, message=message)]

    def _rises(
        self,
        key: tuple[Any, ...],
        bad: bool,
        clear: bool | None = None,
        patience: int | None = None,
    ) -> bool:
        switch = self._switches.get(key)
        if switch is None:
            switch = self._switches[key] = _Switch(patience or self._patience)
        return switch.update(bad, not bad if clear is None else clear)


def _kept(row: MetricsRow, share: str) -> float:
    """Kept pairs per choice, which the share hides where experts choose; older rows lack it."""
    return float(row["kept_per_choice"] if "kept_per_choice" in row else row[share])


class _Switch:
    """Turns on after `patience` bad rows in a row, off after as many clear ones."""

    def __init__(self, patience: int) -> None:
        self._patience, self._on, self._rows = patience, False, 0

    def update(self, bad: bool, clear: bool) -> bool:
        """Whether it turns on at this row."""
        self._rows = self._rows + 1 if (clear if self._on else bad) else 0
        if self._rows < self._patience:
            return False
        self._on, self._rows = not self._on, 0
        return self._on


class _ExcessDrop:
    """Share of choices dropped beyond what the capacity would drop of the most even load so far.

    All quantities are running means, so that one odd batch raises nothing.
    """

    def __init__(self, patience: int) -> None:
        self._patience, self._rows = patience, 0
        self._decay = 1 - 1 / patience
        self._shares = self._best = torch.zeros(0, 0)
        self._factor = self._drop = 0.0

    def update(self, row: MetricsRow) -> float | None:
        """Excess at this row; None where nothing limits, and before `patience` rows."""
        layers = row["layers"]
        if any(layer.get("capacity") is None for layer in layers):
            return None
        load = torch.tensor([layer["num_choices_per_expert"] for layer in layers]).double()
        shares = (load / load.sum(-1, keepdim=True).clamp_min(1)).sort(-1).values
        if shares.shape != self._shares.shape:  # the first row
            self._rows, self._best = 0, self._best[:0]
        self._rows += 1
        # A plain mean at first, then an exponential one.
        decay = min(self._decay, 1 - 1 / self._rows)
        self._shares = shares if self._rows == 1 else self._shares.lerp(shares, 1 - decay)
        self._factor += (1 - decay) * (row["capacity_factor"] - self._factor)
        self._drop += (1 - decay) * (row["drop_rate"] - self._drop)
        if self._rows < self._patience:
            return None
        if not len(self._best) or _dropped(self._shares, 1.0) < _dropped(self._best, 1.0):
            self._best = self._shares
        return self._drop - _dropped(self._best, self._factor)


def _dropped(shares: Tensor, factor: float) -> float:
    """Share of choices over capacity, mean over layers, for load shares [layers, E]."""
    return float((shares - factor / shares.shape[-1]).clamp_min(0).sum(-1).mean())
