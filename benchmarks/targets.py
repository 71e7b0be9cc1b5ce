"""What was promised: each target, its measured value, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from benchmarks.measures import few, generate
from benchmarks.measures.memory import PADDED, TIGHT
from benchmarks.measures.router import ETR_GIVEN, GRAP, GRAP_ROUTER, LINEAR, LINEAR_ROUTER
from benchmarks.measures.routing import CHOICE, LAYER, ROUTING
from benchmarks.measures.training import BEFORE
from benchmarks.results import STEP, CaseResult, Row
from benchmarks.spread import Spread
from benchmarks.systems.floors import DENSE, PER_EXPERT

SAME_PRODUCTS = (
    "both multiply the same rows by the same kernels, and take within a tenth of each other; what "
    "differs is memory (saved bytes, below)"
)
FEW_PAIRS = "its one-hot tensors grow with tokens times capacity, and are small here"
BOOKKEEPING = (
    "what is not a product of matrices is the layer's bookkeeping (operations, below), and in "
    "Python some 280 functions a call where transformers' block runs 100"
)
REASONS: dict[str, str] = {
    "etr over dense floor, 8 experts, 500 tokens each or more": "in bfloat16 the per-expert floor "
    "is itself far above the dense one; reading all tokens for one expert each is the rest",
    "etr over dense floor, 64 experts, 500 tokens each or more": "the per-expert floor itself is "
    "most of the way there: products of 512 rows and width 512 run slower than one dense one",
    "transformers grouped_mm over etr, 4096 tokens": SAME_PRODUCTS,
    "transformers grouped_mm over etr, 256 tokens": SAME_PRODUCTS,
    "transformers eager over etr, 4096 tokens": "its zero gradients of full size cost page faults, "
    "which this run's allocator spares it; see --no-mallopt",
    "GShard one-hot over etr, 4096 tokens": FEW_PAIRS,
    "GShard one-hot over etr, 256 tokens": FEW_PAIRS,
    "st-moe-pytorch over etr, 256 tokens": FEW_PAIRS,
    "DeepSpeed over etr, 4096 tokens": SAME_PRODUCTS,
    "DeepSpeed over etr, 256 tokens": SAME_PRODUCTS,
    "linear over GrAP scores, 64 experts or more, float32, forward": "reading the tokens bounds "
    "both; the linear product catches up from 64 experts downwards",
    "linear over GrAP scores, 64 experts or more, float32, forward+backward": "reading the tokens "
    "bounds both at width 1024",
    "routing's share of the layer, 8 experts": "top-1 over 8 narrow experts leaves the layer few "
    "products; about half of the share is choosing, half sorting, counting and capacity",
    f"{GRAP_ROUTER} over linear router, 64 or 256 experts": "reading the tokens bounds both at "
    "width 1024",
    "peak bytes of a step, ragged at factor 0.6 over padded at 1.1": "a step's peak holds the "
    "gradients of all weights too, of which dropping spares nothing",
    **{
        f"{ETR_GIVEN} over linear router, {experts} experts": "each token's norm and its "
        "gradient read the tokens once more"
        for experts in ("64", "128 or 256")
    },
    **{
        f"{ours} over transformers' block, {tokens}": BOOKKEEPING
        for ours in (few.SAME, few.OWN, few.DROPS)
        for tokens in ("1 token", "8 tokens", "64 tokens")
    },
    f"prefill of a model, {generate.OWN}, over transformers' model": "its router reads each token "
    "once more, for the norm",
    **{
        f"{label} of a model, {ours}, over transformers' model": reason
        for label, reason in (
            ("decode", BOOKKEEPING),
            (
                "compiled decode",
                "what the experts multiply is the same; a call checks some 2300 guards of two "
                "layers where transformers' checks 1260",
            ),
        )
        for ours in (generate.SAME, generate.OWN)
    },
}
"""Why a target is missed, by its name, from the measured stages and floors; shown with the worst
case only while it is missed."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The value of a target on one case."""

    case: str
    value: Spread


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise.

    Args:
        name: what is compared with what.
        bound: at most or at least.
        limit: of the median.
        unit: "x" for a factor, "%" for a share of 1.
        read: all readings in a list of results; the worst one decides.
    """

    name: str
    bound: Literal["at most", "at least"]
    limit: float
    unit: Literal["x", "%"] = "x"
    read: Callable[[list[CaseResult]], list[Reading]]

    def holds(self, value: float) -> bool:
        """Whether a value meets the limit."""
        return value <= self.limit if self.bound == "at most" else value >= self.limit


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A target on a list of results.

    Args:
        target: which.
        readings: worst first; empty if nothing was measured.
        met: how many readings hold the limit.
        reason: why it is missed, or empty.
    """

    target: Target
    readings: list[Reading]
    met: int
    reason: str

    @property
    def outcome(self) -> str:
        """met, missed, or not measured."""
        if not self.readings:
            return "not measured"
        return "met" if self.met == len(self.readings) else "missed"


