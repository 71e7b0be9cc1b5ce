"""The table of supported cells says what construction does, both ways."""

from __future__ import annotations

import pytest
import torch
from cells import ROUTER_CELLS, Cell, E, H, I, context, ids, tokens

from etr.moe import CAPACITIES, EXPERT_BACKENDS, ROUTERS, MoE, MoEConfig, support_table
from etr.moe.config import parse_capacity

SIZES = {"hidden_size": H, "intermediate_size": I, "num_experts": E}


def test_the_table_has_every_cell() -> None:
    assert set(support_table()) == {(r, c) for r in ROUTERS for c in CAPACITIES}


@pytest.mark.parametrize("capacity", list(CAPACITIES))
@pytest.mark.parametrize("router", list(ROUTERS))
def test_the_table_matches_construction(router: str, capacity: str) -> None:
    reason = support_table()[router, capacity]
    if reason is None:
        layer = MoE(MoEConfig(**SIZES, router=router, capacity=capacity))
        assert layer.config.capacity_config.name == capacity
        return
    with pytest.raises(ValueError, match=router) as error:
        MoEConfig(**SIZES, router=router, capacity=capacity)
    assert str(error.value) == reason
    assert capacity in reason
    assert router in reason


def test_known_cells() -> None:
    """Decided cells, so that the rule behind the table cannot drift unseen."""
    table = support_table()
    refused = {
        ("expert_choice", "none"),
        ("baseline", "threshold"),
        ("baseline", "affinity_mass"),
        ("locmoe", "threshold"),
        ("hash", "threshold"),
        ("random", "affinity_mass"),
        ("token_choice", "locmoe"),
        ("hash", "locmoe"),
        ("etr", "locmoe"),
    }
    for cell in refused:
        assert table[cell] is not None, cell
    supported = {("etr_paper", c) for c in CAPACITIES} | {("token_choice", "threshold")}
    supported |= {("etr", c) for c in CAPACITIES if c != "locmoe"}
    for cell in supported:
        assert table[cell] is None, cell


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_what_a_router_says_of_its_gates_and_logits_is_so(cell: Cell) -> None:
    layer, x = cell.layer(), tokens()
    routing, router = layer.route(x, context())[0], layer.router
    if routing.probs is not None:
        used = routing.valid
        probs = routing.probs[routing.token[used], routing.expert[used]]
        assert torch.equal(routing.gate[used], probs) == cell.traits.gates_are_probs
    if router.made_of_logits:
        again = router.of_logits(routing.logits)
        assert torch.equal(again.probs, routing.probs)
        assert routing.scores is None or torch.equal(again.scores, routing.scores)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_every_router_goes_with_its_default_policy(router: str) -> None:
    config = MoEConfig(**SIZES, router=router)
    assert config.capacity_config == parse_capacity(ROUTERS[router]().traits.default_capacity)


def test_tables_name_their_rows() -> None:
    for table in (ROUTERS, CAPACITIES, EXPERT_BACKENDS):
        for name, row in table.items():
            assert row.name == name
            assert row.summary


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_every_parameter_has_a_dimension(cell: Cell) -> None:
    """FSDP shards along the first one, and refuses a parameter that has none."""
    layer = MoE(cell.config(num_shared_experts=1, shared_gate=True))
    assert all(parameter.dim() for parameter in layer.parameters())
