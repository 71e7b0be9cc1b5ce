"""The linear router replaced by an orthonormal one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model, tokens
from torch import Tensor

from etr.hf import FAMILIES, EtrForCausalLM, load_pretrained
from etr.hf.swap_router import fit_gate, set_temperatures, swap_router
from etr.moe import moe_layers
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def batches() -> list[dict[str, Tensor]]:
    x, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.int64)
    mask[0, :5] = 0
    return [{"input_ids": x, "attention_mask": mask}, {"input_ids": tokens(4, 12, seed=5)}]


NUM_TOKENS = 4 * 12 - 5 + 4 * 12


def keeper(family: str = "mixtral") -> EtrForCausalLM:
    """A model with the family's own router, in eval mode."""
    model = make_model("keep", family).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("router.bias", "selection.bias")):
            value.data.normal_(std=0.3)
    return model


@torch.no_grad()
def caught(model: EtrForCausalLM, place: int) -> tuple[Tensor, Tensor]:
    """Input and choices of one layer, for valid tokens."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(number: int, view: LayerView) -> None:
        if number == place:
            valid = view.routing.valid_mask
            found.append((view.x[valid], view.routing.routing_map()[valid]))

    with watch(model, see):
        for batch in batches():
            model(**batch)
    return torch.cat([x for x, _ in found]), torch.cat([chosen for _, chosen in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_counts_what_changes(family: str) -> None:
    model = keeper(family)
    before = copy.deepcopy(model)
    report = swap_router(model, batches())
    assert report.num_tokens == NUM_TOKENS
    for place, (found, new) in enumerate(zip(report.layers, moe_layers(model), strict=True)):
        x, old_choice = caught(before, place)
        directions = new.router.directions(torch.float64).detach()
        torch.testing.assert_close(
            directions @ directions.T, torch.eye(4).double(), atol=1e-6, rtol=0
        )
        best = (x @ directions.T).topk(2, dim=-1).indices
        choice = torch.zeros_like(old_choice).scatter(1, best, True)
        changed = (choice != old_choice).any(-1).double().mean()
        assert found.changed_tokens == pytest.approx(float(changed))
        pairs = (choice & ~old_choice).sum() / (2 * len(x))
        assert found.changed_pairs == pytest.approx(float(pairs))
    assert 0 < report.changed_tokens < 1


def test_experts_and_everything_but_the_router_stay(tmp_path: Path) -> None:
    model = keeper("qwen2_moe")
    before = dict(model.named_parameters())
    swap_router(model, batches(), capacity="factor:capacity_factor=0.6")
    after = dict(model.named_parameters())
    for name, value in before.items():
        if ".router." not in name:
            assert after[name] is value
    for layer in moe_layers(model):
        assert layer.config.router_config.name == "etr"
        assert layer.config.capacity_config.capacity_factor == 0.6
        assert layer.rank_by == "score"
        assert not layer.has_thresholds()
        assert not any(value.is_meta for value in layer.state_dict().values())
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert moe_layers(model)[0].router.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("kind", "offset"), [("softmax", 0.0), ("sigmoid", -1.25)])
def test_the_fit_finds_the_temperature_that_made_the_gates(kind: str, offset: float) -> None:
    affinity = torch.rand(200, 6, dtype=torch.float64).sub(0.5)
    logits = 7.5 * affinity + offset
    gates = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    assert fit_gate(affinity, gates, kind, 3.0) == pytest.approx((7.5, offset), rel=1e-4)


def test_an_orthonormal_router_changes_no_choice_and_little_else() -> None:
    model = keeper()
    with torch.no_grad():
        for layer in moe_layers(model):
            torch.nn.init.orthogonal_(layer.router.weight, gain=3.0)
    before = copy.deepcopy(model)
    report = swap_router(model, batches())
    x = tokens()
    with torch.no_grad():
        # Tokens leave the norm with nearly one length, so one temperature nearly does.
        torch.testing.assert_close(model(x).logits, before(x).logits, rtol=0, atol=1e-2)
    for layer in report.layers:
        assert layer.changed_tokens == layer.changed_pairs == 0
        assert layer.condition == pytest.approx(1)


def test_temperatures_can_be_set_later() -> None:
    model = keeper("deepseek_v3")
    report = swap_router(model, batches(), fit=False)
    scales = [layer.router.log_temperature.exp() for layer in moe_layers(model)]
    assert [float(scale) for scale in scales] == pytest.approx([32**0.5] * 2)
    set_temperatures(model, report)
    for layer, found in zip(moe_layers(model), report.layers, strict=True):
        assert float(layer.router.log_temperature.exp()) == pytest.approx(found.temperature)
        assert float(layer.router.offset) == pytest.approx(found.offset)
        assert found.offset != 0


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (lambda: make_model("etr"), batches, "router 'etr' cannot be swapped"),
        (keeper, list, "batches hold no token"),
    ],
)
def test_what_cannot_be_swapped_is_refused(model: Any, sample: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swap_router(model(), sample())
