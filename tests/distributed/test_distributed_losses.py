"""Losses, their gradients, and counters: ranks against one rank that holds all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, Batch, Layout, parallel
from test_conformance_losses import ROWS, OwnCoupling, router_of
from torch import Tensor

from etr.moe import (
    Collector,
    ExpertPlacement,
    LossConfig,
    MoE,
    MoEConfig,
    RoutingContext,
    after_step,
)
from etr.moe.capacity import AffinityMass, Factor, LocMoE, Threshold
from etr.moe.losses import loss_rows

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

H, E, T = 16, 4, 12
WORLD = 2
MASKS = {
    "all valid": torch.ones(WORLD, T, dtype=torch.bool),
    "unequal": torch.arange(T).expand(WORLD, T) < torch.tensor([[T], [5]]),
    "a rank with none": torch.arange(T).expand(WORLD, T) < torch.tensor([[T], [0]]),
    "none at all": torch.zeros(WORLD, T, dtype=torch.bool),
}
LOSSES: dict[str, Any] = {
    **{getattr(row, "mode", str(row)): (row,) for row in ROWS if row.counts_ranks},
    "of experts": (OwnCoupling(weight=0.5),),
    "all": LossConfig(aux_mode="ranks", z_beta=0.1, locality_mu=0.5),
}
"""Every row of the table, each in all its modes, one that asks for experts, and several at once."""
POLICIES: dict[str, Any] = {
    "factor": Factor(capacity_factor=0.5),
    "affinity_mass": AffinityMass(mode="common"),
    "threshold": Threshold(target=Factor(capacity_factor=0.5)),
    "locmoe": LocMoE(min_factor=0.01, max_factor=9.0),
}
ROUTERS = {"locmoe": "locmoe"}
# Both ranks form node 0; experts 2 and 3 live on another node's rank.
PLACEMENT = ExpertPlacement(rank_of_expert=(0, 1, 2, 2), node_of_rank=(0, 0, 1))


def tokens() -> Tensor:
    """The global batch, rank-major, float64 [WORLD, T, H]; ranks differ in what they like."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(WORLD, T, H, dtype=torch.float64, generator=generator)
    x[0, :, :4] += 1
    x[1, :, 8:12] += 1
    return x


def layer_of(losses: Any, capacity: Any = "none", router: str | None = None) -> MoE:
    torch.manual_seed(3)
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=4,
        num_experts=E,
        router=router or router_of(losses),
        capacity=capacity,
        losses=losses,
    )
    return MoE(config).double()


def past_step(layer: MoE) -> None:
    """Give mode `previous` a load to remember, the same everywhere."""
    with Collector(layer):
        layer(tokens()[0], RoutingContext(placement=PLACEMENT))
    after_step(layer)


def loss_case(name: str, x: Tensor, mask: Tensor, group: Any, past: bool) -> dict[str, Tensor]:
    layer = layer_of(LOSSES[name])
    if past:
        past_step(layer)
    context = RoutingContext(
        valid_mask=mask, placement=PLACEMENT, rank=0, data_group=group, node_group=group
    )
    losses = layer(x, context).losses
    loss = sum(losses.values(), start=torch.zeros(()))
    weight = layer.router.get_parameter("weight")
    return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, weight)[0]}


def state_case(name: str, chunks: list[Tensor], masks: list[Tensor], group: Any) -> dict[str, Any]:
    """State after two optimizer steps of several forwards each."""
    router = ROUTERS.get(name, "etr")
    layer = layer_of(LossConfig(aux_alpha=0.0, locality_mu=0.0), POLICIES[name], router)
    for _ in range(2):
        for x, mask in zip(chunks, masks, strict=True):
            with Collector(layer):
                layer(x, RoutingContext(valid_mask=mask))
        stats = after_step(layer, group)[0]
    return {"state": layer.state_dict(), "stats": stats}


