"""Read-ME: neurons of domains, what is shared, and one choice for all layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_lm import made, plan_in, same_weights, save, small, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from etr.cli import main
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.hf import EtrForCausalLM, load_pretrained
from etr.hf.versions import CACHE
from etr.methods.expertflow import ExpertFlow
from etr.methods.read_me import ReadMe, fitted, levels_of, masks_of, targets
from etr.moe import MoE, MoEConfig, RoutingContext, moe_layers
from etr.moe.watch import watch
from etr.systems import CACHES, replay

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def dense(seed: int = 0) -> EtrForCausalLM:
    """One expert in each layer, float64."""
    return small(seed, num_local_experts=1, num_experts_per_tok=1)


def labelled(domains: int = 2) -> list[dict[str, Any]]:
    """Batches whose rows are of domains in turn, each of tokens of its own."""
    found: list[dict[str, Any]] = []
    for one in tokens():
        ids = one["input_ids"]
        task = (torch.arange(len(ids)) % domains)[:, None].expand_as(ids)
        ids = ids // domains + task * (128 // domains)
        found.append({"input_ids": ids, "routing_context": RoutingContext(task=task)})
    return found


def test_masks_by_hand() -> None:
    """Three of six neurons for each of three domains: 0 is shared, and none is lost."""
    mean = torch.tensor([[5.0, 4, 3, 2, 1, 0], [5, 0, 1, 4, 2, 3], [4, 1, 5, 0, 3, 2]])
    masks = masks_of(mean, 3)
    core = masks.all(0)
    assert core.nonzero().flatten().tolist() == [0]
    experts = [(mask & ~core).nonzero().flatten().tolist() for mask in masks]
    assert experts == [[1, 2], [3, 5], [2, 4]]
    assert masks.any(0).all()
    assert masks_of(torch.ones(1, 6), 2).tolist() == [[True, True] + [False] * 4]  # the first


def test_levels_and_targets_by_hand() -> None:
    """Of 5 strongest neurons the first is in all five sets, the fifth in one."""
    size = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]])
    levels = levels_of(size, 5)
    assert levels.tolist() == [[5, 4, 3, 2, 1, 0, 0]]
    masks = torch.tensor([[True] * 2 + [False] * 5, [False] * 2 + [True] * 5])
    # shares 9 / 15 and 6 / 15, centred .1 and -.1, times 10: 1 and -1
    soft = torch.tensor([1.0, -1.0]).double().softmax(0)
    want = 0.75 * torch.tensor([0.75, 0.25]) + 0.25 * soft
    torch.testing.assert_close(targets(levels, masks), want[None])


def planted() -> tuple[Tensor, Tensor, Any]:
    """Tokens of 4 domains, their neurons' activations, and the outputs of some neurons."""
    generator = torch.Generator().manual_seed(0)
    size, width = 16, 96
    up = torch.randn(width, size, generator=generator) * size**-0.5
    down = torch.randn(size, width, generator=generator) * width**-0.5
    centre = torch.randn(4, 1, size, generator=generator) * 2
    bias = torch.full((width,), -1.0)
    up[:24] *= 0.5
    bias[:24] = 1.0
    x = centre + torch.randn(4, 400, size, generator=generator)
    active = (x @ up.T + bias).relu()
    return x, active, lambda domain, mask: (active[domain] * mask.float()) @ down.T


