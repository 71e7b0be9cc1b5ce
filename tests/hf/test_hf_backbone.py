"""What a family's base class declares about itself, once its blocks are swapped."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import calibrated, etr_config, make_model, tokens
from transformers import AutoModel, MixtralModel

from etr.hf import FAMILIES, EtrForCausalLM
from etr.moe import moe_layers

HALF = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_s_router_logits_are_promised(family):
    model = make_model(family=family).eval()
    assert set(model.model.can_record_outputs) == {"hidden_states", "attentions"}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert len(outputs.attentions) == model.config.num_hidden_layers


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_flags_name_exactly_what_half_precision_leaves_in_float32(family, dtype, tmp_path):
    EtrForCausalLM(etr_config(family=family)).save_pretrained(tmp_path)
    model = EtrForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    flags = set(model._keep_in_fp32_modules_strict)
    if dtype == torch.float16:
        flags |= set(model._keep_in_fp32_modules)
    tensors = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    named = {flag: {k for k in tensors if f".{flag}." in f".{k}."} for flag in flags}
    assert all(named.values()), "a flag that names nothing"
    kept = {name for name, value in tensors.items() if value.dtype == torch.float32}
    assert kept == set().union(*named.values())
    assert {name for name in model.state_keys() if name in tensors} <= kept


@pytest.fixture
def kept(monkeypatch):
    """Mixtral's class keeps its router in float32, as DeepSeek-V3's does, and another part."""
    flags = ["gate.weight", "another_part"]
    monkeypatch.setattr(MixtralModel, "_keep_in_fp32_modules_strict", flags)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("router", ["etr", "token_choice", "keep"])
def test_a_router_that_its_family_keeps_in_float32_stays_exact(router, dtype, tmp_path):
    whole = EtrForCausalLM(etr_config(router))
    whole.save_pretrained(tmp_path)
    model = EtrForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    flags = model._keep_in_fp32_modules_strict
    assert {"mlp.router.weight", "another_part"} <= flags
    assert "gate.weight" not in flags
    for layer, exact in zip(moe_layers(model), moe_layers(whole), strict=True):
        assert torch.equal(layer.router.weight, exact.router.weight)
        assert layer.experts.down_proj.dtype == dtype
    x = tokens()
    model(x, labels=x).loss.backward()
    assert all(layer.router.weight.grad.any() for layer in moe_layers(model))


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_such_a_router_is_built_in_float32_at_least(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = EtrForCausalLM(etr_config("token_choice"))
    finally:
        torch.set_default_dtype(before)
    expected = torch.promote_types(dtype, torch.float32)
    assert {layer.router.weight.dtype for layer in moe_layers(model)} == {expected}
    assert {layer.experts.down_proj.dtype for layer in moe_layers(model)} == {dtype}


def test_a_folder_of_the_decoder_alone_loads_as_this_library_s_model(tmp_path):
    model = calibrated(make_model())
    family_config = model.model.config
    model.model.save_pretrained(tmp_path)
    assert model.model.config is family_config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "etr"
    loaded, info = EtrForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert not info["unexpected_keys"]
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    with pytest.raises(ValueError, match="EtrConfig"):
        AutoModel.from_pretrained(tmp_path)
