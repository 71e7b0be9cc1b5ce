"""Decodings run with a cache a branch equal a plain loop without any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import PAD, calibrated, make_model, quiet_eval, tokens
from torch import Tensor
from transformers import StaticCache

from etr.hf import EtrForCausalLM, adapt
from etr.hf.adapt import Adapting
from etr.hf.decode import decoding_by, generate
from etr.hf.versions import CACHE
from etr.methods.rewire import Rewire
from etr.model import DECODINGS, Decoding
from etr.moe import moe_layers, selecting

NEW = 6


@dataclass(frozen=True, kw_only=True)
class Contrast(Decoding):
    """For this test: dropless logits, pushed away from those of thresholds."""

    name = "contrast"
    summary = "for this test"

    strength: float = 1.5

    @property
    def branches(self) -> tuple[str | None, ...]:
        return ("dropless", "threshold")

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        return (1 + self.strength) * logits[0] - self.strength * logits[1]


@pytest.fixture
def contrast():
    DECODINGS[Contrast.name] = Contrast
    yield DECODINGS.parse("contrast")
    del DECODINGS[Contrast.name]


@pytest.fixture(scope="module")
def model() -> EtrForCausalLM:
    found = calibrated(make_model("etr", capacity="factor:capacity_factor=0.5").float(), steps=4)
    assert any(layer.calibration.threshold.isfinite().any() for layer in moe_layers(found))
    return found


def padded() -> tuple[Tensor, Tensor]:
    """A batch whose first row is padded on the left."""
    ids = tokens(batch=3, length=9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = PAD, 0
    return ids, mask


@torch.no_grad()
def by_hand(model: EtrForCausalLM, ids: Tensor, mask: Tensor, decoding: Decoding) -> Tensor:
    """Greedy, the whole text anew for every token and branch."""
    for _ in range(NEW):
        position = (mask.cumsum(1) - 1).clamp_min(0)
        logits = []
        for selection in decoding.branches:
            with nullcontext() if selection is None else selecting(model, selection):
                out = model(input_ids=ids, attention_mask=mask, position_ids=position)
            logits.append(out.logits[:, -1:])
        best = decoding.combine(logits).argmax(-1)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 10**6}


def run(model: EtrForCausalLM, decoding: Decoding, **options: Any) -> Tensor:
    ids, mask = padded()
    return generate(
        model, decoding, ids, attention_mask=mask, pad_token_id=PAD, **{**GREEDY, **options}
    )


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_two_branches_equal_a_plain_loop(options, contrast, model):
    wanted = by_hand(model, *padded(), contrast)
    assert torch.equal(run(model, contrast, **options), wanted)
    for selection in contrast.branches:  # or the test would say nothing
        with selecting(model, selection):
            assert not torch.equal(run(model, DECODINGS.parse("plain")), wanted)


def test_logits_of_every_step_are_those_of_whole_texts(contrast, model):
    found = run(model, contrast, return_dict_in_generate=True, output_logits=True)
    ids, mask = found.sequences, torch.cat([padded()[1], torch.ones(3, NEW).long()], 1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    logits = []
    for selection in contrast.branches:
        with selecting(model, selection), torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, position_ids=position)
        logits.append(out.logits[:, -NEW - 1 : -1])
    wanted = contrast.combine(logits)
    torch.testing.assert_close(torch.stack(found.logits, 1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DECODINGS)
def test_every_decoding_runs_alike_whatever_the_cache(name, model):
    decoding = DECODINGS.parse(name)
    cached = run(model, decoding)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(run(model, decoding, **options), cached)
    beams = run(model, decoding, num_beams=3)
    assert torch.equal(run(model, decoding, num_beams=3, use_cache=False), beams)
    assert torch.equal(cached, by_hand_or_plain(model, decoding))


def by_hand_or_plain(model: EtrForCausalLM, decoding: Decoding) -> Tensor:
    if decoding.refits_after is not None:
        return run(model, decoding)  # tests below
    if decoding.branches == (None,):
        ids, mask = padded()
        return model.generate(ids, attention_mask=mask, pad_token_id=PAD, **GREEDY)
    return by_hand(model, *padded(), decoding)


def test_plain_samples_as_generate_does_bit_for_bit(model):
    ids, mask = padded()
    options = {"attention_mask": mask, "pad_token_id": PAD, "max_new_tokens": NEW}
    options |= {"do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(3)
    wanted = model.generate(ids, **options)
    torch.manual_seed(3)
    found = generate(model, DECODINGS.parse("plain"), ids, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(map(torch.equal, found.logits, wanted.logits))


def test_beams_move_the_caches_of_all_branches(contrast, model):
    beams = {"num_beams": 3, "num_return_sequences": 3}
    wanted = run(model, contrast, use_cache=False, **beams)
    assert torch.equal(run(model, contrast, **beams), wanted)


def test_generations_follow_each_other_and_leave_no_trace(contrast, model):
    wanted = run(model, contrast)
    ids, mask = padded()
    with decoding_by(model, contrast):
        for _ in range(2):
            again = model.generate(ids, attention_mask=mask, pad_token_id=PAD, **GREEDY)
            assert torch.equal(again, wanted)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(layer.eval_selection == "threshold" for layer in moe_layers(model))


def test_a_model_in_training_mode_decodes_alike(contrast, model):
    wanted = run(model, contrast)
    model.train()
    try:
        assert torch.equal(run(model, contrast), wanted)
        assert not any(layer.pending for layer in moe_layers(model))
    finally:
        model.eval()


def test_a_cache_that_holds_tokens_is_refused(contrast, model):
    ids, mask = padded()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    cache = out.get("cache", out.get("past_key_values"))
    with (
        decoding_by(model, contrast),
        pytest.raises(ValueError, match="holds 9 tokens already, which only one of the branches"),
    ):
        model(input_ids=ids[:, -1:], cache=cache)


def test_a_decoding_without_branches_is_refused(model):
    class Nothing(Contrast):
        name = "nothing"
        branches = ()

    with pytest.raises(ValueError, match="decoding 'nothing' has no branch"):
        run(model, Nothing())


@pytest.fixture(scope="module")
def linear() -> EtrForCausalLM:
    """A router to whose logits something can be added."""
    return quiet_eval(make_model("token_choice", capacity="none"))


def test_rewiring_by_nothing_writes_what_the_model_writes(linear):
    """At rate 0, also where it is fitted in between; and weights stay whatever the rate."""
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    plain = run(linear, DECODINGS.parse("plain"))
    for text in ("rewire:rate=0", "rewire:rate=0,interval=2,steps=1"):
        assert torch.equal(run(linear, DECODINGS.parse(text)), plain)
    changed = run(linear, DECODINGS.parse("rewire:rate=3"))
    assert not torch.equal(changed, plain)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    assert torch.equal(run(linear, DECODINGS.parse("plain")), plain)


def test_a_request_is_rewired_by_its_own_text(linear):
    """In a padded batch as alone, in float64; and a second text starts anew."""
    decoding = DECODINGS.parse("rewire:rate=0.5,interval=3")
    ids, mask = padded()
    with decoding_by(linear, decoding):
        options = {"pad_token_id": PAD, **GREEDY}
        batch = linear.generate(ids, attention_mask=mask, **options)
        for row, first in ((0, 4), (1, 0)):
            alone = linear.generate(
                ids[row : row + 1, first:], attention_mask=mask[row : row + 1, first:], **options
            )
            assert torch.equal(alone[0], batch[row, first:])
        static = linear.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(static, batch)


def test_refits_come_after_so_many_tokens(linear, monkeypatch):
    lengths = []
    fit = Rewire.fit

    def counted(self, loss, start):
        lengths.append(len(loss(dict(start))))
        return fit(self, loss, start)

    monkeypatch.setattr(Rewire, "fit", counted)
    run(linear, DECODINGS.parse("rewire:interval=2,steps=1"))
    assert lengths == [3] * 3  # at the prompt of 9, and as it grows from there to 9 + 5


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_are_rewired_by_their_own_texts(use_cache, linear, monkeypatch):
    """Refits see the texts that the beams are at, and what was added to a text goes with it."""
    texts, fitted = [], []
    prepare, fit = type(linear).prepare_inputs_for_generation, Adapting._fit

    @wraps(prepare)
    def prepared(self, input_ids, **given):
        texts.append(input_ids.clone())
        return prepare(self, input_ids, **given)

    def seen(self, model, mask):
        assert torch.equal(self._text, texts[-1])
        fit(self, model, mask)
        fitted.append(self._text.clone())
        for layer, value in self._deltas.items():  # names the text that it was fitted to
            self._deltas[layer] = value * 0 + self._text.sum(1, keepdim=True)

    def added(given, deltas, length):
        for value in deltas.values() if given else ():  # nothing is given while it fits
            assert torch.equal(value[:, 0].long(), texts[-1][:, : fitted[-1].shape[1]].sum(1))
        return with_deltas(given, deltas, length)

    with_deltas = adapt._with
    monkeypatch.setattr(type(linear), "prepare_inputs_for_generation", prepared)
    monkeypatch.setattr(Adapting, "_fit", seen)
    monkeypatch.setattr(adapt, "_with", added)
    decoding = DECODINGS.parse("rewire:interval=2,steps=1,rate=0")
    run(linear, decoding, num_beams=3, use_cache=use_cache)
    assert len(fitted) == 3
    moved = any(not torch.equal(b[:, : a.shape[1]], a) for a, b in pairwise(texts))
    assert moved  # or the test would say nothing


def test_a_cache_that_is_used_again_begins_a_text(linear):
    decoding = DECODINGS.parse("rewire:rate=3")
    ids, mask = padded()
    cache = StaticCache(config=linear.config, max_cache_len=20)
    options = {"pad_token_id": PAD, CACHE: cache, **GREEDY}
    with decoding_by(linear, decoding):
        first = linear.generate(ids, attention_mask=mask, **options)
        cache.reset()
        other = linear.generate(ids.flip(0), attention_mask=mask.flip(0), **options)
    assert torch.equal(other, first.flip(0))
