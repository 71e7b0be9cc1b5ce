"""The paper's clusters of 32, 64 and 256 devices, predicted, beside what the paper reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from etr.cluster.cost import (
    Cluster,
    Device,
    Layout,
    Links,
    ModelShape,
    RoutingShape,
    peak_memory,
    read_described,
    step_of,
)
from etr.sheet import table

BATCH = 128
"""Sequences of a step."""
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
    "within": Assumption(196e9, 28e9, 392e9, "rate inside a server, bytes per second", "assumed"),
    "between": Assumption(200e9, 12.5e9, 400e9, "uplink of a server, bytes per second", "assumed"),
    "latency": Assumption(30e-6, 5e-6, 1e-3, "latency of an exchange, seconds", "assumed"),
    "recompute": Assumption(1, 0, 1, "whether layers are computed again (1: yes)", "assumed"),
}
"""All assumptions by name; their ranges are what is searched."""
GIVEN = (
    ("model, sequence of 32,768 tokens, 128 sequences a step, top-1, layouts", "the paper"),
    ("313 TFLOP/s in 16 bits, 64 GB and 1.6 TB/s a device, 8 a server", "the paper"),
    ("16-bit weights and activations, float32 gradients, 12 bytes of sharded optimizer", "assumed"),
    ("one sequence a micro-batch; pipeline of one forward, one backward in turn", "assumed"),
    ("an even load but for the hottest expert, the same in training from start to end", "assumed"),
)
POINTS = 12
"""Points of the ranges that are tried at random, beside their ends one by one."""
PROGRESS = (0.25, 0.75)
"""Moments of training whose mean is a step; memory is the most of its two ends."""


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
    rows: float
    """Kept rows of an expert over the mean number of tokens, at the end of training."""


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


def outcomes(devices: int, values: dict[str, float]) -> dict[str, Outcome]:
    """Predict the three routers on one of the paper's clusters."""
    model = read_described(ModelShape, "mixtral-8x7b")
    layout = LAYOUTS[devices]
    layout = replace(
        layout, micro_batches=BATCH // layout.data, recompute=bool(round(values["recompute"]))
    )
    cluster = Cluster(
        name="the paper's",
        num_nodes=devices // 8,
        devices_per_node=8,
        device=Device(
            flops_per_second=313e12,
            memory_bytes=64e9,
            memory_bytes_per_second=1.6e12,
            efficiency=((1.0, values["efficiency"]),),
        ),
        links=Links(
            latency_seconds=values["latency"],
            within_bytes_per_second=values["within"],
            within_is_shared=False,
            between_bytes_per_second=values["between"],
        ),
    )
    return {
        name: _outcome(model, cluster, layout, routing)
        for name, routing in routings(values).items()
    }


def _outcome(model: ModelShape, cluster: Cluster, layout: Layout, routing: RoutingShape) -> Outcome:
    changes = len(routing.capacity) > 1
    moments = PROGRESS if changes else (1.0,)
    steps = [step_of(model, cluster, layout, routing, progress=p) for p in moments]
    parts = [step.parts for step in steps]
    ends = (0.0, 1.0) if changes else (1.0,)
    memory = max(peak_memory(model, layout, routing, p).total_bytes for p in ends)
    kept = routing.factor_at(1.0) if routing.padded else routing.kept_at(1.0, 8).sum()
    return Outcome(
        seconds=float(np.mean([step.seconds for step in steps])),
        expert_seconds=float(np.mean([p["experts"] for p in parts])),
        product_seconds=float(np.mean([p["experts"] + p["attention"] + p["dense"] for p in parts])),
        memory_bytes=memory,
        rows=float(kept),
    )


Found = dict[str, Outcome]


class Claim(NamedTuple):
    """A number of the paper that time and memory decide."""

    words: str
    low: float
    high: float
    text: str
    of: Callable[[Found], float]


def _below(field: str, other: str) -> Callable[[Found], float]:
    return lambda found: 100 * (1 - getattr(found["ETR"], field) / getattr(found[other], field))


def _times(field: str, other: str) -> Callable[[Found], float]:
    return lambda found: getattr(found[other], field) / getattr(found["ETR"], field)


CLAIMS = (
    Claim("step below baseline (%)", 5.4, 46.6, "{:.1f}", _below("seconds", "baseline")),
    Claim("step below LocMoE (%)", 2.9, 13.3, "{:.1f}", _below("seconds", "LocMoE")),
    Claim(
        "experts' products, baseline over ETR",
        17,
        17,
        "{:.2f}",
        _times("expert_seconds", "baseline"),
    ),
    Claim(
        "experts' products, LocMoE over ETR", 2.6, 2.6, "{:.2f}", _times("expert_seconds", "LocMoE")
    ),
    Claim(
        "all products, baseline over ETR", 2.8, 2.8, "{:.2f}", _times("product_seconds", "baseline")
    ),
    Claim("memory below baseline (%)", 4.57, 16.27, "{:.1f}", _below("memory_bytes", "baseline")),
    Claim("memory below LocMoE (%)", 2.86, 10.5, "{:.1f}", _below("memory_bytes", "LocMoE")),
    Claim("tokens of an expert below baseline (%)", 40, 40, "{:.1f}", _below("rows", "baseline")),
)
NOT_PREDICTED = (
    "equal perplexity at 40 % fewer tokens; GDAD 52.8 to 61.5, TeleQnA 62.1 to 68.8, GPQA 29.2 to "
    "33.5, HumanEval 40.2 to 67.8, MMLU 71.8 to 70.4; highest Calinski-Harabasz ratio with both "
    "directions; the balance of auxiliary and locality loss; feature correlation near 0 before "
    "training and above 0.8 after"
)


