"""Training: checkpointing, accumulation, calibration, resuming."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    base_config,
    etr_config,
    make_model,
    pending,
    quiet_eval,
    router_and_family,
    tokens,
    train_steps,
)

import etr
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.moe import attach, capacity, moe_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:MoE layer evaluates dropless", "ignore:`gradient_checkpointing_"
)


def same_stats(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(("router", "family"), router_and_family(etr.ROUTERS))
def test_gradient_checkpointing_changes_nothing(router, family):
    plain, checkpointed = make_model(router, family), make_model(router, family)
    checkpointed.gradient_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())
    x = tokens()
    recomputed = []
    moe_layers(checkpointed)[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    for _ in range(2):  # two micro-batches: recomputation must see the same earlier counts
        losses = [m(x, labels=x).loss for m in (plain, checkpointed)]
        for loss in losses:
            loss.backward()
    assert len(recomputed) == 4
    assert torch.equal(*losses)
    for (name, mine), theirs in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert torch.equal(mine.grad, theirs.grad), name
    assert same_stats(pending(plain), pending(checkpointed))
    assert pending(plain)[0]["num_forwards"] == 2


def test_checkpointing_with_padding_and_running_balance():
    """The context (mask, ids, earlier counts) must be there when a layer is run again."""
    x, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    grads = []
    for enable in (False, True):
        losses = etr.LossConfig(aux_alpha=1.0, aux_mode="running")
        model = make_model(etr.EtrRouter(frame="learned"), losses=losses)
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            model(x, attention_mask=mask, labels=x).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_reentrant_checkpointing_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.gradient_checkpointing_disable()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_attach_calibrates_thresholds():
    model = make_model(capacity=capacity.Factor(capacity_factor=0.6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer, 4)
    train_steps(model, optimizer, 0, 3)
    for layer in moe_layers(model):
        assert layer.calibration.is_calibrated
        assert int(layer.state.step) == 3
        assert torch.isfinite(layer.calibration.threshold).any()
    assert pending(model) == [{}, {}]


def test_training_lowers_the_loss():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach(model, optimizer, 12)
    x, losses = tokens(4, 16), []
    for _ in range(12):
        out = model(x, labels=x)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.lm_loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_accumulation_counts_every_micro_batch():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(model, optimizer, 2)
    for seed in (1, 2):
        x = tokens(2, 12, seed)
        (model(x, labels=x).loss / 2).backward()
    optimizer.step()
    for stats, layer in zip(handle.last_stats, moe_layers(model), strict=True):
        assert (int(stats["num_forwards"]), int(stats["num_valid_tokens"])) == (2, 48)
        assert int(layer.state.step) == 1


def test_checkpointing_options_without_use_reentrant_do_not_mean_true():
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": False})
    layer = model.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords == {
        "preserve_rng_state": False,
        "use_reentrant": False,
    }


@pytest.mark.parametrize(
    ("router", "policy"),
    [
        ("etr", None),
        ("etr", capacity.Threshold()),
        ("etr", capacity.AffinityMass(mode="common")),
        ("locmoe", None),
        ("baseline", None),
        ("random", None),
    ],
)
def test_resumed_training_equals_unbroken(router, policy, tmp_path):
    def start(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer

    model, optimizer = start(make_model(router, capacity=policy))
    attach(model, optimizer, 6)
    unbroken = train_steps(model, optimizer, 0, 6)

    first, optimizer = start(make_model(router, capacity=policy))
    attach(first, optimizer, 6)
    losses = train_steps(first, optimizer, 0, 3)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    second, optimizer = start(load_pretrained(tmp_path).train())
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    attach(second, optimizer, 6)
    losses += train_steps(second, optimizer, 3, 6)

    assert losses == unbroken
    found, expected = second.state_dict(), model.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


def test_dropped_tokens_differ_between_training_and_evaluation_only_by_rule():
    """A threshold model keeps in eval about the share that it kept in training."""
    model = make_model(capacity=capacity.Factor(capacity_factor=0.6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, 8)
    train_steps(model, optimizer, 0, 8)
    quiet_eval(model)
    with torch.no_grad():
        stats = model(tokens(32, 16, seed=500)).routing_stats
    for layer in stats:
        share = layer["num_tokens_per_expert"].sum() / layer["num_choices_per_expert"].sum()
        assert 0.45 < share < 0.75


def test_lora_adapters():
    peft = pytest.importorskip("peft")
    model = make_model(etr.EtrRouter(frame="learned"))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, lora)
    x = tokens()
    adapted(input_ids=x, labels=x).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    assert quiet_eval(adapted).generate(input_ids=x, max_new_tokens=2).shape[0] == 2


def test_half_precision_training_step():
    torch.manual_seed(0)
    model = EtrForCausalLM(etr_config()).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach(model, optimizer, 2)
    losses = train_steps(model, optimizer, 0, 2)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(layer.calibration.threshold.dtype == torch.float32 for layer in moe_layers(model))


def test_autocast_training_step():
    config = EtrConfig.from_base(base_config())
    model = EtrForCausalLM(config).train()
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
