"""Selection over ranks: every supported router and policy, as one rank with all tokens does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cells import ALL, ROUTER_CELLS, Cell, H
from layouts import CLOSE, LAYOUTS, Batch, Layout, assert_one_rank, parallel, run, run_here
from torch import Tensor

from etr.methods import METHODS
from etr.moe import Collector, ExpertParallel, LossConfig, MoE, after_step
from etr.moe.exchange import Traffic

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

OWN = {row.kind for card in METHODS.values() if card.ranks == "own" for row in card.rows}
"""Kinds that look at each rank's tokens alone, as their cards say."""
A_FEW = list({cell.router.name: cell for cell in ROUTER_CELLS}.values())  # one of each router
WHICH = {"4 ranks": ALL, "2 ranks": ROUTER_CELLS, "2x2 data": ROUTER_CELLS}
CASES = [
    (layout, cell)
    for layout in LAYOUTS
    for cell in WHICH.get(layout.id, A_FEW)
    if type(cell.router) not in OWN
]
IDS = [f"{layout.id}-{cell.id}" for layout, cell in CASES]


def layer_of(cell: Cell) -> MoE:
    torch.manual_seed(7)
    return cell.layer(losses=LossConfig(locality_mu=0.0))


def steps(
    layer: MoE, batch: Callable[[int], Batch], measure: Callable[..., Any], group: Any = None
) -> dict[str, Tensor]:
    """An optimizer step, a measured second one, and an evaluation after that."""
    data = batch(1)
    with Collector(layer):
        layer(data.x, data.context())
    after_step(layer, group)
    with Collector(layer):
        found = measure(layer)
    learned = after_step(layer, group)[0]
    state = dict(layer.named_buffers())
    layer.eval()
    data = batch(2)
    evaluated = layer(data.x, data.context())
    found["y"] = torch.cat((found["y"], evaluated.hidden_states.detach()), dim=1)
    found |= {f"stats.eval.{k}": v for k, v in evaluated.stats.items()}
    found |= {f"state.{k}": v for k, v in state.items()}
    return found | {f"learned.{k}": v for k, v in learned.items() if "bytes" not in k}


def on_rank(world: int) -> dict[Any, Any]:
    found = {}
    for (layout, cell), name in zip(CASES, IDS, strict=True):
        if layout.world == world:
            layer = layer_of(cell).distribute(parallel(layout))
            found[name] = steps(
                layer,
                lambda seed, layout=layout: whole(layout, seed).of(layout, dist.get_rank()),
                lambda layer, layout=layout: run_here(layer, layout, whole(layout, 0)),
                dist.group.WORLD,
            )
    for layout in (layout for layout in LAYOUTS if layout.world == world):
        part = whole(layout, 0).of(layout, dist.get_rank())
        group = parallel(layout)
        found["ties", layout.id] = kept_of_equals(part, group)
        alone = dataclasses.replace(group, selection_group=None)
        found["alone", layout.id] = kept_of_equals(part, alone)
    return found


def kept_of_equals(batch: Batch, group: ExpertParallel | None = None) -> Tensor:
    """Which pairs are kept where all tokens want the same with the same score, bool [T, k]."""
    layer = layer_of(next(cell for cell in ALL if cell.id == "token_choice-factor-score-loop"))
    layer.router.get_parameter("weight").data.zero_()
    traffic = None
    if group is not None:
        layer.distribute(group)
        traffic = Traffic(group)
    routing, limit = layer.route(batch.x, batch.context(), traffic)
    return layer.keep(routing, limit, traffic).selection.kept.view(-1, routing.top_k)


def whole(layout: Layout, seed: int) -> Batch:
    return Batch.make(sum(layout.sizes), H, seed)


@pytest.mark.parametrize(("layout", "cell"), CASES, ids=IDS)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_ranks_equal_one_rank(ranks: Any, layout: Layout, cell: Cell) -> None:
    """Outputs, all gradients, counters, and what was learned."""
    found = [part[f"{layout.id}-{cell.id}"] for part in ranks(layout.world)]
    want = steps(layer_of(cell), lambda s: whole(layout, s), lambda x: run(x, whole(layout, 0)))
    same = {name: want.pop(name) for name in list(want) if name.startswith(("state.", "learned."))}
    assert_one_rank(found, want, layout)
    for name, value in same.items():
        for part in found:
            torch.testing.assert_close(
                part[name], value, **CLOSE, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
def test_equal_scores_go_to_the_first_tokens_of_the_group(ranks: Any, layout: Layout) -> None:
    """And without a group to each rank's own first tokens."""
    want = kept_of_equals(whole(layout, 0))
    found = [ranks(layout.world)[rank] for rank in layout.holders]
    got = torch.cat([part["ties", layout.id] for part in found])
    assert torch.equal(got, want)
    alone = torch.cat([part["alone", layout.id] for part in found])
    several = sum(size > 0 for size in layout.sizes) > 1
    assert torch.equal(alone, want) != several
