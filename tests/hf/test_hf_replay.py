"""Recorded choices, fed back: through forward, generate, training and recomputation."""

from __future__ import annotations

import pytest
import torch
from tiny_models import calibrated, make_model, quiet_eval, tokens
from torch import nn

import etr
from etr.hf.replay import join_choices, record_choices, replay_choices
from etr.moe import capacity, moe_layers
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings(
    "ignore:MoE layer evaluates dropless", "ignore:`gradient_checkpointing_"
)


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("router", etr.ROUTERS)
def test_own_choices_change_nothing(router):
    model, x = quiet_eval(make_model(router)), tokens()
    with record_choices(model) as choices:
        before = logits(model, x)
    with replay_choices(model, choices):
        after = logits(model, x)
    assert torch.equal(before, after)
    assert not model.prepare_context


def test_what_experts_took_can_be_replayed():
    model = quiet_eval(make_model("expert_choice", eval_selection="batch"))
    x = tokens()
    with record_choices(model) as choices:
        before = logits(model, x)
    assert choices[0][0].shape == (24, 4)
    for layer in moe_layers(model):
        layer.eval_selection = "dropless"
    with replay_choices(model, choices):
        assert torch.allclose(before, logits(model, x), atol=1e-12)


def test_another_model_routes_the_same():
    first, second, x = quiet_eval(make_model()), quiet_eval(make_model(seed=1)), tokens()
    with record_choices(first) as choices:
        logits(first, x)
    seen: dict[int, LayerView] = {}
    free = logits(second, x)
    with replay_choices(second, choices), watch(second, seen.__setitem__):
        forced = logits(second, x)
    for place, view in seen.items():
        assert torch.equal(view.routing.expert.view(-1, 2), choices[0][place])
    assert not torch.allclose(free, forced)


def test_generation_becomes_one_training_forward():
    """Prefill and decode, joined, are the choices of the whole sequences; padding is kept out."""
    model = calibrated(make_model(capacity=capacity.Factor(capacity_factor=0.6)), steps=3)
    prompt = tokens(batch=2, length=5)
    prompt[0, :2] = 0
    mask = (prompt != 0).long()
    with record_choices(model) as choices:
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert [entry[0].shape[0] for entry in choices] == [10, 2, 2, 2]
    joined = join_choices(choices, batch_size=2)
    assert (joined[0].view(2, 8, 2)[0, :2] == 4).all()

    whole, full = out[:, :-1], torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    position = (full.cumsum(1) - 1).clamp_min(0)
    with record_choices(model) as again, torch.no_grad():
        model(whole, attention_mask=full, position_ids=position)
    assert all(torch.equal(again[0][layer], joined[layer]) for layer in joined)

    model.train()
    labels = whole.masked_fill(full == 0, -100)
    with replay_choices(model, [joined]):
        model(whole, attention_mask=full, position_ids=position, labels=labels).loss.backward()
    for layer in moe_layers(model):
        assert layer.router.weight.grad.abs().sum() > 0


def test_recomputation_sees_the_replay_and_is_recorded_once():
    x, grads = tokens(), []
    source = quiet_eval(make_model(seed=1))
    with record_choices(source) as other:
        logits(source, x)
        logits(source, tokens(seed=2))
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with record_choices(model) as recorded, replay_choices(model, other):
            # Both forwards come before the backward passes.
            losses = [model(ids, labels=ids).loss for ids in (x, tokens(seed=2))]
            sum(losses).backward()
        assert len(recorded) == 2
        assert all(torch.equal(recorded[n][0], other[n][0]) for n in range(2))
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_errors_say_what_is_wrong():
    model, x = quiet_eval(make_model()), tokens()
    with record_choices(model) as choices:
        logits(model, x)

    def replay(entries, forwards):
        with replay_choices(model, entries):
            for _ in range(forwards):
                logits(model, x)

    with pytest.raises(ValueError, match="has 1 entries, and this is forward 2"):
        replay(choices, 2)
    with pytest.raises(ValueError, match="but the model ran 0 times"):
        replay(choices, 0)
    with pytest.raises(ValueError, match=r"choices\[0\] has MoE layers \[0\]"):
        replay([{0: choices[0][0]}], 1)
    with pytest.raises(ValueError, match="one row per token"), replay_choices(model, choices):
        logits(model, tokens(batch=3))
    with pytest.raises(ValueError, match="holds 0 EtrForCausalLM"), record_choices(nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match="no multiple of batch_size=5"):
        join_choices(choices, 5)
    with pytest.raises(ValueError, match="choices is empty"):
        join_choices([], 2)
    assert not model.prepare_context
