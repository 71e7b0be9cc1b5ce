"""The cost model fitted to measured steps of the emulated cluster, and what it says of others."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from etr.cluster.bench.plan import EMULATED, REAL, ROWS, BenchConfig, nodes_of
from etr.cluster.cost import Links, layer_seconds
from etr.cluster.network import parse_rate
from etr.moe.dispatch import parse_dispatcher
from etr.sheet import table

MOST_MEAN, MOST_WORST = 0.10, 0.20
"""Errors that the model is held to on timings that were kept out of its fit."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What is fitted."""

    latency_seconds: float
    """Of an exchange."""
    between_bytes_per_second: float
    """Of a node's uplink."""
    compute_ratio: float
    """Time that the experts take over what they were told to sleep."""
    start_seconds: float
    """Of starting the experts, once a chunk."""
    layer_seconds: float
    """Of the rest of a layer, in each direction."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A measured step of the emulated cluster."""

    group: str
    """What it is timed in: shape, text and ratio of compute to network."""
    variant: str
    """Row of the benchmark."""
    seed: int
    """Of the trained model."""
    seconds: float
    """Median of its steps."""
    layers: tuple[np.ndarray, ...]
    """Bytes from each rank to each, of each layer."""
    nodes: tuple[int, ...]
    """Node of each rank."""
    within_bytes_per_second: float
    """Inside a node, as the network was told: no timing shows it, since uplinks are busier."""
    sleep_seconds: tuple[float, ...]
    """What the busiest rank's experts of each layer sleep in the forward pass."""

    @property
    def chunks(self) -> int:
        """Parts that travel one behind the other."""
        return getattr(parse_dispatcher(ROWS[self.variant].dispatch), "chunks", 1)


def timings_of(results: Mapping[str, Any], config: BenchConfig) -> list[Timing]:
    """The steps of the benchmark's results whose compute was emulated."""
    found = []
    for timed in results["timed"]:
        if timed["compute"] == REAL:
            continue
        at = timed["compute"].removeprefix(EMULATED)
        ratio = float(at.removeprefix("-at-")) if at else config.compute_ratio
        rows = np.array(timed["rows"], dtype=np.float64)
        per_row = config.seconds_per_row(ratio)
        found.append(
            Timing(
                group=f"{timed['shape']}, {timed['run']['text']} text, ratio {ratio:g}",
                variant=timed["variant"],
                seed=timed["run"]["seed"],
                seconds=statistics.median(timed["seconds"]),
                layers=tuple(rows * timed["row_bytes"]),
                nodes=nodes_of(timed["shape"]),
                within_bytes_per_second=parse_rate(config.intra) / 8,
                sleep_seconds=tuple((rows.sum(1).max(1) * per_row).tolist()),
            )
        )
    return found


def predicted_seconds(timing: Timing, fitted: Fitted) -> float:
    """A step by the model: forward and backward of every layer."""
    links = Links(
        latency_seconds=fitted.latency_seconds * timing.chunks,
        within_bytes_per_second=timing.within_bytes_per_second,
        between_bytes_per_second=fitted.between_bytes_per_second,
    )
    total, start = 0.0, fitted.start_seconds * timing.chunks
    for traffic, sleep in zip(timing.layers, timing.sleep_seconds, strict=True):
        there = links.exchange_seconds(traffic, timing.nodes)
        back = links.exchange_seconds(traffic.T, timing.nodes)
        for factor, ways in ((1, (there, back)), (2, (back, there))):
            compute = factor * sleep * fitted.compute_ratio + start
            total += layer_seconds(ways[0], compute, ways[1], timing.chunks)
            total += fitted.layer_seconds
    return total


