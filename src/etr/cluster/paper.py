"""The paper's clusters of 32, 64 and 256 devices, predicted, beside what the paper reports."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from etr.cluster.cost import Cluster, Layout, ModelShape, RoutingShape, read_described
from etr.cluster.plan import Planned, fullest, planned

BATCH = 128
"""Sequences of a step."""
MODEL = read_described(ModelShape, "mixtral-8x7b")
CLUSTER = read_described(Cluster, "ascend-910b3")
LAYOUTS = {
    32: Layout(tensor=4, pipeline=4, data=2, expert=2, expert_tensor=4, sequence_length=32768),
    64: Layout(tensor=8, pipeline=4, data=2, expert=2, expert_tensor=8, sequence_length=32768),
    256: Layout(tensor=8, pipeline=8, data=4, expert=2, expert_tensor=8, sequence_length=32768),
}
"""The paper's, by number of devices; an expert is shared by the tensor ranks (assumed)."""


class Assumption(NamedTuple):
    """A number that goes into the prediction."""

    base: float
    """Taken."""
    low: float
    """Least that is tried."""
    high: float
    """Most that is tried."""
    words: str
    """What it is."""
    source: str
    """Where `base` is from."""


ASSUMED = {
    "baseline_factor": Assumption(
        1.1, 1.0, 8.0, "capacity factor of the padded baseline (8: room for every token)", "assumed"
    ),
    "locmoe_factor": Assumption(1.1, 0.8, 1.1, "capacity factor of LocMoE, padded", "assumed"),
    "etr_start": Assumption(1.1, 0.6, 1.1, "ETR's capacity factor at the start", "this library"),
    "etr_end": Assumption(0.6, 0.4, 1.1, "ETR's capacity factor at the end", "the paper"),
    "hottest": Assumption(1.5, 1.0, 4.0, "load of the hottest expert over the mean", "assumed"),
    "local": Assumption(0.78, 0.5, 1.0, "ETR's share of tokens on their node, of two", "emulated"),
    "chunks": Assumption(4, 1, 16, "chunks of ETR that overlap exchange and experts", "assumed"),
    "efficiency": Assumption(0.5, 0.2, 0.8, "share of the peak that a product reaches", "assumed"),
    "within": Assumption(
        CLUSTER.links.within_bytes_per_second,
        28e9,
        392e9,
        "rate inside a server, bytes per second",
        "assumed",
    ),
    "between": Assumption(
        CLUSTER.links.between_bytes_per_second,
        12.5e9,
        400e9,
        "uplink of a server, bytes per second",
        "assumed",
    ),
    "latency": Assumption(
        CLUSTER.links.latency_seconds, 5e-6, 1e-3, "latency of an exchange, seconds", "assumed"
    ),
    "recompute": Assumption(1, 0, 1, "whether layers are computed again (1: yes)", "assumed"),
}
"""All assumptions by name; their ranges are what is searched."""
GIVEN = (
    ("model, sequence of 32,768 tokens, 128 sequences a step, top-1, layouts", "the paper"),
    (
        f"{CLUSTER.device.flops_per_second / 1e12:g} TFLOP/s in 16 bits, "
        f"{CLUSTER.device.memory_bytes / 1e9:g} GB and "
        f"{CLUSTER.device.memory_bytes_per_second / 1e12:g} TB/s a device, "
        f"{CLUSTER.devices_per_node} a server",
        "the paper",
    ),
    (
        f"{CLUSTER.device.kernel_seconds * 1e6:g} µs to start a product, "
        f"{CLUSTER.links.message_seconds * 1e6:g} µs for each message of a rank",
        "assumed",
    ),
    ("16-bit weights and activations, float32 gradients, 12 bytes of sharded optimizer", "assumed"),
    ("one sequence a micro-batch; pipeline of one forward, one backward in turn", "assumed"),
    ("a step as the mean of the begin, middle and end of training, memory the most", "assumed"),
    ("an even load but for the hottest expert, the same in training from start to end", "assumed"),
)
POINTS = 12
"""Points of the ranges that are tried at random, beside their ends one by one."""


class Outcome(NamedTuple):
    """What is predicted of a router."""

    seconds: float
    """A step's, mean over training."""
    expert_seconds: float
    """Its experts' products."""
    product_seconds: float
    """All its products."""
    memory_bytes: float
    """The fullest device's, at the fullest moment."""
    kept: float
    """Tokens that an expert keeps at the end of training over the mean of those that choose one."""

    @classmethod
    def of(cls, one: Planned) -> Outcome:
        """What the numbers of the paper are compared with."""
        parts = one.parts()
        return cls(
            seconds=one.seconds,
            expert_seconds=parts["experts"],
            product_seconds=parts["experts"] + parts["attention"] + parts["dense"],
            memory_bytes=one.memory.total_bytes,
            kept=float(one.routing.kept_at(1.0, MODEL.num_experts).sum()),
        )


Found = dict[str, Outcome]
"""By router."""
Everywhere = dict[int, Found]
"""By number of devices."""


def base() -> dict[str, float]:
    """The values that are taken."""
    return {name: assumption.base for name, assumption in ASSUMED.items()}


