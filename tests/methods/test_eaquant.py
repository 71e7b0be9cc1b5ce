"""EAQuant: the same function scaled, what rounding then costs, and the router's range."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_lm import family, made, plan_in, same_weights, save, small, tokens

from etr.hf.loading import load_causal
from etr.hf.measure import measure
from etr.hf.transform import transform
from etr.methods.eaquant import CLIPS, EaQuant, divergence, scale_of
from etr.moe import MoE, MoEConfig, moe_layers
from etr.moe.experts.packed import grid_of, on_grid
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
SCALED = EaQuant(bits=16, router_bits=16)


def test_by_hand() -> None:
    """alpha = 1/2, tokens up to 16 and 1, weights up to 1/4 and 1."""
    found = scale_of(torch.tensor([16.0, 1]), torch.tensor([0.25, 1]), 0.5)
    assert found.tolist() == [8.0, 1.0]
    dead = scale_of(torch.zeros(1), torch.zeros(1), 0.6)
    assert float(dead) == pytest.approx(1e-5**0.6 / 1e-5**0.4)
    router = torch.tensor([[0, 0.4, 1], [0, 0, 1]])  # of 1 bit the first row is the second
    kl = divergence(torch.tensor([[0.0, 1, 0]]), router, 1, 1.0, top_k=1)  # logits 0.4 and 0
    assert kl == pytest.approx(0.59869 * math.log(0.59869 / 0.5), abs=1e-5)


def rounded(value: Tensor, bits: int) -> Tensor:
    return on_grid(*grid_of(value, bits))


def output(
    x: Tensor, experts: tuple[Tensor, Tensor], router: Tensor, bits: int = 16
) -> tuple[Tensor, Tensor]:
    """Of top 2 of all experts, tokens and weights rounded, the router and its tokens to 8 bits."""

    def few(value: Tensor, width: int = bits) -> Tensor:
        flat = value.flatten(0, -2)
        return value if bits == 16 else rounded(flat, width).view_as(value)

    logits = few(x, 8) @ few(router, 8).T
    weight, chosen = logits.softmax(-1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    table = torch.zeros_like(logits).scatter(1, chosen, weight)
    gate, up = torch.einsum("td,efd->tef", few(x), few(experts[0])).chunk(2, -1)
    inside = few((gate * gate.sigmoid() * up).contiguous())
    y = torch.einsum("te,tef,edf->td", table, inside, few(experts[1]))
    return y, chosen


@pytest.mark.criterion
def test_scaling_makes_rounding_cheap(tmp_path: Path) -> None:
    """Scaling alone changes no choice and outputs by less than 1e-6; with 4 channels of tokens 25
    times as large as the others, tokens and weights of 4 bits are off by at most 0.75 of what they
    are without it; a router of 3 bits reaches the one of 101 shares of its range that has the
    lowest KL, less than all of it (1) where two weights stand out."""
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(512, 64)
        x[:, :4] *= 25
        up, down = torch.randn(8, 96, 64) / 8, torch.randn(8, 64, 48) * 48**-0.5
        router = torch.randn(8, 64) / 16
        router[:, :4] *= 0.1
        peaks = x.abs().amax(0)
        scale = torch.stack([scale_of(peaks, w.abs().amax(0), 0.6) for w in (router, *up)]).amax(0)
        want, chosen = output(x, (up, down), router)
        found, same = output(x / scale, (up * scale, down), router * scale)
        assert float((found - want).norm() / want.norm()) < 1e-6
        assert torch.equal(chosen, same)
        plain, _ = output(x, (up, down), router, 4)
        smooth, _ = output(x / scale, (up * scale, down), router * scale, 4)
        off = [float((y - want).norm() / want.norm()) for y in (plain, smooth)]
        stats = measured(x, (up, down), router, EaQuant(router_bits=3))
        assert torch.equal(stats["scale"], scale)
        best = float(stats["clip"])
        kl = [divergence(x / scale, router * scale, 3, clip, 2) for clip in CLIPS]
        assert kl[CLIPS.index(best)] == min(kl)
        agree = []
        for clip in (1.0, best):
            logits = (x / scale) @ on_grid(*grid_of(router * scale, 3, clip)).T
            same = logits.topk(2).indices.sort(-1).values == chosen.sort(-1).values
            agree.append(float(same.all(-1).float().mean()))
        print(seed, [round(value, 3) for value in (*off, kl[-1], min(kl), *agree)])
        assert off[1] <= 0.75 * off[0]
        assert agree[1] >= agree[0] - 0.02
        router[:, 4], router[:, 5] = 1.0, -1.0  # the others are near 1 / 16
        x[:, 4:6] *= 0.01
        clip = float(measured(x, (up, down), router, EaQuant(router_bits=3, smooth=False))["clip"])
        kl = [divergence(x, router, 3, share, 2) for share in CLIPS]
        assert clip < 1
        assert kl[CLIPS.index(clip)] == min(kl) < kl[-1]
    source = save(small(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", SCALED, batches=tokens(), compare=True)
    assert report.same_function
    assert not same_weights(model, small())
    (given, _) = tokens(seed=4)
    views: list[list[LayerView]] = [[], []]
    logits = []
    for one, seen in zip((small(), model), views, strict=True):
        with torch.no_grad(), watch(one, lambda place, view, to=seen: to.append(view)):
            logits.append(one(**given).logits)
    for old, new in zip(*views, strict=True):
        assert torch.equal(old.routing.expert, new.routing.expert)
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 1e-6


def measured(
    x: Tensor, experts: tuple[Tensor, Tensor], router: Tensor, method: EaQuant
) -> dict[str, Tensor]:
    """What the method finds out about a layer of 8 experts, H 64, I 48, on its tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_experts": 8, "top_k": 2}
    layer = MoE(MoEConfig(**sizes, router="token_choice", capacity="none"))
    with torch.no_grad():
        layer.router.weight.copy_(router)
        layer.experts.gate_up_proj.copy_(experts[0])
        layer.experts.down_proj.copy_(experts[1])
        views: list[LayerView] = []
        with watch(layer, lambda place, view: views.append(view)):
            layer(x)
        return method.inspect(layer, method.observe(views[0]))


