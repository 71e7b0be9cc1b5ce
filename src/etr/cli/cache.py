"""`etr cache`: a trace in a fast memory that holds a few experts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._options import WithImports, parse
from etr.cli._progress import track
from etr.cli._tables import make_table
from etr.cli._traces import same_model
from etr.systems import CACHES, Cache, Demand, Replayed, replay
from etr.systems.regroup import experts_of_batches, regrouped, uses
from etr.trace import Trace, read_trace


@dataclass(frozen=True, kw_only=True)
class CacheConfig(WithImports):
    """Which trace to replay, and in which memories."""

    trace: Annotated[str, tyro.conf.Positional]
    """File that etr trace or etr generate --trace wrote."""
    caches: tuple[str, ...] = ()
    """Policies: who leaves when another expert must come in; by default all that need no trace to
    learn from, or with one all. oracle knows what comes: a bound."""
    sizes: tuple[int, ...] = ()
    """Experts that a memory holds; by default 1, 2, 4, ... up to all of them."""
    shared: bool = False
    """One memory for all layers, and not one each."""
    learn_from: str | None = None
    """Trace of the same model on another text, for policies that predict."""
    regroup: int | None = None
    """Also make batches of so many sequences whose predicted experts overlap, and print how many
    experts of a layer a batch uses; by each policy that predicts by tokens alone."""
    expert_bytes: int | None = None
    """Size of an expert, to print bytes and not only how many were moved."""
    bandwidth: float | None = None
    """Bytes per second of the way into the memory, to print the time that it takes too."""
    latency: float = 0.0
    """Seconds before the first byte of an expert arrives."""

    def __post_init__(self) -> None:
        for name in self.caches:
            if CACHES.parse(name).predicts and self.learn_from is None:
                raise ValueError(
                    f"cache {name!r} predicts; give --learn-from a trace of the same model"
                )
        for size in (*self.sizes, *(() if self.expert_bytes is None else (self.expert_bytes,))):
            if size < 1:
                raise ValueError(f"sizes and expert_bytes must be at least 1, not {size}")
        if self.regroup is not None and (self.regroup < 1 or self.learn_from is None):
            raise ValueError(
                f"regroup={self.regroup} must be at least 1, sequences of a batch, and needs "
                "--learn-from a trace of the same model"
            )
        if self.bandwidth is not None and (self.expert_bytes is None or not self.bandwidth > 0):
            raise ValueError(
                f"bandwidth={self.bandwidth} must be > 0, bytes per second, and needs expert_bytes"
            )
        if not self.latency >= 0:
            raise ValueError(f"latency={self.latency} must be >= 0, seconds")


def run(arguments: list[str]) -> int:
    """Replay, and print hits and what was moved for every policy and size."""
    config = parse(CacheConfig, "cache", arguments)
    trace = read_trace(config.trace)
    if config.learn_from is not None:
        _token_by_token(trace, config.trace)
    choices = torch.from_numpy(trace.choices(kept=True)[0])
    step = None if trace.step is None else torch.tensor(trace.step)
    experts = trace.info.num_experts
    largest = experts * (trace.info.num_layers if config.shared else 1)
    sizes = config.sizes or (*_doubling(largest), largest)
    names = config.caches or tuple(
        name for name, kind in CACHES.items() if config.learn_from or not kind.predicts
    )
    expected = {name: _expected(CACHES.parse(name), config.learn_from, trace) for name in names}
    options: dict[str, Any] = {"num_experts": experts, "shared": config.shared, "step": step}
    table = make_table(
        "experts held", "policy", "hits", "of the bound", *_moved(config, None), words=("policy",)
    )
    bounds: dict[int, Replayed] = {}
    for size, name in track([*product(sizes, names)], "replaying", total=len(sizes) * len(names)):
        if size not in bounds:
            bounds[size] = replay(choices, CACHES["oracle"](), size, **options)
        bound = found = bounds[size]
        if name != "oracle":
            cache = CACHES.parse(name)
            found = replay(choices, cache, size, expected=expected[name], **options)
        share = f"{found.hits / bound.hits:.1%}" if bound.hits else "-"
        cells = (str(size), name, f"{found.hit_rate:.1%}", share)
        table.add_row(*cells, *_moved(config, found))
    Console().print(table)
    order = "in decoding order" if step is None else f"in {len(step.unique_consecutive()):,} passes"
    where = "one memory for all layers" if config.shared else "a memory for each layer"
    print(
        f"{trace.num_tokens:,} tokens {order}, {trace.info.num_layers} layers of "
        f"{experts} experts, {where}, empty at first"
    )
    if config.regroup is not None:
        Console().print(batches_table(trace, expected, config.regroup))
    return 0


def batches_table(trace: Trace, expected: dict[str, torch.Tensor | None], size: int) -> Table:
    """Experts that batches use, in the trace's order and as they are made by predictions.

    Args:
        expected: what each policy predicts, by its text, int64 [L, N, K].
        size: sequences of a batch.
    """
    now = _demand(trace)
    assert now.choices is not None
    assert now.sequence is not None
    used = uses(now.choices, now.sequence, trace.info.num_experts)
    order = list(range(len(used)))
    in_order = [order[first : first + size] for first in order[::size]]
    ways = {"in order": in_order, "by what is used": regrouped(used.flatten(1), size)}
    for name, choices in expected.items():
        if choices is not None and CACHES.parse(name).predicts_prompts:
            likely = uses(choices, now.sequence, trace.info.num_experts)
            ways[f"by {name}"] = regrouped(likely.flatten(1), size)
    words = f"batches of {size} sequences"
    table = make_table(words, "experts of a layer", "of in order", words=(words,))
    least = experts_of_batches(used, in_order)
    for name, batches in ways.items():
        found = experts_of_batches(used, batches)
        table.add_row(name, f"{found:.2f}", f"{found / least:.1%}")
    return table


def _expected(cache: Cache, learn_from: str | None, trace: Trace) -> torch.Tensor | None:
    """What a policy predicts of a trace; None for one that does not."""
    if not cache.predicts or learn_from is None:
        return None
    past = same_model(learn_from, trace.info, "learn_from")
    _token_by_token(past, learn_from)
    ids = [torch.from_numpy(one.layer(0).token_id.astype("int64")) for one in (past, trace)]
    before, now = (_demand(one) for one in (past, trace))
    return cache.learn(before, ids[0])(now, ids[1])


def _token_by_token(trace: Trace, path: str) -> None:
    """Refuse what policies that predict cannot go by."""
    if trace.step is not None:
        raise ValueError(
            f"{path!r} has the steps of a model that fills blocks; policies that learn_from "
            "another trace predict token after token: leave it out, or give traces of etr trace"
        )


def _demand(trace: Trace) -> Demand:
    choices, sequence = map(torch.tensor, trace.choices(kept=True))
    return Demand.of(choices, sequence, trace.info.num_experts)


def _moved(config: CacheConfig, found: Replayed | None) -> tuple[str, ...]:
    """Cells that say what was moved, or their headings."""
    if config.expert_bytes is None:
        return ("experts moved",) if found is None else (f"{found.loads:,}",)
    cells = (
        ["MB moved"] if found is None else [f"{found.bytes_moved(config.expert_bytes) / 1e6:,.1f}"]
    )
    if config.bandwidth is not None:
        way = (config.expert_bytes, config.bandwidth, config.latency)
        cells.append("seconds" if found is None else f"{found.seconds(*way):,.3f}")
    return tuple(cells)


def _doubling(end: int) -> list[int]:
    """1, 2, 4, ... below `end`."""
    return [2**power for power in range(end.bit_length()) if 2**power < end]
