"""EtrConfig: delegation, round trips, errors."""

from __future__ import annotations

import copy
import json

import pytest
from tiny_models import base_config, etr_config, router_and_family
from transformers import AutoConfig, LlamaConfig

import etr
from etr.hf import FAMILIES, EtrConfig
from etr.moe import LossConfig, capacity


@pytest.mark.parametrize(("router", "family"), router_and_family(etr.ROUTERS))
def test_json_round_trip_is_exact(router, family, tmp_path):
    config = etr_config(router, family)
    config.save_pretrained(tmp_path)
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        EtrConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ):
        assert isinstance(loaded, EtrConfig)
        assert loaded.moe_config == config.moe_config
        expected = {**config.to_dict(), "_name_or_path": loaded.name_or_path}
        assert loaded.to_dict() == expected
        assert type(loaded.base_config) is type(config.base_config)


def test_options_survive(tmp_path):
    config = EtrConfig.from_base(
        base_config(),
        etr.EtrRouter(frame="learned", gate="sigmoid", score="cosine"),
        capacity.Threshold(target=capacity.Factor(capacity_factor=0.7)),
        top_k=1,
        losses=LossConfig(aux_alpha=0.02, z_beta=0.001),
        num_shared_experts=1,
        backend="bmm",
        eval_selection="dropless",
    )
    config.save_pretrained(tmp_path)
    moe = EtrConfig.from_pretrained(tmp_path).moe_config
    assert moe.router.frame == "learned"
    assert (moe.router.gate, moe.router.score) == ("sigmoid", "cosine")
    assert moe.capacity.target.capacity_factor == 0.7
    assert (moe.top_k, moe.num_shared_experts, moe.backend) == (1, 1, "bmm")
    assert moe.losses == LossConfig(aux_alpha=0.02, z_beta=0.001)
    assert moe.eval_selection == "dropless"


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_come_from_the_base(family):
    config = etr_config(family=family, top_k=1)
    moe = config.moe_config
    assert (moe.hidden_size, moe.intermediate_size, moe.num_experts) == (32, 48, 4)
    assert moe.top_k == config.num_experts_per_tok == 1
    assert moe.activation == ("clamped_swiglu" if family == "gpt_oss" else "swiglu")


def test_from_base_copies_its_argument():
    base = base_config()
    EtrConfig.from_base(base, top_k=1).vocab_size = 7
    assert (base.num_experts_per_tok, base.vocab_size) == (2, 64)


def test_attributes_are_those_of_the_base():
    config = etr_config()
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " head_dim sliding_window pad_token_id bos_token_id eos_token_id tie_word_embeddings"
    names += " max_position_embeddings num_experts rope_parameters initializer_range"
    for name in names.split():
        assert getattr(config, name) == getattr(config.base_config, name), name
    assert config.get_text_config(decoder=True) is config.base_config
    config.use_cache = False
    assert config.base_config.use_cache is False
    assert "use_cache" not in vars(config)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = config.no_such_attribute


def test_attention_implementation_reaches_the_base():
    base = base_config()
    base._attn_implementation = "eager"
    assert EtrConfig.from_base(base).base_config._attn_implementation == "eager"
    config = etr_config()
    config._attn_implementation = "eager"
    assert config.base_config._attn_implementation == "eager"


def test_default_config_is_mixtral():
    assert EtrConfig().base_config.model_type == "mixtral"
    assert EtrConfig().moe_config.router_config.name == "etr"


def test_family_balance_weight_counts_top_k():
    config = etr_config()
    expected = config.base_config.router_aux_loss_coef * 2
    assert config.family.aux_alpha(config.base_config) == expected


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"'llama'.*mixtral"):
        EtrConfig.from_base(LlamaConfig())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"top_k": 5}, "top_k=5 exceeds num_experts=4"),
        ({"hidden_size": 34, "head_dim": 8}, {"router": "etr_paper"}, "hidden_size=34"),
        ({"hidden_act": "gelu"}, {}, "hidden_act='gelu'"),
        ({}, {"router": "nope"}, "router='nope'"),
        ({}, {"router": "baseline"}, "top_k=2"),
    ],
)
def test_contradictions_are_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        EtrConfig.from_base(base_config(**changes), **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe": {"ruoter": "etr"}}, "ruoter"),
        ({"moe": {"hidden_size": 8}}, "hidden_size"),
        ({"base_config": {"model_type": "nope"}}, "nope"),
        ({"base_config": {"vocab_size": 3}}, "model_type"),
        ({"base_config": 3}, "base_config=3"),
    ],
)
def test_damaged_dictionaries_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EtrConfig(**values)
