"""What the study of equal wall time runs: rows, conditions, and sizes of the timed step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from etr.cluster.bench.plan import CHUNKED, PADDED, RANKS
from etr.cluster.network import parse_rate
from etr.study.study import Study

__all__ = ["CHUNKED", "PADDED", "RANKS", "Condition", "EqualTimeStudy"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A cluster."""

    shape: str
    """Nodes x ranks per node."""
    compute_ratio: float
    """Emulated time of an expert's forward pass over a row, in units of the time that the row takes
    over a node's uplink shared by the ranks of a node of two."""

    def __post_init__(self) -> None:
        if self.nodes * self.ranks_per_node != RANKS:
            raise ValueError(f"shape={self.shape!r} must have {RANKS} ranks")
        if not self.compute_ratio >= 0:
            raise ValueError(f"compute_ratio={self.compute_ratio} must be >= 0")

    @property
    def nodes(self) -> int:
        """Nodes."""
        return int(self.shape.split("x")[0])

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return int(self.shape.split("x")[1])

    @property
    def node_of_rank(self) -> tuple[int, ...]:
        """Node of each rank."""
        return tuple(rank // self.ranks_per_node for rank in range(RANKS))

    @property
    def name(self) -> str:
        """As files and headings name it."""
        return f"{self.shape}-{self.compute_ratio:g}"


@dataclass(frozen=True, kw_only=True)
class EqualTimeStudy(Study):
    """A study whose matched blocks are matched by the time of whole steps on a cluster."""

    conditions: Mapping[str, Condition] = field(default_factory=dict)
    """Cluster of each matched block, by the block's name."""
    padded: tuple[str, ...] = ()
    """Rows that send buffers as large as the capacity; the others send what there is, in chunks."""
    points: int = 8
    """Points of the schedule at which steps are timed, in the middle of equal parts."""
    sequences_per_rank: int = 8
    """Sequences of each rank in a timed step."""
    rounds: int = 3
    """Times that all rows take their turn at every point."""
    inter: str = "200mbit"
    """Rate between nodes."""
    intra: str = "1600mbit"
    """Rate inside a node."""

    def __post_init__(self) -> None:
        for name in ("points", "sequences_per_rank", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        matched = {block.name for block in self.blocks if block.match == "seconds"}
        if matched != set(self.conditions):
            raise ValueError(f"conditions={sorted(self.conditions)} must be of {sorted(matched)}")
        for name in ("inter", "intra"):
            parse_rate(getattr(self, name), name)

    @property
    def progress(self) -> tuple[float, ...]:
        """The points."""
        return tuple((number + 0.5) / self.points for number in range(self.points))

    def dispatch(self, row: str) -> str:
        """How a row's tokens travel."""
        return PADDED if row in self.padded else CHUNKED

    def seconds_per_row(self, condition: Condition, hidden_size: int) -> float:
        """Emulated time of an expert's forward pass over a row; the backward pass takes twice."""
        return condition.compute_ratio * 4 * hidden_size * 2 * 8 / parse_rate(self.inter)
