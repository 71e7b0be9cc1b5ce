"""EdgeMoE: bits by what the loss misses, and experts fetched by those before (2308.14352)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS
from etr.model.bits import FewBits, bits_a_weight, num_matrices, rounded
from etr.model.experts import Calibrated, OfExperts
from etr.model.transform import Stats
from etr.moe.checked import check_types
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.packed import WHOLE
from etr.moe.experts.weights import ExpertWeights
from etr.moe.layer import MoE
from etr.moe.view import LayerView
from etr.systems.cache import CACHES, Cache, FastMemory, Forecast
from etr.systems.plan import Demand


@dataclass(frozen=True, kw_only=True)
class EdgeMoe(Calibrated, FewBits):
    """Rounds experts to few bits, and to fewer where the loss of the text allows it.

    An expert's importance is what the loss rises by while it alone has `low` bits. With `base` bits
    for all, experts are lowered from the least important one on, for as long as the loss does not
    rise by more than the tolerance. The text is run up to twice for every expert of the model.
    """

    name = "edgemoe"
    summary = "experts of few bits, and fewer for those that the loss of your text misses least"

    base: int = 4
    """Bits of most experts: 2, 4, 8 (or 3 where store=plain), or 16 for none."""
    low: int = 2
    """Bits of the least important ones."""
    tolerance: float = 0.05
    """Nats a token by which the loss of the text may rise over that of the model as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_bits("base", "low")
        if self.low > self.base:
            raise ValueError(f"low={self.low} must not be over base={self.base} bits")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance} must be at least 0 nats a token")

    def changes_function(self) -> str | None:
        if self.low == WHOLE:
            return None
        return f"weights have {self.base} bits, of the least important experts {self.low}"

    def observe(self, view: LayerView) -> Stats:
        return {"tokens": view.selection.num_tokens_per_expert}

    def probe(
        self, layers: Sequence[Collected], loss: Callable[[], float], stats: Sequence[Stats]
    ) -> list[Stats]:
        """Of each expert ``rise``, that of the loss by `low` bits for it alone, and its ``bits``.

        And ``total`` [], what the loss rises by with those bits.
        """
        experts = _Experts(layers)
        OfExperts.check(self, None, experts.configs)
        tokens, before = [one["tokens"] for one in stats], loss()
        if self.low == self.base:
            rise = [torch.zeros(len(count)).double() for count in tokens]
        else:
            rise = [one - before for one in experts.losses(self.low, loss)]
        judged = self.judged(tokens, rise, experts.configs)
        bits = [torch.where(one.isposinf(), WHOLE, self.base) for one in judged]
        experts.round_all(bits)
        total = loss() - before
        for place, expert in self._least_first(judged):
            experts.round(place, expert, self.low)
            lowered = loss() - before
            if not lowered <= self.tolerance:
                break
            total, bits[place][expert] = lowered, self.low
        return [
            {"rise": one, "bits": widths, "total": torch.tensor(total, dtype=torch.float64)}
            for one, widths in zip(rise, bits, strict=True)
        ]

    def _least_first(self, judged: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Layer and expert of those that may be lowered."""
        if self.low == self.base:
            return []
        places = [(place, e) for place, one in enumerate(judged) for e in range(len(one))]
        flat = torch.cat([*judged])
        order = flat.argsort(stable=True).tolist()
        return [places[number] for number in order if not flat[number].isposinf()]

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        return {
            "bits": [
                one["bits"].repeat_interleave(num_matrices(layer)).tolist()
                for one, layer in zip(stats, layers, strict=True)
            ],
            "loss_rise": float(stats[0]["total"]),
            "importance": [one["rise"].tolist() for one in stats],
            "tokens": [one["tokens"].tolist() for one in stats],
        }

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        found = f"{bits_a_weight(plan, layers):.4g} bits a weight of the experts"
        rise = plan.get("loss_rise")
        return found if rise is None else f"{found}; the loss of the text rises by {rise:.4f} nats"


class _Experts:
    """Experts of layers, rounded in place from what they were."""

    def __init__(self, layers: Sequence[Collected]) -> None:
        self.parts: list[ExpertWeights] = []
        self.configs: list[MoEConfig] = []
        for layer in layers:
            assert isinstance(layer, MoE)
            self.configs.append(layer.config)
            self.parts += layer.bank.parts
        self.whole = [
            {name: value.detach().clone() for name, value in part.weights()} for part in self.parts
        ]

    def round(self, place: int, expert: int, width: int) -> None:
        one = {name: value[expert, None] for name, value in self.whole[place].items()}
        if width != WHOLE:
            one = rounded(one, [width] * num_matrices(self.configs[place]))
        into = dict(self.parts[place].weights())
        for name, value in one.items():
            into[name][expert] = value[0]

    def round_all(self, bits: Sequence[Tensor]) -> None:
        for place, widths in enumerate(bits):
            for expert, width in enumerate(widths.tolist()):
                self.round(place, expert, width)

    def losses(self, width: int, loss: Callable[[], float]) -> list[Tensor]:
        """Of each expert that of the text while it alone is rounded, float64 [E] a layer."""
        found = []
        for place, config in enumerate(self.configs):
            each = []
            for expert in range(config.num_experts):
                self.round(place, expert, width)
                each.append(loss())
                self.round(place, expert, WHOLE)
            found.append(torch.tensor(each, dtype=torch.float64))
        return found


@dataclass(frozen=True, kw_only=True)
class EdgeCache(Cache):
    """Brings the next layer's experts in while a layer runs, by what followed it in a trace.

    Keys are the sets of experts that a token used in the two layers before, then in the one before,
    then none. Whoever has the lowest uses so far / (1 + layers until its own runs) leaves; what the
    running layer uses stays, and what was just brought in.
    """

    name = "edgemoe"
    summary = "the next layer's likely experts come early; rare and late ones leave"
    predicts = True
    prefetches = True

    prefetch: int = 2
    """Experts that are brought in before a layer, at most; 0 for none."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.prefetch < 0:
            raise ValueError(f"prefetch={self.prefetch} must be at least 0 experts")

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
        return _Layered(expected)

    def learn(self, past: Demand, tokens: Tensor) -> Forecast:
        paths = Paths(_choices(past))

        def forecast(demand: Demand, tokens: Tensor) -> Tensor:
            choices = _choices(demand)
            found = choices.new_full((*choices.shape[:2], self.prefetch), -1)
            for number, row in enumerate(sets_of(choices)):
                for layer in range(1, len(choices)):  # nothing runs before the first
                    guess = paths.following(row[:layer])[: self.prefetch]
                    found[layer, number, : len(guess)] = found.new_tensor(guess)
            return found

        return forecast


class _Layered(FastMemory):
    """Knows which layer runs, and how often each expert was used."""

    def __init__(self, expected: Sequence[Sequence[int]]) -> None:
        self._expected = expected
        self._used: dict[int, tuple[int, int]] = {}  # how often, and when last
        self._now, self._stays = 0, set[int]()

    def prepare(self, step: int, experts: Sequence[int]) -> Iterator[int]:
        for expert in self._expected[step]:  # while the layer before runs
            self._stays.add(expert)
            yield expert
        self._now, self._stays = step % self.num_layers, set(experts)

    def used(self, place: int, expert: int) -> None:
        self._used[expert] = self._used.get(expert, (0, 0))[0] + 1, place

    def leaves(self, held: Collection[int]) -> int:
        return min(held, key=lambda expert: (expert in self._stays, *self._rank(expert)))

    def _rank(self, expert: int) -> tuple[float, int, int]:
        """Score, then last use, then number."""
        often, last = self._used.get(expert, (0, -1))
        distance = (expert // self.num_experts - self._now) % self.num_layers
        return often / (1 + distance), last, expert


Used = tuple[int, ...]
"""Of one layer, sorted."""


class Paths:
    """How often each expert followed those of the two layers before it, or of one, or any.

    Args:
        choices: of a trace, int64 [L, N, K].
    """

    def __init__(self, choices: Tensor) -> None:
        self._counts: dict[tuple[object, ...], Counter[int]] = {}
        for row in sets_of(choices):
            for layer, experts in enumerate(row):
                for key in _keys(row[:layer]):
                    self._counts.setdefault(key, Counter()).update(experts)

    def following(self, before: Sequence[Used]) -> list[int]:
        """Experts of the next layer, likeliest first; none where the trace has no such layer.

        Args:
            before: sets of experts of all layers so far, sorted.
        """
        known = (self._counts[key] for key in _keys(before) if key in self._counts)
        counts = next(known, Counter[int]())
        return sorted(counts, key=lambda expert: (-counts[expert], expert))


def sets_of(choices: Tensor) -> list[list[Used]]:
    """Of each token its experts in every layer, sorted.

    Args:
        choices: int64 [L, N, K].
    """
    rows = choices.transpose(0, 1).tolist()
    return [[tuple(sorted({e for e in one if e >= 0})) for one in row] for row in rows]


def _keys(before: Sequence[Used]) -> list[tuple[object, ...]]:
    """Number of the layer with the sets of two layers before it, of one, of none."""
    layer = len(before)
    return list(dict.fromkeys((layer, *before[max(layer - n, 0) :]) for n in (2, 1, 0)))


def _choices(demand: Demand) -> Tensor:
    if demand.choices is None:
        raise ValueError("cache 'edgemoe' learns from the choices of every token")
    return demand.choices


CARD = Card(
    name="edgemoe",
    title="EdgeMoE",
    summary="fewer bits where the loss misses them least, and experts that come before they run",
    paper="2308.14352",
    level="system",
    branch="offloading and caching",
    rows=(Row(table=TRANSFORMS, kind=EdgeMoe), Row(table=CACHES, kind=EdgeCache)),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Of a small language model's trace, 2 experts that are brought in early are at least 0.1 "
        "more of what the next layer uses than the 2 most frequent ones; of 48 experts, hits with "
        "12 held are over LRU's by at least 0.1 and with 24 not below; 4 and 2 bits raise the loss "
        "of the text by no more than the 0.05 nats allowed."
    ),
    departs=(
        "Bits are of whole experts, rounded to nearest; importance is the loss and no accuracy. "
        "The score of who leaves is this library's own, since the paper's is not known here; "
        "without early experts it has fewer hits than LRU (0.29 against 0.39 with 12 held). Early "
        "experts are moved too, 1.55 times as many as by LRU. The trace's layers are two real "
        "ones, of three tokens each."
    ),
)
