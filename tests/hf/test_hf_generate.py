"""Decoding with a cache, left padding, generate."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    PAD,
    InFloat64,
    calibrated,
    make_model,
    router_and_family,
    tokens,
    traits,
)

import etr
from etr.hf.versions import CACHE
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:MoE layer evaluates dropless", "ignore:record_property is incompatible"
)
POSITION_FREE = [name for name in etr.ROUTERS if traits(name).position_free]


def left_padded(length=12, padding=4):
    """One full and one left-padded row: ids and mask, int64 [2, S]."""
    x, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
    x[1, :padding], mask[1, :padding] = PAD, 0
    return x, mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def cached_logits(model, x, mask, prefill):
    """Logits of a prefill, then of one token at a time."""
    index = positions(mask)
    out = model(
        x[:, :prefill],
        attention_mask=mask[:, :prefill],
        position_ids=index[:, :prefill],
        use_cache=True,
    )
    found = [out.logits]
    for t in range(prefill, x.shape[1]):
        out = model(
            x[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=index[:, t : t + 1],
            cache=out[CACHE],
            use_cache=True,
        )
        found.append(out.logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def greedy(model, x, mask, steps):
    """Argmax loop without a cache."""
    for _ in range(steps):
        logits = model(x, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        x = torch.cat([x, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return x


@pytest.mark.parametrize(("router", "family"), router_and_family(POSITION_FREE))
def test_decoding_with_a_cache_equals_one_forward(router, family):
    model = calibrated(make_model(router, family))
    x, mask = left_padded()
    with torch.no_grad(), InFloat64():  # positions rounded to float32 differ with the shape
        full = model(x, attention_mask=mask, position_ids=positions(mask)).logits
    valid = mask.bool()
    for prefill in (1, 5):
        with InFloat64():
            found = cached_logits(model, x, mask, prefill)
        torch.testing.assert_close(found[valid], full[valid], rtol=0, atol=1e-9)


@pytest.mark.parametrize("router", POSITION_FREE)
def test_padding_changes_nothing(router):
    model = calibrated(make_model(router))
    x, mask = left_padded()
    with torch.no_grad():
        padded = model(x, attention_mask=mask, position_ids=positions(mask)).logits[1, 4:]
        alone = model(x[1:, 4:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("router", "family"), router_and_family(POSITION_FREE))
def test_greedy_generation(router, family):
    model = calibrated(make_model(router, family))
    x, mask = left_padded(8, 3)
    found = model.generate(
        x, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found, greedy(model, x, mask, 6))


@pytest.mark.parametrize("router", etr.ROUTERS)
@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 5}, {"num_beams": 3}])
def test_sampling_and_beams_run(router, options):
    model = calibrated(make_model(router), steps=1)
    x, mask = left_padded(8, 3)
    found = model.generate(x, attention_mask=mask, max_new_tokens=4, eos_token_id=None, **options)
    assert found.shape == (2, 12)
    assert torch.equal(found[:, :8], x)
    assert all(layer.pending == {} for layer in moe_layers(model))


@pytest.mark.parametrize("selection", ["threshold", "dropless"])
@pytest.mark.parametrize("router", POSITION_FREE)
def test_beams_with_a_cache_equal_beams_without(router, selection):
    """Beams change places in the batch, and so do the rows of the cache."""
    model = calibrated(make_model(router))
    etr.set_eval_selection(model, selection)
    x, mask = left_padded(8, 3)
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 4, "eos_token_id": None}
    found = model.generate(x, **options)
    assert torch.equal(found, model.generate(x, use_cache=False, **options))


@pytest.mark.parametrize("selection", ["threshold", "dropless"])
@pytest.mark.parametrize("router", POSITION_FREE)
def test_a_batch_generates_what_each_prompt_does_alone(router, selection):
    model = calibrated(make_model(router))
    etr.set_eval_selection(model, selection)
    x, mask = left_padded(8, 3)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    both = model.generate(x, attention_mask=mask, **options)
    for row, padding in enumerate((0, 3)):
        prompt = x[row : row + 1, padding:]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(both[row, 8:], alone[0, 8 - padding :])


def test_static_cache():
    model = calibrated(make_model())
    x, mask = left_padded(8, 3)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(x, attention_mask=mask, **options)
    found = model.generate(x, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(found, expected)


def test_generation_settings_come_from_the_base():
    model = make_model()
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, PAD)


class Choices:
    """Records kept experts of every token in each MoE layer, from the outside."""

    def __init__(self, model):
        self.maps = [[] for _ in moe_layers(model)]
        for layer, found in zip(moe_layers(model), self.maps, strict=True):
            self._record(layer, found)

    def _record(self, layer, found):
        plain = layer.keep

        def keep(routing, *args, **options):
            kept = plain(routing, *args, **options)
            found.append(kept.selection.selection_map(routing))
            return kept

        layer.keep = keep

    def take(self):
        """What was kept since the last call, one bool [T, E] per layer (batch of one)."""
        taken = [torch.cat(found) for found in self.maps]
        for found in self.maps:
            found.clear()
        return taken


@pytest.mark.parametrize("router", POSITION_FREE)
def test_float32_decoding_away_from_cuts(router, record_property):
    """In float32 the last bits differ, and a hard cut may turn that into another choice."""
    model = calibrated(make_model(router)).float()
    choices, compared, flipped, worst = Choices(model), 0, 0, 0.0
    for seed in range(8):
        x = tokens(1, 24, seed=seed)
        with torch.no_grad():
            full = model(x).logits
        kept = choices.take()
        cached = cached_logits(model, x, torch.ones_like(x), 6)
        differs = torch.stack(
            [(a != b).any(-1) for a, b in zip(kept, choices.take(), strict=True)]
        ).any(0)
        compared, flipped = compared + differs.numel(), flipped + int(differs.sum())
        clean = differs.cumsum(0) == 0  # attention carries a flip to all later tokens
        gap = (full - cached).abs().amax(-1)[0][clean]
        worst = max(worst, gap.max().item() if len(gap) else 0.0)
    record_property("flip_rate", flipped / compared)
    record_property("worst_difference", worst)
    assert worst < 1e-4
    assert flipped / compared < 0.02
