"""What a run leaves behind: plain values, raw seconds of every round."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from benchmarks.spread import Spread, paired_ratio, spread

STEP = "forward+backward"
"""The measure that targets read."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one case.

    Args:
        system: its name.
        kind: floor, ours or rival.
        default: what the library picks by itself (ours), so what targets read.
        seconds: by measure, seconds of every round; None where a round left it out.
        kept_pairs, drop_rate: (token, expert) pairs computed, and the share of asked ones dropped.
        saved_bytes: held for the backward pass, parameters not counted.
        peak_bytes: most memory allocated by one step beyond what was there before.
        operations: that are not views, of one forward; with a backward pass where one is timed.
        routing: "same" as the others, its "own" (checked on it), or empty.
        refused: why there is no time: not installed, not checkable, failed its check.
        version: of the package, or empty.
    """

    system: str
    kind: str
    default: bool = False
    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    kept_pairs: int | None = None
    drop_rate: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    operations: int | None = None
    routing: str = ""
    refused: str = ""
    version: str = ""

    def spread_of(self, measure: str) -> Spread | None:
        """Median and quartiles of the seconds of one measure."""
        values = [value for value in self.seconds.get(measure, []) if value is not None]
        return spread(values) if values else None


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """All rows of one case.

    Args:
        name, group: of the case.
        sizes: the numbers that define it.
        rows: one per system.
        took_seconds: wall time of the whole case, checks included.
        left_out: why nothing was measured, or empty.
    """

    name: str
    group: str
    sizes: dict[str, Any]
    rows: list[Row]
    took_seconds: float = 0.0
    left_out: str = ""

    def row(self, system: str) -> Row | None:
        """The row of one system."""
        return next((row for row in self.rows if row.system == system), None)

    @property
    def ours(self) -> Row | None:
        """The row of what the library picks by itself."""
        return next((row for row in self.rows if row.default), None)

    def ratio(self, above: Row | None, below: Row | None, measure: str = STEP) -> Spread | None:
        """Time of one row over another's in the same rounds, per kept pair; None if not timed."""
        if above is None or below is None:
            return None
        scale = 1.0
        if above.kept_pairs and below.kept_pairs:
            scale = below.kept_pairs / above.kept_pairs
        return paired_ratio(above.seconds.get(measure, []), below.seconds.get(measure, []), scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseResult:
        """Inverse of `to_dict`."""
        return cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})
