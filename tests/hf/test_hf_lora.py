"""PEFT: LoRA on attention and on the fused experts trains what it should, and merges."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import calibrated, make_model, quiet_eval, tokens

import etr
from etr.hf import load_pretrained
from etr.moe import attach, moe_layers

peft = pytest.importorskip("peft", reason="needs the extra peft")

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(**options):
    model = make_model(etr.EtrRouter(frame="learned"), **options)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=EXPERTS,
    )
    return model, peft.get_peft_model(model, lora)


def logits(model, x):
    with torch.no_grad():
        return quiet_eval(model)(input_ids=x).logits


@pytest.mark.parametrize("shared", [0, 1])
def test_lora_on_experts_and_attention_trains_and_merges(shared, tmp_path):
    x = tokens()
    model, adapter = adapted(num_shared_experts=shared)
    start = logits(adapter, x)
    frozen = {n: p.clone() for n, p in adapter.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    handle = attach(adapter, optimizer, 4)
    adapter.train()
    losses = []
    for _ in range(4):
        loss = adapter(input_ids=x, labels=x).loss
        loss.backward()
        names = [n for n, p in adapter.named_parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    handle.detach()
    assert losses[-1] < losses[0]
    assert all("lora_" in name for name in names)
    assert sum("experts" in name for name in names) == 2 * len(EXPERTS) * 2  # A and B, two layers
    assert sum("q_proj" in name for name in names) == 4
    for name, value in adapter.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    assert all(int(layer.state.step) == 4 for layer in moe_layers(adapter))

    tuned = logits(adapter, x)
    assert not torch.allclose(start, tuned)
    merged = adapter.merge_and_unload()
    assert type(merged) is type(model)
    assert torch.allclose(tuned, logits(merged, x), atol=1e-10)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(tuned, logits(load_pretrained(tmp_path), x), atol=1e-10)


def test_a_saved_adapter_loads_onto_the_model(tmp_path):
    """And leaves the thresholds that the model has."""
    x = tokens()
    model, adapter = adapted()
    calibrated(model)
    for name, value in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    tuned = logits(adapter, x)
    adapter.save_pretrained(tmp_path)
    adapter.unload().save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no routing state")
        again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert all(layer.calibration.is_calibrated for layer in moe_layers(again))
    assert torch.allclose(tuned, logits(again, x), atol=1e-10)
    assert again.generate(input_ids=x, max_new_tokens=2).shape == (2, 14)
