"""Generation by a model in training mode: layers select as in eval mode, and learn nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import PAD, calibrated, make_model, pending, router_and_family, tokens
from torch import Tensor
from transformers import GenerationMixin

import etr
from etr.hf import EtrForCausalLM
from etr.moe import SERVING, RoutingContext, capacity, moe_layers
from etr.moe.collector import Collector
from etr.moe.config import MoEConfig
from etr.moe.layer import MoE

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def dropping(router: Any = "etr", family: str = "mixtral", **options: Any) -> EtrForCausalLM:
    """Calibrated in training that drops four in ten choices, and in training mode again."""
    if router == "etr" and "capacity" not in options:
        options["capacity"] = capacity.Factor(capacity_factor=0.6)
    model = calibrated(make_model(router, family, **options))
    return model.train()


def generated(model: EtrForCausalLM, x: Tensor, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(x, **settings)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(("router", "family"), router_and_family(etr.ROUTERS))
def test_training_mode_generates_as_eval_mode(router: str, family: str) -> None:
    model, x = dropping(router, family), tokens(3, 8)
    found = generated(model, x)
    assert model.training
    assert all(layer.training for layer in moe_layers(model))
    assert_same(found, generated(model.eval(), x))


@pytest.mark.parametrize("way", WAYS)
def test_however_it_generates(way: str) -> None:
    model, x = dropping(), tokens(2 if way != "prompt lookup" else 1, 8)
    found = generated(model, x, **WAYS[way])
    assert_same(found, generated(model.eval(), x, **WAYS[way]))


@pytest.mark.parametrize("selection", SERVING)
def test_by_the_selection_that_eval_mode_has(selection: Any) -> None:
    model, x = dropping(), tokens(3, 8)
    etr.set_eval_selection(model, selection)
    assert_same(generated(model, x), generated(model.eval(), x))


def test_a_row_does_not_depend_on_the_others() -> None:
    model, x = dropping(), tokens(4, 8)
    together, alone = generated(model, x), generated(model, x[:1])
    assert torch.equal(together.sequences[:1], alone.sequences)
    for all_rows, one in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(all_rows[:1], one, rtol=0, atol=1e-9)


def test_an_assistant_in_training_mode() -> None:
    model, assistant, x = dropping(), dropping(seed=1), tokens(1, 8)
    found = generated(model, x, assistant_model=assistant)
    expected = generated(model.eval(), x, assistant_model=assistant.eval())
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
def test_with_activation_checkpointing_on() -> None:
    model, x = dropping(), tokens(2, 8)
    model.gradient_checkpointing_enable()
    found = generated(model, x)
    assert model.is_gradient_checkpointing
    assert_same(found, generated(model.eval(), x))


def test_nothing_is_counted() -> None:
    model, x = dropping(), tokens(2, 8)
    model(x, labels=x).loss.backward()
    before = [{name: value.clone() for name, value in stats.items()} for stats in pending(model)]
    generated(model, x)
    for old, new in zip(before, pending(model), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_training_goes_on_as_before() -> None:
    """Also after a generation that failed."""
    model, x = dropping(), tokens(2, 8)
    with torch.no_grad():
        expected = model(x).logits
        generated(model, x)
        assert torch.equal(model(x).logits, expected)
        with pytest.raises(ZeroDivisionError):
            generated(model, x, logits_processor=[lambda *_: 1 / 0])
        assert torch.equal(model(x).logits, expected)
    assert model.prepare_context == []
    assert model(x, labels=x).router_losses.keys() == {"aux"}


def test_an_adapted_model() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    model, x = dropping(), tokens(2, 8)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    adapted.train()
    settings = {**GREEDY, "input_ids": x}
    assert torch.equal(adapted.generate(**settings), adapted.eval().generate(**settings))


def test_continuous_batching_selects_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is taken by one forward: transformers' own needs an accelerator."""
    monkeypatch.setattr(GenerationMixin, "generate_batch", lambda model, x: model(x).logits)
    model, x = dropping(), tokens(3, 8)
    with torch.no_grad():
        found = model.generate_batch(x)
        assert torch.equal(found, model.eval().generate_batch(x))
        assert not torch.equal(found, model.train()(x).logits)


def test_uncalibrated_layers_say_that_they_drop_nothing() -> None:
    model = make_model()
    with pytest.warns(UserWarning, match="MoE layer evaluates dropless"):
        generated(model, tokens(2, 8))


# What it is made of: a call that routes as in eval mode


def layer_of(router: str = "etr", **options: Any) -> MoE:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2}
    return MoE(MoEConfig(**sizes, router=router, **options)).double()


def test_a_call_may_route_as_in_eval_mode() -> None:
    layer = layer_of(capacity=capacity.Factor(capacity_factor=0.6))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    etr.attach(layer, optimizer, 4)
    x = torch.randn(40, 16, dtype=torch.float64)
    for _ in range(3):
        layer(x).hidden_states.sum().backward()
        optimizer.step()
    for selection in SERVING:
        with Collector(layer) as collector:
            output = layer(x, RoutingContext(selection=selection))
        assert output.losses == {}
        assert "score_histogram" not in output.stats
        assert len(collector.stats()) == 1
        assert layer.pending == {}
        layer.eval().eval_selection = selection
        assert torch.equal(output.hidden_states, layer(x).hidden_states)
        layer.train()
    kept = [
        int(layer(x, RoutingContext(selection=selection)).stats["num_tokens_per_expert"].sum())
        for selection in ("threshold", "dropless")
    ]
    assert kept[0] < kept[1] == 80


def test_an_unknown_selection_is_refused() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match=r"context\.serving='best' is unknown"):
        layer(torch.randn(4, 16), RoutingContext(selection="best"))  # type: ignore[arg-type]
