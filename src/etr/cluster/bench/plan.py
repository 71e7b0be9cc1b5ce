"""What is trained, and what of it is timed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from etr.cluster.network import parse_rate
from etr.data import DataConfig
from etr.moe import LossConfig
from etr.moe.config import parse_router

if TYPE_CHECKING:
    from etr.train import TrainConfig

RANKS = 4
"""Ranks of every run; both shapes have as many."""
TextKind = Literal["own", "mixed"]
EMULATED, REAL = "emulated", "real"
PADDED, PLAIN = "all_to_all_padded", "all_to_all"
CHUNKED = "chunked:all_to_all,chunks=4"
CURVE_SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 23)
"""Bytes of the messages that measure the network; the last are beyond bursts and buffers."""
_SHAPES = {"2x2": 2, "4x1": 4}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    router: str
    """Router with options."""
    locality: float | None = None
    """Weight of the locality loss, or None for none."""
    per_rank: bool = False
    """Whether capacity counts a rank's own tokens, as where buffers are padded."""
    local_bonus: float = 0.0
    """What is added to the score of experts on the token's node."""
    sharded: bool = False
    """Whether sequences go to the node whose experts they use, from half of the training on."""

    def __post_init__(self) -> None:
        parse_router(self.router)

    @property
    def needs_nodes(self) -> bool:
        """Whether training depends on which rank is on which node."""
        return self.locality is not None or bool(self.local_bonus) or self.sharded


MU = 0.3
"""Weight of the locality loss where a row does not say otherwise."""
PUBLISHED = "etr_paper"
RECIPES: dict[str, Recipe] = {
    "baseline": Recipe(router="baseline", per_rank=True),
    # Its own weight of the locality loss.
    "locmoe": Recipe(router="locmoe", locality=0.01, per_rank=True),
    "etr-published": Recipe(router=PUBLISHED, locality=MU),
    "etr": Recipe(router="etr", locality=MU),
    "capacity": Recipe(router=PUBLISHED, per_rank=True),
    "locality": Recipe(router="baseline", locality=MU),
    "bonus": Recipe(router=PUBLISHED, locality=MU, local_bonus=0.1),
    "sharded": Recipe(router=PUBLISHED, locality=MU, sharded=True),
}
"""Recipes by name."""


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """One training run. Its shape is "any" where nodes change nothing."""

    recipe: str
    text: TextKind
    shape: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.recipe}-{self.text}-{self.shape}-seed{self.seed}"


class BenchRow(NamedTuple):
    """A row of the page: a trained model and how its tokens travel."""

    title: str
    """Shown in tables."""
    recipe: str
    """Name in `RECIPES`."""
    dispatch: str
    """Dispatcher with options."""


ROWS: dict[str, BenchRow] = {
    "baseline": BenchRow("baseline: top-1, factor 1.1, padded", "baseline", PADDED),
    "locmoe": BenchRow("LocMoE", "locmoe", PADDED),
    "etr-published": BenchRow(
        "published ETR: schedule to 0.6, locality, chunked", "etr-published", CHUNKED
    ),
    "etr": BenchRow("default ETR: schedule to 1.1, locality, chunked", "etr", CHUNKED),
    "capacity": BenchRow("capacity alone: schedule to 0.6, padded", "capacity", PADDED),
    "unpadded": BenchRow("baseline, unpadded", "baseline", PLAIN),
    "locality": BenchRow("locality alone: baseline, unpadded, locality loss", "locality", PLAIN),
    "locality-padded": BenchRow("locality loss under padding", "locality", PADDED),
    "overlap": BenchRow("overlap alone: baseline, unpadded, chunked", "baseline", CHUNKED),
    "no-overlap": BenchRow("published ETR without overlap", "etr-published", PLAIN),
    "bonus": BenchRow("published ETR with local_bonus", "bonus", CHUNKED),
    "sharded": BenchRow("published ETR, documents sharded by their routing", "sharded", CHUNKED),
}
"""Rows by name."""