def judge(target: Target, results: list[CaseResult]) -> Verdict:
    """Read a target off results."""
    readings = sorted(
        target.read(results),
        key=lambda reading: reading.value.median,
        reverse=target.bound == "at most",
    )
    met = sum(target.holds(reading.value.median) for reading in readings)
    missed = met < len(readings)
    found = (REASONS.get(target.name), breakdown(readings[0].case, results)) if missed else ()
    reason = "; ".join(filter(None, found))
    return Verdict(target=target, readings=readings, met=met, reason=reason)


def breakdown(case: str, results: list[CaseResult]) -> str:
    """What the measured stages of the layer say about a case of the layer, or empty."""
    same = case.removeprefix("layer/")
    for result in results:
        if result.group == "routing" and result.name.removeprefix("routing/") == same:
            whole, choice = shares(result)
            if whole is not None and choice is not None:
                return (
                    f"routing takes {whole.median:.1%} of the layer's step on these sizes, of it "
                    f"affinity and selection {choice.median:.1%}"
                )
    return ""


def shares(result: CaseResult) -> tuple[Spread | None, Spread | None]:
    """Shares of a layer's step: all of routing, and choosing alone."""
    layer = result.row(LAYER)
    return result.ratio(result.row(ROUTING), layer), result.ratio(result.row(CHOICE), layer)


def of_layer(
    other: str, wanted: Callable[[CaseResult], bool], *, ours_over_other: bool
) -> Callable[[list[CaseResult]], list[Reading]]:
    """Readings of the layer against another system, forward and backward, per kept pair."""

    def read(results: list[CaseResult]) -> list[Reading]:
        found = []
        for result in results:
            if result.group == "layer" and wanted(result):
                pair = (result.ours, result.row(other))
                value = result.ratio(*(pair if ours_over_other else pair[::-1]))
                if value is not None:
                    found.append(Reading(case=result.name, value=value))
        return found

    return read


def routing_share(num_experts: int) -> Callable[[list[CaseResult]], list[Reading]]:
    """Readings of what routing takes of the layer."""

    def read(results: list[CaseResult]) -> list[Reading]:
        return [
            Reading(case=result.name, value=share)
            for result in results
            if result.group == "routing" and result.sizes["num_experts"] == num_experts
            if (share := shares(result)[0]) is not None
        ]

    return read


def grap(measure: str) -> Callable[[list[CaseResult]], list[Reading]]:
    """Readings of linear scores over GrAP scores at 64 experts and more, float32."""

    def read(results: list[CaseResult]) -> list[Reading]:
        return [
            Reading(case=result.name, value=value)
            for result in results
            if result.group == "router"
            and result.sizes["num_experts"] >= 64
            and result.sizes["dtype"] == "float32"
            if (value := result.ratio(result.row(LINEAR), result.row(GRAP), measure)) is not None
        ]

    return read


def saved(rival: str) -> Callable[[list[CaseResult]], list[Reading]]:
    """Readings of our saved bytes over a rival's, nothing dropped by either."""

    def read(results: list[CaseResult]) -> list[Reading]:
        found = []
        for result in results:
            ours, other = _bytes(result.ours), _bytes(result.row(rival))
            if result.group == "layer" and ours and other:
                found.append(Reading(case=result.name, value=_exact(ours / other)))
        return found

    return read


def over(
    group: str,
    ours: str,
    rival: str,
    measure: str,
    wanted: Callable[[CaseResult], bool] = lambda result: True,
) -> Callable[[list[CaseResult]], list[Reading]]:
    """Readings of one row's time over another's in the cases of a group."""

    def read(results: list[CaseResult]) -> list[Reading]:
        return [
            Reading(case=result.name, value=value)
            for result in results
            if result.group == group and wanted(result)
            if (value := result.ratio(result.row(ours), result.row(rival), measure)) is not None
        ]

    return read


def peak(ours: str, rival: str) -> Callable[[list[CaseResult]], list[Reading]]:
    """Readings of the peak bytes of one row's step over another's."""

    def read(results: list[CaseResult]) -> list[Reading]:
        found = []
        for result in results:
            above, below = result.row(ours), result.row(rival)
            if above and below and above.peak_bytes and below.peak_bytes:
                value = _exact(above.peak_bytes / below.peak_bytes)
                found.append(Reading(case=result.name, value=value))
        return found

    return read


def demo_step(results: list[CaseResult]) -> list[Reading]:
    """Readings of the demo's steps over those of the other checkout."""
    return [
        Reading(case=f"{result.name}: {row.system}", value=value)
        for result in results
        if result.group == "training"
        for row in result.rows
        if (value := result.ratio(row, result.row(row.system + BEFORE), "step")) is not None
    ]


def _bytes(row: Row | None) -> int | None:
    return None if row is None or row.refused else row.saved_bytes


def _exact(value: float) -> Spread:
    return Spread(median=value, low=value, high=value, count=1)


def _few(result: CaseResult) -> bool:
    return bool(result.sizes["num_experts"] == 8) and _loaded(result)


def _many(result: CaseResult) -> bool:
    return bool(result.sizes["num_experts"] == 64) and _loaded(result)


def _loaded(result: CaseResult) -> bool:
    return bool(result.sizes["tokens_each"] >= 500)


