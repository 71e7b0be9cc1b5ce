"""Banks in models: saved and loaded, shared by layers, trained, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import base_config, etr_config, make_model, tokens, train_steps

import etr
from etr.hf import EtrConfig, EtrForCausalLM
from etr.hf.convert import convert
from etr.moe import BANKS, moe_layers
from etr.train.metrics import count_parameters, expert_flops

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

TEXTS = [
    *BANKS,
    "nulls:count=4,kind=constant",
    "nulls:count=4,kind=copy",
    "widths:widths=2x48+16+32",
    "shared:nulls",
    "widths:widths=2x48+0+16",
    "merged:of=0+1+0+1",
    "compressed:main=1",
    "nested:group=16,use=2",
    "low_rank:ranks=0+2x4+48",
    "low_rank_rows:rank=4,left=0.5,of=0+1+0+1",
    "packed:bits=2+4+8+9x16",
]
FAMILIES = ["mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_saved_model_computes_the_same_and_trains_on(
    text: str, family: str, tmp_path: Path
) -> None:
    # These families divide weights by their sum over the chosen, which some banks refuse.
    weighs = {"normalize": "none"} if BANKS.parse(text).of_gates else {}
    model = make_model("token_choice", family, experts=text, **weighs)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 2)
    model.save_pretrained(tmp_path)
    loaded, info = EtrForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = tokens()
    assert torch.equal(loaded.eval()(x).logits, model.eval()(x).logits)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    found = [
        train_steps(one.train(), torch.optim.SGD(one.parameters(), lr=0.1), 2, 4)
        for one in (model, loaded)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("tied", [False, True])
def test_layers_share_one_bank_which_is_saved_once(tied: bool, tmp_path: Path) -> None:
    base = base_config(num_hidden_layers=4, tie_word_embeddings=tied)
    torch.manual_seed(0)
    config = EtrConfig.from_base(base, "token_choice", experts=BANKS["shared"](layers=2))
    model = EtrForCausalLM(config)
    first, second, third, fourth = moe_layers(model)
    assert first.experts is second.experts
    assert third.experts is fourth.experts is not first.experts
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
    assert sorted(names) == [
        f"model.layers.{place}.mlp.experts.{name}"
        for place in (0, 2)
        for name in ("down_proj", "gate_up_proj")
    ]
    loaded = EtrForCausalLM.from_pretrained(tmp_path)
    layers = moe_layers(loaded)
    assert layers[0].experts.down_proj is layers[1].experts.down_proj
    assert layers[2].experts.down_proj is layers[3].experts.down_proj
    assert torch.equal(layers[3].experts.down_proj, fourth.experts.down_proj)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    x = tokens()
    assert torch.equal(loaded.eval()(x).logits, model.eval()(x).logits)


def gradient(model: EtrForCausalLM) -> torch.Tensor:
    x = tokens()
    model(x, labels=x).loss.backward()
    grad = moe_layers(model)[0].experts.down_proj.grad
    assert grad is not None
    return grad


def test_a_shared_banks_gradient_is_the_sum_of_its_layers() -> None:
    shared = make_model("token_choice", experts="shared")
    apart = make_model("token_choice")
    state = shared.state_dict()
    apart.load_state_dict({name: state[name] for name in apart.state_dict()})
    found, first = gradient(shared), gradient(apart)
    second = moe_layers(apart)[1].experts.down_proj.grad
    assert second is not None
    torch.testing.assert_close(found, first + second, rtol=1e-10, atol=1e-12)


def sizes(**options: Any) -> tuple[int, int]:
    return count_parameters(EtrForCausalLM(etr_config("token_choice", **options)))


def test_parameters_that_a_token_uses() -> None:
    """H=32, I=48, 2 layers, E=4, k=2: an expert has 3 * 32 * 48 weights."""
    one = 3 * 32 * 48
    total, active = sizes()
    assert total - active == 2 * 2 * one
    router = 32  # of each further choice
    assert sizes(experts="nulls:count=3") == (total + 6 * router, active + 6 * router)
    constants = 2 * 3 * 32
    with_constants = (total + 6 * router + constants, active + 6 * router + constants)
    assert sizes(experts="nulls:count=3,kind=constant") == with_constants
    few, used = sizes(experts="widths:widths=2x48+2x16")
    assert total - few == 2 * 2 * (one - one // 3)
    assert few - used == 2 * 2 * (one // 3)  # the widest may be chosen
    assert sizes(experts="shared") == (total - 4 * one, total - 4 * one)  # two layers use all four


def test_operations_of_the_experts() -> None:
    """Forward and backward are three forwards; nulls cost nothing, and widths what they are."""
    counts = [{"num_tokens_per_expert": torch.tensor(n)} for n in ([3, 1, 0, 2], [1, 1, 1, 1])]
    one = 3 * 32 * 48
    model = EtrForCausalLM(etr_config("token_choice"))
    assert expert_flops(model, counts) == 6 * one * 10
    wide = EtrForCausalLM(etr_config("token_choice", experts="widths:widths=2x48+2x16"))
    assert expert_flops(wide, counts) == 6 * one * (6 + 4 / 3)
    more = [
        {"num_tokens_per_expert": torch.cat((c["num_tokens_per_expert"], torch.tensor([9])))}
        for c in counts
    ]
    nulls = EtrForCausalLM(etr_config("token_choice", experts="nulls"))
    assert expert_flops(nulls, more) == 6 * one * 10


@pytest.mark.parametrize("text", ["nulls", "widths:widths=2x48+16+32"])
def test_a_family_cannot_hold_another_bank(text: str, tmp_path: Path) -> None:
    model = EtrForCausalLM(etr_config("keep", experts=text))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"cannot hold this model: .*experts"):
        convert(tmp_path / "a", tmp_path / "b")


def test_what_earlier_versions_saved_has_the_uniform_bank(tmp_path: Path) -> None:
    config = etr_config("token_choice")
    del config.moe["experts"]
    again = EtrConfig(base_config=config.base_config, moe=config.moe)
    assert again.moe["experts"] == {"name": "uniform"}
    assert isinstance(moe_layers(EtrForCausalLM(again))[0].experts, etr.moe.experts.ExpertWeights)


@pytest.mark.parametrize("experts", ["uniform", "shared"])
def test_inner_steps_hold_the_same_experts_which_are_saved_once(
    experts: str, tmp_path: Path
) -> None:
    """Two decoder layers of two inner steps; shared experts and their gate are the same too."""
    model = make_model("token_choice", "qwen2_moe", experts=experts, inner_steps=2)
    layers = moe_layers(model)
    assert [layer.layer_index for layer in layers] == [0, 1, 2, 3]
    for name in ("experts", "shared_experts", "shared_gate"):
        first, second, third, fourth = (getattr(layer, name) for layer in layers)
        assert first is second is not None
        assert third is fourth
        assert (first is third) == (name == "experts" and experts == "shared")
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 2)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not any(".later.0." in name and "experts" in name for name in names)
    assert sum(".later.0.router." in name for name in names) == 2
    loaded = EtrForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert moe_layers(loaded)[1].experts is moe_layers(loaded)[0].experts
    x = tokens()
    assert torch.equal(loaded.eval()(x).logits, model.eval()(x).logits)
    with pytest.raises(ValueError, match=r"cannot hold this model: .*inner_steps"):
        convert(tmp_path, tmp_path / "b")


def test_shared_experts_run_for_every_token() -> None:
    """Three times two operations a weight of 3 * 32 * 40 and a token, beside the routed ones."""
    counts = {"num_tokens_per_expert": torch.tensor([3, 1, 0, 2])}
    counts["num_valid_tokens"] = torch.tensor(5)
    model = EtrForCausalLM(etr_config("token_choice", "qwen2_moe"))
    shared = 3 * 32 * model.config.moe_config.shared_width
    routed = 3 * 32 * model.config.moe_config.intermediate_size
    assert expert_flops(model, [counts, counts]) == 6 * 2 * (6 * routed + 5 * shared)
