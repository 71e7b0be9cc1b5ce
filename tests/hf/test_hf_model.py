"""EtrForCausalLM's forward: equality with transformers, causality, masks, losses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    VOCAB,
    base_config,
    calibrated,
    make_model,
    pending,
    quiet_eval,
    router_and_family,
    tokens,
    traits,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import etr
from etr.hf import EtrConfig, EtrForCausalLM, MoEBlock
from etr.hf.versions import CACHE
from etr.moe import LossConfig, RoutingContext, moe_layers, set_eval_selection

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
TOLERANCE = {"rtol": 0, "atol": 1e-9}


@pytest.mark.parametrize("router", etr.ROUTERS)
@pytest.mark.parametrize("selection", ["threshold", "dropless"])
def test_later_tokens_change_nothing_before_them(router, selection):
    model = calibrated(make_model(router))
    set_eval_selection(model, selection)
    position = 6
    x = tokens(2, 12)
    other = x.clone()
    other[:, position + 1 :] = tokens(2, 5, seed=9)
    with torch.no_grad():
        first, second = model(x).logits, model(other).logits
    torch.testing.assert_close(first[:, : position + 1], second[:, : position + 1], **TOLERANCE)
    assert not torch.allclose(first[:, position + 1 :], second[:, position + 1 :])


def test_batch_selection_is_not_causal():
    """Shows that the test above can fail."""
    model = calibrated(make_model("etr", capacity=etr.moe.capacity.Factor(capacity_factor=0.5)))
    x = tokens(2, 12)
    other = x.clone()
    other[:, 7:] = tokens(2, 5, seed=9)
    set_eval_selection(model, "batch")
    with torch.no_grad():
        changed = (model(x).logits - model(other).logits)[:, :7].abs().max()
    assert changed > 1e-4


def test_thresholds_drop_tokens():
    """So that the threshold tests do not compare dropless models."""
    model = calibrated(make_model("etr", capacity=etr.moe.capacity.Factor(capacity_factor=0.5)))
    with torch.no_grad():
        stats = model(tokens(4, 16)).routing_stats
    for layer in stats:
        assert layer["num_tokens_per_expert"].sum() < layer["num_choices_per_expert"].sum()


@pytest.mark.parametrize(("router", "family"), router_and_family(etr.ROUTERS))
def test_losses(router, family):
    losses = LossConfig(z_beta=0.001) if traits(router).has_probs else None
    model = make_model(router, family, losses=losses)
    x = tokens()
    labels = x.clone()
    labels[0, :4] = -100
    out = model(x, labels=labels)
    ce = F.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(out.lm_loss.double(), ce, rtol=0, atol=1e-5)
    assert not out.lm_loss.requires_grad
    total = out.lm_loss + sum(out.router_losses.values())
    torch.testing.assert_close(out.loss, total, rtol=1e-6, atol=0)
    expected = {"aux"} if traits(router).has_probs and traits(router).tokens_choose else set()
    assert set(out.router_losses) == expected | ({"z"} if losses else set())
    quiet_eval(model)
    out = model(x, labels=labels)
    assert out.router_losses == {}
    assert torch.equal(out.loss, out.lm_loss)
    assert model(x).loss is None


@pytest.mark.parametrize(
    "router",
    [
        etr.EtrRouter(frame="learned"),
        etr.EtrRouter(frame="orthonormal"),
        etr.EtrRouter(gate="sigmoid"),
        etr.EtrPaper(learn_temperature=True),
        "token_choice",
        "expert_choice",
    ],
)
@pytest.mark.parametrize("weight", [0.0, None])
def test_gradients_reach_the_router(router, weight):
    model = make_model(router, losses=LossConfig(aux_alpha=weight))
    x = tokens()
    model(x, labels=x).loss.backward()
    for layer in moe_layers(model):
        for name, parameter in layer.router.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_num_items_in_batch_makes_micro_batches_add_up():
    model = make_model("token_choice", capacity="none")
    x = tokens(4, 8)
    parts = [model(half, labels=half, num_items_in_batch=4 * 7) for half in x.split(2)]
    whole = model(x, labels=x)
    torch.testing.assert_close(
        sum(part.lm_loss for part in parts), whole.lm_loss, rtol=1e-6, atol=0
    )
    found = sum(part.loss - part.lm_loss for part in parts)
    expected = torch.stack([p.router_losses["aux"] for p in parts]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_padding_is_not_routed():
    model = make_model()
    x = tokens(2, 10)
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    stats = model(x, attention_mask=mask).routing_stats
    assert [int(layer["num_valid_tokens"]) for layer in stats] == [16, 16]
    assert [int(layer["num_valid_tokens"]) for layer in model(x).routing_stats] == [20, 20]


def test_hash_router_needs_token_ids():
    model = quiet_eval(make_model("hash"))
    embeds = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match="router 'hash' needs RoutingContext"):
        model(inputs_embeds=embeds)
    assert all(block.context is None for block in moe_layers(model))


def test_embeddings_instead_of_ids():
    model = quiet_eval(make_model())
    x = tokens()
    embeds = model.get_input_embeddings()(x)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(x).logits, **TOLERANCE)


def test_logits_to_keep():
    model = quiet_eval(make_model())
    x = tokens()
    full = model(x).logits
    index = torch.tensor([0, 5])
    for keep, expected in ((3, full[:, -3:]), (index, full[:, index])):
        found = model(x, logits_to_keep=keep).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_outputs():
    model = quiet_eval(make_model())
    x = tokens()
    out = model(x, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 12, 32)] * 3
    assert isinstance(model(x, labels=x, return_dict=False), tuple)
    assert [layer["num_forwards"].item() for layer in out.routing_stats] == [1, 1]
    assert model(x, use_cache=False).get(CACHE) is None
    model.config.output_hidden_states = True
    model.config.use_cache = False
    out = model(x)
    assert len(out.hidden_states) == 3
    assert out.get(CACHE) is None


def test_attention_implementation_can_change():
    model = quiet_eval(make_model())
    x = tokens()
    expected = model(x).logits
    model.set_attn_implementation("eager")
    out = model(x, output_attentions=True)
    assert [a.shape for a in out.attentions] == [(2, 4, 12, 12)] * 2
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)


def test_caller_supplies_the_rest_of_the_context():
    model = quiet_eval(make_model("random"))
    x = tokens()
    shifted = model(x, routing_context=RoutingContext(global_token_offset=100)).logits
    assert not torch.allclose(shifted, model(x).logits)


class TestPending:
    """Only a training forward with gradients that succeeds leaves counters."""

    def test_training_forward(self):
        model = make_model()
        model(tokens())
        assert [int(p["num_valid_tokens"]) for p in pending(model)] == [24, 24]

    def test_no_grad_and_eval(self):
        model = make_model()
        with torch.no_grad():
            model(tokens())
        quiet_eval(model)(tokens())
        assert pending(model) == [{}, {}]

    def test_failed_forward(self):
        model = make_model()

        def fail(*_):
            raise RuntimeError("stop")

        model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(tokens())
        assert pending(model) == [{}, {}]
        assert all(block.context is None for block in moe_layers(model))


def test_dense_layers_stay_dense():
    base = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    model = EtrForCausalLM(EtrConfig.from_base(base))
    kinds = [isinstance(layer.mlp, MoEBlock) for layer in model.model.layers]
    assert kinds == [True, False, True]
    assert [layer.layer_index for layer in moe_layers(model)] == [0, 1]
    x = tokens()
    model(x, labels=x).loss.backward()
    base.mlp_only_layers = [0, 1, 2]
    with pytest.raises(ValueError, match="every layer dense"):
        EtrForCausalLM(EtrConfig.from_base(base))


def test_layers_keep_the_names_by_which_device_maps_know_them():
    model = make_model()
    assert type(model.model.layers[0]).__name__ == "MixtralDecoderLayer"
    assert "MixtralDecoderLayer" in model._no_split_modules


def test_a_family_model_s_own_config_serves_as_base():
    family_model = AutoModelForCausalLM.from_config(base_config())
    assert family_model.config._experts_implementation is not None
    EtrForCausalLM(EtrConfig.from_base(family_model.config))
    family_model(tokens())


def test_training_compiles_as_one_graph():
    model = make_model("baseline", backend="bmm")
    x = tokens()
    expected = model(x, labels=x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(x, labels=x)
    torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(found.loss, expected.loss, **TOLERANCE)
    found.loss.backward()
    assert [int(layer["num_forwards"]) for layer in pending(model)] == [2, 2]
