"""HEAPr: scores by hand, exact pruning, widths down to 0, and what the loss says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_lm import (
    family,
    loss,
    made,
    plan_in,
    same_weights,
    save,
    small,
    text,
    tokens,
    trained,
)

from etr.hf.loading import load_causal
from etr.hf.measure import measure
from etr.hf.transform import transform
from etr.methods.heapr import Heapr
from etr.moe import MoE, MoEConfig, moe_layers
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

LAYER = MoEConfig(
    hidden_size=2, intermediate_size=2, num_experts=1, router="token_choice", capacity="none"
)


def test_by_hand() -> None:
    """w_0 = (1, 0), w_1 = (0, 2), G = diag(1, 1/4); activations (1, 2) and (3, 0)."""
    stats = {
        "squares": torch.tensor([[10.0, 4]]),
        "effects": torch.tensor([[2.0, 2]]),  # g = (1, 1/2) and (1, -1/2): (g w)^2 is 1
        "norms": torch.tensor([[10.0, 16]]),
        "tokens": torch.tensor([2]),
    }
    (scores,) = [Heapr()._scores(stats, torch.Generator())]
    assert scores.tolist() == [[2.5, 1.0]]
    assert Heapr(ratio=0.5).plan([stats], [LAYER])["keep"] == [[[0]]]
    assert Heapr(ratio=0.5, score="activation").plan([stats], [LAYER])["keep"] == [[[1]]]


def test_gradients_and_activations_are_those_of_the_loss() -> None:
    """Of a sum over tokens of the loss, by each expert's output."""
    model, (given, _) = small(), tokens()
    found = measure(model, Heapr(), [given])
    views: list[LayerView] = []
    outputs: list[torch.Tensor] = []

    def keep(module: MoE, x: object, y: torch.Tensor) -> None:
        y.retain_grad()
        outputs.append(y)

    for layer in moe_layers(model):
        layer.register_forward_hook(keep)
    with watch(model, lambda place, view: views.append(view)):
        logits = model(**given).logits[:, :-1].flatten(0, 1)
    target = given["input_ids"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    for view, out, stats, layer in zip(views, outputs, found, moe_layers(model), strict=True):
        grad = out.grad.flatten(0, 1)
        params = layer.experts.params(torch.float64)
        squares, effects = torch.zeros(2, 4, 12).double().unbind()
        for pair, expert in enumerate(view.routing.expert.tolist()):
            token = view.routing.token[pair]
            gate, up = (params.up[expert] @ view.x[token]).chunk(2)
            squares[expert] += (gate * gate.sigmoid() * up).detach() ** 2
            g = view.selection.combine_weight[pair] * grad[token]
            effects[expert] += (g @ params.down[expert]).detach() ** 2
        torch.testing.assert_close(stats["squares"], squares)
        torch.testing.assert_close(stats["effects"], effects)
        assert stats["tokens"].tolist() == view.routing.num_choices_per_expert().tolist()
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("store", ["widths", "padded"])
def test_pruned_neurons_are_gone_and_no_other(store: str, tmp_path: Path) -> None:
    """The function of the model in which they are zero; parameters are what widths say."""
    source = save(small(), tmp_path / "a")
    method = Heapr(ratio=0.6, store=store)
    model, report = made(source, tmp_path / "b", method, batches=tokens(), compare=True)
    keep = plan_in(tmp_path / "b")["keep"]
    silent = small()
    for layer, kept in zip(moe_layers(silent), keep, strict=True):
        for expert, numbers in enumerate(kept):
            gone = sorted(set(range(12)) - set(numbers))
            layer.experts.down_proj.data[expert, :, gone] = 0.0
    (given, _) = tokens(seed=5)
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, silent(**given).logits)
    widths = [len(numbers) for kept in keep for numbers in kept]
    assert sum(widths) == 8 * 12 - int(0.6 * 8 * 12)
    assert len(set(widths)) > 2
    experts = sum(v.numel() for each in moe_layers(model) for v in each.experts.parameters())
    stored = sum(widths) if store == "widths" else 8 * (8 if max(widths) <= 8 else 12)
    assert experts == 3 * 16 * stored
    saved = report.source_bytes - report.num_bytes
    assert saved == 8 * 3 * 16 * (8 * 12 - stored)  # float64
    assert report.plan.startswith(f"keeps {sum(widths)} of 96 neurons")