def bursts(seed: int) -> Tensor:
    """Routes of 400 tokens to 8 experts, 1 to 5 of one after the other."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < 400:
        route, times = (
            int(torch.randint(*of, (1,), generator=generator)) for of in ((0, 8), (1, 6))
        )
        found += [route] * times
    return torch.tensor(found)[None, :, None]


@pytest.mark.criterion
def test_domains_keep_their_neurons(tmp_path: Path) -> None:
    """Of a feed-forward of 4 planted domains half of the neurons, those of a domain, are off by at
    most 0.5 of what another's are; all layers choose alike; a memory that is told the routes has
    Belady's hits, which are no fewer than LRU's; keep = 1 changes no bit."""
    _, active, run = planted()
    masks = masks_of(active.mean(1), 48)
    whole = [run(domain, torch.ones(96)) for domain in range(4)]
    error = torch.tensor(
        [[float((run(d, m) - whole[d]).norm() / whole[d].norm()) for m in masks] for d in range(4)]
    )
    own, other = float(error.trace()) / 4, float(error.sum() - error.trace()) / 12
    print(f"own {own:.3f}, another's {other:.3f}, shared {int(masks.all(0).sum())}")
    assert own <= 0.5 * other
    rates = []
    for seed in range(5):
        routes = bursts(seed)
        lru, best = (replay(routes, CACHES[n](), 4, num_experts=8).hits for n in ("lru", "oracle"))
        told = replay(routes, ExpertFlow(), 4, num_experts=8, expected=routes)
        assert told.hits == best >= lru
        rates.append((lru / 400, best / 400))
    print("LRU, told:", torch.tensor(rates).mean(0).tolist())
    source = save(dense(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", ReadMe(), batches=labelled())
    first, second = chosen(model, labelled()[0])
    assert torch.equal(first, second)
    assert set(first.tolist()) == {0, 1}
    assert "2 domains share" in report.plan
    same, report = made(source, tmp_path / "c", ReadMe(keep=1.0), batches=labelled(), compare=True)
    assert report.same_function
    assert same_weights(same, dense())


def chosen(model: EtrForCausalLM, given: dict[str, Any]) -> list[Tensor]:
    """Choices of each layer."""
    found: list[Tensor] = []
    with torch.no_grad(), watch(model, lambda place, view: found.append(view.routing.expert)):
        model(input_ids=given["input_ids"])
    return found


def test_a_token_gets_the_neurons_of_its_choice(tmp_path: Path) -> None:
    """The layer computes what the dense one does with all other neurons at 0, to rounding; and so
    does a model that is loaded again, with a cache of earlier tokens too."""
    source, text = save(dense(), tmp_path / "a"), labelled()
    model, _ = made(source, tmp_path / "b", ReadMe(), batches=text)
    plan = plan_in(tmp_path / "b")
    seen: list[Any] = []
    with torch.no_grad(), watch(model, lambda place, view: seen.append(view), ["outputs"]):
        whole = model(input_ids=text[0]["input_ids"]).logits
    for place, (view, layer) in enumerate(zip(seen, moe_layers(dense()), strict=True)):
        choice = view.routing.expert
        for domain, own in enumerate(plan["experts"][place]):
            gone = torch.ones(12, dtype=torch.bool)
            gone[plan["core"][place] + own] = False
            layer.experts.down_proj.data[0, :, gone] = 0.0
            with torch.no_grad():
                want = layer(view.x[choice == domain])
            torch.testing.assert_close(view.output[choice == domain], want)
            layer.experts.load_state_dict(moe_layers(dense())[place].experts.state_dict())
    again, ids = load_pretrained(tmp_path / "b").eval(), text[0]["input_ids"]
    with torch.no_grad():
        start = again(input_ids=ids[:, :20], use_cache=True)
        rest = again(input_ids=ids[:, 20:], **{CACHE: start[CACHE]}).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole)


def test_a_plan_says_what_the_text_showed(tmp_path: Path) -> None:
    """Mean absolute activations of each domain's tokens, over batches; padding counts nothing."""
    model, text = dense(), labelled()
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[0, 10:] = 0
    text[1]["attention_mask"] = mask
    source = save(model, tmp_path / "a")
    _, report = made(source, tmp_path / "b", ReadMe(keep=0.25), batches=text)
    plan = plan_in(tmp_path / "b")
    sums, counts = torch.zeros(2, 12).double(), torch.zeros(2)
    seen: list[Tensor] = []
    with torch.no_grad(), watch(model, lambda place, view: seen.append(view.x)):
        for one in text:
            model(**one)
    up = moe_layers(model)[0].experts.gate_up_proj[0].detach()
    for x, one in zip(seen[::2], text, strict=True):
        gate, linear = (x @ up.T).chunk(2, -1)
        size = (torch.nn.functional.silu(gate) * linear).abs()
        task = one["routing_context"].task.flatten()
        real = one.get("attention_mask", torch.ones(4, 24)).flatten().bool()
        for domain in range(2):
            mine = (task == domain) & real
            sums[domain] += size[mine].sum(0)
            counts[domain] += mine.sum()
    masks = masks_of(sums / counts[:, None], 3)
    for domain in range(2):
        held = sorted(plan["core"][0] + plan["experts"][0][domain])
        assert held == masks[domain].nonzero().flatten().tolist()
    assert report.plan.endswith(f"{plan['own_domain']:.1%} of the tokens go to their own")
    made(source, tmp_path / "c", ReadMe(keep=0.25), batches=text)
    assert plan_in(tmp_path / "c") == plan