def _sparse(result: CaseResult) -> bool:
    return bool(result.sizes["tokens_each"] <= 64)


def _tokens(count: int) -> Callable[[CaseResult], bool]:
    return lambda result: bool(result.sizes["num_tokens"] == count)


def _wide(*experts: int) -> Callable[[CaseResult], bool]:
    return lambda result: (
        result.sizes["num_experts"] in experts and bool(result.sizes["hidden_size"] >= 1024)
    )


def _few_tokens() -> Iterable[Target]:
    """One forward in eval mode, by number of tokens."""
    limits = {few.SAME: 1.02, few.OWN: 1.02, few.DROPS: 1.0}
    for ours, limit in limits.items():
        for tokens in (1, 8, 64):
            yield Target(
                name=f"{ours} over transformers' block, {tokens} token{'s'[: tokens > 1]}",
                bound="at most",
                limit=limit,
                read=over("few", ours, few.HF, "forward", _tokens(tokens)),
            )


def _whole_model() -> Iterable[Target]:
    """Prefill and decode of a model that serves dropless."""
    for label in generate.RUNS:
        for ours in (generate.SAME, generate.OWN):
            yield Target(
                name=f"{label} of a model, {ours}, over transformers' model",
                bound="at most",
                limit=1.0 if label == "compiled decode" else 1.02,
                read=over(
                    "generate",
                    ours,
                    generate.HF,
                    "forward",
                    lambda result, label=label: result.sizes["label"] == label,  # type: ignore[misc]
                ),
            )


def _routers() -> Iterable[Target]:
    """Whole routers, forward and backward, width 1024 and more."""
    limits = (
        (ETR_GIVEN, 1.10, (64,)),
        (ETR_GIVEN, 1.05, (128, 256)),
        (GRAP_ROUTER, 0.5, (64, 256)),
    )
    for ours, limit, experts in limits:
        yield Target(
            name=f"{ours} over linear router, {' or '.join(map(str, experts))} experts",
            bound="at most",
            limit=limit,
            read=over("router", ours, LINEAR_ROUTER, STEP, _wide(*experts)),
        )


def _against(
    rival: str, limit: float, wanted: Callable[[CaseResult], bool] = lambda result: True
) -> Iterable[Target]:
    """A rival by number of tokens: what it loses grows or shrinks with them."""
    for tokens in (4096, 256):
        yield Target(
            name=f"{rival} over etr, {tokens} tokens",
            bound="at least",
            limit=limit,
            read=of_layer(
                rival,
                lambda result, tokens=tokens: (  # type: ignore[misc]
                    result.sizes["num_tokens"] == tokens and wanted(result)
                ),
                ours_over_other=False,
            ),
        )


TARGETS: tuple[Target, ...] = (
    Target(
        name="etr over dense floor, 8 experts, 500 tokens each or more",
        bound="at most",
        limit=1.10,
        read=of_layer(DENSE, _few, ours_over_other=True),
    ),
    Target(
        name="etr over dense floor, 64 experts, 500 tokens each or more",
        bound="at most",
        limit=1.15,
        read=of_layer(DENSE, _many, ours_over_other=True),
    ),
    Target(
        name="etr over per-expert floor, 64 tokens each or fewer",
        bound="at most",
        limit=1.15,
        read=of_layer(PER_EXPERT, _sparse, ours_over_other=True),
    ),
    *_against("transformers grouped_mm", 1.15),
    *_against("transformers eager", 2.5, lambda result: bool(result.sizes["num_experts"] == 64)),
    *_against("GShard one-hot", 4.0),
    *_against("st-moe-pytorch", 1.4),
    *_against("DeepSpeed", 1.5),
    Target(
        name="routing's share of the layer, 8 experts",
        bound="at most",
        limit=0.03,
        unit="%",
        read=routing_share(8),
    ),
    Target(
        name="routing's share of the layer, 64 experts",
        bound="at most",
        limit=0.08,
        unit="%",
        read=routing_share(64),
    ),
    Target(
        name="linear over GrAP scores, 64 experts or more, float32, forward",
        bound="at least",
        limit=4.0,
        read=grap("forward"),
    ),
    Target(
        name="linear over GrAP scores, 64 experts or more, float32, forward+backward",
        bound="at least",
        limit=4.0,
        read=grap(STEP),
    ),
    *_routers(),
    *_few_tokens(),
    *_whole_model(),
    Target(
        name="saved bytes, etr dropless over transformers grouped_mm",
        bound="at most",
        limit=0.5,
        read=saved("transformers grouped_mm"),
    ),
    Target(
        name="peak bytes of a step, ragged at factor 0.6 over padded at 1.1",
        bound="at most",
        limit=0.6,
        read=peak(TIGHT, PADDED),
    ),
    Target(
        name="demo step over the other checkout's",
        bound="at most",
        limit=1.05,
        read=demo_step,
    ),
)
"""In the order of the page."""


def judge_all(results: list[CaseResult]) -> list[Verdict]:
    """Every target."""
    return [judge(target, results) for target in TARGETS]