def routings(values: dict[str, float]) -> dict[str, RoutingShape]:
    """The three routers that the paper compares."""
    rest = (8 - values["hottest"]) / 7
    load = (values["hottest"], *[max(rest, 0.0)] * 7)
    end = min(values["etr_start"], values["etr_end"])

    def padded(name: str, factor: float) -> RoutingShape:
        return RoutingShape(
            name=name, dispatch="all_to_all_padded", top_k=1, load=load, capacity=((0.0, factor),)
        )

    chunks = int(values["chunks"])
    return {
        "baseline": padded("baseline", values["baseline_factor"]),
        "LocMoE": padded("LocMoE", values["locmoe_factor"]),
        "ETR": RoutingShape(
            name="ETR",
            dispatch=f"chunked:all_to_all,chunks={chunks}" if chunks > 1 else "all_to_all",
            top_k=1,
            load=load,
            local_share=values["local"],
            capacity=((0.0, values["etr_start"]), (1.0, end)),
        ),
    }


def outcomes(values: dict[str, float]) -> Everywhere:
    """Predict the three routers on each of the paper's clusters."""
    device = replace(CLUSTER.device, efficiency=((1.0, values["efficiency"]),))
    links = replace(
        CLUSTER.links,
        latency_seconds=values["latency"],
        within_bytes_per_second=values["within"],
        between_bytes_per_second=values["between"],
    )
    found: Everywhere = {}
    for devices, given in LAYOUTS.items():
        nodes = devices // CLUSTER.devices_per_node
        cluster = replace(CLUSTER, num_nodes=nodes, device=device, links=links)
        again, count = bool(round(values["recompute"])), BATCH // given.data
        layout = replace(given, micro_batches=count, recompute=again)
        found[devices] = {
            name: Outcome.of(
                planned(MODEL, cluster, layout, routing, fullest(MODEL, layout, routing))
            )
            for name, routing in routings(values).items()
        }
    return found


class Claim(NamedTuple):
    """A number of the paper that time and memory decide."""

    words: str
    field: str
    """Of an `Outcome`."""
    other: str
    """The router that ETR is compared with."""
    low: float
    high: float
    ratio: bool = False
    """Whether it is the other's over ETR's, or how far ETR's is below the other's, in percent."""

    def of(self, found: Found) -> float:
        """The number as predicted."""
        ours, theirs = (getattr(found[name], self.field) for name in ("ETR", self.other))
        return theirs / ours if self.ratio else 100 * (1 - ours / theirs)

    def text(self, value: float) -> str:
        """As the page shows it."""
        return f"{value:.2f}" if self.ratio else f"{value:.1f}"


CLAIMS = (
    Claim("step below baseline (%)", "seconds", "baseline", 5.4, 46.6),
    Claim("step below LocMoE (%)", "seconds", "LocMoE", 2.9, 13.3),
    Claim("experts' products, baseline over ETR", "expert_seconds", "baseline", 17, 17, True),
    Claim("experts' products, LocMoE over ETR", "expert_seconds", "LocMoE", 2.6, 2.6, True),
    Claim("all products, baseline over ETR", "product_seconds", "baseline", 2.8, 2.8, True),
    Claim("memory below baseline (%)", "memory_bytes", "baseline", 4.57, 16.27),
    Claim("memory below LocMoE (%)", "memory_bytes", "LocMoE", 2.86, 10.5),
    Claim("kept tokens of an expert below baseline (%)", "kept", "baseline", 40, 40),
)
NOT_PREDICTED = (
    "equal perplexity at 40 % fewer tokens; GDAD 52.8 to 61.5, TeleQnA 62.1 to 68.8, GPQA 29.2 to "
    "33.5, HumanEval 40.2 to 67.8, MMLU 71.8 to 70.4; highest Calinski-Harabasz ratio with both "
    "directions; the balance of auxiliary and locality loss; feature correlation near 0 before "
    "training and above 0.8 after"
)


class Tried(NamedTuple):
    """Predictions at every point that is tried."""

    base: Everywhere
    """What is taken."""
    alone: dict[str, tuple[Everywhere, Everywhere]]
    """The least and the most of each assumption, the others as taken."""
    chance: list[Everywhere]
    """Points at random."""
    favoured: Everywhere
    """Each assumption at that of its values which alone favours ETR most."""

    @property
    def every(self) -> list[Everywhere]:
        """All of them."""
        ends = [end for pair in self.alone.values() for end in pair]
        return [self.base, *ends, *self.chance, self.favoured]


def saving(found: Everywhere) -> float:
    """How far ETR's step is below the baseline's, percent, mean over clusters."""
    return float(np.mean([CLAIMS[0].of(one) for one in found.values()]))


def tried() -> Tried:
    """Predict all points."""
    taken, draw = base(), np.random.default_rng(0)
    first = outcomes(taken)
    alone = {
        name: (outcomes({**taken, name: a.low}), outcomes({**taken, name: a.high}))
        for name, a in ASSUMED.items()
    }
    best = {
        name: max(
            ((a.base, first), (a.low, alone[name][0]), (a.high, alone[name][1])),
            key=lambda end: saving(end[1]),
        )[0]
        for name, a in ASSUMED.items()
    }
    chance = [
        outcomes(
            {n: a.low + p * (a.high - a.low) for (n, a), p in zip(ASSUMED.items(), at, strict=True)}
        )
        for at in draw.random((POINTS, len(ASSUMED)))
    ]
    return Tried(first, alone, chance, outcomes(best))
