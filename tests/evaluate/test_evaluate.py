"""Held-out loss, calibration and score densities of a small model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MixtralConfig

import etr
from etr.data import IGNORED, Batch
from etr.evaluate import calibrate, evaluate, score_densities
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
DOMAINS = ("a", "b")


def make_model(router: str = "etr", **options: object) -> EtrForCausalLM:
    base = MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        initializer_range=0.3,
    )
    return EtrForCausalLM(EtrConfig.from_base(base, router=router, **options))


def make_batches(count: int = 3, rows: int = 8, length: int = 16) -> list[Batch]:
    batches = []
    for number in range(count):
        ids = torch.randint(0, 50, (rows, length + 1))
        labels = ids[:, 1:].clone()
        labels[-1, length // 2 :] = IGNORED  # padding
        batches.append(
            Batch(
                input_ids=ids[:, :-1],
                labels=labels,
                domain=torch.full((rows,), number % 2),
                position=torch.arange(length).expand(rows, length),
            )
        )
    return batches


def test_the_digest_is_of_the_tokens_and_of_no_batch_size():
    model, (batch,) = make_model(), make_batches(1)
    rows = [
        Batch(**{name: part[i : i + 1] for name, part in vars(batch).items()}) for i in range(8)
    ]
    whole, single = (evaluate(model, found, DOMAINS, "dropless") for found in ([batch], rows))
    assert whole.digest == single.digest != ""
    rows[3].input_ids[0, 5] += 1
    changed = evaluate(model, rows, DOMAINS, "dropless")
    assert [tokens for _, tokens in changed.rows] == [tokens for _, tokens in whole.rows]
    assert changed.digest != whole.digest


def test_loss_is_the_mean_over_real_tokens():
    model, batches = make_model(), make_batches()
    result = evaluate(model, batches, DOMAINS, "dropless")
    sums, counts = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    model.eval()
    etr.set_eval_selection(model, "dropless")
    for batch in batches:
        with torch.no_grad():
            output = model(input_ids=batch.input_ids, attention_mask=batch.valid_mask.long())
        logs = output.logits.log_softmax(-1)
        for row, column in batch.valid_mask.nonzero().tolist():
            name = DOMAINS[int(batch.domain[row])]
            sums[name] -= float(logs[row, column, batch.labels[row, column]])
            counts[name] += 1
    assert result.tokens_by_domain == counts
    for name in DOMAINS:
        assert result.loss_by_domain[name] == pytest.approx(sums[name] / counts[name], rel=1e-5)
    assert result.loss == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)
    assert result.kept_fraction == 1.0
    bits = result.bits_per_byte({"a": 2.0, "b": 1.0})
    assert bits["a"] == pytest.approx(result.loss_by_domain["a"] / math.log(2) / 2)


def test_mode_and_selection_are_restored():
    model = make_model()
    model.train()
    etr.set_eval_selection(model, "batch")
    evaluate(model, make_batches(1), DOMAINS, "dropless")
    assert model.training
    assert all(layer.eval_selection == "batch" for layer in moe_layers(model))


def test_uncalibrated_thresholds_evaluate_dropless_and_say_so():
    model, batches = make_model(), make_batches()
    with pytest.warns(UserWarning, match="evaluates dropless: its thresholds are not calibrated"):
        result = evaluate(model, batches, DOMAINS, "threshold")
    assert result.selection == "dropless"
    assert result.kept_fraction == 1.0


def test_no_held_out_text_is_an_error():
    with pytest.raises(ValueError, match="no held-out tokens"):
        evaluate(make_model(), [], DOMAINS)


@pytest.mark.parametrize(
    "router", [n for n, kind in etr.ROUTERS.items() if kind().traits.has_scores]
)
def test_calibration_keeps_the_policys_share_and_changes_no_weight(router):
    traits = etr.ROUTERS[router]().traits
    capacity = etr.capacity.Factor(capacity_factor=0.5)
    if "score" not in traits.rank_by:
        model = make_model(router, capacity=capacity)
        with pytest.raises(ValueError, match="no score to put a threshold on"):
            calibrate(model, make_batches())
        return
    model = make_model(router, capacity=capacity, rank_by="score").double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = make_batches(count=6, rows=32)
    kept = calibrate(model, batches)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert all(layer.pending == {} for layer in moe_layers(model))
    assert all(int(layer.state.step) == 0 for layer in moe_layers(model))
    result = evaluate(model, batches, DOMAINS, "threshold")
    assert result.selection == "threshold"
    policy = evaluate(model, batches, DOMAINS, "batch")
    assert result.kept_fraction == pytest.approx(policy.kept_fraction, abs=0.02)
    assert len(kept) == 2


def test_calibration_needs_a_batch():
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        calibrate(make_model(), [])


@pytest.mark.parametrize("router", etr.ROUTERS)
def test_score_densities(router):
    model = make_model(router)
    found = score_densities(model, make_batches(1))
    if not etr.ROUTERS[router]().traits.has_scores:
        assert found is None
        return
    assert found is not None
    widths = [b - a for a, b in zip(found["edges"], found["edges"][1:], strict=False)]
    for name in ("own", "others"):
        area = sum(w * d for w, d in zip(widths, found[name], strict=True))
        assert area == pytest.approx(1.0, abs=1e-3)
    middle = [(a + b) / 2 for a, b in zip(found["edges"], found["edges"][1:], strict=False)]
    mean = {
        name: sum(m * w * d for m, w, d in zip(middle, widths, found[name], strict=True))
        for name in ("own", "others")
    }
    assert mean["own"] > mean["others"]
