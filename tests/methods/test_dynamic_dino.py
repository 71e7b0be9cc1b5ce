"""Dynamic-DINO's start: exact copies in slices, of which a token takes one copy's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from toy_lm import made, same_weights, save, small, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from etr.hf import EtrForCausalLM
from etr.methods.dynamic_dino import DynamicDino
from etr.moe import MoEConfig, moe_layers, reference
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def dense() -> EtrForCausalLM:
    return small(num_local_experts=1, num_experts_per_tok=1).float()


@pytest.mark.criterion
def test_the_start_is_exact(tmp_path: Path) -> None:
    """A layer of 3 copies in 2 slices computes what the dense one does within 1e-6 in float32, and
    every token takes both slices of one copy; without the factor k = 2 on the weights the output is
    half of it."""
    source = save(dense(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", DynamicDino(copies=3), compare=True)
    assert report.same_function
    new, old, x = moe_layers(model)[0], moe_layers(dense())[0], torch.randn(50, 16)
    seen: list[LayerView] = []
    with torch.no_grad(), watch(new, lambda place, view: seen.append(view)):
        found, want = new(x), old(x)
        assert float((found - want).norm() / want.norm()) <= 1e-6
        chosen = seen[0].routing.expert.view(50, 2)
        assert torch.equal(chosen, chosen[:, :1] // 2 * 2 + torch.tensor([0, 1]))
        assert len(chosen.unique()) == 6
        torch.testing.assert_close(seen[0].selection.combine_weight, torch.ones(100))
        half = copy.deepcopy(new)
        half.reconfigure(routed_scale=1.0)
        torch.testing.assert_close(half(x), want / 2, rtol=1e-5, atol=1e-6)
    assert new.config.intermediate_size * 2 == old.config.intermediate_size
    assert report.num_bytes > report.source_bytes


def test_a_dense_folder_is_read_as_it_is(tmp_path: Path) -> None:
    """The loss at the start is the dense model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "a")
    model, report = made(tmp_path / "a", tmp_path / "b", DynamicDino(copies=2, slices=3))
    assert report.to == "etr"
    (given, _) = tokens()
    with torch.no_grad():
        want = llama(**given, labels=given["input_ids"]).loss
        found = model(**given, labels=given["input_ids"]).loss
    assert float(found) == pytest.approx(float(want), abs=1e-5)
    assert [layer.config.num_experts for layer in moe_layers(model)] == [6, 6]


@pytest.mark.parametrize(("copies", "slices"), [(1, 1), (1, 4), (5, 3)])
def test_one_copy_is_a_sum_of_slices(copies: int, slices: int, tmp_path: Path) -> None:
    source = save(dense(), tmp_path / "a")
    method = DynamicDino(copies=copies, slices=slices)
    model, report = made(source, tmp_path / "b", method, compare=True)
    assert report.same_function
    assert same_weights(model, dense()) == (copies == slices == 1)


def test_one_slice_is_weighed_by_its_gate() -> None:
    assert "below 1" in str(DynamicDino(slices=1).changes_function())
    assert DynamicDino(slices=1, copies=1).changes_function() is None
    assert "mix slices" in str(DynamicDino(noise=0.1).changes_function())


def test_by_hand() -> None:
    """Two copies in two slices, logits 1, 1, 0, 0: experts 0 and 1 of weights 1 and 1."""
    config = MoEConfig(hidden_size=2, intermediate_size=4, num_experts=1, router="token_choice")
    layer = moe_layers_of(DynamicDino(copies=2).options(config, None, 0))
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
        seen: list[LayerView] = []
        with watch(layer, lambda place, view: seen.append(view)):
            layer(torch.tensor([[1.0, 0]]))
    probs = seen[0].routing.probs
    torch.testing.assert_close(probs[0, [0, 2]], torch.tensor([0.3655, 0.1345]), atol=1e-4, rtol=0)
    assert seen[0].routing.expert.tolist() == [0, 1]
    assert seen[0].selection.combine_weight.tolist() == [1.0, 1.0]


def moe_layers_of(config: MoEConfig) -> torch.nn.Module:
    from etr.moe import MoE

    return MoE(config).eval()


def test_biases_are_shared_out() -> None:
    """Of an expert with biases each slice adds its part of the last one."""
    from etr.moe import MoE

    config = MoEConfig(
        hidden_size=4,
        intermediate_size=6,
        num_experts=1,
        router="token_choice",
        activation="gelu",
        expert_bias=True,
        capacity="none",
    )
    layer, method = MoE(config).double(), DynamicDino(copies=2, slices=3)
    with torch.no_grad():
        for value in layer.experts.parameters():
            value.normal_()
    other = MoE(method.options(config, None, 0)).double()
    values = {name: value.detach() for name, value in layer.experts.named_parameters()}
    other.experts.load_state_dict(method._sliced(values))
    x = torch.randn(4).double()
    whole = reference.expert_output(layer.bank, x, 0)
    parts = sum(reference.expert_output(other.bank, x, expert) for expert in (3, 4, 5))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 2}, "layer 0 has 2 experts; .* takes a dense model"),
        ({"router": "token_choice:gate=sigmoid"}, "may weigh its one expert below 1"),
        ({"intermediate_size": 7}, "slices=2 must divide intermediate_size=7 of layer 0"),
    ],
)
def test_what_it_does_not_take(options: dict, words: str) -> None:
    values = {"hidden_size": 4, "intermediate_size": 8, "num_experts": 1, "router": "token_choice"}
    with pytest.raises(ValueError, match=words):
        DynamicDino().check(None, [MoEConfig(**{**values, **options})])
