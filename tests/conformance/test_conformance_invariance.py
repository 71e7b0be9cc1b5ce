"""What must not matter: order, padding, leading shapes, repetition; and empty inputs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cells import (
    ALL,
    ROUTER_CELLS,
    Cell,
    E,
    H,
    T,
    context,
    ids,
    pairs,
    tokens,
    with_backends,
)
from torch import Tensor

from etr.moe import Collector, ExpertPlacement, RoutingContext
from etr.moe.context import Replay

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def kept_pairs(layer: object, x: Tensor, ctx: RoutingContext) -> set[tuple[int, int]]:
    routing, limit = layer.route(x, ctx)  # type: ignore[attr-defined]
    return pairs(routing, layer.keep(routing, limit).selection.kept)  # type: ignore[attr-defined]


ORDER_FREE = [
    cell
    for cell in ALL
    if cell.traits.position_free and (cell.by_score or cell.capacity.name == "none")
]


@pytest.mark.parametrize("cell", ORDER_FREE, ids=ids)
def test_permuting_tokens_permutes_the_output(cell: Cell) -> None:
    layer, x = cell.layer(), tokens()
    ctx, order = context(), torch.randperm(T)
    assert ctx.token_ids is not None
    moved = context(token_ids=ctx.token_ids[order])
    y, permuted = layer(x, ctx).hidden_states, layer(x[order], moved).hidden_states
    torch.testing.assert_close(permuted, y[order], **CLOSE)


@pytest.mark.parametrize("cell", ALL, ids=ids)
def test_the_same_input_gives_the_same_output_bit_for_bit(cell: Cell) -> None:
    layer, x, ctx = cell.layer(torch.float32), tokens(dtype=torch.float32), context()
    first, second = layer(x, ctx), layer(x, ctx)
    assert torch.equal(first.hidden_states, second.hidden_states)
    assert first.stats.keys() == second.stats.keys()
    for name in first.stats:
        assert torch.equal(first.stats[name], second.stats[name]), name
    for name in first.losses:
        assert torch.equal(first.losses[name], second.losses[name]), name


@pytest.mark.parametrize("cell", with_backends(ALL), ids=ids)
def test_what_padding_holds_never_matters(cell: Cell) -> None:
    mask, layer, ctx = torch.rand(T) > 0.3, cell.layer(), context()
    mask[0], mask[-1] = False, False
    assert ctx.token_ids is not None
    results = []
    for filler in (0.0, 1.0, 1e6):
        x, ids_ = tokens(), ctx.token_ids.clone()
        torch.manual_seed(1)
        x[mask] = tokens()[mask]
        x[~mask] = filler * torch.randn(int((~mask).sum()), H).double()
        ids_[~mask] = int(filler)
        layer.zero_grad()
        x.requires_grad_()
        output = layer(x, RoutingContext(valid_mask=mask, token_ids=ids_))
        (output.hidden_states.square().sum() + sum(output.losses.values())).backward()
        assert x.grad is not None
        assert not output.hidden_states[~mask].any()
        assert not x.grad[~mask].any()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append(
            [output.hidden_states[mask], *output.losses.values(), *output.stats.values(), *grads]
        )
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("cell", with_backends(ROUTER_CELLS), ids=ids)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_padding_reaches_no_real_token(cell: Cell, value: float) -> None:
    x, mask = tokens(), torch.arange(T) < T - 3
    layer, ctx = cell.layer(), context(valid_mask=mask)
    want = layer(x, ctx)
    bad = torch.where(mask[:, None], x, value).requires_grad_()
    got = layer(bad, ctx)
    assert torch.equal(got.hidden_states, want.hidden_states)
    for name, loss in want.losses.items():
        assert torch.equal(got.losses[name], loss)
    (got.hidden_states.square().sum() + sum(got.losses.values())).backward()
    assert bad.grad is not None
    assert not bad.grad[~mask].any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("padding_first", [True, False])
@pytest.mark.parametrize("cell", [c for c in ALL if c.traits.position_free], ids=ids)
def test_padding_equals_leaving_the_tokens_out(cell: Cell, padding_first: bool) -> None:
    """Where the policy counts valid tokens; `common` shapes are static and count all."""
    layer, x, ctx = cell.layer(), tokens(), context()
    assert ctx.token_ids is not None
    mask = torch.arange(T) >= 5 if padding_first else torch.arange(T) < T - 5
    padded = layer(x, dataclasses.replace(ctx, valid_mask=mask))
    alone = layer(x[mask], context(token_ids=ctx.token_ids[mask]))
    torch.testing.assert_close(padded.hidden_states[mask], alone.hidden_states, **CLOSE)
    for name in alone.losses:
        torch.testing.assert_close(padded.losses[name], alone.losses[name], **CLOSE)
    assert torch.equal(padded.stats["num_tokens_per_expert"], alone.stats["num_tokens_per_expert"])


@pytest.mark.parametrize("cell", with_backends(ALL), ids=ids)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_no_token_and_one_token(cell: Cell) -> None:
    for training, num_tokens in itertools.product([True, False], [0, 1]):
        layer = cell.layer(num_shared_experts=1).train(training)
        x, ctx = tokens(num_tokens).requires_grad_(), context(num_tokens)
        with Collector(layer) as collector:
            output = layer(x, ctx)
        (output.hidden_states.sum() + collector.loss()).backward()
        assert output.hidden_states.shape == (num_tokens, H)
        for value in (x.grad, *output.losses.values(), *(p.grad for p in layer.parameters())):
            assert value is None or bool(torch.isfinite(value).all())
        if num_tokens == 0:
            assert all(float(loss.detach()) == 0 for loss in output.losses.values())
            assert not output.stats["num_tokens_per_expert"].any()
        elif cell.traits.tokens_choose and getattr(cell.router, "expert_pool", "") != "all":
            served = int(output.stats["num_tokens_per_expert"].sum())
            assert served == cell.top_k if cell.traits.fixed_k else 1 <= served <= E


@pytest.mark.parametrize("cell", with_backends(ALL), ids=ids)
def test_all_tokens_are_padding(cell: Cell) -> None:
    layer, x = cell.layer(), tokens().requires_grad_()
    output = layer(x, context(valid_mask=torch.zeros(T, dtype=torch.bool)))
    (output.hidden_states.sum() + sum(output.losses.values())).backward()
    assert not output.hidden_states.any()
    assert all(float(loss.detach()) == 0 for loss in output.losses.values())
    for p in (x, *layer.parameters()):
        assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_expert_without_tokens_gets_no_gradient(backend: str, dtype: torch.dtype) -> None:
    cell = next(c for c in ALL if c.router.name == "etr_paper")
    layer = cell.layer(dtype, backend=backend, top_k=1, capacity="none")
    x = torch.rand(T, H, dtype=dtype)
    x[:, : H // E] += 3  # every token's affinity is highest with expert 0
    layer(x).hidden_states.sum().backward()
    for p in layer.experts.parameters():
        assert p.grad is not None
        assert p.grad[0].any()
        assert not p.grad[1:].any()


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_leading_shapes_and_packed_batches(cell: Cell) -> None:
    layer, x, ctx = cell.layer(), tokens(12), context(12)
    mask = torch.rand(12) > 0.2
    assert ctx.token_ids is not None
    flat = layer(x, dataclasses.replace(ctx, valid_mask=mask))
    for shape in ((3, 4), (2, 3, 2), (1, 12), (12, 1)):
        ctx_shaped = RoutingContext(
            valid_mask=mask.view(shape),
            token_ids=ctx.token_ids.view(shape),
        )
        shaped = layer(x.view(*shape, H), ctx_shaped)
        assert shaped.hidden_states.shape == (*shape, H)
        assert torch.equal(shaped.hidden_states.view(12, H), flat.hidden_states)


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_the_input_is_left_alone(cell: Cell) -> None:
    layer, x = cell.layer(), tokens()
    before = x.clone()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(x, context(valid_mask=torch.rand(T) > 0.3))
    assert torch.equal(x, before)
    assert layer.pending == {}  # a forward changes nothing
    for name, value in layer.state_dict().items():
        assert torch.equal(value.nan_to_num(), state[name].nan_to_num()), name


TOKEN_CHOOSING = [c for c in ROUTER_CELLS if c.traits.tokens_choose]


@pytest.mark.parametrize("cell", TOKEN_CHOOSING, ids=ids)
def test_replay_uses_recorded_choices_with_live_gates(cell: Cell) -> None:
    layer, x, ctx = cell.layer(capacity="none"), tokens(), context()
    expert = torch.stack([torch.randperm(E)[: cell.top_k] for _ in range(T)])
    expert[3] = E  # this token takes no expert
    ctx = dataclasses.replace(ctx, replay={0: Replay(expert=expert), 1: Replay(expert=expert * 0)})
    x.requires_grad_()
    routing, _limit = layer.route(x, ctx)
    assert kept_pairs(layer, x, ctx) == {
        (t, int(e)) for t in range(T) for e in expert[t] if int(e) < E
    }
    output = layer(x, ctx)
    assert not output.hidden_states[3].any()
    own, _ = layer.route(x, dataclasses.replace(ctx, replay=None))
    if own.probs is not None and routing.probs is not None:
        assert torch.equal(own.probs, routing.probs)
    output.hidden_states.sum().backward()
    for p in layer.router.parameters():
        assert p.grad is not None
        assert p.grad.any() or cell.traits.reads_before  # of which there is none


@pytest.mark.parametrize("cell", TOKEN_CHOOSING, ids=ids)
def test_replaying_ones_own_choices_changes_nothing(cell: Cell) -> None:
    layer, x, ctx = cell.layer(), tokens(), context()
    routing, _ = layer.route(x, ctx)
    replay = {0: Replay(expert=routing.expert.view(T, -1))}
    again = layer(x, dataclasses.replace(ctx, replay=replay)).hidden_states
    assert torch.equal(again, layer(x, ctx).hidden_states)


WITH_SCORES = [c for c in ROUTER_CELLS if c.traits.has_scores]
PLACEMENT = ExpertPlacement.contiguous(E, 2, 2)


@pytest.mark.parametrize("cell", WITH_SCORES, ids=ids)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_local_bonus_attracts_but_does_not_weigh(cell: Cell, rank: int) -> None:
    near = set(PLACEMENT.experts_on_node(rank))
    ctx = context(placement=PLACEMENT, rank=rank)
    x = tokens()
    with_bonus = cell.layer(local_bonus=10.0, top_k=1)
    plain = cell.layer(top_k=1)
    plain.load_state_dict(with_bonus.state_dict())
    routing, _ = with_bonus.route(x, ctx)
    base, _ = plain.route(x, ctx)
    if cell.traits.tokens_choose:
        assert set(routing.expert.view(T, -1)[:, 0].tolist()) <= near
    assert routing.scores is not None
    assert base.scores is not None
    assert torch.equal(routing.scores, base.scores)  # thresholds are read off these
    if routing.probs is not None and base.probs is not None:
        assert torch.equal(routing.probs, base.probs)
    if cell.traits.tokens_choose:
        replay = {0: Replay(expert=routing.expert.view(T, -1))}
        base, _ = plain.route(x, dataclasses.replace(ctx, replay=replay))
    assert torch.equal(routing.gate, base.gate)
    with_bonus.eval(), plain.eval()
    assert kept_pairs(with_bonus, x, ctx) == kept_pairs(plain, x, ctx)
