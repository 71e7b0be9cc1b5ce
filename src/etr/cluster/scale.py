"""Expert parallelism over thousands of devices, by simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from etr.cluster.bench.book import local_share
from etr.cluster.bench.plan import BenchConfig, nodes_of
from etr.cluster.calibration import calibrate
from etr.cluster.calibration import section as calibration_section
from etr.cluster.cost import Cluster, ModelShape, layer_seconds, read_described
from etr.sheet import table


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """What is simulated."""

    results: str = "docs/results/cluster.json"
    """Results of etr cluster bench: loads and local shares of trained routers, measured steps."""
    page: str | None = None
    """Markdown file to write; printed if not given."""
    model: str = "deepseek-v3"
    """Model that comes with the library, or a JSON or TOML file."""
    cluster: str = "h100"
    """Cluster that comes with the library, or a file; its number of nodes is not used."""
    devices: int = 10_000
    """Devices, as many as whole expert groups take."""
    experts: int = 1024
    """Experts of a layer, so that all groups can be divided."""
    tokens: int = 4096
    """Tokens of a rank in a micro-batch."""
    layers: int = 2
    """Layers that are drawn, with loads of their own."""
    straggler_sigma: float = 0.03
    """Spread of the logarithm of a device's speed, assumed: no unit."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        for name in ("devices", "experts", "tokens", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.experts % 8 or not self.straggler_sigma >= 0:
            raise ValueError(
                f"experts={self.experts} must be a multiple of 8 and straggler_sigma="
                f"{self.straggler_sigma} at least 0"
            )

    @property
    def groups(self) -> list[int]:
        """Sizes of the expert group: 8 to 1,024."""
        sizes = [8 << n for n in range(8)]
        return [n for n in sizes if n <= self.devices and self.experts % n == 0]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a layer routes and sends, on the way through a simulation."""

    factor: float = 1.1
    """Capacity factor."""
    padded: bool = False
    """Whether buffers travel whole."""
    chunks: int = 4
    """Parts that travel one behind the other."""
    local: bool = False
    """Whether tokens prefer experts of their node, as the measured locality loss makes them."""
    replicated: bool = False
    """Whether each rank holds one more expert, a copy of a hot one."""


WAYS = {
    "padded 1.1": Way(padded=True, chunks=1),
    "unpadded 1.1, chunked": Way(),
    "the same, hot experts twice": Way(replicated=True),
    "the same, with locality": Way(local=True),
    "factor 0.6, chunked": Way(factor=0.6),
    "factor 0.6, with locality": Way(factor=0.6, local=True),
}
"""Rows of the tables."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What trained routers of the benchmark did."""

    loads: np.ndarray
    """Relative loads of their experts, over the mean."""
    odds: float
    """Odds of staying on the node under the locality loss over those of placement."""

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Observed:
        """From the results of etr cluster bench."""
        loads, odds = [], []
        for trained in results["trained"].values():
            run, chosen = trained["run"], np.array(trained["chosen"], dtype=np.float64).sum(0)
            loads.append(chosen / chosen.mean())
            if run["recipe"] == "locality" and run["text"] == "own":
                nodes = nodes_of(run["shape"])
                share, by_chance = local_share(trained["chosen"], nodes), 1 / (max(nodes) + 1)
                odds.append(share / (1 - share) * (1 - by_chance) / by_chance)
        return cls(loads=np.concatenate(loads), odds=float(np.exp(np.mean(np.log(odds)))))

    def share_on_node(self, nodes: int) -> float:
        """Local share among so many nodes, at the measured odds."""
        return self.odds / (self.odds + nodes - 1)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A layer's forward and backward at one size of the expert group."""

    seconds: float
    """Mean over layers of the slowest group's time."""
    compute_seconds: float
    """The mean device's experts."""
    network_seconds: float
    """Exchanges of the slowest group."""
    imbalance: float
    """Rows of the busiest rank over the mean, mean over groups and layers."""