def fit(timings: Sequence[Timing], config: BenchConfig) -> Fitted:
    """The values with the least squared logarithms of predicted over measured seconds."""
    from scipy.optimize import least_squares

    begin = Fitted(
        latency_seconds=1e-3,
        between_bytes_per_second=parse_rate(config.inter) / 8,
        compute_ratio=1.0,
        start_seconds=1e-3,
        layer_seconds=5e-3,
    )

    def errors(logs: np.ndarray) -> list[float]:
        tried = Fitted(**dict(zip(vars(begin), np.exp(logs).tolist(), strict=True)))
        return [float(np.log(predicted_seconds(t, tried) / t.seconds)) for t in timings]

    logs = least_squares(errors, np.log(list(vars(begin).values()))).x
    return Fitted(**dict(zip(vars(begin), np.exp(logs).tolist(), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fit and what it says of the timings that were kept out of it."""

    fitted: Fitted
    used: list[Timing]
    kept_out: list[Timing]

    def errors(self, timings: Sequence[Timing]) -> np.ndarray:
        """Relative error of each prediction."""
        return np.array([predicted_seconds(t, self.fitted) / t.seconds - 1 for t in timings])

    def cells(self) -> dict[tuple[str, str], tuple[float, float]]:
        """(group, variant) kept out: predicted and measured seconds, means over seeds."""
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for timing in self.kept_out:
            both = predicted_seconds(timing, self.fitted), timing.seconds
            found.setdefault((timing.group, timing.variant), []).append(both)
        return {key: tuple(np.mean(both, axis=0)) for key, both in found.items()}

    def orders(self) -> tuple[int, int, list[str]]:
        """Pairs of variants of a group: all; those in the measured order; the others, in words.

        Pairs whose measured means lie within 5 % of each other have no order.
        """
        cells, right, wrong = self.cells(), 0, []
        for (a, x), (b, y) in itertools.combinations(cells.items(), 2):
            if a[0] != b[0] or abs(x[1] / y[1] - 1) < 0.05:
                continue
            if (x[0] < y[0], x[0] > y[0]) == (x[1] < y[1], x[1] > y[1]):
                right += 1
            else:
                how = ", predicted equal" if x[0] == y[0] else ""
                wrong.append(f"{a[1]} and {b[1]} ({a[0]}{how})")
        return right + len(wrong), right, wrong


def calibrate(results: Mapping[str, Any], config: BenchConfig) -> Calibration:
    """Fit to the first shape's own text at the usual ratio; all else is kept for validation."""
    timings = timings_of(results, config)
    first = f"{config.shapes[0]}, own text, ratio {config.compute_ratio:g}"
    used = [timing for timing in timings if timing.group == first]
    return Calibration(
        fitted=fit(used, config),
        used=used,
        kept_out=[timing for timing in timings if timing.group != first],
    )


def section(found: Calibration) -> str:
    """What the page says of a calibration."""
    inside, errors = found.errors(found.used), found.errors(found.kept_out)
    average, worst = float(np.abs(errors).mean()), float(np.abs(errors).max())
    pairs, right, wrong = found.orders()
    holds = average < MOST_MEAN and worst < MOST_WORST and not wrong
    fitted = found.fitted
    values = [
        ("latency of an exchange", f"{fitted.latency_seconds * 1e3:.2f} ms"),
        ("uplink of a node", f"{fitted.between_bytes_per_second * 8e-6:.0f} Mbit/s"),
        ("experts' time over what they sleep", f"{fitted.compute_ratio:.2f}"),
        ("starting a chunk's experts", f"{fitted.start_seconds * 1e3:.1f} ms"),
        ("the rest of a layer, each direction", f"{fitted.layer_seconds * 1e3:.1f} ms"),
    ]
    rows = [
        (*key, f"{both[0]:.3f}", f"{both[1]:.3f}", f"{both[0] / both[1] - 1:+.0%}")
        for key, both in found.cells().items()
    ]
    return (
        "## Against measured steps of the emulated cluster\n\n"
        f"**Measured** on the emulated network, with emulated compute ([cluster.md](cluster.md)). "
        f"Five values are fitted to the {len(found.used)} timings of {found.used[0].group}; the "
        f"{len(found.kept_out)} of other numbers of nodes, other text and other ratios are kept "
        f"out of it.\n\n{table(('fitted', 'value'), values)}\n"
        f"On the timings of the fit the mean absolute error is {np.abs(inside).mean():.1%}, the "
        f"worst {np.abs(inside).max():.1%}. On those kept out it is {average:.1%} (asked: under "
        f"{MOST_MEAN:.0%}), the worst {worst:.1%} (asked: under {MOST_WORST:.0%}), and {right} of "
        f"{pairs} pairs of variants whose measured means differ by 5 % or more are in the measured "
        f"order (asked: all). {'All three hold.' if holds else 'Not all three hold.'}"
        + (f" Out of order: {'; '.join(wrong)}." if wrong else "")
        + "\n\nKept out, means over seeds:\n\n"
        + table(("timed in", "variant", "predicted (s)", "measured (s)", "error"), rows)
    )