OWN_TEXT = tuple(name for name in ROWS if name not in ("bonus", "sharded"))
MAIN_ROWS = ("baseline", "locmoe", "etr-published", "etr")
"""Rows that are also timed with the trained experts, and at other ratios of compute to network."""
MIXED_TEXT = ("baseline", "etr-published", "locality", "bonus", "sharded")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The whole benchmark."""

    out: str = "runs/cluster"
    """Folder of results; what is there is not run again."""
    page: str | None = None
    """Also write the page as this Markdown file, e.g. docs/results/cluster.md."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each model is trained once with every seed. On seed 0 the locality loss got its weight."""
    steps: int = 200
    """Optimizer steps of each training run."""
    hidden_size: int = 128
    """Width of the model."""
    num_layers: int = 2
    """Its layers."""
    rows_per_rank: int = 4
    """Sequences of each rank in a training step."""
    replay_rows: int = 16
    """Sequences of each rank in a timed step."""
    replay_batches: int = 3
    """Different timed steps."""
    rounds: int = 2
    """Times that all variants take their turn."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    inter: str = "200mbit"
    """Rate between nodes."""
    intra: str = "1600mbit"
    """Rate inside a node."""
    compute_ratio: float = 1.0
    """Emulated time of an expert's forward pass over a row, in units of the time that the row
    takes over a node's uplink shared by its ranks (2x2)."""
    other_ratios: tuple[float, ...] = (0.5, 2.0)
    """Ratios at which the main rows are timed too, on the first shape."""
    shapes: tuple[str, ...] = ("2x2", "4x1")
    """Nodes x ranks per node."""
    max_bytes_per_domain: int = 2_000_000
    """Most text of each domain, bytes."""
    eval_tokens_per_domain: int = 16384
    """Held-out tokens of each domain."""
    variants: tuple[str, ...] = field(default=tuple(ROWS))
    """Rows that are run."""

    def __post_init__(self) -> None:
        for name in ("steps", "replay_batches", "rounds", "rows_per_rank", "replay_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, known in (("shapes", _SHAPES), ("variants", ROWS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must be of {', '.join(known)}")
        for ratio in (self.compute_ratio, *self.other_ratios):
            if not ratio >= 0:
                raise ValueError(f"compute_ratio={ratio} must be >= 0")
        if not self.seeds:
            raise ValueError("seeds=() needs at least one")
        for name in ("inter", "intra"):
            parse_rate(getattr(self, name), name)

    def cells(self) -> list[tuple[str, TextKind, str]]:
        """(shape, text, variant) of every timed row; mixed text on the first shape alone."""
        found: list[tuple[str, TextKind, str]] = [
            (shape, "own", name)
            for shape in self.shapes
            for name in self.variants
            if name in OWN_TEXT
        ]
        mixed = [name for name in self.variants if name in MIXED_TEXT]
        return found + [(self.shapes[0], "mixed", name) for name in mixed]

    def run_of(self, shape: str, text: TextKind, variant: str, seed: int) -> BenchRun:
        """The training run behind a row."""
        recipe = ROWS[variant].recipe
        shape = shape if RECIPES[recipe].needs_nodes else "any"
        return BenchRun(recipe=recipe, text=text, shape=shape, seed=seed)

    def runs(self) -> list[BenchRun]:
        """Every training run, seed by seed."""
        found = [self.run_of(*cell, seed) for seed in self.seeds for cell in self.cells()]
        return list(dict.fromkeys(found))

    def training(self, run: BenchRun, out: str) -> TrainConfig:
        """Config of a training run."""
        # Here, so that ranks that time without training start without the trainer.
        from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig

        recipe = RECIPES[run.recipe]
        base = TrainConfig(
            out=out,
            data=DataConfig(
                sequence_length=self.sequence_length,
                batch_size=self.rows_per_rank * RANKS,
                max_bytes_per_domain=self.max_bytes_per_domain,
            ),
            model=ModelConfig(
                hidden_size=self.hidden_size,
                num_layers=self.num_layers,
                routing=RoutingOptions(
                    router=recipe.router,
                    expert_size=2 * self.hidden_size,
                    losses=LossConfig(locality_mu=recipe.locality or 0.0),
                ),
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=max(self.steps // 20, 1)),
            steps=self.steps,
            seed=run.seed,
            eval_every=self.steps,
            eval_tokens_per_domain=self.eval_tokens_per_domain,
            checkpoint_every=self.steps,
            diagnostics=False,
            profile_every=None,
            device="cpu",
        )
        parallel = dataclasses.replace(base.parallel, expert_ranks=RANKS, fsdp=False)
        return dataclasses.replace(base, parallel=parallel)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it travels, float32."""
        return 4 * self.hidden_size

    def seconds_per_row(self, ratio: float | None = None) -> float:
        """Emulated time of an expert's forward pass over a row; the backward pass takes twice.

        Args:
            ratio: of compute to network; None for `compute_ratio`.
        """
        ratio = self.compute_ratio if ratio is None else ratio
        return ratio * self.row_bytes * 2 * 8 / parse_rate(self.inter)

    def computes(self, shape: str, text: TextKind, variant: str) -> list[str]:
        """How a row's computation is timed: emulated, at other ratios, and real."""
        if variant not in MAIN_ROWS or text != "own":
            return [EMULATED]
        other = self.other_ratios if shape == self.shapes[0] else ()
        return [EMULATED, *map(emulated_at, other), REAL]


def emulated_at(ratio: float) -> str:
    """Name of the emulated compute at another ratio."""
    return f"{EMULATED}-at-{ratio:g}"


def nodes_of(shape: str) -> tuple[int, ...]:
    """Node of each rank in a shape; "any" is all ranks on one node."""
    nodes = _SHAPES.get(shape, 1)
    return tuple(rank * nodes // RANKS for rank in range(RANKS))
