"""transformers' plans for several ranks: attention is divided, experts stay whole."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import base_config, family_model, make_model, quiet_eval, tokens

from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))
from gloo_ranks import spawn

pytestmark = [
    pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless"),
    pytest.mark.filterwarnings("ignore:Passing `tp_plan` directly"),
]


def rules(model: Any) -> dict[str, Any]:
    """Rules of the tensor-parallel plan that name something in the model."""
    names = {
        re.sub(r"\.\d+(\.|$)", r".*\1", name)
        for name, _ in (*model.named_modules(), *model.named_parameters())
    }
    return {name: rule for name, rule in model._tp_plan.items() if name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_the_familys_without_its_experts(family: str) -> None:
    theirs, ours = family_model(family), make_model("keep", family)
    block = FAMILIES[family].block
    outside = {name: rule for name, rule in rules(theirs).items() if f".{block}" not in name}
    assert rules(ours) == outside
    assert not [name for name in ours._tp_plan if f".{block}" in name and name not in outside]
    assert not ours._ep_plan
    assert "lm_head" in outside


def test_dense_layers_are_divided() -> None:
    base = base_config("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    plan = EtrForCausalLM(EtrConfig.from_base(base, "keep"))._tp_plan
    inside = {name.removeprefix("model.layers.*.mlp.") for name in plan if ".mlp" in name}
    assert inside == {"gate_proj", "up_proj", "down_proj"}


def models() -> dict[str, EtrForCausalLM]:
    """In float64: the default router, and a dense layer with tied embeddings."""
    torch.manual_seed(0)
    tied = base_config(
        "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], tie_word_embeddings=True
    )
    return {
        "mixtral": make_model(),
        "qwen3_moe": EtrForCausalLM(EtrConfig.from_base(tied, "keep")).double(),
    }


def results(model: EtrForCausalLM) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step, and logits and tokens in evaluation."""
    x = tokens()
    loss = model.train()(input_ids=x, labels=x).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    quiet_eval(model)
    with torch.no_grad():
        found["logits"] = model(input_ids=x).logits
        found["tokens"] = model.generate(x, max_new_tokens=4, do_sample=False)
    return found


def on_a_rank(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """`results` of the saved models, divided over the ranks."""
    found = {}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(dist.get_rank())}  # as torchrun sets them
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    for name in ("mixtral", "qwen3_moe"):
        model = EtrForCausalLM.from_pretrained(Path(folder) / name, tp_plan="auto")
        assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16
        found[name] = results(model)
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    expected = {}
    for name, model in models().items():
        model.save_pretrained(tmp_path / name)
        expected[name] = results(model)
    for found in spawn(2, on_a_rank, tmp_path / "ranks", str(tmp_path)):
        for name, values in expected.items():
            assert set(found[name]) == set(values)
            for key, value in values.items():
                torch.testing.assert_close(found[name][key], value, rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"enable_expert_parallel": True, "ep_size": 2},
            "divide the experts with `MoE.distribute`",
        ),
        ({"pp_size": 2}, "pp_size=2 is not supported"),
    ],
)
def test_other_divisions_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    config = SimpleNamespace(**{"enable_expert_parallel": False, "pp_size": 1, **options})
    with pytest.raises(ValueError, match=message):
        EtrForCausalLM.from_pretrained(tmp_path, distributed_config=config)
