"""Options of the base family that trainers change: they take effect, or are refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tiny_models import BASES, base_config, etr_config, family_model, make_model, quiet_eval, tokens
from transformers import AutoConfig

from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM
from etr.moe import LossConfig, moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
WITH_BALANCE = [name for name, family in FAMILIES.items() if family.aux_coefficient]


def alpha(config: EtrConfig) -> float:
    return config.moe_config.loss_weights["balance"]


@pytest.mark.parametrize("family", WITH_BALANCE)
@pytest.mark.parametrize("router", ["etr", "keep"])
def test_a_coefficient_of_its_own_weighs_the_balance_loss(family: str, router: str) -> None:
    base = base_config(family, router_aux_loss_coef=0.125)
    config = EtrConfig.from_base(base, router)
    assert alpha(config) == 0.25  # transformers' loss is top_k where ours is 1
    assert config.router_aux_loss_coef == 0.125


@pytest.mark.parametrize("family", WITH_BALANCE)
def test_the_familys_default_leaves_ours(family: str) -> None:
    config = EtrConfig.from_base(base_config(family))
    assert config.moe_config.losses == LossConfig()
    assert alpha(config) == 0.01
    assert config.router_aux_loss_coef == 0.005  # says the same to trainers
    assert EtrConfig.from_base(base_config(family), "random").router_aux_loss_coef == 0.0


def test_a_weight_given_to_us_comes_first() -> None:
    base = base_config(router_aux_loss_coef=0.125)
    config = EtrConfig.from_base(base, losses=LossConfig(aux_alpha=0.5, z_beta=0.25))
    assert config.moe_config.losses == LossConfig(aux_alpha=0.5, z_beta=0.25)
    assert config.router_aux_loss_coef == 0.25
    assert base.router_aux_loss_coef == 0.125  # the caller's own stays


def test_a_coefficient_for_a_router_without_balance_loss_is_refused() -> None:
    base = base_config(router_aux_loss_coef=0.125)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.125 .* router 'expert_choice'"):
        EtrConfig.from_base(base, "expert_choice")
    config = EtrConfig.from_base(base, "expert_choice", losses=LossConfig(aux_alpha=0.0))
    assert alpha(config) == config.router_aux_loss_coef == 0.0


@pytest.mark.parametrize("explicit", [None, 0.5])
def test_configs_of_before_are_read(explicit: float | None, tmp_path: Any) -> None:
    """They have a coefficient that said nothing, and no word about it."""
    config = EtrConfig.from_base(base_config(), losses=LossConfig(aux_alpha=explicit))
    values = config.to_dict()
    del values["aux_coefficient"]
    values["base_config"]["router_aux_loss_coef"] = 0.001
    read = EtrConfig.from_dict(values)
    assert alpha(read) == (0.01 if explicit is None else 0.5)
    assert read.router_aux_loss_coef == alpha(read) / 2


def balance_gradient(model: EtrForCausalLM) -> torch.Tensor:
    model.zero_grad()
    model(tokens(), labels=tokens()).router_losses["aux"].backward()
    return moe_layers(model)[0].router.weight.grad.clone()


@pytest.mark.parametrize("router", ["etr", "keep"])
def test_a_change_in_the_model_takes_effect(router: str, tmp_path: Any) -> None:
    model = make_model(router, losses=LossConfig(aux_alpha=0.5))
    before = balance_gradient(model)
    model.config.router_aux_loss_coef = 100.0
    close = {"rtol": 1e-5, "atol": 1e-6}  # norms are float32
    torch.testing.assert_close(balance_gradient(model), 400 * before, **close)  # 100 * top_k / 0.5
    model.config.save_pretrained(tmp_path)
    again = EtrForCausalLM(AutoConfig.from_pretrained(tmp_path)).double().train()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(balance_gradient(again), 400 * before, **close)
    model.config.router_aux_loss_coef = 0.25
    assert torch.equal(balance_gradient(model), before)


def test_a_change_reaches_copies() -> None:
    model = copy.deepcopy(make_model(losses=LossConfig(aux_alpha=0.5)))
    model.config.router_aux_loss_coef = 1.0
    assert [layer.loss_rows()[0].weight for layer in moe_layers(model)] == [2.0, 2.0]


def test_zero_takes_effect_where_the_balance_loss_is_asked_for() -> None:
    """TRL's SFTTrainer writes 0 and False to say that it adds none of its own."""
    model = make_model(losses=LossConfig(aux_alpha=0.5))
    model.config.router_aux_loss_coef = 0.0
    with pytest.warns(UserWarning, match="the layers keep theirs"):
        assert balance_gradient(model).any()
    model.config.output_router_logits = True
    assert "aux" not in model(tokens()).router_losses