def test_logits_stay_with_shared_experts_and_bf16(tmp_path: Path) -> None:
    """Also where a family has shared experts and their gate: all read the same norm."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=12,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "a")
    report = transform(tmp_path / "a", tmp_path / "b", SCALED, batches=tokens(), compare=True)
    assert (report.to, report.same_function) == ("hf", True)
    assert report.difference.largest < 1e-4 * report.difference.logit
    first, second = (load_causal(tmp_path / name) for name in "ab")
    norm = first.model.layers[0].post_attention_layernorm.weight
    assert not torch.equal(second.model.layers[0].post_attention_layernorm.weight, norm)


def test_sixteen_bits_unscaled_are_the_identity(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    off = EaQuant(smooth=False, bits=16, router_bits=16)
    model, report = made(source, tmp_path / "b", off, batches=tokens(), compare=True)
    assert report.same_function
    assert same_weights(model, small())


def test_packed_experts_compute_what_rounded_ones_do(tmp_path: Path) -> None:
    source = family(tmp_path / "a")
    report = transform(source, tmp_path / "b", EaQuant(store="plain"), batches=tokens())
    plan = plan_in(tmp_path / "b")
    model, stored = made(source, tmp_path / "c", EaQuant(), plan=plan)
    assert (report.to, stored.to) == ("hf", "etr")
    theirs, (given, _) = load_causal(tmp_path / "b"), tokens(seed=3)
    with torch.no_grad():
        found, want = theirs(**given).logits, model(**given).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    codes = sum(layer.experts.codes.numel() for layer in moe_layers(model))
    assert codes == 2 * 4 * 3 * 16 * 12 // 2  # half a byte a weight
    for layer in moe_layers(model):
        assert all(len(row.unique()) <= 256 for row in layer.router.weight)


def test_what_is_measured(tmp_path: Path) -> None:
    """Largest values over all tokens; an expert that kept none is unscaled inside."""
    model = small()
    with torch.no_grad():
        moe_layers(model)[0].router.weight[2] = 0.0
        moe_layers(model)[0].router.weight[2, 0] = -50.0
        moe_layers(model)[0].router.weight[2, 1] = 50.0
    found = measure(model, SCALED, tokens())
    views: list[LayerView] = []
    with torch.no_grad(), watch(model, lambda place, view: views.append(view)):
        for given in tokens():
            model(**given)
    both = torch.cat([view.x for view in views if view.layer is views[0].layer])
    torch.testing.assert_close(found[0]["input"], both.abs().amax(0))
    assert len(found[0]["sample"]) == len(both)
    few = EaQuant(bits=16, router_bits=16, min_tokens=10**6)
    assert (measure(model, few, tokens())[0]["scale_inside"] == 1).all()
    assert (found[0]["scale_inside"] != 1).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 2}, "alpha=2 must lie between 0 and 1"),
        ({"bits": 3}, "bits=3 must be one of 2, 4, 8, 16"),
        ({"router_bits": 9}, "router_bits=9 must be 2 to 8 bits, or 16"),
        ({"protect": "0.1"}, "channels are scaled, not experts"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EaQuant(**options)
    layer = MoEConfig(hidden_size=2, intermediate_size=1, num_experts=1, router="token_choice")
    plan = {"input": [[1.0, 0.0]], "inside": [[[1.0]]], "clip": [1.0]}
    with pytest.raises(ValueError, match="scales of layer 0 must be 2 positive"):
        EaQuant().check(plan, [layer])
