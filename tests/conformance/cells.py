"""Every supported combination of router, capacity policy and expert backend, read off the tables.

A new row in `ROUTERS`, `CAPACITIES` or `EXPERT_BACKENDS` is tested without a change here: options
are found by their types, and what a configuration can do by its traits.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import typing
import zlib
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from etr.moe import CAPACITIES, EXPERT_BACKENDS, ROUTERS, MoE, MoEConfig, RoutingContext
from etr.moe.capacity import CapacityConfig
from etr.moe.config import parse_capacity
from etr.moe.routers import RouterConfig
from etr.moe.rules import unsupported

H, E, I, T = 16, 4, 8, 16  # noqa: E741


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination to test."""

    router: RouterConfig
    capacity: CapacityConfig
    rank_by: str | None = None
    backend: str = "loop"

    @property
    def id(self) -> str:
        parts = [_short(self.router), _short(self.capacity), self.rank_by, self.backend]
        return "-".join(part for part in parts if part)

    @property
    def traits(self) -> Any:
        return self.router.traits

    @property
    def top_k(self) -> int:
        """2 where the router takes it, else 1."""
        try:
            self.router.check(H, E, 2)
        except ValueError:
            return 1
        return 2

    @property
    def by_score(self) -> bool:
        return self.config().resolved_rank_by == "score"

    def config(self, **options: Any) -> MoEConfig:
        values: dict[str, Any] = {
            "hidden_size": H,
            "intermediate_size": I,
            "num_experts": E,
            "top_k": self.top_k,
            "router": self.router,
            "capacity": self.capacity,
            "rank_by": self.rank_by,
            "backend": self.backend,
        }
        return MoEConfig(**{**values, **options})

    def layer(self, dtype: torch.dtype = torch.float64, **options: Any) -> MoE:
        """A layer in training mode with random router weights too."""
        layer = MoE(self.config(**options)).to(dtype)
        with torch.no_grad():
            for weight in layer.router.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        return layer


@functools.cache
def _short(config: RouterConfig | CapacityConfig) -> str:
    text, defaults = config.name, type(config)()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(defaults, field.name)
        if value != default and not field.name.endswith("factor"):
            text += f"[{field.name}={value.name if isinstance(value, CapacityConfig) else value}]"
    return text


def variants(config: Any) -> list[Any]:
    """`config` with one option changed: each other value of its choices, flags and policies."""
    found = []
    for name, hint in typing.get_type_hints(type(config)).items():
        if name not in {field.name for field in dataclasses.fields(config)}:
            continue
        choices: list[Any] = []
        if typing.get_origin(hint) is typing.Literal:
            choices = list(typing.get_args(hint))
        elif hint is bool:
            choices = [False, True]
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            kinds = [kind for kind in typing.get_args(hint) if isinstance(kind, type)]
            choices = [tight(kind()) for kind in kinds if issubclass(kind, CapacityConfig)]
        for choice in choices:
            if choice == getattr(config, name):
                continue
            try:
                found.append(dataclasses.replace(config, **{name: choice}))
            except ValueError:
                continue  # refused by the config itself; tests/moe checks the reasons
    return found


def tight(config: Any) -> Any:
    """`config` with every capacity factor at 0.5, so that experts drop tokens."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name.endswith("factor"):
            changes[field.name] = 0.5
        elif isinstance(getattr(config, field.name), CapacityConfig):
            changes[field.name] = tight(getattr(config, field.name))
    return dataclasses.replace(config, **changes)


def policy(text: str) -> CapacityConfig:
    return tight(parse_capacity(text))


def on_the_shelf(kind: type) -> bool:
    """Whether a row comes from a method's file."""
    return kind.__module__.startswith("etr.methods.")


def _policies(name: str) -> list[str]:
    """Policies to pair a router with: a policy sees a `Routing`, whoever made it, so that of the
    shelf's routers their own default and least scores are enough."""
    if not on_the_shelf(ROUTERS[name]):
        return list(CAPACITIES)
    return [ROUTERS[name]().traits.default_capacity.partition(":")[0], "threshold"]


def _default_cells() -> list[Cell]:
    return [
        Cell(router=ROUTERS[router](), capacity=policy(capacity))
        for router in ROUTERS
        for capacity in CAPACITIES
        if capacity in _policies(router)
        and unsupported(ROUTERS[router](), CAPACITIES[capacity]()) is None
    ]