def simulate(
    config: ScaleConfig, model: ModelShape, cluster: Cluster, observed: Observed, ranks: int
) -> dict[str, Point]:
    """Draw loads, counts of every group and speeds of every device; the slowest decides.

    All groups have one model, so an expert is as popular in each of them; the tokens that each
    group has of it vary as independent choices do. All ways see the same draws.
    """
    draw = np.random.default_rng(config.seed)
    experts, groups = config.experts, config.devices // ranks
    node = min(ranks, cluster.devices_per_node)
    speed = np.exp(draw.normal(0, config.straggler_sigma, (groups, ranks)))
    found: dict[str, list[Point]] = {name: [] for name in WAYS}
    for _ in range(config.layers):
        load = draw.choice(observed.loads, experts)
        mean = ranks * config.tokens * model.top_k / experts
        chosen = mean * load / load.mean()
        chosen = chosen + np.sqrt(chosen) * draw.normal(size=(groups, experts))
        for name, way in WAYS.items():
            slots = math.ceil(way.factor * mean)
            rows = np.full_like(chosen, slots) if way.padded else np.clip(chosen, 0, slots)
            held = rows.reshape(groups, ranks, -1)
            if way.replicated:
                held = _replicated(rows, load, ranks)
            found[name].append(_layer(model, cluster, way, observed, held, speed, node))
    fields = Point.__dataclass_fields__
    return {
        name: Point(**{key: float(np.mean([getattr(p, key) for p in points])) for key in fields})
        for name, points in found.items()
    }


def _replicated(rows: np.ndarray, load: np.ndarray, ranks: int) -> np.ndarray:
    """Rows of each expert of each rank, [groups, ranks, experts of a rank + 1].

    The hottest experts have a copy, one on each rank more, and share their tokens with it; experts
    and copies are dealt to ranks by load, back and forth.
    """
    hot = np.argsort(-load)[: min(ranks, len(load))]
    weight = load.astype(np.float64).copy()
    weight[hot] /= 2
    halved = rows.copy()
    halved[:, hot] /= 2
    weight, halved = np.append(weight, weight[hot]), np.hstack([halved, halved[:, hot]])
    order = np.argsort(-weight, kind="stable").reshape(-1, ranks)
    order[1::2] = order[1::2, ::-1]
    return halved[:, order.T]


