"""Losses by name, and what a layer's options say about them: rows, text, or a `LossConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from etr.moe.checked import check_types
from etr.moe.losses.balance import Balance
from etr.moe.losses.base import AuxMode, Loss
from etr.moe.losses.locality import Locality
from etr.moe.losses.pool import PoolBalance
from etr.moe.losses.z import Z
from etr.moe.routers import RouterConfig
from etr.moe.table import Table, config_to_dict

LOSSES: Table[Loss] = Table("loss", (Balance, Z, Locality, PoolBalance))
"""Losses by name."""

WEIGHTS = {"balance": "aux_alpha", "z": "z_beta", "locality": "locality_mu"}
"""Fields of `LossConfig` that weigh a loss, by the loss's name."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Losses as flat options, or by `losses` as one text."""

    aux_alpha: float | None = None
    """Weight of the balance loss, no unit. None: the router's own (0.01, or 0 where experts choose
    or the router has no probabilities)."""
    aux_mode: AuxMode = "ranks"
    """Whose choices count as load. micro: this rank's micro-batch. ranks: summed over data ranks.
    running: plus the step's earlier micro-batches. previous: the last optimizer step's."""
    z_beta: float = 0.0
    """Weight of the mean squared log-sum-exp of the logits, no unit."""
    locality_mu: float | None = None
    """Weight of the locality loss, no unit. None: 0.01 with more than one node, else 0."""
    locality_epsilon: float = 0.1
    """Share of the target that is spread over all experts; 0 would make the divergence infinite."""
    losses: str | None = None
    """Every loss with its options, in the place of the options above: balance:mode=running,
    z:weight=1e-3. None: what those say."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in WEIGHTS.values():
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must be >= 0")
        if not 0 < self.locality_epsilon <= 1:
            raise ValueError(f"locality_epsilon={self.locality_epsilon} must lie in (0, 1]")
        if self.losses is None:
            return
        parse_losses(self.losses)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "losses" and value != field.default:
                raise ValueError(
                    f"losses={self.losses!r} names every loss with its options, so that "
                    f"{field.name}={value!r} beside it would be ignored; write it into the text"
                )

    def rows(self) -> tuple[Loss, ...]:
        """The losses that this means."""
        if self.losses is not None:
            return parse_losses(self.losses)
        return (
            Balance(weight=self.aux_alpha, mode=self.aux_mode),
            Z(weight=self.z_beta),
            Locality(weight=self.locality_mu, epsilon=self.locality_epsilon),
        )


Losses = LossConfig | tuple[Loss, ...] | str
"""What may be said of a layer's losses."""


def parse_losses(text: str) -> tuple[Loss, ...]:
    """Read ``name:option=value,option=value,name,name:...``; empty for no loss.

    Raises:
        ValueError: a name or an option is unknown, a value is refused, or a name comes twice.
    """
    rows: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        head, equals, _ = part.partition("=")
        if equals and ":" not in head and rows:  # one more option of the loss before
            rows[-1] += ("," if ":" in rows[-1] else ":") + part
        else:
            rows.append(part)
    return loss_rows(tuple(LOSSES.parse(row) for row in rows))


def loss_rows(losses: Losses) -> tuple[Loss, ...]:
    """The losses of a layer.

    Raises:
        ValueError: as `parse_losses`.
    """
    if isinstance(losses, str):
        return parse_losses(losses)
    rows = losses.rows() if isinstance(losses, LossConfig) else tuple(losses)
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"losses name {label!r} {labels.count(label)} times; once is enough")
    return rows


def reweighted(losses: Losses, name: str, weight: float) -> Losses:
    """The same losses with another weight of one of them, which is added where it is not there."""
    if isinstance(losses, LossConfig) and losses.losses is None and name in WEIGHTS:
        changes: dict[str, Any] = {WEIGHTS[name]: weight}
        return dataclasses.replace(losses, **changes)
    rows = loss_rows(losses)
    if all(row.name != name for row in rows):
        return (*rows, LOSSES[name](weight=weight))
    return tuple(
        dataclasses.replace(row, weight=weight) if row.name == name else row for row in rows
    )


def check_losses(losses: Losses, router: RouterConfig) -> None:
    """Refuse a loss that has no meaning for a router.

    Raises:
        ValueError: names the loss, its weight and what the router lacks.
    """
    flat = isinstance(losses, LossConfig) and losses.losses is None
    for row in loss_rows(losses):
        reason = row.lacks(router.traits)
        if row.weight_for(router.traits) and reason is not None:
            what = f"losses.{WEIGHTS[row.name]}" if flat else f"losses: {row.name}:weight"
            raise ValueError(f"{what}={row.weight}: {reason.format(repr(router.name))}; use 0")


def losses_to_plain(losses: Losses) -> Any:
    """JSON-ready values, of which `losses_from_plain` makes the same losses."""
    if isinstance(losses, LossConfig) and losses.losses is None:
        return {k: v for k, v in dataclasses.asdict(losses).items() if k != "losses"}
    return [config_to_dict(row) for row in loss_rows(losses)]


def losses_from_plain(value: Any) -> Any:
    """Inverse of `losses_to_plain`; what is not plain stays as it is."""
    if isinstance(value, dict):
        return LossConfig(**value)
    if isinstance(value, list):
        return tuple(LOSSES.from_dict(row) if isinstance(row, dict) else row for row in value)
    return value
