"""What tools ask of the model's class and config before they load it."""

from __future__ import annotations

import json

import pytest
from tiny_models import base_config, etr_config, make_model
from transformers import MODEL_MAPPING, AutoConfig, AutoModelForCausalLM, MixtralConfig

from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM
from etr.hf.config import SHOWN
from etr.hf.modeling import ATTENTION_FLAGS

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


@pytest.mark.parametrize("flag", ATTENTION_FLAGS)
def test_the_class_says_what_some_family_can_and_a_model_what_its_own_can(flag):
    family_class = {name: MODEL_MAPPING[type(base_config(name))] for name in FAMILIES}
    assert getattr(EtrForCausalLM, flag) is any(getattr(c, flag) for c in family_class.values())
    for name, theirs in family_class.items():
        assert getattr(make_model("keep", name), flag) is getattr(theirs, flag)


def test_loading_by_keyword(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = EtrForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert type(model) is EtrForCausalLM
    assert AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)


def test_no_code_comes_with_a_config(tmp_path):
    etr_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert not config.auto_map
    assert "auto_map" not in config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_to_dict_shows_the_sizes_and_the_file_holds_them_once(family, tmp_path):
    config = etr_config("keep", family)
    shown, base = config.to_dict(), config.base_config.to_dict()
    assert {name: shown[name] for name in SHOWN if name in base} == {
        name: base[name] for name in SHOWN if name in base
    }
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not set(saved) & set(SHOWN)
    assert EtrConfig.from_dict(config.to_dict()).to_dict() == shown
    again = EtrConfig.from_dict({**config.to_dict(), "num_hidden_layers": 1})
    assert again.base_config.num_hidden_layers == again.num_hidden_layers == 1


def test_a_base_config_is_not_a_config_of_ours():
    with pytest.raises(TypeError, match=r"MixtralConfig; .*EtrConfig\.from_base"):
        EtrForCausalLM(MixtralConfig())