def test_text_of_one_kind_is_one_domain(tmp_path: Path) -> None:
    """Its neurons are all shared, and experts have none: half a dense model."""
    source = save(dense(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", ReadMe(), batches=tokens())
    assert report.plan.startswith("1 domains share 6 + 6 neurons and have 0 + 0 each")
    for layer in moe_layers(model):
        assert layer.shared_experts.down_proj.shape == (1, 16, 6)
        assert sum(value.numel() for value in layer.experts.parameters()) == 0


def test_weights_are_one(tmp_path: Path) -> None:
    """Their gradient is 0, and not missing, and no layer after the first has weights of its own."""
    source = save(dense(), tmp_path / "a")
    model, _ = made(source, tmp_path / "b", ReadMe(), batches=labelled())
    seen: list[Any] = []
    with watch(model, lambda place, view: seen.append(view)):
        model.train()(input_ids=labelled()[0]["input_ids"]).logits.square().mean().backward()
    for view in seen:
        assert (view.selection.combine_weight == 1).all()
    router = moe_layers(model)[0].router.weight
    assert router.grad is not None
    assert router.grad.abs().sum() == 0
    assert not list(moe_layers(model)[1].router.parameters())


def test_a_router_is_fitted_to_what_is_wanted() -> None:
    """Separable tokens get the wanted probabilities within the pull of a small weight."""
    x = torch.eye(3).double().repeat(20, 1)
    target = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]]).double().repeat(20, 1)
    found = (x @ fitted(x, target).T).softmax(-1)
    torch.testing.assert_close(found, target, atol=2e-3, rtol=0)


def test_a_command_goes_by_the_domains_of_its_text(tmp_path: Path) -> None:
    """Each folder of the text is one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=BYTE_VOCAB_SIZE, **sizes, **heads)).save_pretrained(
        tmp_path / "dense"
    )
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    for name, words in (("sums", "1+2=3; "), ("words", "some more ")):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "all.txt").write_text(words * 400)
    options = {"calibrate": "text", "cache-dir": "cache"}
    given = [part for name, at in options.items() for part in (f"--{name}", str(tmp_path / at))]
    sizes_of = ["--sequence-length", "32", "--batch-size", "4", "--num-batches", "4"]
    arguments = ["transform", "read_me", str(tmp_path / "dense"), str(tmp_path / "new")]
    assert main([*arguments, *given, *sizes_of]) == 0
    assert plan_in(tmp_path / "new")["domains"] == [0, 1]
    layers = moe_layers(load_pretrained(tmp_path / "new"))
    assert [layer.config.num_experts for layer in layers] == [2, 2]


def test_experts_are_not_taken_apart(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    with pytest.raises(ValueError, match="has 4 experts; transform 'read_me' takes a dense"):
        made(source, tmp_path / "b", ReadMe(), batches=tokens())


PLAN: dict[str, Any] = {"core": [[0]], "experts": [[[1], [2]]], "router": [[0.0] * 8] * 2}


@pytest.mark.parametrize(
    ("changes", "layer", "words"),
    [
        ({}, {"num_experts": 2}, "layer 0 has 2 experts and 0 shared ones"),
        (
            {"router": [[0.0] * 8]},
            {},
            r"router has shape \(1, 8\); it must have a row of 8 for each",
        ),
        ({"experts": [[[0], [2]]]}, {}, "neurons of layer 0 must be different numbers below 4"),
        ({"experts": [[[1], [2, 3]]]}, {}, "experts of layer 0 must be of one width"),
    ],
)
def test_plans_are_checked(changes: dict, layer: dict, words: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 1, "router": "token_choice"}
    with pytest.raises(ValueError, match=words):
        ReadMe(keep=0.5).check({**PLAN, **changes}, [MoEConfig(**{**sizes, **layer})])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"keep": 0.0}, "keep=0.0 must be a share"), ({"protect": "0.0"}, "whole")],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReadMe(**options)


def test_a_layer_that_follows_needs_one_before() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 2}
    layer = MoE(MoEConfig(**sizes, router="ahead:distance=1"))
    with pytest.raises(ValueError, match=r"logits \(3, 2\) of the layer before, which are None"):
        layer(torch.randn(3, 8))
    with pytest.raises(ValueError, match="distance=-1 must be at least 0"):
        MoEConfig(**sizes, router="ahead:distance=-1")