def test_a_change_that_the_router_cannot_follow_is_refused() -> None:
    model = make_model("random")
    model.config.router_aux_loss_coef = 0.1
    with pytest.raises(ValueError, match="router 'random' can have no balance loss"):
        model(tokens())


@pytest.mark.parametrize("training", [True, False])
def test_router_logits_by_the_configs_switch(training: bool) -> None:
    model = quiet_eval(make_model()).train(training)
    assert model(tokens()).router_logits is None
    model.config.output_router_logits = True
    output = model(tokens(), labels=tokens())
    assert len(output.router_logits) == 2
    assert output.aux_loss > 1
    assert model(tokens(), output_router_logits=False).router_logits is None
    expected = output.lm_loss + sum(output.router_losses.values())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_the_switch_on(family: str) -> None:
    model, x = quiet_eval(make_model(family=family)), tokens(2, 6)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(x, **settings)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(x, **settings), expected)


# Noise on the router's input


def test_jitter_is_that_of_the_family() -> None:
    theirs = family_model("mixtral", router_jitter_noise=0.3).train()
    base = base_config(router_jitter_noise=0.3)
    model = EtrForCausalLM(EtrConfig.from_base(base, "keep")).train()
    for mine, layer in zip(moe_layers(model), theirs.model.layers, strict=True):
        mine.router.weight.data.copy_(layer.mlp.gate.weight)
        mine.experts.gate_up_proj.data.copy_(layer.mlp.experts.gate_up_proj)
        mine.experts.down_proj.data.copy_(layer.mlp.experts.down_proj)
    shared = {k: v for k, v in theirs.state_dict().items() if "mlp" not in k}
    model.load_state_dict({**model.state_dict(), **shared})
    found = []
    for each in (model, theirs):
        torch.manual_seed(0)
        found.append(each(tokens()).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(tokens()).logits, found[0])


def test_jitter_is_for_training_alone_and_may_be_changed() -> None:
    model, x = make_model(), tokens()
    quiet = model(x).logits
    model.config.router_jitter_noise = 0.3
    assert not torch.equal(model(x).logits, quiet)
    rollouts = [model.generate(x, max_new_tokens=3, do_sample=False) for _ in range(2)]
    assert torch.equal(*rollouts)
    quiet_eval(model)
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
def test_jitter_is_the_same_when_a_layer_runs_again() -> None:
    grads = []
    for checkpointing in (False, True):
        model = make_model()
        model.config.router_jitter_noise = 0.3
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(tokens(), labels=tokens()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# Options that are built into the layers


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, 0]
    return f"{value}x" if isinstance(value, str) else value + type(value)(1)


BUILT_IN = [
    (family, name)
    for family in FAMILIES
    for name in FAMILIES[family].built_in
    if hasattr(base_config(family), name)
]


def test_every_family_names_what_its_block_reads() -> None:
    names = {name for _, name in BUILT_IN}
    assert {"num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"} <= names
    assert {"topk_group", "mlp_only_layers", "hidden_act"} <= names
    # An option in later versions of transformers, a constant before.
    assert ("swiglu_limit" in names) == hasattr(base_config("gpt_oss"), "swiglu_limit")
    assert {family for family, _ in BUILT_IN} == set(BASES)


@pytest.mark.parametrize(("family", "name"), BUILT_IN)
def test_a_change_of_what_is_built_in_is_refused(family: str, name: str) -> None:
    model = make_model(family=family)
    old = getattr(model.config, name)
    setattr(model.config, name, changed(old))
    with pytest.raises(ValueError, match=f"{name}=.* differs from"):
        model(tokens())
    setattr(model.config, name, old)
    model(tokens())


def test_a_list_that_is_changed_in_place_is_seen() -> None:
    model = make_model(family="qwen3_moe")
    model.config.mlp_only_layers.append(0)
    with pytest.raises(ValueError, match="mlp_only_layers="):
        model.model(tokens())


def test_no_warning_where_nothing_was_changed() -> None:
    for losses in (LossConfig(), LossConfig(aux_alpha=0.0)):
        model = EtrForCausalLM(etr_config(losses=losses)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens())
