"""What the tables of pairs say works does, and what they refuse is refused with a reason."""

from __future__ import annotations

import pytest
import torch

from etr.moe import ExpertPlacement, MoE, RoutingContext, support_table
from etr.moe.pairs import SIZES, TABLES, pair_config, pair_table, pairs

EACH = list(pairs())
T = 12


def runs(**options: str) -> str | None:
    """What is wrong with a step of training of a layer of these rows; None for nothing."""
    torch.manual_seed(0)
    layer = MoE(pair_config(**options)).double()
    x = torch.randn(T, SIZES["hidden_size"], dtype=torch.float64, requires_grad=True)
    context = RoutingContext(
        valid_mask=torch.arange(T) != 3,
        token_ids=torch.arange(T),
        placement=ExpertPlacement(rank_of_expert=(0, 0, 1, 1), node_of_rank=(0, 1)),
    )
    output = layer(x, context)
    losses = sum(output.losses.values(), start=torch.zeros((), dtype=torch.float64))
    if "losses" in options:
        (name,) = (row.label for row in layer.loss_rows())
        if name not in output.losses:
            return "the loss is not there"
    (output.hidden_states.square().sum() + losses).backward()
    grads = [x.grad, *(p.grad for p in layer.experts.parameters())]
    if not all(torch.isfinite(g).all() for g in grads if g is not None):
        return "a gradient is not finite"
    # Experts that are codes start at 0, and make nothing that what is beside them could learn from.
    weights = (p for part in layer.bank.parts for _, p in part.weights())
    learn = any(p.numel() and p.requires_grad for p in weights)
    if learn and not any(g is not None and g.any() for g in grads):
        return "nothing has a gradient"
    return None


@pytest.mark.parametrize(("one", "other"), EACH, ids=["-".join(pair) for pair in EACH])
def test_what_goes_together_trains_and_the_rest_says_why(one: str, other: str) -> None:
    table, wrong = pair_table(one, other), {}
    assert len(table) == len(TABLES[one]) * len(TABLES[other])
    for (a, b), reason in table.items():
        options = {one: a, other: b}
        if reason is None:
            problem = runs(**options)
            if problem is not None:
                wrong[a, b] = problem
            continue
        assert a in reason or b in reason, reason
        with pytest.raises(ValueError, match=r"."):
            pair_config(**options)
    assert not wrong
    assert {name for (_, name), reason in table.items() if reason is None} == set(TABLES[other])


def test_routers_and_capacities_are_those_of_the_support_table() -> None:
    found = {pair: reason is None for pair, reason in pair_table("router", "capacity").items()}
    assert found == {pair: reason is None for pair, reason in support_table().items()}
