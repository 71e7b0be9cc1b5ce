"""Recovering a router's choices after a swap: what is trained, what is measured, the example."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from etr.data import BYTE_VOCAB_SIZE, DataConfig, OpenedData
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import moe_layers
from etr.recipes import recover as recover_recipe
from etr.recipes.recover import STAGES, RecoverRecipe, page, run
from etr.train.recover import MEASURED_AT, RecoverConfig, recover

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def mixtral(router: str = "keep", num_local_experts: int = 4) -> EtrForCausalLM:
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=num_local_experts,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = EtrForCausalLM(EtrConfig.from_base(base, router))
    if router == "keep":  # far from orthonormal, so that a swap changes choices
        for layer in moe_layers(model):
            ones = torch.ones(num_local_experts, num_local_experts)
            mix = torch.eye(num_local_experts) + 0.8 * ones.tril(-1)
            layer.router.weight.data = mix @ layer.router.weight.data
    return model.eval()


def config(data: DataConfig, **changes: object) -> RecoverConfig:
    values = {"steps": 30, "calibration_batches": 4, "eval_tokens_per_domain": 256}
    return RecoverConfig(data=data, **{**values, **changes})  # type: ignore[arg-type]


def test_the_old_choices_come_back_and_experts_stay(
    data: OpenedData, data_config: DataConfig
) -> None:
    model = mixtral()
    old = {n: p.clone() for n, p in model.named_parameters() if ".router." not in n}
    steps: list[int] = []
    found = recover(model, data, config(data_config), on_step=lambda step, loss: steps.append(step))
    assert [stage.name for stage in found.stages] == list(STAGES)[:4]
    before, swapped, calibrated, recovered = found.stages
    assert before.changed_tokens == 0
    assert min(swapped.changed_tokens, calibrated.changed_tokens) > recovered.changed_tokens > 0
    assert steps == list(range(1, 31))
    assert sum(found.distillation[-5:]) < sum(found.distillation[:5])
    for stage in found.stages:
        assert set(stage.losses) == set(MEASURED_AT)
        assert (stage.losses["0.6"] is None) == (stage is swapped)
    assert calibrated.losses["none"] != swapped.losses["none"]
    assert before.losses["none"] != before.losses["0.6"]

    for name, value in model.named_parameters():
        assert ".router." in name or torch.equal(value, old[name]), name
        assert value.requires_grad
        assert value.grad is None
    assert not model.training
    for layer in moe_layers(model):
        assert layer.config.router_config.name == "etr"
        assert layer.has_thresholds()
        assert layer.eval_selection == "threshold"
        assert layer.capacity.config == layer.config.capacity_config
        assert not layer.pending
        assert not layer.watchers


def test_measuring_leaves_the_model_as_it_is(data: OpenedData, data_config: DataConfig) -> None:
    """The stages before the swap and after it do not depend on the number of steps."""
    runs = [recover(mixtral(), data, config(data_config, steps=n)) for n in (0, 2)]
    assert runs[0].stages[:3] == runs[1].stages[:3]
    assert runs[0].distillation == ()
    assert dataclasses.replace(runs[0].stages[3], name="calibrated") == runs[0].stages[2]


def test_bad_input_is_refused(data: OpenedData, data_config: DataConfig) -> None:
    with pytest.raises(ValueError, match="router 'etr' is not linear"):
        recover(mixtral("etr"), data, config(data_config))
    with pytest.raises(ValueError, match="steps=-1 must be >= 0"):
        config(data_config, steps=-1)


def test_the_worked_example(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = functools.partial(RecoverConfig, calibration_batches=2)
    monkeypatch.setattr(recover_recipe, "RecoverConfig", few)
    recipe = RecoverRecipe(
        out=str(tmp_path),
        data=data_config,
        train_steps=4,
        steps=3,
        into_fixed=2,
        hidden_size=32,
        eval_tokens_per_domain=128,
    )
    result = run(recipe)
    assert json.loads((tmp_path / "recover.json").read_text())["stages"] == list(result["stages"])
    assert [stage["name"] for stage in result["stages"]] == list(STAGES)
    text = page(result)
    for stage in result["stages"]:
        assert f"| {stage['name']} | {STAGES[stage['name']]} |" in text
    assert f"{result['stages'][0]['losses']['none']:.4f}" in text
    more = result["stages"][5]["losses"]["none"] - result["stages"][4]["losses"]["none"]
    assert f"at capacities none, 1.1, 0.6: {more:+.4f}, " in text
    # Folders that are there are not made again.
    again = run(dataclasses.replace(recipe, into_fixed=0))
    assert again["stages"] == result["stages"][:4]
    assert "fixed frame" not in page(again)
