"""PEFT on every kind of parameter of a block: it works, or says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model, quiet_eval, tokens

import etr
from etr.hf import FAMILIES
from etr.moe import attach, moe_layers

peft = pytest.importorskip("peft", reason="needs the extra peft")
pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
PARAMETERS = [  # of a block: the family that has them, and whether LoRA can adapt them
    ("mixtral", "router.weight"),
    ("mixtral", "experts.gate_up_proj"),
    ("mixtral", "experts.down_proj"),
    ("qwen2_moe", "shared_experts.gate_up_proj"),
    ("qwen2_moe", "shared_experts.down_proj"),
    ("qwen2_moe", "shared_gate.weight"),
    ("gpt_oss", "experts.gate_up_proj_bias"),
    ("gpt_oss", "experts.down_proj_bias"),
]


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)


def logits(model, x):
    with torch.no_grad():
        return quiet_eval(model)(input_ids=x).logits


def adapt(family, config, router="keep"):
    """A model with a new adapter, which changes nothing yet, and its trained parameters' names."""
    model, x = make_model(router, family), tokens()
    start = logits(model, x)
    adapter = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapter, x), start)
    return adapter, start


def trains_and_merges(adapter, start):
    """Every trained parameter has an effect and gets a gradient, and merging keeps the function."""
    x = tokens()
    trained = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    assert trained
    for name, value in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
            before = logits(adapter, x)
            assert not torch.allclose(before, start), name
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    handle = attach(adapter, optimizer, 1)
    adapter.train()(input_ids=x, labels=x).loss.backward()
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    optimizer.step()
    handle.detach()
    assert all(int(layer.state.step) == 1 for layer in moe_layers(adapter))
    tuned = logits(adapter, x)
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), tuned, rtol=0, atol=1e-9)


def parameters_of_blocks():
    """Names within the block of every parameter of every family."""
    found = set()
    for family in FAMILIES:
        model = make_model("keep", family)
        prefix = f"model.layers.0.{FAMILIES[family].block}."
        found |= {n.removeprefix(prefix) for n, _ in model.named_parameters() if prefix in n}
    return found


def test_every_parameter_of_a_block_is_tried():
    """But the router's bias, a vector, which LoRA cannot adapt."""
    assert parameters_of_blocks() - {"router.bias"} == {name for _, name in PARAMETERS}
    model = make_model("keep", "gpt_oss")
    with pytest.raises(ValueError, match="only 2d and 3d are supported"):
        peft.get_peft_model(model, lora(target_modules=[], target_parameters=["router.bias"]))


@pytest.mark.parametrize(("family", "name"), PARAMETERS)
def test_lora_on_a_parameter(family, name):
    trains_and_merges(*adapt(family, lora(target_modules=[], target_parameters=[name])))


@pytest.mark.parametrize("router", [r for r in etr.ROUTERS if r not in ("hash", "random")])
def test_lora_on_every_router(router):
    """Where the router has a matrix; in batch selection, so that what experts pick counts too."""
    model = make_model(router)
    if "weight" not in dict(moe_layers(model)[0].router.named_parameters()):
        pytest.skip("the router has no weight")
    adapter = peft.get_peft_model(
        model, lora(target_modules=[], target_parameters=["router.weight"])
    )
    x = tokens()
    adapter.train()(input_ids=x, labels=x).loss.backward()
    grads = [p.grad for n, p in adapter.named_parameters() if "lora_B" in n]
    assert len(grads) == 2
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["shared_gate"]},
        {"target_modules": ["shared_gate", "q_proj"], "use_dora": True},
        {
            "target_modules": "all-linear",
            "target_parameters": [n for f, n in PARAMETERS if f != "gpt_oss"][:-1],
        },
    ],
    ids=["all-linear", "shared gate", "DoRA", "everything"],
)
def test_lora_on_modules(options):
    trains_and_merges(*adapt("qwen2_moe", lora(**options)))


def test_an_adapter_on_the_shared_gate_has_an_effect():
    """Its weight was read past the adapter."""
    adapter, start = adapt("qwen2_moe", lora(target_modules=["shared_gate"]))
    for name, value in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    assert not torch.allclose(logits(adapter, tokens()), start)


@pytest.mark.parametrize("name", ["router", "experts", "shared_experts", "shared_gate"])
def test_modules_that_are_trained_whole(name):
    config = lora(target_modules=["q_proj"], modules_to_save=[name])
    adapter, _ = adapt("qwen2_moe", config)
    x = tokens()
    adapter.train()(input_ids=x, labels=x).loss.backward()
    whole = [p for n, p in adapter.named_parameters() if "modules_to_save" in n]
    assert whole
    assert all(p.requires_grad and p.grad.any() for p in whole)


def test_ia3_on_attention_and_the_shared_gate():
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "shared_gate"],
        feedforward_modules=["shared_gate"],
    )
    trains_and_merges(*adapt("qwen2_moe", config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lora(), "specify `target_modules` or `target_parameters`"),
        (lambda: peft.IA3Config(task_type="CAUSAL_LM"), "specify `target_modules`"),
        (lambda: lora(target_modules=["experts"]), "Experts.* is not supported"),
        (lambda: lora(target_modules=["router"]), "LinearRouter.* is not supported"),
        (
            lambda: lora(target_modules=[], target_parameters=["experts.down_proj"], use_dora=True),
            "does not work with use_dora=True",
        ),
    ],
)
def test_what_peft_cannot_do_it_says(config, message):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(make_model("keep"), config())


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_virtual_tokens_train(family, kind):
    model, x, mask = make_model("keep", family), tokens(), torch.ones(2, 12, dtype=torch.long)
    start = logits(model, x)
    adapter = peft.get_peft_model(model, PROMPTS[kind]())
    adapter.train()(input_ids=x, attention_mask=mask, labels=x).loss.backward()
    grads = {n: p.grad for n, p in adapter.named_parameters() if p.requires_grad}
    assert any(grad is not None and grad.any() for grad in grads.values())
    with torch.no_grad():
        tuned = quiet_eval(adapter)(input_ids=x, attention_mask=mask).logits[:, -12:]
    assert not torch.allclose(tuned, start)
