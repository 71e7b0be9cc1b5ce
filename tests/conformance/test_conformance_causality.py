"""Later tokens and earlier ones: what eval mode promises, and what the `causal` flag says."""

from __future__ import annotations

import pytest
import torch
from cells import (
    ALL,
    ROUTER_CELLS,
    Cell,
    E,
    context,
    ids,
    pairs,
    policy,
    tokens,
    train_steps,
    trained,
    with_backends,
)
from torch import Tensor

from etr.moe import CAPACITIES, MoE
from etr.moe.rules import unsupported

N = 24
HALF = N // 2


def first_half(layer: MoE, x: Tensor, token_ids: Tensor) -> tuple[Tensor, set[tuple[int, int]]]:
    ctx = context(N, token_ids=token_ids)
    routing, limit = layer.route(x, ctx)
    kept = pairs(routing, layer.keep(routing, limit).selection.kept)
    return layer(x, ctx).hidden_states[:HALF], {(t, e) for t, e in kept if t < HALF}


def changes(layer: MoE, trials: int = 4) -> bool:
    """Whether changing the second half ever changes what the first half gets."""
    x, token_ids = tokens(N), torch.randint(0, 99, (N,))
    _, kept = first_half(layer, x, token_ids)
    for _ in range(trials):
        other, other_ids = x.clone(), token_ids.clone()
        other[HALF:] = 5 * tokens(N)[HALF:].flip(-1)
        other_ids[HALF:] = torch.randint(0, 99, (HALF,))
        if first_half(layer, other, other_ids)[1] != kept:
            return True
    return False


def assert_causal(layer: MoE) -> None:
    x, token_ids = tokens(N), torch.randint(0, 99, (N,))
    y, kept = first_half(layer, x, token_ids)
    for _ in range(4):
        other, other_ids = x.clone(), token_ids.clone()
        other[HALF:] = 5 * tokens(N)[HALF:].flip(-1)
        other_ids[HALF:] = torch.randint(0, 99, (HALF,))
        y_other, kept_other = first_half(layer, other, other_ids)
        assert kept_other == kept
        torch.testing.assert_close(y_other, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("selection", ["threshold", "dropless"])
@pytest.mark.parametrize("cell", with_backends(ALL), ids=ids)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_eval_is_causal(cell: Cell, selection: str) -> None:
    assert_causal(trained(cell, selection))


@pytest.mark.parametrize("cell", [c for c in ALL if c.by_score], ids=ids)
def test_thresholds_select_alike_in_any_batch_split(cell: Cell) -> None:
    """Prefill, decoding one token at a time, other batches: the same pairs bit for bit."""
    layer = cell.layer(torch.float32)
    train_steps(layer)
    layer.eval()
    x, ctx = tokens(N, torch.float32), context(N)
    assert ctx.token_ids is not None
    routing, limit = layer.route(x, ctx)
    assert limit.min_score is not None
    whole = pairs(routing, layer.keep(routing, limit).selection.kept)
    assert routing.scores is not None
    # Given equal scores: split the pairs, not the matrix product that made the scores.
    by_hand = {
        (t, e)
        for t, e in pairs(routing, routing.valid)
        if float(routing.scores[t, e]) >= float(limit.min_score[e])
    }
    assert whole == by_hand


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_flag_causal(cell: Cell) -> None:
    """causal=False shows in training; causal=True does not, unless a policy lets rivals drop."""
    if not cell.traits.causal:
        assert changes(cell.layer())
        return
    assert not changes(cell.layer(capacity="none"))
    if unsupported(cell.router, policy("factor"), "position") is None:
        assert not changes(cell.layer(capacity=policy("factor"), rank_by="position"))


@pytest.mark.parametrize("capacity", list(CAPACITIES))
def test_ranking_by_score_over_a_batch_is_not_causal(capacity: str) -> None:
    """Shown with a router that goes with every policy."""
    cell = next(c for c in ALL if c.by_score and c.traits.causal and c.traits.has_cosine)
    if capacity in ("none", "threshold"):
        pytest.skip("no rivals")
    reason = unsupported(cell.router, policy(capacity))
    assert reason is None
    assert changes(cell.layer(capacity=policy(capacity)))


@pytest.mark.parametrize("cell", [c for c in ALL if c.capacity.name == "threshold"], ids=ids)
def test_training_with_the_threshold_policy_is_causal_once_calibrated(cell: Cell) -> None:
    layer = cell.layer()
    train_steps(layer)
    layer.train()
    limit = layer.keep(*layer.route(tokens(N), context(N))).limit
    assert limit.capacity is None
    assert limit.min_score is not None
    if cell.traits.tokens_choose and cell.traits.causal:
        assert_causal(layer)


@pytest.mark.parametrize("cell", [c for c in ALL if c.by_score], ids=ids)
def test_eval_keeps_the_share_that_training_keeps(cell: Cell) -> None:
    """On fresh tokens of the same distribution, within 2 points plus the noise of the sample."""
    layer = cell.layer(torch.float32)
    num_tokens, steps = 4096, 4
    train_steps(layer, steps, num_tokens)
    share = layer.calibration.kept_share()
    layer.eval()
    x = tokens(8 * num_tokens, torch.float32)
    routing, limit = layer.route(x, context(8 * num_tokens))
    asked = routing.num_choices_per_expert()
    kept = layer.keep(routing, limit).selection.num_tokens_per_expert
    gap = (kept / asked.clamp_min(1) - share)[asked > 500].abs()
    assert len(gap) >= E // 2
    assert float(gap.max()) < 0.035, (kept / asked, share)
