"""From learned directions to fixed blocks: what trains, where it ends, what the end changes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_train_recover import config, mixtral

from etr.cli import main
from etr.data import Batch, DataConfig, OpenedData, TokenLoader, byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.hf.swap_router import swap_router
from etr.moe import moe_layers
from etr.moe.affinity import grap_affinity
from etr.moe.polar import polar_factor
from etr.train import TrainingDiverged
from etr.train.config import OptimizerConfig
from etr.train.into_fixed import (
    MOVING_SHARE,
    arrived,
    block_directions,
    fix_frame,
    number_experts,
    train_on,
)
from etr.train.recover import recover

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
# Without decay, weights change by their gradient alone.
FAST = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.0)


@pytest.fixture(scope="module")
def batches(data: OpenedData) -> list[Batch]:
    return list(islice(TokenLoader(data.dataset, sequence_length=32, batch_size=4), 10))


@pytest.fixture
def swapped(batches: list[Batch]) -> EtrForCausalLM:
    """Routers of ETR with the directions nearest to the old linear ones."""
    model = mixtral()
    swap_router(model, [{"input_ids": batches[0].input_ids}])
    return model


def directions(model: EtrForCausalLM) -> list[torch.Tensor]:
    return [polar_factor(layer.router.weight.detach()) for layer in moe_layers(model)]


def logits(model: EtrForCausalLM, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids).logits


def test_block_directions_are_those_of_the_fixed_frame() -> None:
    x = torch.randn(7, 12, dtype=torch.float64)
    rows = block_directions(3, 12)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(x @ rows.T / x.norm(dim=-1, keepdim=True), grap_affinity(x, 3))


def test_the_way_is_even_and_ends_before_the_steps_do() -> None:
    way = [arrived(step, 10) for step in range(1, 11)]
    moving = round(10 * MOVING_SHARE)
    assert way == pytest.approx([min(1.0, step / moving) for step in range(1, 11)])
    assert way[moving - 2] < 1 == way[moving - 1]
    assert arrived(1, 1) == 1


def test_experts_numbered_anew_compute_the_same_and_are_nearer(
    swapped: EtrForCausalLM, batches: list[Batch]
) -> None:
    swapped.double()
    before, old = logits(swapped, batches[0]), directions(swapped)
    experts = [layer.experts.down_proj.clone() for layer in moe_layers(swapped)]
    orders = number_experts(swapped)
    torch.testing.assert_close(logits(swapped, batches[0]), before, rtol=0, atol=1e-9)
    assert any(order.tolist() != [0, 1, 2, 3] for order in orders)
    blocks = block_directions(4, 32)
    for place, (layer, order) in enumerate(zip(moe_layers(swapped), orders, strict=True)):
        assert torch.equal(layer.experts.down_proj, experts[place][order])
        nearness = [
            sum(float(old[place][e] @ blocks[b]) for b, e in enumerate(numbers))
            for numbers in itertools.permutations(range(4))
        ]
        found = float((directions(swapped)[place] * blocks).sum())
        assert found == pytest.approx(max(nearness))
    assert [order.tolist() for order in number_experts(swapped)] == [[0, 1, 2, 3]] * 2


def test_everything_trains_and_directions_end_at_the_blocks(
    swapped: EtrForCausalLM, batches: list[Batch]
) -> None:
    before = {name: value.clone() for name, value in swapped.named_parameters()}
    seen: list[int] = []
    losses = train_on(
        swapped, batches, FAST, to_blocks=True, on_step=lambda step, loss: seen.append(step)
    )
    assert seen == list(range(1, 11))
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    for found in directions(swapped):
        torch.testing.assert_close(found, block_directions(4, 32).float())
    for name, value in swapped.named_parameters():
        assert not torch.equal(value, before[name]), name  # experts, temperatures and all
        assert value.requires_grad
        assert value.grad is None
    assert not swapped.training
    assert all(int(layer.state.step) == 10 for layer in moe_layers(swapped))
    assert all(layer.collector is None and not layer.pending for layer in moe_layers(swapped))


def test_without_a_way_directions_stay_and_the_rest_trains(
    swapped: EtrForCausalLM, batches: list[Batch]
) -> None:
    before, experts = directions(swapped), moe_layers(swapped)[0].experts
    weights = [value.clone() for value in experts.parameters()]
    train_on(swapped, batches[:3], FAST, to_blocks=False)
    for found, old in zip(directions(swapped), before, strict=True):
        assert torch.equal(found, old)
    for value, old in zip(experts.parameters(), weights, strict=True):
        assert not torch.equal(value, old)


@pytest.mark.parametrize("selection", ["dropless", "threshold", "batch"])
def test_the_change_of_frame_changes_no_logit(
    swapped: EtrForCausalLM, batches: list[Batch], selection: str
) -> None:
    swapped.double()
    train_on(swapped, batches, FAST, to_blocks=True)
    for layer in moe_layers(swapped):
        layer.eval_selection = selection  # type: ignore[assignment]
    before = logits(swapped, batches[0])
    temperatures = [layer.router.log_temperature.clone() for layer in moe_layers(swapped)]
    fix_frame(swapped)
    torch.testing.assert_close(logits(swapped, batches[0]), before, rtol=0, atol=1e-9)
    assert not swapped.training
    for layer, old in zip(moe_layers(swapped), temperatures, strict=True):
        assert layer.router.weight is None
        assert layer.router.config.frame == layer.config.router_config.frame == "fixed"
        assert torch.equal(layer.router.log_temperature, old)
        assert layer.router.log_temperature.requires_grad


def test_a_fixed_temperature_and_an_offset_stay(batches: list[Batch]) -> None:
    base = mixtral("etr").config.base_config
    router = dataclasses.replace(
        moe_layers(mixtral("etr"))[0].router.config,
        temperature=3.0,
        learn_temperature=False,
        gate="sigmoid",
    )
    model = EtrForCausalLM(EtrConfig.from_base(base, router)).double().eval()
    for layer in moe_layers(model):
        layer.router.weight.data = block_directions(4, 32)
        layer.router.offset.data.fill_(0.5)
    before = logits(model, batches[0])
    fix_frame(model)
    torch.testing.assert_close(logits(model, batches[0]), before, rtol=0, atol=1e-9)
    assert {layer.router.temperature for layer in moe_layers(model)} == {3.0}


def test_the_change_of_frame_shows_where_directions_are_not_the_blocks(
    swapped: EtrForCausalLM, batches: list[Batch]
) -> None:
    """Or the tests above would say nothing."""
    before = logits(swapped, batches[0])
    fix_frame(swapped)
    assert (logits(swapped, batches[0]) - before).abs().max() > 1e-3


def test_saved_and_loaded_it_computes_the_same(
    swapped: EtrForCausalLM, batches: list[Batch], tmp_path: Path
) -> None:
    train_on(swapped, batches[:5], FAST, to_blocks=True)
    fix_frame(swapped)
    swapped.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).eval()
    assert again.config.moe == swapped.config.moe
    assert again.config.moe["router"]["frame"] == "fixed"
    assert all(layer.router.weight is None for layer in moe_layers(again))
    assert torch.equal(logits(again, batches[0]), logits(swapped, batches[0]))


def test_recovery_measures_it_beside_a_copy_that_trains_as_it_is(
    data: OpenedData, data_config: DataConfig
) -> None:
    plain, model = mixtral(), mixtral()
    without = recover(plain, data, config(data_config, steps=2, into_fixed=0))
    settings = config(data_config, steps=2, into_fixed=3)
    shown: list[tuple[int, str]] = []
    found = recover(model, data, settings, on_step=lambda *step: shown.append(step))
    assert found.stages[:4] == without.stages
    assert found.distillation == without.distillation
    assert without.training == ()
    assert {layer.router.config.frame for layer in moe_layers(plain)} == {"orthonormal"}

    trained, fixed = found.stages[4:]
    assert (trained.name, fixed.name) == ("trained", "fixed")
    assert trained.losses != fixed.losses
    assert 0 < trained.changed_tokens < fixed.changed_tokens
    assert [step for step, _ in shown] == list(range(1, settings.total_steps + 1))
    assert [words.split()[0] for _, words in shown] == (
        ["distillation"] * 2 + ["trained"] * 3 + ["fixed"] * 3
    )
    assert shown[5][1] == f"fixed {found.training[0]:.3f}"
    assert len(found.training) == 3
    for layer in moe_layers(model):
        assert layer.router.config.frame == "fixed"
        assert layer.has_thresholds()
        assert layer.eval_selection == "threshold"


def test_bad_input_is_refused(
    data: OpenedData, data_config: DataConfig, batches: list[Batch]
) -> None:
    with pytest.raises(ValueError, match="into_fixed=-1 must be >= 0"):
        config(data_config, into_fixed=-1)
    with pytest.raises(ValueError, match="into_fixed_learning_rate=0 must be > 0"):
        config(data_config, into_fixed_learning_rate=0)
    with pytest.raises(ValueError, match="no orthonormal directions"):
        train_on(mixtral(), batches[:1], FAST, to_blocks=True)
    with pytest.raises(ValueError, match="no orthonormal directions"):
        fix_frame(mixtral())


def test_a_width_that_blocks_do_not_divide_is_refused_before_any_work(
    data: OpenedData, data_config: DataConfig
) -> None:
    model = mixtral(num_local_experts=5)
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_experts=5"):
        recover(model, data, config(data_config, into_fixed=2))
    assert moe_layers(model)[0].router.config.name == "token_choice"


def test_a_loss_that_is_no_number_stops_it(swapped: EtrForCausalLM, batches: list[Batch]) -> None:
    swapped.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="loss is nan at step 1"):
        train_on(swapped, batches, FAST, to_blocks=True)


def test_the_command_saves_a_model_of_the_fixed_frame(
    data_config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "kept", tmp_path / "fixed"
    mixtral().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    options = (
        f"--recover --out {out} --steps 2 --into-fixed 2 --data {data_config.data[0]} "
        f"--cache-dir {data_config.cache_dir} --sequence-length 32 --batch-size 4 "
        "--calibration-batches 2 --eval-tokens-per-domain 64"
    )
    assert main(["finetune", str(source), *options.split()]) == 0
    shown = capsys.readouterr().out
    assert "trained" in shown
    assert "fixed" in shown
    stages = json.loads((out / "recover.json").read_text())["stages"]
    assert [stage["name"] for stage in stages][-2:] == ["trained", "fixed"]
    layers = moe_layers(load_pretrained(out))
    assert all(layer.router.config.frame == "fixed" for layer in layers)
    assert all(layer.has_thresholds() for layer in layers)