def searched() -> dict[int, list[dict[str, float]]]:
    """Points that are tried on each cluster: the base, the ends one by one, and random ones."""
    draw = np.random.default_rng(0)
    tried = [base()]
    for name, assumption in ASSUMED.items():
        tried += [{**base(), name: end} for end in (assumption.low, assumption.high)]
    for place in draw.random((POINTS, len(ASSUMED))):
        ends = ASSUMED.items()
        tried.append(
            {n: a.low + p * (a.high - a.low) for (n, a), p in zip(ends, place, strict=True)}
        )
    # The most that speaks for ETR, at once.
    most = {
        "baseline_factor": 8.0,
        "etr_start": 0.6,
        "etr_end": 0.4,
        "local": 1.0,
        "recompute": 0.0,
    }
    tried += [
        {**base(), **most, "between": rate, "hottest": hottest}
        for rate in (12.5e9, 400e9)
        for hottest in (1.0, 4.0)
    ]
    return dict.fromkeys(LAYOUTS, tried)


def page() -> str:
    """docs/results/paper-clusters.md."""
    found = {
        devices: [outcomes(devices, values) for values in points]
        for devices, points in searched().items()
    }
    at_base = {devices: all_found[0] for devices, all_found in found.items()}
    rows, missed = [], []
    for claim in CLAIMS:
        values = [claim.of(one) for every in found.values() for one in every]
        low, high = min(values), max(values)
        reached = any(claim.low <= value <= claim.high for value in values) or (
            claim.low == claim.high and low <= claim.low <= high
        )
        told = f"{claim.low:g}" if claim.low == claim.high else f"{claim.low:g} to {claim.high:g}"
        here = [claim.text.format(claim.of(at_base[devices])) for devices in LAYOUTS]
        span = f"{claim.text.format(low)} to {claim.text.format(high)}"
        rows.append((claim.words, told, *here, span, "yes" if reached else "no"))
        if not reached:
            missed.append(claim.words)
    steps = [
        (
            f"{devices}",
            LAYOUTS[devices].name,
            name,
            f"{one.seconds:.2f}",
            f"{one.memory_bytes / 1e9:.1f}",
            "yes" if one.memory_bytes <= 64e9 else "no",
        )
        for devices, every in at_base.items()
        for name, one in every.items()
    ]
    head = ("number", "paper", *map(str, LAYOUTS), "over the ranges", "reached")
    assumed = [
        (a.words, f"{a.base:g}", f"{a.low:g} to {a.high:g}", a.source) for a in ASSUMED.values()
    ]
    return "\n".join(
        [
            "# The paper's clusters, predicted\n",
            "Generated by `etr cluster paper`; nothing here is typed by hand. **Predicted** by the "
            "cost model (`etr.cluster.cost`) from sizes and assumed rates; nothing was measured on "
            "such a cluster. The paper gives ranges over its clusters.\n",
            f"## Beside each number of the paper\n\n{table(head, rows)}",
            _reached(found, missed),
            f"Not a matter of time or memory, so not predicted: {NOT_PREDICTED}.\n",
            "## Steps\n\n"
            + table(("devices", "layout", "router", "step (s)", "memory (GB)", "fits"), steps),
            "## What goes in\n\n" + table(("what", "source"), GIVEN),
            table(("assumption", "taken", "tried", "source"), assumed),
            f"## What moves the saving of a step most\n\n{_tornado(found[64])}",
        ]
    )


def _reached(found: dict[int, list[Found]], missed: list[str]) -> str:
    """Which numbers no point reproduces, and how many points reproduce all ranges at once."""
    ranges = [claim for claim in CLAIMS if claim.low < claim.high]
    together = sum(
        all(c.low <= c.of(one) <= c.high for one in point for c in ranges)
        for point in zip(*found.values(), strict=True)
    )
    said = f"No tried point of the listed ranges reproduces: {'; '.join(missed)}."
    if not missed:
        said = "Each number is reached at some tried point of the listed ranges."
    return (
        f"{said} A single number counts as reached where it lies between the least and the "
        f"greatest prediction. Tried are {len(found[64])} points on each cluster: what is taken, "
        f"each end of a range alone, {POINTS} at random, and the ends that favour ETR most, "
        f"together. At {together} of them all ranges of steps and memory hold on all clusters at "
        "once.\n"
    )


def _tornado(found: list[Found]) -> str:
    """The ends of each range, one by one, on 64 devices."""
    claim = CLAIMS[0]
    rows = []
    for number, assumption in enumerate(ASSUMED.values()):
        low, high = (claim.of(found[1 + 2 * number + end]) for end in (0, 1))
        rows.append((abs(high - low), assumption, low, high))
    rows.sort(key=lambda row: -row[0])
    cells = [
        (a.words, f"{a.low:g}: {low:.1f}", f"{a.high:g}: {high:.1f}", f"{width:.1f}")
        for width, a, low, high in rows
    ]
    return (
        "A tornado table: 64 devices, step of ETR below the baseline's in percent, "
        f"{claim.of(found[0]):.1f} as taken; one assumption moved at a time.\n\n"
        + table(("assumption", "at its least", "at its most", "width"), cells)
    )
