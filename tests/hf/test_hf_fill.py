"""Block diffusion on a model: who changes what, and filling with a cache equals doing without."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import PAD, VOCAB, make_model, quiet_eval
from tiny_models import tokens as random_tokens
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from etr.hf import EtrForCausalLM
from etr.hf.fill import fill, sampler
from etr.model import UNMASKINGS, BlockDiffusion, Text
from etr.model.block_diffusion import two_streams
from etr.model.objective import draws
from etr.model.unmasking import fill_block
from etr.moe import RoutingContext, selecting
from etr.moe.watch import LayerView, watch

MASK, BLOCK = VOCAB - 1, 4
OBJECTIVE = BlockDiffusion(block=BLOCK, mask=MASK)
NEW = 9


@functools.cache
def model(top_k: int = 2) -> EtrForCausalLM:
    return quiet_eval(make_model("token_choice", top_k=top_k, capacity="none"))


def tokens(rows: int, length: int) -> Tensor:
    return random_tokens(rows, length) % MASK


def as_text(ids: Tensor) -> Text:
    return Text(ids=ids, following=ids.roll(-1, 1))


@torch.no_grad()
def two(noised: Tensor, clean: Tensor, top_k: int = 4) -> Tensor:
    """Logits of both halves."""
    example = OBJECTIVE.example(as_text(clean), draws(0))
    arguments = example.arguments(torch.float64)
    arguments["input_ids"] = torch.cat([noised, clean], 1)
    return model(top_k)(**arguments).logits


def changed(ids: Tensor, block: int, value: int | None = None) -> Tensor:
    ids = ids.clone()
    place = slice(block * BLOCK, (block + 1) * BLOCK)
    ids[:, place] = (ids[:, place] + 1) % MASK if value is None else value
    return ids


@pytest.mark.parametrize("top_k", [4, 2])
def test_a_clean_block_reaches_later_blocks_alone_and_a_noised_one_itself(top_k) -> None:
    """Bit for bit where every expert takes all tokens, so that no product has another shape."""
    same = torch.equal if top_k == 4 else functools.partial(torch.allclose, rtol=0, atol=1e-12)
    clean = tokens(2, 12)
    noised = torch.where(torch.rand(2, 12, generator=draws(1)) < 0.5, MASK, clean)
    before = two(noised, clean, top_k)
    after = two(noised, changed(clean, 1), top_k)
    assert same(after[:, :8], before[:, :8])  # noised blocks 0 and 1
    assert not torch.allclose(after[:, 8:12], before[:, 8:12])
    assert same(after[:, 12:16], before[:, 12:16])  # clean block 0
    after = two(changed(noised, 1, MASK), clean, top_k)
    assert same(after[:, :4], before[:, :4])
    assert same(after[:, 8:], before[:, 8:])  # noised block 2, and all that is clean
    assert not torch.allclose(after[:, 4:8], before[:, 4:8])


def test_blocks_of_one_token_all_masked_are_next_token_prediction() -> None:
    """The loss is the text's nats by the chain rule, each token from those before it."""
    objective, clean = BlockDiffusion(block=1, least=1.0, mask=MASK), tokens(2, 7)
    example = objective.example(as_text(clean), draws(0))
    with torch.no_grad():
        logits = model()(**example.arguments(torch.float64)).logits
        nats = objective.losses(logits, example).view(2, 14)
        assert (nats[:, 7:] == 0).all()
        for place in range(7):
            row = clean[:, : place + 1].clone()
            row[:, place] = MASK
            alone = model()(input_ids=row).logits[:, -1]  # the causal mask
            wanted = F.cross_entropy(alone, clean[:, place], reduction="none")
            torch.testing.assert_close(nats[:, place], wanted)


