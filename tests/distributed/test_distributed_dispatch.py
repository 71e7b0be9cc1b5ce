"""Dispatchers: each exact against one rank, in values and gradients, and in the bytes it counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, Batch, E, Layout, assert_one_rank, parallel, run, run_here
from test_conformance_losses import Coupling
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etr.moe import (
    DISPATCHERS,
    EXPERT_BACKENDS,
    ExpertParallel,
    LossConfig,
    MoE,
    MoEConfig,
    RoutingContext,
    Topology,
    exchange,
)
from etr.moe.capacity import Factor
from etr.moe.dispatch import parse_dispatcher
from etr.moe.dispatch.base import finish
from etr.moe.exchange import Traffic

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

H, I = 16, 8  # noqa: E741
BY_ID = {layout.id: layout for layout in LAYOUTS}
WRAPPED = [
    f"chunked:{name},chunks=3"
    for name, kind in DISPATCHERS.items()
    if kind.needs_ranks and name != "chunked"
]
ACROSS = [name for name, kind in DISPATCHERS.items() if kind.needs_ranks]


@dataclass(frozen=True)
class Case:
    """A dispatcher on a layout."""

    layout: Layout
    dispatch: str
    top_k: int = 2
    backend: str = "auto"
    crowded: bool = False  # all tokens want the first experts
    experts: str = "uniform"

    @property
    def id(self) -> str:
        crowd = "-crowded" if self.crowded else ""
        bank = "" if self.experts == "uniform" else f"-{self.experts}"
        return f"{self.layout.id}-{self.dispatch}-top{self.top_k}-{self.backend}{crowd}{bank}"

    def layer(self, **options: Any) -> MoE:
        torch.manual_seed(11)
        config = {
            "hidden_size": H,
            "intermediate_size": I,
            "num_experts": E,
            "top_k": self.top_k,
            "router": "token_choice",
            "rank_by": "score",
            "capacity": Factor(capacity_factor=0.8),
            "losses": LossConfig(locality_mu=0.0),
            "backend": self.backend,
            "experts": self.experts,
            "expert_bias": True,
            "num_shared_experts": 1,
        }
        return MoE(MoEConfig(**{**config, **options})).double()  # type: ignore[arg-type]

    def batch(self) -> Batch:
        batch = Batch.make(sum(self.layout.sizes), H)
        if self.crowded:
            batch.x[:, 0] += 9.0
        return batch

    def prepared(self, layer: MoE) -> MoE:
        if self.crowded:
            weight = layer.router.get_parameter("weight")
            with torch.no_grad():
                weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, -9.0])
        return layer


def _cases() -> list[Case]:
    cases = []
    for layout in LAYOUTS:
        twins = "tensor" in layout.dims
        names = [n for n in (*ACROSS, *WRAPPED) if ("group_wise" in n) == twins]
        names += ["group_wise:dedup"] if twins else []
        cases += [Case(layout, name) for name in names]
    plain = [n for n in ACROSS if n != "group_wise"]
    cases += [Case(BY_ID["4 ranks"], n, top_k=k) for n in plain for k in (1, 3)]
    cases += [Case(BY_ID["4 ranks"], n, crowded=True) for n in plain]
    banks = [f"nulls:count=3,kind={kind}" for kind in ("zero", "copy", "constant")]
    cases += [Case(BY_ID["4 ranks"], n, experts=text) for n in plain for text in banks[:1]]
    banks.append("stand_in:rank=2")
    cases += [Case(BY_ID["2x2 twins"], "group_wise", experts=text) for text in banks]
    cases += [Case(BY_ID["2 ranks"], "all_to_all", experts=text) for text in banks]
    cases += [Case(BY_ID["2x2 data"], "all_to_all", experts=banks[-1])]
    for backend in EXPERT_BACKENDS.values():
        if backend.unavailable() is None:
            fits = [n for n in plain if not backend.padded or parse_dispatcher(n).padded]
            cases += [Case(BY_ID["2 ranks"], n, backend=backend.name) for n in fits]
    return cases


CASES = _cases()


def on_rank(world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for case in CASES:
        if case.layout.world == world:
            layer = case.prepared(case.layer(dispatch=case.dispatch))
            layer.distribute(parallel(case.layout))
            found[case.id] = run_here(layer, case.layout, case.batch())
    for layout in LAYOUTS:
        if layout.world == world:
            found["checkpoint", layout.id] = checkpointed(layout)
    if world == 2:
        found["mistakes"] = mistakes()
        found["order"] = order()
    if world == 4:
        found["mistakes"] = uneven_nodes()
        found["half"] = half_precision()
        found["bytes"] = {name: counted_bytes(name, None) for name in ("none", "factor")}
        found["bytes alone"] = counted_bytes("none", "all_to_all_padded")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_dispatcher_equals_one_rank(ranks: Any, case: Case) -> None:
    found = [part[case.id] for part in ranks(case.layout.world)]
    one = dataclasses.replace(case, dispatch="permute")
    layer = one.prepared(one.layer())
    want = run(layer, one.batch())
    assert_one_rank(found, want, case.layout)
    if case.crowded:
        assert not want["experts.down_proj"][3].any()  # an expert with no token


# --- activation checkpointing ---------------------------------------------------------------------


def checkpointed(layout: Layout) -> dict[str, Tensor]:
    """Gradients with and without recomputation, chunked and plain."""
    found = {}
    twins = "tensor" in layout.dims
    for name in ("group_wise", "chunked:group_wise") if twins else ("dedup", "chunked:all_to_all"):
        for recompute in (False, True):
            layer = Case(layout, name).layer(dispatch=name).distribute(parallel(layout))
            batch = Case(layout, name).batch().of(layout, dist.get_rank())
            x = batch.x.clone().requires_grad_()

            def forward(x: Tensor, layer: MoE = layer) -> Tensor:
                return layer(x).hidden_states.tanh()

            y = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
            (y * batch.cotangent).sum().backward()
            assert x.grad is not None
            found[f"{name}/{recompute}"] = torch.cat((y.detach(), x.grad))
            weight = layer.experts.down_proj.grad
            found[f"{name}/{recompute}/experts"] = weight.to_local()  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
def test_recomputation_changes_nothing(ranks: Any, layout: Layout) -> None:
    for part in ranks(layout.world):
        found = part["checkpoint", layout.id]
        for name in [name for name in found if "False" in name]:
            assert torch.equal(found[name], found[name.replace("False", "True")]), name


# --- overlap --------------------------------------------------------------------------------------


def order() -> dict[str, list[str]]:
    """When exchanges start and end and experts run, in both passes, for three chunks."""
    events: list[str] = []

    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            events.append("experts")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            events.append("experts")
            return grad

    class Backend:
        padded = False

        def run_routed(self, x: Tensor, *_: Any) -> Tensor:
            return Experts.apply(x)

    start, wait = exchange._Flight.start, exchange._Flight.wait

    def logged_start(self: Any, rows: Tensor, *, back: bool) -> Tensor:
        events.append("start")
        return start(self, rows, back=back)

    def logged_wait(self: Any) -> Tensor:
        events.append("wait")
        return wait(self)

    layout = BY_ID["2 ranks"]
    layer = Case(layout, "all_to_all").layer().distribute(parallel(layout))
    x = Case(layout, "").batch().of(layout, dist.get_rank()).x.clone().requires_grad_()
    routing, limit = layer.route(x, layer.parallel.fill(RoutingContext()))  # type: ignore
    job = (routing, layer.keep(routing, limit).selection, Backend(), None)
    traffic = Traffic(parallel(layout))
    steps = parse_dispatcher("chunked:all_to_all,chunks=3").steps(x, *job, traffic)  # type: ignore
    exchange._Flight.start, exchange._Flight.wait = logged_start, logged_wait  # type: ignore
    try:
        y = finish(steps)
        forward = list(events)
        events.clear()
        y.sum().backward()
    finally:
        exchange._Flight.start, exchange._Flight.wait = start, wait  # type: ignore
    return {"forward": forward, "backward": list(events)}


def test_a_chunk_travels_while_its_neighbour_is_computed(ranks: Any) -> None:
    go, wait, experts = "start", "wait", "experts"
    middle = [wait, experts, go]  # a chunk arrives, is computed, and leaves
    forward = [
        *[go],
        *[go, *middle],  # the second chunk leaves before the first is waited for
        *[go, *middle, wait],
        *[*middle, wait],
        *[wait],
    ]
    mirror = {go: wait, wait: go, experts: experts}
    for part in ranks(2):
        assert part["order"]["forward"] == forward
        assert part["order"]["backward"] == [mirror[event] for event in reversed(forward)]


# --- bytes ----------------------------------------------------------------------------------------


def counted_bytes(capacity: str, dispatch: str | None) -> dict[str, Any]:
    """Counters of a forward in float64, and what a count by hand needs."""
    layout = BY_ID["4 ranks"]
    group = parallel(layout)
    if dispatch is not None:
        group = dataclasses.replace(group, selection_group=None)
    policy = Factor(capacity_factor=0.8) if capacity == "factor" else "none"
    case = Case(layout, dispatch or "all_to_all")
    layer = case.layer(dispatch=case.dispatch, capacity=policy).distribute(group)
    x = case.batch().of(layout, dist.get_rank()).x
    output = layer(x)
    traffic = Traffic(group)
    routing, limit = layer.route(x, RoutingContext(), traffic)
    kept = layer.keep(routing, limit, traffic).selection.num_tokens_per_expert
    stats = {k: int(v) for k, v in output.stats.items() if k.startswith("bytes")}
    chosen = routing.num_choices_per_expert().tolist()
    return {"stats": stats, "kept": kept.tolist(), "chosen": chosen, "tokens": len(x)}


@pytest.mark.parametrize("capacity", ["none", "factor"])
def test_bytes_equal_a_count_by_hand(ranks: Any, capacity: str) -> None:
    """4 ranks of one expert each on 2 nodes, float64 rows of 16 numbers."""
    found = [part["bytes"][capacity] for part in ranks(4)]
    for rank, part in enumerate(found):
        want = {"bytes_within_node": 0, "bytes_between_nodes": 0}
        for other in set(range(4)) - {rank}:
            there, back = part["kept"][other], found[other]["kept"][rank]
            sent = (there + back) * H * 8 + 8  # rows there and back, and one count
            if capacity == "factor":
                # (pairs, tokens, valid tokens); expert and score of each pair; one answer each
                sent += 3 * 8 + part["chosen"][other] * 2 * 8 + found[other]["chosen"][rank]
            near = rank // 2 == other // 2
            want["bytes_within_node" if near else "bytes_between_nodes"] += sent
        for name, value in want.items():
            assert part["stats"][name] == value, (rank, name)


def test_the_padded_baseline_sends_what_the_comparison_says(ranks: Any) -> None:
    """Summed over ranks; where capacity is counted per rank and the factor is 1.1."""
    found = [part["bytes alone"] for part in ranks(4)]
    for part in found:
        slot = -(-part["tokens"] * 2 * 11 // 40)  # ceil(1.1 * T * k / E)
        assert part["stats"]["bytes_between_nodes_padded"] == 2 * 2 * slot * H * 8
    slots = [part["tokens"] for part in found]  # dropless: a slot for every token
    for rank, part in enumerate(found):
        far = [r for r in range(4) if r // 2 != rank // 2]
        want = sum((slots[rank] + slots[r]) * H * 8 + 8 for r in far)
        assert part["stats"]["bytes_between_nodes"] == want


# --- half precision -------------------------------------------------------------------------------


def half_precision() -> dict[str, Any]:
    layout = BY_ID["4 ranks"]
    layer = Case(layout, "all_to_all").layer(capacity="none").float().distribute(parallel(layout))
    x = Case(layout, "").batch().of(layout, dist.get_rank()).x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    output.hidden_states.sum().backward()
    assert x.grad is not None
    bytes_sent = int(output.stats["bytes_between_nodes"] + output.stats["bytes_within_node"])
    return {"y": output.hidden_states.detach(), "x.grad": x.grad, "bytes": bytes_sent}


def test_rows_travel_in_the_dtype_of_autocast(ranks: Any) -> None:
    found, wide = ranks(4), ranks(4)
    counts = 3 * 8
    for part, double in zip(found, wide, strict=True):
        stats = double["bytes"]["none"]["stats"]
        rows = stats["bytes_within_node"] + stats["bytes_between_nodes"] - counts
        assert part["half"]["bytes"] - counts == rows // 4
    layer = Case(BY_ID["4 ranks"], "permute").layer(capacity="none").float()
    x = Case(BY_ID["4 ranks"], "permute").batch().x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = layer(x).hidden_states
    want.sum().backward()
    got = torch.cat([part["half"]["y"] for part in found])
    torch.testing.assert_close(got, want.detach(), rtol=0.02, atol=0.02)
    got = torch.cat([part["half"]["x.grad"] for part in found])
    torch.testing.assert_close(got, x.grad, rtol=0.02, atol=0.02)


# --- mistakes -------------------------------------------------------------------------------------


def message(do: Any) -> str:
    try:
        do()
    except ValueError as error:
        return str(error)
    return "no error"


def mistakes() -> dict[str, str]:
    good = parallel(BY_ID["2 ranks"])
    case = Case(BY_ID["2 ranks"], "")

    def across(**options: Any) -> Any:
        return lambda: case.layer(**options).distribute(good)

    twice = case.layer().distribute(good)
    return {
        "experts": message(lambda: ExpertParallel.create(good.mesh, good.topology, 5)),
        "topology": message(lambda: ExpertParallel.create(good.mesh, Topology((0,)), 4)),
        "permute": message(across(dispatch="permute")),
        "bmm": message(across(backend="bmm")),
        "group_wise": message(across(dispatch="group_wise")),
        "number": message(across(num_experts=8)),
        "widths": message(across(experts="widths:widths=2x8+2x4")),
        "shared": message(across(experts="shared")),
        "inner steps": message(across(inner_steps=2)),
        "loss": message(across(losses=(Coupling(weight=0.5),))),
        "loss of weight 0": message(across(losses=(Coupling(weight=0.0),))),
        "twice": message(lambda: twice.distribute(good)),
    }


def uneven_nodes() -> dict[str, str]:
    mesh = parallel(BY_ID["4 ranks"]).mesh
    uneven = ExpertParallel.create(mesh, Topology((0, 0, 0, 1)), E)
    case = Case(BY_ID["4 ranks"], "")
    return {
        name: message(lambda name=name: case.layer(dispatch=name).distribute(uneven))
        for name in ("dedup", "hierarchical", "chunked:dedup")
    }


@pytest.mark.parametrize(
    ("world", "name", "text"),
    [
        (2, "experts", "num_experts=5 is not a multiple of the 2 ranks"),
        (2, "topology", "describes 1 ranks; the world has 2"),
        (2, "permute", "dispatch='permute' moves no rows"),
        (2, "bmm", "backend='bmm' takes buffers of a fixed capacity"),
        (2, "group_wise", "a mesh with a dimension 'tensor'"),
        (2, "number", "num_experts=8, but the ranks were arranged for 4"),
        (2, "twice", "distribute once"),
        (2, "widths", "experts='widths' cannot be divided among ranks: ranks would hold unequal"),
        (2, "shared", "experts='shared' cannot be divided among ranks: layers would divide"),
        (2, "inner steps", "inner_steps=2: experts that a layer runs again cannot be divided"),
        (2, "loss", "loss 'coupling' asks for tokens and experts' weights"),
        (2, "loss of weight 0", "no error"),
        (4, "dedup", "the same number of ranks of the expert group on every node"),
        (4, "hierarchical", "the same number of ranks of the expert group on every node"),
        (4, "chunked:dedup", "the same number of ranks of the expert group on every node"),
    ],
)
def test_mistakes_are_named(ranks: Any, world: int, name: str, text: str) -> None:
    for part in ranks(world):
        assert text in part["mistakes"][name]
