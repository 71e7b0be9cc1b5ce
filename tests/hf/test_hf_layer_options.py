"""Options of single MoE layers in one model: saved, loaded, trained, and refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import VOCAB, base_config, etr_config

import etr
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import LossConfig, moe_layers
from etr.moe.config import SIZES
from etr.moe.options import OPTIONS
from etr.moe.stats import routing_shares

LAYERS = [
    {"router": "token_choice:gate=sigmoid", "capacity": "none", "losses": "z:weight=0.1"},
    {"num_experts": 3, "intermediate_size": 20, "top_k": 1, "capacity": "factor"},
]


def config_of(layers=LAYERS):
    return EtrConfig.from_base(base_config(), "etr", rank_by="score", layers=layers)


def model_of(config):
    torch.manual_seed(2)
    return EtrForCausalLM(config)


def test_every_option_is_stored_and_taken():
    assert set(etr_config().moe) == set(OPTIONS)
    config = EtrConfig.from_base(base_config(), routed_scale=2.0, debug=True, local_bonus=0.5)
    assert (config.moe["routed_scale"], config.moe["debug"]) == (2.0, True)
    assert config.moe_config.local_bonus == 0.5
    with pytest.raises(ValueError, match="moe has unknown options debugging; known: activation"):
        EtrConfig.from_base(base_config(), debugging=True)


def test_layers_have_what_they_were_given():
    first, second = (layer.config for layer in moe_layers(model_of(config_of())))
    assert first.router_config == etr.TokenChoice(gate="sigmoid")
    assert (first.num_experts, first.intermediate_size, first.top_k) == (4, 48, 2)
    assert first.loss_weights == {"z": 0.1}
    assert second.router_config.name == "etr"
    assert (second.num_experts, second.intermediate_size, second.top_k) == (3, 20, 1)
    assert first.rank_by == second.rank_by == "score"


def test_a_saved_model_loads_as_it_was(tmp_path):
    model = model_of(config_of()).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["moe"]
    assert [set(options) & set(SIZES) for options in stored] == [set(), {*SIZES} - {"hidden_size"}]
    again = EtrForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.moe == model.config.moe
    ids = torch.randint(1, VOCAB, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        again.generate(ids, max_new_tokens=3, do_sample=False),
        model.generate(ids, max_new_tokens=3, do_sample=False),
    )


def test_layers_that_are_alike_are_the_model_with_one_dictionary():
    ids = torch.randint(1, VOCAB, (2, 9))
    one, several = (model_of(config_of(layers)) for layers in (None, [{}, {}]))
    assert several.config.moe == [one.config.moe] * 2
    assert several.config.moe_config == one.config.moe_config
    assert torch.equal(one(ids, labels=ids).loss, several(ids, labels=ids).loss)


def test_unlike_layers_train_and_are_counted():
    model = model_of(config_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = etr.attach(model, optimizer, total_steps=2)
    ids = torch.randint(1, VOCAB, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(layer.router.weight.grad.any() for layer in moe_layers(model))
    optimizer.step()
    shares = routing_shares(
        attachment.last_stats, [layer.config.top_k for layer in moe_layers(model)]
    )
    kept = sum(int(stats["num_tokens_per_expert"].sum()) for stats in attachment.last_stats)
    assert shares["kept_per_choice"] == kept / (18 * 3)


def test_a_changed_coefficient_weighs_by_each_layers_top_k():
    config = config_of([{}, {"top_k": 1}])
    model = model_of(config)
    assert [layer.loss_rows()[0].weight for layer in moe_layers(model)] == [None, None]
    config.router_aux_loss_coef = 0.5
    assert [layer.loss_rows()[0].weight for layer in moe_layers(model)] == [1.0, 0.5]


def test_a_config_from_before_still_loads(tmp_path):
    config = etr_config("token_choice")
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    flat = {"aux_alpha": 0.02, "aux_mode": "running", "z_beta": 0.1}
    values["moe"]["losses"] = {**flat, "locality_mu": None, "locality_epsilon": 0.1}
    path.write_text(json.dumps(values))
    losses = EtrConfig.from_pretrained(tmp_path).moe_config.losses
    assert losses == LossConfig(**flat)


def test_losses_as_text_are_stored_as_rows(tmp_path):
    config = EtrConfig.from_base(base_config(), losses="balance:mode=running,z:weight=0.1")
    config.save_pretrained(tmp_path)
    again = EtrConfig.from_pretrained(tmp_path)
    assert again.moe == config.moe
    assert again.moe_config.loss_rows == config.moe_config.loss_rows
    assert {row["name"] for row in config.moe["losses"]} == {"balance", "z"}


def test_mistakes_name_the_layer():
    with pytest.raises(ValueError, match=r"moe\[1\] has unknown options gates; known: activation"):
        config_of([{}, {"gates": 1}])
    with pytest.raises(ValueError, match=r"moe\[1\] has unknown options hidden_size"):
        config_of([{}, {"hidden_size": 8}])
    with pytest.raises(ValueError, match=r"moe\[0\]: top_k=5 exceeds num_experts=4"):
        config_of([{"top_k": 5}, {}])
    with pytest.raises(ValueError, match="moe has unknown options num_experts"):
        EtrConfig(base_config=base_config(), moe={"num_experts": 3})
    for wrong in ([], [{}, 3]):
        with pytest.raises(ValueError, match="moe must be a dictionary, or a list with one for"):
            EtrConfig(base_config=base_config(), moe=wrong)
    with pytest.raises(ValueError, match="moe holds 3 dictionaries, and the model has 2 MoE layer"):
        EtrForCausalLM(config_of([{}, {}, {}]))


def test_what_needs_one_config_for_all_says_so():
    config = config_of()
    with pytest.raises(ValueError, match="differ in capacity, intermediate_size, losses, num_exp"):
        _ = config.moe_config
    ids = torch.randint(1, VOCAB, (1, 4))
    with pytest.raises(
        ValueError, match=r"one num_experts and top_k; they have \(3, 1\), \(4, 2\)"
    ):
        model_of(config)(ids, output_router_logits=True)
