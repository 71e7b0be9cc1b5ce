"""PEFT: LoRA on attention and on the fused experts trains what it should, and merges."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import calibrated, make_model, quiet_eval, tokens

import etr
from etr.hf import load_pretrained
from etr.moe import attach, moe_layers
from etr.moe.capacity import Factor

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


def trained_further(kind, x):
    """A model whose base stays, adapted and trained so that its thresholds move, and its base."""
    base = make_model(router="etr", capacity=Factor(capacity_factor=0.5))
    saved = copy.deepcopy(base)
    adapter = peft.get_peft_model(base, kind)
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    handle = attach(adapter.train(), optimizer, 4)
    for _ in range(4):
        adapter(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()
    assert all(layer.calibration.threshold.isfinite().any() for layer in moe_layers(adapter))
    return adapter, saved


KINDS = [
    peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
]


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "ia3", "prompt"])
def test_an_adapter_brings_the_thresholds_that_it_was_trained_with(kind, tmp_path):
    x = tokens()
    adapter, base = trained_further(copy.deepcopy(kind), x)
    tuned = logits(adapter, x)
    adapter.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    for mine, theirs in zip(moe_layers(again), moe_layers(adapter), strict=True):
        for (name, value), (_, other) in zip(
            mine.named_buffers(), theirs.named_buffers(), strict=True
        ):
            assert torch.equal(value, other), name
            assert value.dtype == other.dtype, name
    assert torch.equal(logits(again, x), tuned)
