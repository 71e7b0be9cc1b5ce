"""Which rank holds which expert: planners, and what they plan from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from etr.table import Table


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Equal nodes of consecutive ranks."""

    num_ranks: int
    """Ranks that hold experts."""
    num_nodes: int = 1
    """Nodes that the ranks stand on."""

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_ranks % self.num_nodes:
            raise ValueError(
                f"num_ranks={self.num_ranks} is not a multiple of num_nodes={self.num_nodes}"
            )

    def node_of(self, rank: Tensor) -> Tensor:
        """Node of each rank."""
        return rank // (self.num_ranks // self.num_nodes)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What tokens asked of the experts of L layers.

    Args:
        counts: tokens of each expert, int64 [L, E].
        choices: experts of each token, int64 [L, N, K], negative where it has fewer; None where
            only the counts are known.
        sequence: the sequence each token is of, int64 [N]; None with `choices` None.
    """

    counts: Tensor
    choices: Tensor | None = None
    sequence: Tensor | None = None

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or not self.counts.numel():
            raise ValueError(f"counts has shape {tuple(self.counts.shape)}; it must be [L, E]")

    @classmethod
    def of(cls, choices: Tensor, sequence: Tensor, num_experts: int) -> Demand:
        """Count choices.

        Raises:
            ValueError: wrong shapes, or an expert that there is not.
        """
        if choices.ndim != 3 or sequence.shape != choices.shape[1:2]:
            raise ValueError(
                f"choices has shape {tuple(choices.shape)} and sequence {tuple(sequence.shape)}; "
                "they must be [L, N, K] and [N]"
            )
        if choices.numel() and choices.max() >= num_experts:
            raise ValueError(f"choices holds {int(choices.max())}; num_experts={num_experts}")
        counts = torch.stack([torch.bincount(c[c >= 0], minlength=num_experts) for c in choices])
        return cls(counts=counts, choices=choices, sequence=sequence)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rank of every expert.

    Where every rank has equally many experts of each layer, the plan is carried out by renumbering
    the experts of a checkpoint by `order`: blocks of consecutive experts then are what it asks for.

    Args:
        rank_of_expert: int64 [L, E].
        devices: the ranks.
        planner: who made it, as text.
        source: of what model.
    """

    rank_of_expert: Tensor
    devices: Devices
    planner: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        ranks = self.rank_of_expert
        if ranks.dtype != torch.int64 or ranks.ndim != 2 or not ranks.numel():
            raise ValueError(
                f"rank_of_expert has dtype {ranks.dtype} and shape {tuple(ranks.shape)}; it must "
                "be int64 [L, E]"
            )
        lowest, highest = int(ranks.min()), int(ranks.max())
        if lowest < 0 or highest >= self.devices.num_ranks:
            raise ValueError(
                f"rank_of_expert holds {lowest if lowest < 0 else highest}; ranks are 0 to "
                f"{self.devices.num_ranks - 1}"
            )

    @property
    def is_even(self) -> bool:
        """Whether every rank has equally many experts of each layer."""
        held = _count(self.rank_of_expert, self.devices.num_ranks)
        return bool((held == held[0, 0]).all())

    def order(self) -> Tensor:
        """The expert that stands at each new number, int64 [L, E]; on a rank, as before.

        Raises:
            ValueError: ranks have different numbers of experts.
        """
        if not self.is_even:
            raise ValueError(
                f"the plan of {self.planner or 'this planner'} gives ranks different numbers of "
                "experts; renumbering a checkpoint's experts needs equal ones"
            )
        return self.rank_of_expert.argsort(dim=1, stable=True)

    def to_dict(self) -> dict[str, Any]:
        """The plan as values of JSON."""
        return {
            "planner": self.planner,
            "source": self.source,
            **dataclasses.asdict(self.devices),
            "rank_of_expert": self.rank_of_expert.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Any, where: str = "the plan") -> Plan:
        """Inverse of `to_dict`.

        Args:
            where: name of the file, for errors.
        Raises:
            ValueError: a value is missing or wrong.
        """
        try:
            devices = Devices(num_ranks=values["num_ranks"], num_nodes=values["num_nodes"])
            rows = values["rank_of_expert"]
            if not all(type(rank) is int for row in rows for rank in row):
                raise ValueError("rank_of_expert must hold rows of whole numbers")
            return cls(
                rank_of_expert=torch.tensor(rows),
                devices=devices,
                planner=str(values.get("planner", "")),
                source=str(values.get("source", "")),
            )
        except KeyError as error:
            raise ValueError(f"{where} is not a plan of etr plan: it lacks {error}") from error
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where} is not a plan of etr plan: {error}") from error


class Planner:
    """A frozen config that says where experts should be; one row of `PLANNERS`."""

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for `etr plan --help`."""
    needs_choices: ClassVar[bool] = False
    """Whether counts alone do not do."""

    def place(self, demand: Demand, devices: Devices) -> Tensor:
        """The rank of every expert, int64 [L, E].

        Args:
            demand: what tokens asked for; the number of experts is a multiple of the ranks'.
            devices: the ranks.
        """
        raise NotImplementedError

    def plan(self, demand: Demand, devices: Devices, source: str = "") -> Plan:
        """A checked plan.

        Raises:
            ValueError: experts cannot be divided among the ranks, or the planner needs choices.
        """
        num_experts = demand.counts.shape[1]
        if num_experts % devices.num_ranks:
            raise ValueError(
                f"num_experts={num_experts} is not a multiple of num_ranks={devices.num_ranks}"
            )
        if self.needs_choices and demand.choices is None:
            raise ValueError(f"planner {self.name!r} needs the choices of every token, not counts")
        ranks = self.place(demand, devices)
        if ranks.shape != demand.counts.shape:
            raise ValueError(
                f"planner {self.name!r} placed {tuple(ranks.shape)} experts of "
                f"{tuple(demand.counts.shape)}"
            )
        return Plan(rank_of_expert=ranks, devices=devices, planner=self.name, source=source)


@dataclass(frozen=True, kw_only=True)
class Consecutive(Planner):
    """Equal blocks of consecutive experts: what every checkpoint's numbering says as it stands."""

    name = "consecutive"
    summary = "equal blocks of consecutive experts, as a checkpoint numbers them"

    def place(self, demand: Demand, devices: Devices) -> Tensor:
        layers, experts = demand.counts.shape
        block = experts // devices.num_ranks
        return (torch.arange(experts) // block).repeat(layers, 1)


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Planner):
    """Experts dealt out to the ranks in turn, by number or by load."""

    name = "round_robin"
    summary = "experts dealt out in turn"

    by_load: bool = False
    """Deal in order of load, from the most chosen expert on, and not by number."""

    def place(self, demand: Demand, devices: Devices) -> Tensor:
        layers, experts = demand.counts.shape
        order = torch.arange(experts).repeat(layers, 1)
        if self.by_load:
            order = demand.counts.argsort(dim=1, descending=True, stable=True)
        turn = (torch.arange(experts) % devices.num_ranks).repeat(layers, 1)
        return torch.empty_like(turn).scatter_(1, order, turn)


PLANNERS: Table[Planner] = Table("planner", (Consecutive, RoundRobin))
"""Planners by name."""


def _count(values: Tensor, kinds: int) -> Tensor:
    return torch.stack([torch.bincount(row, minlength=kinds) for row in values])