def _layer(
    model: ModelShape,
    cluster: Cluster,
    way: Way,
    observed: Observed,
    rows: np.ndarray,
    speed: np.ndarray,
    node: int,
) -> Point:
    """A layer's forward and backward; times are those of the slowest group.

    Every rank sends alike, so an exchange is decided by the node, or the rank, that gets most.
    """
    hidden, width, itemsize = model.hidden_size, model.expert_size, 2
    seconds = cluster.device.feed_forward_seconds(rows, hidden, width, itemsize)
    compute = seconds.sum(2) * speed  # [groups, ranks]
    groups, ranks = compute.shape
    nodes = ranks // node
    got = rows.sum(2)
    on_node = 1 / nodes
    if way.local and nodes > 1:
        on_node = observed.share_on_node(nodes)
    on_nodes = got.reshape(groups, nodes, node).sum(2).max(1)
    busiest = on_nodes if cluster.links.within_is_shared else got.max(1)
    row_bytes = hidden * itemsize
    between = row_bytes * on_nodes * (1 - on_node)
    within = row_bytes * busiest * on_node * (node - 1) / node
    exchange = cluster.links.seconds(ranks - 1, between, within, way.chunks)
    slowest = compute.max(1)
    total = [
        sum(layer_seconds(e, factor * c, e, way.chunks) for factor in (1, 2))
        for e, c in zip(exchange, slowest, strict=True)
    ]
    last = int(np.argmax(total))
    return Point(
        seconds=total[last],
        compute_seconds=3 * float(compute.mean()),
        network_seconds=4 * float(exchange[last]),
        imbalance=float((got.max(1) / got.mean(1)).mean()),
    )


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Exponent of time in the size of the group, least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def section(config: ScaleConfig, results: Mapping[str, Any]) -> str:
    """What the page says of scale."""
    observed = Observed.of(results)
    model, cluster = (
        read_described(ModelShape, config.model),
        read_described(Cluster, config.cluster),
    )
    model = replace(model, num_experts=config.experts)
    points = [simulate(config, model, cluster, observed, ranks) for ranks in config.groups]
    grid = {name: [point[name] for point in points] for name in WAYS}
    head = ("", *(f"EP {n:,}" for n in config.groups))
    times = [
        (
            name,
            *(f"{p.seconds * 1e3:.2f}" for p in row),
            f"{slope(config.groups, [p.seconds for p in row]):+.2f}",
        )
        for name, row in grid.items()
    ]
    shares = [
        ("devices simulated", *(f"{config.devices // n * n:,}" for n in config.groups)),
        *(
            (f"busiest rank over mean: {name}", *(f"{p.imbalance:.2f}" for p in grid[name]))
            for name in (
                "unpadded 1.1, chunked",
                "the same, hot experts twice",
                "factor 0.6, chunked",
            )
        ),
        (
            "network over compute: unpadded 1.1, chunked",
            *(
                f"{p.network_seconds / p.compute_seconds:.2f}"
                for p in grid["unpadded 1.1, chunked"]
            ),
        ),
        *_saved(grid),
    ]
    return (
        f"## Expert groups of {config.groups[0]} to {config.groups[-1]:,} over "
        f"{config.devices:,} devices\n\n"
        f"**Predicted**, nothing here was measured at this size. A layer of {model.name} with "
        f"{config.experts:,} experts, forward and backward, {config.tokens:,} tokens a rank, on "
        f"{cluster.name} (efficiency and latencies assumed). Relative loads are drawn from the "
        f"{len(observed.loads)} experts of the models trained for [cluster.md](cluster.md) (small "
        "models, top-1); every group has the same popular experts and counts of its own. Speeds of "
        f"devices are drawn from a log-normal of {config.straggler_sigma:g}, assumed. The slowest "
        "group decides. Milliseconds; the last column is the slope of their logarithm over that of "
        f"the size.\n\n{table((*head, 'slope'), times)}\n{table(head, shares)}\n" + _words(observed)
    )


LOCAL_PAIRS = (
    ("unpadded 1.1, chunked", "the same, with locality"),
    ("factor 0.6, chunked", "factor 0.6, with locality"),
)


def _saved(grid: Mapping[str, list[Point]]) -> list[tuple[str, ...]]:
    return [
        (
            f"saved by locality: {without}",
            *(
                f"{1 - b.seconds / a.seconds:.0%}"
                for a, b in zip(grid[without], grid[with_it], strict=True)
            ),
        )
        for without, with_it in LOCAL_PAIRS
    ]


def _words(observed: Observed) -> str:
    return (
        f"Locality is carried over by the odds that the locality loss has on the emulated cluster, "
        f"{observed.odds:.1f} times those of placement: a local share of "
        + ", ".join(f"{observed.share_on_node(n):.2f} on {n} nodes" for n in (2, 16, 128))
        + ".\n"
    )


def page(config: ScaleConfig, results: Mapping[str, Any]) -> str:
    """docs/results/cost-model.md."""
    return (
        "# The cost model: two formulas against measured steps, and what it says of scale\n\n"
        "Generated by `etr cluster scale`; nothing here is typed by hand. "
        "[paper-clusters.md](paper-clusters.md) has the clusters of the paper, and "
        "[plan-a-cluster.md](../guides/plan-a-cluster.md) says how to plan one's own.\n\n"
        f"{calibration_section(calibrate(results, BenchConfig()))}\n{section(config, results)}"
    )
