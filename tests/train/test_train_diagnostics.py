"""Rows of diagnostics and profiles, and what train rows say about each layer."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch

import etr
from etr.evaluate import evaluate
from etr.moe import moe_layers
from etr.moe.lower_bound import erfc_bound
from etr.parallel import Ranks
from etr.train import train
from etr.train.diagnose import diagnose, mixed_batches
from etr.train.loop import Trainer
from etr.train.metrics import layer_metrics, read_metrics, router_grad_norms
from etr.train.model import build_model
from etr.train.profile import split_time, union, without

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def rows_of(out: str, kind: str) -> list[dict]:
    return [r for r in read_metrics(Path(out) / "metrics.jsonl") if r["kind"] == kind]


@pytest.fixture
def make_config(make_config):
    """With all that watches a run, as it is unless somebody turns it off."""
    return functools.partial(make_config, diagnostics=True, profile_every=0)


@pytest.mark.parametrize("router", etr.ROUTERS)
def test_every_router_can_be_diagnosed(make_config, data, router):
    config = make_config(router)
    model = build_model(config.model, data.tokenizer, 32, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = mixed_batches(data.dataset, 32, 4, 512)
    row = diagnose(model, batches, data.dataset.domains)
    json.dumps(row, allow_nan=False)
    assert row == diagnose(model, batches, data.dataset.domains)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    tokens = sum(int(batch.valid_mask.sum()) for batch in batches)
    assert row["domains"] == list(data.dataset.domains)
    assert len(row["layers"]) == 2
    for layer, values in zip(moe_layers(model), row["layers"], strict=True):
        counts = torch.tensor(values["domain_expert"])
        assert counts.shape == (2, 4)
        most = 1 if layer.traits.fixed_k else 4  # top_k is 1
        some = layer.traits.fixed_load and not layer.traits.fixed_k  # experts leave tokens out
        assert (1 if some else tokens) <= int(counts.sum()) <= most * tokens
        assert 0 <= values["mutual_information_bits"] <= 1
        similarity = torch.tensor(values["expert_similarity"])
        torch.testing.assert_close(similarity, similarity.T)
        torch.testing.assert_close(similarity.diagonal(), torch.ones(4))
        assert values["calinski_harabasz_all"] > 0
        assert values["calinski_harabasz_trimmed"] is not None
        assert ("affinity_edges" in values) == layer.traits.has_scores
        if layer.traits.has_scores:
            width = torch.tensor(values["affinity_edges"]).diff()
            for name in ("own", "others"):
                density = torch.tensor(values[f"affinity_{name}"])
                assert float((density * width).sum()) == pytest.approx(1, abs=1e-3)
    correlation = torch.tensor(row["token_correlation"])
    assert correlation.shape == (48, 48)
    assert row["token_expert"] == sorted(row["token_expert"])


def test_tokens_are_a_mixture_of_all_domains(data):
    batches = mixed_batches(data.dataset, 32, 4, 512)
    domains = torch.cat([batch.domain for batch in batches])
    assert (domains == 0).sum() == (domains == 1).sum() == 8
    for batch in batches:
        assert set(batch.domain.tolist()) == {0, 1}
    (least,) = mixed_batches(data.dataset, 32, 4, 1)  # a row of each domain at least
    assert least.domain.tolist() == [0, 1]


def test_experts_keep_what_training_keeps(make_config, data):
    """At a tight capacity fewer tokens stay, and clusters of the kept ones stand out more."""
    batches = mixed_batches(data.dataset, 32, 4, 2048)
    found = {}
    for factor in (0.5, 4.0):
        routing = {"capacity": f"factor:capacity_factor={factor}"}
        model = build_model(make_config("etr", routing).model, data.tokenizer, 32, seed=0)
        found[factor] = diagnose(model, batches, data.dataset.domains)["layers"][0]
    assert found[0.5]["domain_expert"] == found[4.0]["domain_expert"]
    assert found[0.5]["calinski_harabasz_kept"] > 1.1 * found[4.0]["calinski_harabasz_kept"]
    assert found[0.5]["calinski_harabasz_trimmed"] > found[0.5]["calinski_harabasz_all"]
    assert found[4.0]["calinski_harabasz_trimmed"] == found[4.0]["calinski_harabasz_all"]


def test_an_expert_that_reads_the_domain_is_seen(make_config, data):
    model = build_model(make_config("baseline").model, data.tokenizer, 32, seed=0)
    batches = mixed_batches(data.dataset, 32, 4, 512)
    before = diagnose(model, batches, data.dataset.domains)["layers"][0]
    letters = torch.tensor([b for b in range(len(data.tokenizer)) if chr(max(b - 3, 0)).isalpha()])
    with torch.no_grad():  # letters point one way, everything else the other
        embedding = model.get_input_embeddings().weight
        embedding.normal_(std=0.01)
        embedding[:, 0] = -1.0
        embedding[letters, 0] = 1.0
        router = next(moe_layers(model)[0].router.parameters())
        router.zero_()
        router[0, 0], router[1, 0] = 5.0, -5.0
    after = diagnose(model, batches, data.dataset.domains)["layers"][0]
    assert after["mutual_information_bits"] > before["mutual_information_bits"] + 0.2


def test_rows_come_at_the_start_and_at_each_evaluation(make_config, data):
    config = make_config(profile_every=3)
    train(config, data=data)
    assert [row["step"] for row in rows_of(config.out, "diagnostics")] == [0, 4, 8]
    assert [row["step"] for row in rows_of(config.out, "profile")] == [3, 6, 8]
    with (Path(config.out) / "metrics.jsonl").open() as lines:
        for line in lines:
            json.loads(line, parse_constant=pytest.fail)  # no NaN, no Infinity


def test_extras_can_be_left_out(make_config, data):
    config = make_config(profile_every=None, diagnostics=False)
    train(config, data=data)
    assert not rows_of(config.out, "profile") + rows_of(config.out, "diagnostics")


def test_extras_change_nothing_of_the_training(make_config, data, tmp_path):
    plain = make_config(out=str(tmp_path / "plain"), profile_every=None, diagnostics=False)
    extra = make_config(out=str(tmp_path / "extra"), profile_every=1, eval_every=1)
    for config in (plain, extra):
        train(config, data=data)
    keys = ("loss", "grad_norm", "kept_fraction", "expert_flops", "tokens")
    one, other = (
        [[row[key] for key in keys] for row in rows_of(config.out, "train")]
        for config in (plain, extra)
    )
    assert one == other
    assert rows_of(plain.out, "eval")[-1]["val_loss"] == rows_of(extra.out, "eval")[-1]["val_loss"]


def test_a_resumed_run_repeats_no_row(make_config, data):
    config = make_config(profile_every=1)
    with Trainer(config, data) as trainer:
        for _ in range(6):  # two steps past the checkpoint, as if killed there
            trainer.advance()
    train(dataclasses.replace(config, resume=True), data=data)
    assert [row["step"] for row in rows_of(config.out, "diagnostics")] == [0, 4, 8]
    assert [row["step"] for row in rows_of(config.out, "profile")] == list(range(1, 9))
    assert [row["step"] for row in rows_of(config.out, "train")] == list(range(1, 9))


def test_profile_says_where_the_time_goes(make_config, data):
    config = make_config("baseline", gradient_checkpointing=True)
    with Trainer(config, data) as trainer:
        trainer.train_step()
        (row,) = trainer.profile()
        assert all(p.grad is None for p in trainer.model.parameters())
        assert all(layer.pending == {} for layer in moe_layers(trainer.model))
    assert row["communication_seconds"] == row["overlapped_seconds"] == 0.0
    assert row["computation_seconds"] > 0
    assert row["idle_seconds"] >= 0
    seconds = [operator["seconds"] for operator in row["operators"]]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 < len(seconds) <= 20
    assert all(operator["calls"] >= 1 for operator in row["operators"])
    assert any("mm" in operator["name"] for operator in row["operators"])


def test_split_of_intervals():
    found = split_time([(0, 2), (1, 3), (6, 7)], [(2, 5), (4, 6.5)], wall_seconds=10)
    assert found == {
        "computation_seconds": 4.0,
        "communication_seconds": 4.5,
        "overlapped_seconds": 1.5,
        "idle_seconds": 3.0,
    }
    assert set(split_time([], [], 2.0).values()) == {0, 2.0}
    assert union([(3, 4), (0, 1), (1, 2), (5, 5), (3.5, 3.6)]) == [(0, 2), (3, 4)]
    assert without([(0, 10)], [(-1, 1), (3, 4), (9, 12)]) == [(1, 3), (4, 9)]
    assert without([(0, 1), (2, 3)], [(0, 1)]) == [(2, 3)]
    assert without([(0, 1)], []) == [(0, 1)]


def test_train_rows_say_what_limits_a_layer(make_config, data):
    routing = {"capacity": "factor:capacity_factor=0.5"}
    config = make_config("etr_paper", routing, accumulation_steps=2)
    with Trainer(config, data) as trainer:
        for _ in range(3):
            (row,) = trainer.train_step()
        layers = moe_layers(trainer.model)
    tokens = config.data.batch_size * config.data.sequence_length
    assert row["memory_bytes"] > 10_000_000
    for layer, values in zip(layers, row["layers"], strict=True):
        assert values["capacity"] == tokens * 0.5 / 4
        expected = float(erfc_bound(32, 4, layer.calibration.affinity_p99))
        assert values["capacity_lower_bound"] == pytest.approx(expected)
        assert values["router_grad_norm"] is None  # the fixed frame has no parameters


@pytest.mark.parametrize(
    ("router", "capacity"), [("etr_paper", "none"), ("baseline", "factor:capacity_factor=1.1")]
)
def test_train_rows_without_capacity_or_cosine(make_config, data, router, capacity):
    with Trainer(make_config(router, {"capacity": capacity}), data) as trainer:
        (row,) = trainer.train_step()
    for values in row["layers"]:
        assert (values["capacity"] is None) == (capacity == "none")
        assert (values["capacity_lower_bound"] is None) == (router == "baseline")
        if router == "baseline":
            assert values["router_grad_norm"] > 0


def test_kept_mass_is_a_share_of_gates(make_config, data):
    layer = moe_layers(build_model(make_config().model, data.tokenizer, 32, seed=0))[0]
    stats = {
        "capacity_sum": torch.tensor(40),
        "num_valid_tokens": torch.tensor(100),
        "num_forwards": torch.tensor(2),
    }
    assert layer_metrics(layer, stats)["kept_affinity_mass"] is None
    stats |= {"gate_sum": torch.tensor(8.0), "kept_gate_sum": torch.tensor(6.0)}
    assert layer_metrics(layer, stats)["kept_affinity_mass"] == 0.75
    assert layer_metrics(layer, stats)["capacity"] == 40 / (2 * 4)


def test_router_gradients(make_config, data):
    model = build_model(make_config("baseline").model, data.tokenizer, 32, seed=0)
    assert router_grad_norms(model, Ranks(None)) == [0.0, 0.0]
    weights = [next(layer.router.parameters()) for layer in moe_layers(model)]
    weights[0].grad = torch.full_like(weights[0], 2.0)
    weights[1].requires_grad_(False)
    assert router_grad_norms(model, Ranks(None)) == [
        pytest.approx(2 * math.sqrt(weights[0].numel())),
        None,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diagnostics_tokens": 0}, "diagnostics_tokens=0"),
        ({"profile_every": -1}, "profile_every=-1"),
        ({"trackers": ("paper",)}, "'paper' must be one of tensorboard, wandb, trackio"),
        ({"trackers": ("wandb", "wandb")}, "names one twice"),
    ],
)
def test_bad_options_are_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_options_that_only_watch_can_change_on_resuming(make_config, data):
    config = make_config(steps=8)
    with Trainer(config, data) as trainer:
        for _ in range(4):
            trainer.advance()
    changed = dataclasses.replace(
        config, resume=True, diagnostics=False, profile_every=None, diagnostics_tokens=64
    )
    assert train(changed, data=data).steps == 8


def test_evaluation_after_diagnostics_selects_as_before(make_config, data):
    config = make_config("etr", {"capacity": "factor:capacity_factor=0.5"})
    with Trainer(config, data) as trainer:
        for _ in range(2):
            trainer.train_step()
        before = evaluate(
            trainer.model, trainer.task.held_out_batches(config), data.dataset.domains
        )
        trainer.diagnose()
        after = evaluate(trainer.model, trainer.task.held_out_batches(config), data.dataset.domains)
    assert before == after
    assert before.selection == "threshold"


def test_without_held_out_text_there_is_nothing_to_diagnose(make_config, data, monkeypatch):
    monkeypatch.setattr("etr.train.loop.mixed_batches", lambda *_: [])
    with Trainer(make_config(), data) as trainer:
        assert trainer.diagnose() == []
