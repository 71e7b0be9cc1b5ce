"""Every serving policy of the table: causal where it says so, frozen, and for one call alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cells import CELLS, Cell, T, context, ids, tokens, train_steps, trained
from torch import Tensor

from etr.moe import SERVING, MoE, RoutingContext
from etr.moe.serving import LayerFacts, Serving, serving_of

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

HALF = T // 2
POSITION_FREE = [cell for cell in CELLS if cell.traits.position_free]
CAUSAL = [name for name in SERVING if SERVING[name].causal]


def labelled(num_tokens: int, first: int = 0) -> RoutingContext:
    """A context in which all tokens are of one block."""
    token_ids = torch.arange(first, first + num_tokens)
    return context(num_tokens, token_ids=token_ids, block=torch.zeros_like(token_ids))


def output(layer: MoE, x: Tensor, first: int = 0) -> Tensor:
    return layer(x, labelled(len(x), first)).hidden_states


def others(x: Tensor) -> Tensor:
    """`x` with another second half, in which tokens score higher."""
    return torch.cat((x[:HALF], 5 * tokens()[HALF:].flip(-1)))


@pytest.mark.parametrize("text", CAUSAL)
@pytest.mark.parametrize("cell", POSITION_FREE, ids=ids)
def test_a_causal_one_gives_a_token_the_same_whatever_else_is_there(cell: Cell, text: str) -> None:
    """Later tokens or other rows, a prefill and one token at a time: as all tokens together."""
    layer, x = trained(cell, text), tokens()
    whole = output(layer, x)
    changed = output(layer, others(x))[:HALF]
    torch.testing.assert_close(changed, whole[:HALF], rtol=1e-12, atol=1e-13)
    parts = [output(layer, x[:HALF])]
    parts += [output(layer, x[t : t + 1], first=t) for t in range(HALF, T)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("text", [name for name in SERVING if name not in CAUSAL])
def test_any_other_shows_that_it_is_not_causal(text: str) -> None:
    """In some cell: where nothing is dropped, nothing can be seen."""

    def changes(cell: Cell) -> bool:
        layer, x = trained(cell, text), tokens()
        first = output(layer, x)[:HALF]
        return any(not torch.equal(output(layer, others(x))[:HALF], first) for _ in range(4))

    assert any(map(changes, POSITION_FREE))


@pytest.mark.parametrize("text", SERVING)
@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_it_changes_no_state(cell: Cell, text: str) -> None:
    layer = trained(cell, text)
    before = copy.deepcopy(layer.state_dict())
    output(layer, tokens())
    assert layer.pending == {}
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("text", SERVING)
@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_no_token_and_one_token(cell: Cell, text: str, num_tokens: int) -> None:
    layer, x = trained(cell, text), tokens(num_tokens)
    y = output(layer, x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("text", SERVING)
@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_for_one_call_it_serves_as_if_it_were_the_layers_own(
    cell: Cell, text: str, training: bool
) -> None:
    """By text, as an object and under the old name; nothing of the layer changes."""
    layer, x, given = trained(cell, text), tokens(), labelled(T)
    want = layer(x, given).hidden_states
    layer.eval_selection = own = next(name for name in SERVING if name != text)
    layer.train(training)
    for field, value in (("serving", text), ("serving", SERVING[text]()), ("selection", text)):
        found = layer(x, replace(given, **{field: value}))
        assert torch.equal(found.hidden_states, want)
        assert found.losses == {}
    assert (layer.eval_selection, layer.training, layer.pending) == (own, training, {})


@pytest.mark.parametrize("text", SERVING)
def test_texts_of_policies_are_read_back(text: str) -> None:
    serving = serving_of(text)
    assert serving_of(serving.text) == serving == serving_of(serving)
    assert type(serving) is SERVING[text]


@pytest.mark.parametrize("text", SERVING)
@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_what_a_layer_refuses_drops_nothing(cell: Cell, text: str) -> None:
    """As its facts say without waiting for the device; and what is served is what was trained."""
    layer, x = trained(cell, text), tokens()
    facts = layer.facts(wait=False)
    assert facts == LayerFacts(traits=cell.traits, rank_by=layer.rank_by)
    found, dropless = (
        layer.route(x, replace(labelled(T), serving=how)) for how in (text, "dropless")
    )
    if SERVING[text]().refuses(facts) is not None:
        kept = layer.keep(*found).selection.kept
        assert torch.equal(kept, layer.keep(*dropless).selection.kept)
        assert torch.equal(kept, dropless[0].valid)


def test_a_policy_knows_its_layer_before_it_serves_it() -> None:
    """Every cell that ranks by score has thresholds once it is trained, and no other."""
    for cell in CELLS:
        layer = cell.layer()
        assert not layer.has_thresholds()
        train_steps(layer)
        assert layer.has_thresholds() == (cell.by_score and cell.traits.has_scores)
        assert all(issubclass(kind, Serving) for kind in SERVING.values())