def on_rank(world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for layout in LAYOUTS:
        if layout.world == world:
            for name in LOSSES:
                found["layout", name, layout.id] = layout_case(name, layout)
    if world != WORLD:
        return found
    group, rank = dist.group.WORLD, dist.get_rank()
    x = tokens()[rank]
    for past in (False, True):
        for name in LOSSES:
            for case, mask in MASKS.items():
                found["loss", name, case, past] = loss_case(name, x, mask[rank], group, past)
    for name in POLICIES:
        for case, mask in MASKS.items():
            found["state", name, case] = state_case(name, [x], [mask[rank]], group)
    found["accumulate"] = accumulate(x.chunk(2), group)
    return found


def accumulate(chunks: Any, group: Any) -> Tensor:
    """Gradient of mode `previous` summed over micro-batches of equal weight."""
    layer = layer_of(LOSSES["previous"])
    past_step(layer)
    for x in chunks:
        with Collector(layer) as collector:
            layer(x, RoutingContext(data_group=group))
        (collector.loss() / len(chunks)).backward()  # type: ignore[union-attr]
    gradient = layer.router.get_parameter("weight").grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("case", list(MASKS))
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_average_over_ranks_equals_one_rank_with_all_tokens(
    ranks: Any, name: str, case: str, past: bool
) -> None:
    """Value and gradient: what data parallelism computes is what one rank would."""
    want = loss_case(name, tokens(), MASKS[case], None, past)
    for part in ("loss", "grad"):
        got = sum(found["loss", name, case, past][part] for found in ranks(WORLD)) / WORLD
        torch.testing.assert_close(got, want[part].to(got), rtol=1e-9, atol=1e-12)
    nothing = case == "none at all" or (name == "previous" and not past)
    nothing = nothing and not any(row.needs_experts for row in loss_rows(LOSSES[name]))
    assert bool(want["grad"].abs().max() > 1e-12) != nothing


def test_the_ranks_differ(ranks: Any) -> None:
    """Each rank's own load would give another gradient, so the averages say something."""
    z = next(name for name in LOSSES if name.startswith("Z("))
    for name in ("ranks", z):
        first, second = (found["loss", name, "unequal", True]["grad"] for found in ranks(WORLD))
        assert not torch.allclose(first, second)
    layer = layer_of(LossConfig(aux_mode="micro"))
    grads = []
    for x in tokens():
        loss = layer(x).losses["aux"]
        grads.append(torch.autograd.grad(loss, layer.router.get_parameter("weight"))[0])
    want = loss_case("ranks", tokens(), MASKS["all valid"], None, True)["grad"]
    assert not torch.allclose(sum(grads) / WORLD, want)


def test_previous_is_invariant_to_ranks_and_accumulation(ranks: Any) -> None:
    want = loss_case("previous", tokens(), MASKS["all valid"], None, True)["grad"]
    got = sum(found["accumulate"] for found in ranks(WORLD)) / WORLD
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    one_rank = accumulate(tokens().flatten(0, 1).chunk(4), None)
    torch.testing.assert_close(one_rank, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", list(MASKS))
@pytest.mark.parametrize("name", list(POLICIES))
def test_after_step_learns_alike_on_every_rank_and_as_one_rank_would(
    ranks: Any, name: str, case: str
) -> None:
    """One rank sees the other's batch as a second micro-batch."""
    want = state_case(name, list(tokens()), list(MASKS[case]), None)
    for found in ranks(WORLD):
        got = found["state", name, case]
        assert got["state"].keys() == want["state"].keys()
        for part in ("state", "stats"):
            for key, value in want[part].items():
                torch.testing.assert_close(
                    got[part][key], value, rtol=0, atol=0, equal_nan=True, msg=key
                )
    assert int(want["stats"]["num_valid_tokens"]) == int(MASKS[case].sum())


# --- layers spread over ranks, which know their groups themselves ---------------------------------


def layout_batch(layout: Layout) -> Batch:
    batch = Batch.make(sum(layout.sizes), H, seed=4)
    batch.x[: layout.sizes[0], 8:12] += 1  # ranks differ in what they like
    return batch


def measured(layer: MoE, batch: Batch, **fields: Any) -> dict[str, Tensor]:
    """Sum of the losses, and its gradient with respect to the router."""
    losses = layer(batch.x, batch.context(**fields)).losses
    weight = layer.router.get_parameter("weight")
    loss = sum(losses.values(), start=0.0 * weight.sum())
    return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, weight)[0]}


def layout_case(name: str, layout: Layout) -> dict[str, Tensor]:
    """On a rank: the second micro-batch of a run, whose first gave mode `previous` its load."""
    layer = layer_of(LOSSES[name]).distribute(parallel(layout))
    batch = layout_batch(layout).of(layout, dist.get_rank())
    with Collector(layer):
        layer(batch.x, batch.context())
    after_step(layer, dist.group.WORLD)
    return measured(layer, batch)


def one_rank_case(name: str, layout: Layout) -> dict[str, Tensor]:
    """The same on one rank; the locality loss is a mean over nodes, of the tokens there."""
    layer, batch = layer_of(LOSSES[name]), layout_batch(layout)
    with Collector(layer):
        layer(batch.x, batch.context(placement=placement_of(layout, 0)))
    after_step(layer)
    rows = layer.loss_rows()
    layer.reconfigure(losses=tuple(row for row in rows if row.name != "locality"))
    found = measured(layer, batch)
    layer.reconfigure(losses=tuple(row for row in rows if row.name == "locality"))
    for node in set(layout.nodes):
        parts = [batch.of(layout, r) for r in layout.holders if layout.nodes[r] == node]
        here = Batch(*(torch.cat(t) for t in zip(*(astuple(p) for p in parts), strict=True)))
        placement = placement_of(layout, layout.nodes.index(node))
        rank = placement.node_of_rank.index(node)
        more = measured(layer, here, placement=placement, rank=rank)
        share = len(parts) / len(layout.holders)
        found = {key: found[key] + share * more[key] for key in found}
    return found


def placement_of(layout: Layout, rank: int) -> ExpertPlacement:
    """Where the experts are of the expert group that a rank belongs to."""
    same = [
        other
        for other in range(layout.world)
        if all(layout.place(other, dim) == layout.place(rank, dim) for dim in ("data", "tensor"))
    ]
    return ExpertPlacement(
        rank_of_expert=tuple(e * len(same) // E for e in range(E)),
        node_of_rank=tuple(layout.nodes[other] for other in same),
    )


def astuple(batch: Batch) -> tuple[Tensor, ...]:
    return batch.x, batch.cotangent, batch.token_ids, batch.valid_mask


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_of_a_spread_layer_are_those_of_one_rank(
    ranks: Any, name: str, layout: Layout
) -> None:
    """Value and gradient, for data and expert ranks, nodes, and ranks with the same tokens."""
    found = [part["layout", name, layout.id] for part in ranks(layout.world)]
    want = one_rank_case(name, layout)
    for key, value in want.items():
        got = torch.stack([found[rank][key] for rank in layout.holders]).mean(0)
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)
        for rank, part in enumerate(found):
            twin = found[layout.holders[layout.holder(rank)]]
            torch.testing.assert_close(part[key], twin[key], rtol=1e-9, atol=1e-12)