@torch.no_grad()
def by_hand(ids: Tensor, **options: Any) -> Tensor:
    """One row without a cache: the halves of training, the noised one cut to the block at hand."""
    size, length = BLOCK, ids.shape[1] + NEW
    row = F.pad(ids, (0, -(-length // size) * size - ids.shape[1]), value=MASK)
    for first in range(ids.shape[1] // size * size, length, size):
        here = slice(first, first + size)

        def predict(block: Tensor, hidden: Tensor, step: int) -> Tensor:
            whole = torch.cat([row[:, :first], block], 1)  # noqa: B023
            sees = two_streams(torch.arange(whole.shape[1]) // size)
            hides = torch.zeros(sees.shape).double().masked_fill(~sees, -1e300)[None, None]
            place = torch.arange(whole.shape[1]).repeat(2)[None]
            both = torch.cat([whole, whole], 1)
            block = torch.arange(both.shape[1])[None] // size
            context = RoutingContext(block=block)
            options = {"attention_mask": hides, "position_ids": place, "routing_context": context}
            out = model()(input_ids=both, **options)
            return out.logits[:, first : first + size]  # noqa: B023

        hidden = row[:, here] == MASK
        row[:, here] = fill_block(predict, row[:, here], hidden, mask=MASK, **options)[0]
    return row[:, :length]


CASES = [("quota", length, "dropless") for length in (1, 8, 10)]
CASES += [(name, 10, "dropless") for name in UNMASKINGS if name != "quota"]
CASES += [("quota", 10, name) for name in ("dmoe:tau=0.5", "dynamic_sharing:beta=0.5")]


@pytest.mark.parametrize(("name", "length", "selection"), CASES)
def test_a_cache_changes_no_token(name, length, selection) -> None:
    """Nor do policies by which a block's tokens share experts: blocks are the same ones."""
    ids, policy = tokens(1, length), UNMASKINGS.parse(name)
    with selecting(model(), selection):
        wanted = by_hand(ids, unmasking=policy)
        found = fill(model(), OBJECTIVE, ids, max_new_tokens=NEW, unmasking=policy)
    assert torch.equal(found, wanted)
    assert torch.equal(found[:, :length], ids)
    assert (found != MASK).all()


def static(rows: int = 3) -> StaticCache:
    return StaticCache(config=model().config, max_cache_len=40, max_batch_size=rows)


@pytest.mark.parametrize("cache", [DynamicCache, static])
def test_rows_of_a_batch_that_is_padded_on_the_left_are_those_alone(cache) -> None:
    if cache is static and not hasattr(static().layers[0], "crop"):
        pytest.skip("this version's static caches forget nothing")
    lengths, ids = (3, 11, 6), tokens(3, 11)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : 11 - length], mask[row, : 11 - length] = PAD, 0
    found = fill(model(), OBJECTIVE, ids, mask, max_new_tokens=NEW, cache=cache())
    assert torch.equal(found[:, :11], ids)
    for row, length in enumerate(lengths):
        alone = fill(model(), OBJECTIVE, ids[row, None, -length:], max_new_tokens=NEW)
        assert torch.equal(found[row, -length - NEW :], alone[0])


def test_an_end_of_text_ends_its_row_and_changes_no_other() -> None:
    ids = tokens(2, 6)
    free = fill(model(), OBJECTIVE, ids, max_new_tokens=NEW)
    end = int(free[0, 8])
    found = fill(model(), OBJECTIVE, ids, max_new_tokens=NEW, eos_token_id=end, pad_token_id=PAD)
    for row in range(2):
        there = (free[row, 6:] == end).nonzero()
        stop = int(there[0]) + 7 if len(there) else 6 + NEW
        assert torch.equal(found[row, :stop], free[row, :stop])
        assert (found[row, stop:] == PAD).all()
    own = fill(model(), OBJECTIVE, ids[:1], max_new_tokens=40, eos_token_id=end)
    assert own.shape == (1, 46)
    assert (own[0, 10:] == end).all()


def test_what_a_step_routes_is_the_block_with_its_share_of_masks(monkeypatch) -> None:
    contexts: list[RoutingContext] = []
    steps: list[int] = []

    def keep(context: RoutingContext) -> RoutingContext:
        contexts.append(context)
        return context

    monkeypatch.setattr(model(), "prepare_context", model().prepare_context)
    model().prepare_context.append(keep)
    try:
        fill(
            model(),
            OBJECTIVE,
            tokens(2, 9),
            max_new_tokens=7,
            unmasking=UNMASKINGS.parse("quota:steps=2,threshold=1"),
            on_step=steps.append,
        )
    finally:
        model().prepare_context.remove(keep)
    assert steps == [0, 1, 0, 1]
    times = [float(context.time[0, 0]) for context in contexts]
    assert times == [0, 0.75, 0.25, 0, 1, 0.5]  # the prompt, a block, its cache, the last block
    assert [context.block.shape for context in contexts] == [(2, 8), *[(2, 4)] * 5]
    for context in contexts:
        assert len(context.block[0].unique()) * 2 == len(context.block.unique())


def test_sampling_follows_temperature_and_top_p() -> None:
    logits = torch.tensor([[[2.0, 1.0, -1.0, 0.0]]]).expand(1, 4000, 4)
    torch.manual_seed(0)
    share = torch.bincount(sampler(2.0)(logits).flatten(), minlength=4) / 4000
    torch.testing.assert_close(share, (logits[0, 0] / 2).softmax(-1), atol=0.03, rtol=0)
    assert set(sampler(1.0, 0.7)(logits).flatten().tolist()) == {0, 1}
    assert (sampler(0.0)(logits) == 0).all()
    torch.manual_seed(1)
    drawn = fill(model(), OBJECTIVE, tokens(1, 5), max_new_tokens=NEW, propose=sampler(5.0))
    assert not torch.equal(drawn, fill(model(), OBJECTIVE, tokens(1, 5), max_new_tokens=NEW))


@pytest.mark.parametrize(
    ("few", "all_of_them"),
    [("dmoe:tau=0.1", "dmoe:tau=1"), ("dynamic_sharing:beta=0.5", "dynamic_sharing:beta=1")],
)
def test_the_tokens_of_a_block_share_experts_in_each_step(few, all_of_them) -> None:
    """At most two of four, in every block of every pass; with all of them nothing changes."""
    used: list[int] = []

    def see(place: int, view: LayerView) -> None:
        blocks = view.routing.expert.view(-1, BLOCK * 2).tolist()
        used.extend(len(set(block)) for block in blocks)

    ids, found = tokens(2, 9), []
    for selection in ("dropless", all_of_them, few):
        used.clear()
        with selecting(model(), selection), watch(model(), see):
            found.append(fill(model(), OBJECTIVE, ids, max_new_tokens=NEW))
        assert max(used) == (2 if selection == few else 4)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_cannot_be_is_refused() -> None:
    ids = tokens(1, 5)
    right = torch.tensor([[1, 1, 1, 1, 0]])
    for mask in (right, torch.zeros_like(right)):
        with pytest.raises(ValueError, match="padded on the left"):
            fill(model(), OBJECTIVE, ids, mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        fill(model(), OBJECTIVE, ids, max_new_tokens=0)
    with pytest.raises(ValueError, match="no mask token"):
        fill(model(), BlockDiffusion(), ids, max_new_tokens=2)
    used = DynamicCache()
    with torch.no_grad():
        model()(input_ids=ids, cache=used)
    with pytest.raises(ValueError, match="holds 5 tokens"):
        fill(model(), OBJECTIVE, ids, max_new_tokens=2, cache=used)
    fixed = static(1)
    fixed.layers = [object()]  # as of a version whose static caches cannot forget
    fixed.get_seq_length = lambda: 0
    with pytest.raises(ValueError, match=r"StaticCache .* cannot forget"):
        fill(model(), OBJECTIVE, ids, max_new_tokens=2, cache=fixed)
    if not hasattr(static().layers[0], "crop"):
        return
    small = StaticCache(config=model().config, max_cache_len=6, max_batch_size=1)
    with pytest.raises(ValueError, match="room for 6 tokens of 8"):
        fill(model(), OBJECTIVE, ids, max_new_tokens=2, cache=small)
