"""Router losses train, once, whatever a caller computes its loss from, and are scaled like it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import base_config, make_model, pending, quiet_eval, tokens
from torch import Tensor
from torch.nn import functional as F

import etr
from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM
from etr.moe import LossConfig, moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
LOSSES = LossConfig(aux_alpha=1.0, z_beta=0.1)
Way = Callable[[EtrForCausalLM, Tensor], Tensor]


def next_token_loss(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())


def own_sum(model: EtrForCausalLM, x: Tensor) -> Tensor:
    output = model(x)
    return next_token_loss(output.logits, x) + sum(output.router_losses.values())


def projected(model: EtrForCausalLM, hidden: Tensor) -> Tensor:
    """Logits as a trainer computes them past the model."""
    divisor = model.config.family.logits_divisor
    return model.lm_head(hidden) / (1 if divisor is None else getattr(model.config, divisor))


def last_rows(model: EtrForCausalLM, x: Tensor) -> Tensor:
    """All positions, asked for by `logits_to_keep`."""
    return next_token_loss(model(x, logits_to_keep=torch.arange(x.shape[1])).logits, x)


WAYS: dict[str, Way] = {
    "labels": lambda m, x: m(x, labels=x).loss,
    "logits": lambda m, x: next_token_loss(m(x).logits, x),
    "logits beside labels": lambda m, x: next_token_loss(m(x, labels=x).logits, x),
    "logits written into": lambda m, x: next_token_loss(m(x).logits.mul_(2).div_(2), x),
    "logits of a tuple": lambda m, x: next_token_loss(m(x, return_dict=False)[0], x),
    "logits_to_keep": last_rows,
    "added by the caller": own_sum,
    "hidden states": lambda m, x: next_token_loss(
        m.lm_head(m(x, output_hidden_states=True).hidden_states[-1]), x
    ),
    "base model": lambda m, x: next_token_loss(projected(m, m.model(x).last_hidden_state), x),
    "base model's tuple": lambda m, x: next_token_loss(
        m.lm_head(m.model(x, return_dict=False)[0]), x
    ),
    "several outputs": lambda m, x: several_outputs(m, x),
    "router logits unused": lambda m, x: next_token_loss(m(x, output_router_logits=True).logits, x),
}


def several_outputs(model: EtrForCausalLM, x: Tensor) -> Tensor:
    output = model(x, output_hidden_states=True)
    from_hidden = model.lm_head(output.hidden_states[-1])
    return (next_token_loss(output.logits, x) + next_token_loss(from_hidden, x)) / 2


def gradients(way: Way, *, checkpointing: bool = False, **options: Any) -> list[Tensor | None]:
    model = make_model(etr.EtrRouter(), **{"losses": LOSSES, **options})
    if checkpointing:
        model.gradient_checkpointing_enable()
    way(model, tokens()).backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None], atol: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_gradient_of_the_loss_with_labels(way: str, checkpointing: bool) -> None:
    expected = gradients(WAYS["labels"])
    assert_equal(gradients(WAYS[way], checkpointing=checkpointing), expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_carries_them(family: str) -> None:
    expected = gradients(WAYS["labels"], family=family)
    for way in ("logits", "base model"):
        assert_equal(gradients(WAYS[way], family=family), expected, atol=1e-6)


FIELDS: dict[str, Callable[[Any], Tensor]] = {
    "logits": lambda output: output.logits,
    "first hidden states": lambda output: output.hidden_states[0],
    "last hidden states": lambda output: output.hidden_states[-1],
    "attentions": lambda output: output.attentions[0],
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_carries_just_the_router_losses(field: str) -> None:
    """A loss of zero gradient leaves theirs alone, whichever field it comes back through."""
    asked = {"output_hidden_states": True, "output_attentions": True}

    def build() -> EtrForCausalLM:
        model = make_model(etr.EtrRouter(), losses=LOSSES)
        model.set_attn_implementation("eager")
        return model

    plain, model, x = build(), build(), tokens()
    sum(plain(x).router_losses.values()).backward()
    (0.0 * FIELDS[field](model(x, **asked)).sum()).backward()
    for mine, theirs in zip(moe_layers(model), moe_layers(plain), strict=True):
        assert theirs.router.weight.grad.abs().max() > 0
        torch.testing.assert_close(mine.router.weight.grad, theirs.router.weight.grad)


def test_a_loss_beside_outputs_loss_adds_its_own_gradient_alone() -> None:
    """Distillation: the router losses come with outputs.loss, at its weight, and no second time."""

    def distilled(model: EtrForCausalLM, x: Tensor) -> Tensor:
        output = model(x, labels=x)
        return 0.5 * output.loss + output.logits.square().mean()

    def apart(model: EtrForCausalLM, x: Tensor) -> Tensor:
        output = model(x, labels=x)
        routers = sum(output.router_losses.values())
        own = next_token_loss(output.logits, x) + routers
        return 0.5 * own + output.logits.square().mean()

    assert_equal(gradients(distilled), gradients(apart), atol=1e-6)


def test_a_caller_may_add_some_of_them() -> None:
    def aux_alone(model: EtrForCausalLM, x: Tensor) -> Tensor:
        output = model(x)
        return next_token_loss(output.logits, x) + output.router_losses["aux"]

    assert_equal(gradients(aux_alone), gradients(WAYS["labels"]), atol=1e-6)


def test_values_are_the_same_with_and_without() -> None:
    x = tokens()
    model = make_model(etr.EtrRouter(), losses=LOSSES)
    with torch.no_grad():
        expected = model(x, labels=x, output_hidden_states=True)
    found = model(x, labels=x, output_hidden_states=True)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert found.router_losses.keys() == expected.router_losses.keys() == {"aux", "z"}
    total = found.lm_loss + sum(found.router_losses.values())
    torch.testing.assert_close(found.loss, total, rtol=0, atol=1e-6)


def test_without_gradients_or_in_eval_mode_nothing_is_attached() -> None:
    x, model = tokens(), make_model(etr.EtrRouter(), losses=LOSSES)
    with torch.no_grad():
        assert model(x).logits.grad_fn is None
    quiet_eval(model)
    (0.0 * model(x).logits.sum()).backward()
    assert all(not layer.router.weight.grad.any() for layer in moe_layers(model))
    assert model(x).router_losses == {}


# A balance loss of the caller's own, as TRL adds it


def test_the_callers_balance_loss_takes_the_place_of_ours() -> None:
    """With the config's coefficient it has our weight; the z loss stays."""

    def by_caller(model: EtrForCausalLM, x: Tensor) -> Tensor:
        output = model(x, output_router_logits=True)
        coefficient = model.config.router_aux_loss_coef
        return next_token_loss(output.logits, x) + coefficient * output.aux_loss

    # Layers that agree: the family's loss is pooled over them.
    one = {"capacity": "none"}
    base = base_config(num_hidden_layers=1)
    grads = []
    for way in (WAYS["labels"], by_caller):
        torch.manual_seed(0)
        config = EtrConfig.from_base(base, etr.EtrRouter(), losses=LOSSES, **one)
        model = EtrForCausalLM(config).double().train()
        way(model, tokens()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_equal(grads[1], grads[0], atol=1e-6)


def test_router_logits_of_the_base_model_bring_the_callers_loss() -> None:
    """TRL computes the balance loss from the base model's router logits."""
    x = tokens()
    model = make_model(etr.EtrRouter(), losses=LossConfig(aux_alpha=1.0))
    output = model.model(x, output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(24, 4)] * 2
    (0.0 * output.last_hidden_state.sum() + 0.0 * output.router_logits[0].sum()).backward()
    assert all(not layer.router.weight.grad.any() for layer in moe_layers(model))


@pytest.mark.parametrize("training", [True, False])
def test_the_family_computes_the_same_balance_loss(training: bool) -> None:
    from tiny_models import family_model

    theirs = family_model("mixtral")
    config = EtrConfig.from_base(base_config(), "keep")
    model = quiet_eval(EtrForCausalLM(config)).train(training)
    for mine, layer in zip(moe_layers(model), theirs.model.layers, strict=True):
        mine.router.weight.data.copy_(layer.mlp.gate.weight)
        mine.experts.gate_up_proj.data.copy_(layer.mlp.experts.gate_up_proj)
        mine.experts.down_proj.data.copy_(layer.mlp.experts.down_proj)
    shared = {k: v for k, v in theirs.state_dict().items() if "mlp" not in k}
    model.load_state_dict({**model.state_dict(), **shared})
    x, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        options = {"attention_mask": attention_mask, "output_router_logits": True}
        mine, expected = model(x, **options), theirs(x, **options)
        torch.testing.assert_close(mine.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-6)


def test_a_router_without_logits_says_so() -> None:
    model = make_model("random")
    with pytest.raises(ValueError, match="router 'random' has no logits"):
        model(tokens(), output_router_logits=True)


# Their scale


def router_gradient(model: EtrForCausalLM) -> Tensor:
    return torch.stack([layer.router.weight.grad.clone() for layer in moe_layers(model)])


def scaled(way: Way, scale: float, **options: Any) -> Tensor:
    """Router gradients after a scaled backward pass, unscaled again."""
    model = make_model(etr.EtrRouter(), losses=LOSSES).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    etr.attach(model, optimizer, 8, scaler=scaler, **options)
    scaler.scale(way(model, tokens())).backward()
    scaler.unscale_(optimizer)
    return router_gradient(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_scaler_scales_them_too(way: str) -> None:
    torch.testing.assert_close(scaled(WAYS[way], 2.0**16), scaled(WAYS["labels"], 1.0))


def test_a_known_number() -> None:
    """The norm of a router's gradient, with whatever loss scale."""
    from transformers import MixtralConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        base = MixtralConfig(**sizes, **heads)
        model = EtrForCausalLM(EtrConfig.from_base(base, losses=LossConfig(aux_alpha=10.0))).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        etr.attach(model, optimizer, 8, scaler=scaler)
        hidden = model.model(ids).last_hidden_state
        scaler.scale(next_token_loss(model.lm_head(hidden), ids)).backward()
        scaler.unscale_(optimizer)
        norm = float(moe_layers(model)[0].router.weight.grad.norm())
        assert norm == pytest.approx(0.4775, abs=5e-5)


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_make_up_a_mean(way: str) -> None:
    expected = 0
    model = make_model(etr.EtrRouter(), losses=LOSSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    etr.attach(model, optimizer, 8, accumulation_steps=2)
    for seed in (1, 2):
        x = tokens(seed=seed)
        (WAYS[way](model, x) / 2).backward()
        one = make_model(etr.EtrRouter(), losses=LOSSES)
        etr.attach(one, torch.optim.SGD(one.parameters(), lr=0.0), 8)
        WAYS["labels"](one, x).backward()
        expected = expected + router_gradient(one) / 2
    torch.testing.assert_close(router_gradient(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["logits", "hidden states", "base model"])
def test_float16_needs_a_known_scaler(way: str) -> None:
    model = make_model(etr.EtrRouter(), losses=LOSSES).float()
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match=r"attach\(\.\.\., scaler=scaler\)"),
    ):
        WAYS[way](model, tokens())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    etr.attach(model, optimizer, 8, scaler=torch.amp.GradScaler("cpu", enabled=False))
    with torch.autocast("cpu", torch.float16):
        loss = WAYS[way](model, tokens())
    loss.backward()
    assert router_gradient(model).isfinite().all()


def test_float16_with_the_models_own_loss_needs_none() -> None:
    """It holds them. A backward pass past it does not."""
    model, x = make_model(etr.EtrRouter(), losses=LOSSES).float(), tokens()
    with torch.autocast("cpu", torch.float16):
        model(x, labels=x).loss.backward()
        logits = model(x, labels=x).logits
    with pytest.raises(ValueError, match=r"attach\(\.\.\., scaler=scaler\)"):
        logits.float().mean().backward()


def test_attach_lets_go_and_copies_take_nothing_along() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = etr.attach(model, optimizer, 8, scaler=torch.amp.GradScaler("cpu"))
    layer = moe_layers(model)[0]
    assert layer.loss_scale is handle.loss_scale
    assert copy.deepcopy(layer).loss_scale is None
    assert pickle.loads(pickle.dumps(layer)).loss_scale is None
    handle.detach()
    assert layer.loss_scale is None
    with pytest.raises(ValueError, match="accumulation_steps=0 must be at least 1"):
        etr.attach(model, optimizer, 8, accumulation_steps=0)


def test_counters_are_those_of_one_forward() -> None:
    for way in WAYS.values():
        model = make_model(etr.EtrRouter())
        way(model, tokens()).backward()
        assert [int(stats["num_forwards"]) for stats in pending(model)] == [1, 1]
