"""Named variants of one training run, written in a line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from etr.methods import options_of
from etr.moe import LossConfig
from etr.table import value_of
from etr.train.config import RoutingOptions, TrainConfig

TEXTS = ("router", "capacity", "losses")
"""Fields that stay text."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A router and its options under a name."""

    name: str
    """Name in tables and figures."""
    changes: dict[str, Any]
    """Fields of RoutingOptions or LossConfig that differ from the common config."""
    steps: int | None = None
    """Optimizer steps, if not the common number."""

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The common config with this variant's changes."""
        losses = {f.name for f in dataclasses.fields(LossConfig)}
        inner = {k: v for k, v in self.changes.items() if k in losses}
        outer = {k: v for k, v in self.changes.items() if k not in losses}
        routing = config.model.routing
        routing = dataclasses.replace(
            routing, losses=dataclasses.replace(routing.losses, **inner), **outer
        )
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, routing=routing),
            steps=self.steps or config.steps,
        )


def parse_variant(text: str) -> Variant:
    """Read ``[NAME=]ROUTER[:options][/field=value]...``.

    ROUTER is a method, which stands for all its options, or a router. A field is one of
    RoutingOptions or LossConfig, or `steps`; ``capacity`` and ``losses`` may carry their own
    options. Examples: ``baseline``, ``etr``, ``loss_free_balance:bias_rate=0.01``,
    ``etr-0.6=etr:frame=orthonormal/capacity=factor:capacity_factor=0.6``,
    ``etr/losses=balance:mode=running,z:weight=1e-3``.

    Raises:
        ValueError: an unknown name or field, or a part that does not read field=value.
    """
    head, *parts = text.split("/")
    before_options = head.partition(":")[0]
    name, equals, _ = before_options.partition("=")
    router = head[len(name) + 1 :] if equals else head
    allowed = {f.name for cls in (RoutingOptions, LossConfig) for f in dataclasses.fields(cls)}
    allowed = (allowed | {"steps"}) - {"router"}
    changes: dict[str, Any] = {}
    try:
        for field, value in options_of(router).items():
            changes[field] = value if field in TEXTS else value_of(value)
        for part in parts:
            field, equals, value = part.partition("=")
            if not equals or field not in allowed:
                raise ValueError(
                    f"{part!r} must read field=value with a field of {', '.join(sorted(allowed))}"
                )
            changes[field] = value if field in TEXTS else value_of(value)
        steps = changes.pop("steps", None)
        RoutingOptions(**{k: v for k, v in changes.items() if k in ("router", "capacity")})
        LossConfig(losses=changes.get("losses"))
    except ValueError as error:
        raise ValueError(f"variant {text!r}: {error}") from error
    return Variant(
        name=name if equals or "=" in before_options else text, changes=changes, steps=steps
    )