@pytest.mark.parametrize("store", ["widths", "padded"])
def test_pruning_nothing_changes_no_bit(store: str, tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    method = Heapr(ratio=0.0, store=store)
    model, report = made(source, tmp_path / "b", method, batches=tokens(), compare=True)
    assert report.same_function
    assert same_weights(model, small())


def test_experts_of_which_all_neurons_stay_are_bit_equal(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    plan = {"keep": [[list(range(12)), [0, 3], [], list(range(12))], [list(range(12))] * 4]}
    model, _ = made(source, tmp_path / "b", Heapr(), plan=plan)
    first, second = moe_layers(model)
    old = moe_layers(small())
    assert first.config.bank_config.widths == "12+2+0+12"
    for part, expert in ((0, 0), (3, 3)):
        part = first.experts.groups[part]
        assert torch.equal(part.gate_up_proj[0], old[0].experts.gate_up_proj[expert])
        assert torch.equal(part.down_proj[0], old[0].experts.down_proj[expert])
    assert torch.equal(second.experts.down_proj, old[1].experts.down_proj)


@pytest.mark.parametrize("store", ["widths", "padded"])
def test_all_neurons_may_go(store: str, tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    model, _ = made(source, tmp_path / "b", Heapr(ratio=1.0, store=store), batches=tokens())
    (given, _) = tokens()
    seen: list[LayerView] = []
    with watch(model, lambda place, view: seen.append(view), ["outputs"]), torch.no_grad():
        model(**given)
    assert all(not view.output.any() for view in seen)


def test_a_padded_family_serves_in_plain_transformers_and_widths_do_not(tmp_path: Path) -> None:
    source = family(tmp_path / "a")
    padded = transform(source, tmp_path / "b", Heapr(store="padded"), batches=tokens())
    plan = plan_in(tmp_path / "b")
    widths, report = made(source, tmp_path / "c", Heapr(), plan=plan)
    assert (padded.to, padded.why_ours, report.to) == ("hf", "", "etr")
    assert "experts" in report.why_ours
    theirs, (given, _) = load_causal(tmp_path / "b"), tokens(seed=3)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        found, want = theirs(**given).logits, widths(**given).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "clamped_swiglu"])
@pytest.mark.parametrize("store", ["widths", "padded"])
def test_every_activation_and_biases(activation: str, store: str) -> None:
    from etr.model import LazyTensor

    config = MoEConfig(
        hidden_size=8,
        intermediate_size=6,
        num_experts=3,
        top_k=3,
        router="token_choice",
        capacity="none",
        activation=activation,
        expert_bias=True,
        num_shared_experts=1,
    )
    layer, method = MoE(config).double(), Heapr(store=store)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.add_(torch.randn_like(value) * ("bias" in name))
    plan = {"keep": [[[0, 2], [5], []]]}
    method.check(plan, [config])
    tensors = {
        name: LazyTensor(name=name, shape=tuple(v.shape), dtype=v.dtype, make=v.clone)
        for name, v in layer.state_dict().items()
    }
    made = method.apply(tensors, plan, 0)
    other = MoE(method.options(config, plan, 0)).double()
    other.load_state_dict({name: tensor.make() for name, tensor in made.items()})
    for expert, gone in enumerate(([1, 3, 4, 5], [0, 1, 2, 3, 4], list(range(6)))):
        layer.experts.down_proj.data[expert, :, gone] = 0.0
    x = torch.randn(9, 8).double()
    torch.testing.assert_close(other(x).hidden_states, layer(x).hidden_states)


def test_protected_and_unseen_experts_stay() -> None:
    layer = MoEConfig(hidden_size=2, intermediate_size=2, num_experts=3, router="token_choice")
    stats = {
        "squares": torch.tensor([[3.0, 4], [0, 0], [9, 8]]),
        "effects": torch.ones(3, 2),
        "norms": torch.ones(3, 2),
        "tokens": torch.tensor([1, 0, 1]),
    }
    for options, keep in (
        ({}, [[1], [0, 1], []]),
        ({"unseen": "drop"}, [[0, 1], [], [0]]),
        ({"protect": "0.0", "unseen": "drop"}, [[0, 1], [], [0]]),
        ({"protect": "0.2"}, [[], [0, 1], [0, 1]]),
        ({"protect": "0.0+0.2"}, [[0, 1]] * 3),
    ):
        if not options:
            stats = {**stats, "squares": torch.tensor([[3.0, 9], [0, 0], [2, 1]])}
        else:
            stats = {**stats, "squares": torch.tensor([[3.0, 4], [0, 0], [9, 1]])}
        assert Heapr(ratio=0.5, **options).plan([stats], [layer])["keep"] == [keep], options


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"keep": [[[0]], [[0]]]}, "'keep' is of 2 layers, and the model has 1"),
        ({"keep": [[[0], [1]]]}, "must name the neurons of 1 experts"),
        ({"keep": [[[0, 2]]]}, "kept neurons of expert 0 of layer 0 must be different numbers"),
    ],
)
def test_plans_are_checked(plan: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Heapr().check(plan, [LAYER])


@pytest.mark.criterion
@pytest.mark.measured
def test_half_of_the_neurons_go(tmp_path: Path) -> None:
    """Of a small language model half of the neurons go, and the loss rises by less than by
    activation norms and at most 0.3 of what it does by chance; the parameters left are 3 H times
    the widths, and ratio 0 changes no bit."""
    source, before = save(trained(), tmp_path / "a"), loss(trained())
    rises = {}
    for score in ("heapr", "activation", "random"):
        method = Heapr(ratio=0.5, score=score)
        model, _ = made(source, tmp_path / score, method, batches=text(8))
        rises[score] = loss(model) - before
        keep = plan_in(tmp_path / score)["keep"]
        widths = sum(len(numbers) for layer in keep for numbers in layer)
        assert widths == 2 * 8 * 48 / 2
        experts = sum(v.numel() for each in moe_layers(model) for v in each.experts.parameters())
        assert experts == 3 * 48 * widths
    print({"loss": before, **rises})
    assert rises["heapr"] < rises["activation"]
    assert rises["heapr"] <= 0.3 * rises["random"]
    same, _ = made(source, tmp_path / "same", Heapr(ratio=0.0), batches=text(1))
    assert same_weights(same, trained())