def _variant_cells() -> list[Cell]:
    cells = [
        Cell(router=router, capacity=policy(router.traits.default_capacity))
        for name in ROUTERS
        for router in variants(ROUTERS[name]())
    ]
    for name in CAPACITIES:
        for capacity in variants(policy(name)):
            router = next(
                (ROUTERS[r]() for r in ROUTERS if not unsupported(ROUTERS[r](), capacity)), None
            )
            if router is not None:
                cells.append(Cell(router=router, capacity=capacity))
    for name in (name for name in ROUTERS if not on_the_shelf(ROUTERS[name])):
        router = ROUTERS[name]()
        for order in router.traits.rank_by[1:]:
            capacity = policy(router.traits.default_capacity)
            if unsupported(router, capacity, order) is None:
                cells.append(Cell(router=router, capacity=capacity, rank_by=order))
    return cells


CELLS = _default_cells()
"""Every cell of router x policy at default options (capacities made tight) that is supported, and
of the shelf's routers some."""

VARIANTS = _variant_cells()
"""Every other value of every option, one at a time."""

ALL = CELLS + VARIANTS

BACKEND_CELLS = [
    Cell(router=ROUTERS["token_choice"](), capacity=policy("none")),
    Cell(router=ROUTERS["token_choice"](), capacity=policy("threshold")),
    Cell(router=ROUTERS["baseline"](), capacity=policy("factor")),
    Cell(router=ROUTERS["expert_choice"](), capacity=policy("factor")),
    Cell(router=ROUTERS["etr"](), capacity=policy("schedule")),
    Cell(router=ROUTERS["etr_paper"](), capacity=policy("affinity_mass")),
]
"""What engines can tell apart, for they see rows and counts and never a router: all kept or some
dropped, one expert a token or two, tokens that choose or experts, capacities or least scores."""

BACKENDS = [
    backend.name
    for backend in EXPERT_BACKENDS.values()
    if backend.unavailable() is None  # tests/moe say by name what is skipped
]


def with_backends(cells: list[Cell]) -> list[Cell]:
    """`cells` with loops, and `BACKEND_CELLS` with every other backend."""
    return cells + [
        dataclasses.replace(cell, backend=backend)
        for backend in BACKENDS
        if backend != "loop"
        for cell in BACKEND_CELLS
    ]


ROUTER_CELLS = [
    Cell(router=router, capacity=policy(router.traits.default_capacity))
    for name in ROUTERS
    for router in (ROUTERS[name](), *variants(ROUTERS[name]()))
]
"""Every router, and every variant of it, with its default policy."""


def ids(cell: Cell) -> str:
    return cell.id


def tokens(num_tokens: int = T, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random tokens of different lengths, leaning towards the first experts."""
    x = torch.randn(num_tokens, H, dtype=torch.float64) * torch.rand(num_tokens, 1).exp()
    x[:, : H // E] += 0.5
    return x.to(dtype)


def context(shape: Any = T, **fields: Any) -> RoutingContext:
    """A context that any router is content with."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    fields.setdefault("token_ids", torch.randint(0, 1000, shape))
    return RoutingContext(**fields)


def pairs(routing: Any, mask: Tensor) -> set[tuple[int, int]]:
    """(token, expert) of the pairs where `mask` is True."""
    return set(zip(routing.token[mask].tolist(), routing.expert[mask].tolist(), strict=True))


def train_steps(layer: MoE, num_steps: int = 3, num_tokens: int = 256) -> None:
    """Let the layer's policies and thresholds learn from a few steps; weights stay."""
    from etr.moe import Collector, after_step

    layer.train()
    dtype = next(chain(layer.experts.parameters(), layer.parameters())).dtype
    for _ in range(num_steps):
        with Collector(layer) as collector:
            layer(tokens(num_tokens, dtype), context(num_tokens, collector=collector))
        after_step(layer)


@functools.cache
def _trained(cell: Cell) -> MoE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(cell.id.encode()))
        layer = cell.layer()
        train_steps(layer)
    return layer.eval()


def trained(cell: Cell, eval_selection: str) -> MoE:
    """A layer in eval mode that has learned from a few steps, the same at each call.

    Training never looks at `eval_selection`, so that the layers of a cell learn together.
    """
    layer = copy.deepcopy(_trained(cell))
    layer.eval_selection = eval_selection
    return layer
