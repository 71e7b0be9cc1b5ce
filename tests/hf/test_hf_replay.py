"""Recorded choices, fed back: through forward, generate, training and recomputation."""

from __future__ import annotations

import pytest
import torch
from tiny_models import calibrated, make_model, quiet_eval, tokens
from torch import nn

import etr
from etr.hf.replay import join_choices, record_choices, replay_choices
from etr.moe import capacity, moe_layers
from etr.moe.context import Replay
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


ENGINES = {
    "int32": lambda choices: choices.int(),
    "uint8": lambda choices: choices.to(torch.uint8),
    "-1 in padding": lambda choices: choices.masked_fill(choices == 4, -1),
    "rows of sequences": lambda choices: choices.view(2, -1, 2),
    "named twice": lambda choices: torch.cat([choices, choices[:, :1]], 1),
}


@pytest.mark.parametrize("form", ENGINES)
def test_choices_in_the_forms_of_other_engines(form):
    model, x = calibrated(make_model(capacity=capacity.Factor(capacity_factor=0.6))), tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    with record_choices(model) as choices, torch.no_grad():
        before = model(x, attention_mask=mask).logits
    given = {layer: ENGINES[form](experts) for layer, experts in choices[0].items()}
    with replay_choices(model, [given]), torch.no_grad():
        after = model(x, attention_mask=mask).logits
    assert torch.equal(before, after)


def test_a_token_without_a_choice_passes_by():
    """-1 for a real token: no expert, and the gradient of the others stays."""
    model, x = make_model("token_choice", capacity="none"), tokens()
    with record_choices(model) as choices, torch.no_grad():
        model(x)
    given = {layer: experts.clone() for layer, experts in choices[0].items()}
    for experts in given.values():
        experts[5] = -1
    seen: dict[int, LayerView] = {}
    with replay_choices(model, [given]), watch(model, seen.__setitem__):
        model(x, labels=x).loss.backward()
    for view in seen.values():
        kept = view.selection.selection_map(view.routing)
        assert kept.any(-1).tolist() == [token != 5 for token in range(24)]
    assert all(layer.router.weight.grad.any() for layer in moe_layers(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: e.fill_(9), ValueError, r"choices\[0\]\[0\] holds 9; experts are 0 to 3"),
        (lambda e: e.fill_(5), ValueError, r"holds 5; experts are 0 to 3, and -1 or 4 marks"),
        (lambda e: e.fill_(-2), ValueError, r"choices\[0\]\[0\] holds -2; experts are 0 to 3"),
        (lambda e: e.float(), ValueError, r"choices\[0\]\[0\] has dtype torch.float32"),
        (lambda e: e.flatten(), ValueError, r"shape \(48,\); it must be \[T, k\] or \[B, S, k\]"),
        (lambda e: e.numpy(), TypeError, r"choices\[0\]\[0\] is ndarray"),
    ],
)
def test_wrong_choices_are_refused_before_a_forward(change, error, message):
    model, x = quiet_eval(make_model()), tokens()
    with record_choices(model) as choices:
        logits(model, x)
    given = {layer: change(experts.clone()) for layer, experts in choices[0].items()}
    with pytest.raises(error, match=message), replay_choices(model, [given]):
        raise AssertionError("not reached")
    assert not model.prepare_context


def test_checked_choices_are_not_checked_in_a_forward(monkeypatch):
    """That would wait for the device once a layer."""
    model, x = quiet_eval(make_model()), tokens()
    with record_choices(model) as choices:
        logits(model, x)
    with replay_choices(model, choices):
        monkeypatch.setattr(Replay, "checked", None)
        logits(model, x)


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
    with pytest.raises(ValueError, match="not a multiple of batch_size=5"):
        join_choices(choices, 5)
    with pytest.raises(ValueError, match="choices is empty"):
        join_choices([], 2)
    with pytest.raises(ValueError, match=r"choices\[1\] has other layers"):
        join_choices([choices[0], {0: choices[0][0]}], 2)
    with pytest.raises(ValueError, match=r"choices\[1\] .* another number of experts a token"):
        join_choices([choices[0], {k: v[:, :1] for k, v in choices[0].items()}], 2)
    assert not model.prepare_context
