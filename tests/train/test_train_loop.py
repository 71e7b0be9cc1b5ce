"""The training loop: learning, resuming, stopping, diverging."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import etr
from etr.evaluate import evaluate
from etr.hf import EtrForCausalLM
from etr.moe import MoE, MoEConfig, moe_layers
from etr.parallel import Ranks, manifest
from etr.train import TrainingDiverged, train
from etr.train.checkpoint import list_checkpoints
from etr.train.loop import Trainer
from etr.train.metrics import nonfinite_in_words, read_metrics
from etr.train.model import find_device

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def losses_of(run: str) -> list[float]:
    return [r["loss"] for r in read_metrics(Path(run) / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize("router", etr.ROUTERS)
def test_every_router_learns(make_config, data, router):
    config = make_config(router, steps=30, eval_every=30, checkpoint_every=30)
    result = train(config, data=data)
    losses = losses_of(config.out)
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    evals = {row["selection"]: row for row in rows if row["kind"] == "eval"}
    assert evals["dropless"]["kept_fraction_eval"] == pytest.approx(1.0)
    assert set(evals["dropless"]["val_loss_by_domain"]) == set(data.dataset.domains)
    assert not result.stopped
    assert not result.model.training


def test_metrics_count_what_was_kept(make_config, data):
    config = make_config("etr", {"capacity": "factor:capacity_factor=0.5"})
    train(config, data=data)
    rows = [r for r in read_metrics(Path(config.out) / "metrics.jsonl") if r["kind"] == "train"]
    tokens = config.data.batch_size * config.data.sequence_length
    for row in rows:
        kept = sum(sum(layer["num_tokens_per_expert"]) for layer in row["layers"])
        chosen = sum(sum(layer["num_choices_per_expert"]) for layer in row["layers"])
        assert chosen == tokens * config.model.num_layers
        assert row["kept_fraction"] == pytest.approx(kept / chosen)
        assert row["drop_rate"] == pytest.approx(1 - kept / chosen)
        assert row["tokens_without_expert"] == pytest.approx(row["drop_rate"])  # top_k is 1
        assert row["capacity_factor"] == pytest.approx(0.5)
        assert max(max(layer["num_tokens_per_expert"]) for layer in row["layers"]) <= tokens / 8
    flops_per_token = 6 * 3 * 32 * 16
    kept = sum(sum(sum(x["num_tokens_per_expert"]) for x in row["layers"]) for row in rows)
    assert rows[-1]["expert_flops"] == pytest.approx(kept * flops_per_token)
    assert rows[-1]["tokens"] == tokens * len(rows)


@pytest.mark.parametrize("router", ["etr", "etr:frame=orthonormal", "baseline", "random"])
def test_resume_continues_bit_for_bit(make_config, data, tmp_path, router):
    whole = make_config(router, out=str(tmp_path / "whole"))
    train(whole, data=data)
    first = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    with Trainer(first, data) as trainer:
        for _ in range(6):  # two steps past the checkpoint, as if killed there
            trainer.advance()
    train(dataclasses.replace(first, resume=True), data=data)
    assert losses_of(first.out) == losses_of(whole.out)
    one, other = (list_checkpoints(Path(c.out))[-1] for c in (whole, first))
    a = EtrForCausalLM.from_pretrained(one).state_dict()
    b = EtrForCausalLM.from_pretrained(other).state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_interrupt_saves_and_the_run_goes_on(make_config, data):
    config = make_config(checkpoint_every=100)

    def interrupt(row):
        if row["step"] == 3 and row["kind"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    result = train(config, data=data, on_step=interrupt)
    assert result.stopped
    assert result.steps == 3
    assert [path.name for path in list_checkpoints(Path(config.out))] == ["step-00000003"]
    result = train(dataclasses.replace(config, resume=True), data=data)
    assert not result.stopped
    assert len(losses_of(config.out)) == config.steps


def test_accumulation_sums_counters_and_averages_gradients(make_config, data, tmp_path):
    """Two micro-batches of two rows learn like one of four where no capacity cuts."""
    routing = {"capacity": "none", "losses": etr.LossConfig(aux_alpha=0.0)}
    one = make_config("etr", routing, out=str(tmp_path / "one"))
    half = dataclasses.replace(one.data, batch_size=2)
    two = dataclasses.replace(one, data=half, accumulation_steps=2, out=str(tmp_path / "two"))
    train(one, data=data)
    train(two, data=data)
    rows = [read_metrics(Path(c.out) / "metrics.jsonl") for c in (one, two)]
    for a, b in zip(*rows, strict=True):
        if a["kind"] == "train":
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)
            assert sum(a["layers"][0]["num_choices_per_expert"]) == sum(
                b["layers"][0]["num_choices_per_expert"]
            )


def test_activation_checkpointing_changes_no_loss(make_config, data, tmp_path):
    plain = make_config(out=str(tmp_path / "plain"))
    saving = dataclasses.replace(plain, out=str(tmp_path / "saving"), gradient_checkpointing=True)
    train(plain, data=data)
    train(saving, data=data)
    assert losses_of(saving.out) == losses_of(plain.out)


def test_bf16_trains(make_config, data):
    config = make_config(precision="bf16", steps=20, checkpoint_every=20)
    result = train(config, data=data)
    losses = losses_of(config.out)
    assert losses[-1] < losses[0] - 1.0
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_divergence_names_step_layers_and_checkpoint(make_config, data):
    config = make_config()
    with Trainer(config, data) as trainer:
        for _ in range(4):
            trainer.advance()
        with torch.no_grad():
            next(iter(trainer.model.parameters())).fill_(float("nan"))
        with pytest.raises(TrainingDiverged) as error:
            trainer.advance()
    text = str(error.value)
    assert "nan at step 5" in text
    assert "step-00000004" in text
    assert "layer 1: weight norm" in text
    batch = config.data.batch_size * config.data.sequence_length
    assert f"NaN or infinite router scores: layer 0: {batch}, layer 1: {batch}; layer 0: " in text


def test_a_router_that_diverged_is_named(make_config, data):
    config = make_config("etr:frame=orthonormal")
    with Trainer(config, data) as trainer:
        trainer.advance()
        with torch.no_grad():
            moe_layers(trainer.model)[1].router.get_parameter("weight").fill_(float("inf"))
        with pytest.raises(TrainingDiverged, match=r"nan at step 2; .*; layer 1: weight norm inf"):
            trainer.advance()


def test_ranks_whose_tokens_are_not_finite_are_named() -> None:
    layers = [MoE(MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2), i) for i in (0, 1)]
    ranks = SimpleNamespace(size=3, gather=lambda counts: [[0, 0], [0, 5], counts])
    layers[0].pending["num_nonfinite_tokens"] = torch.tensor(7)
    said = "tokens with NaN or infinite router scores: "
    assert nonfinite_in_words(layers, ranks) == f"{said}layer 1 on rank 1: 5, layer 0 on rank 2: 7"
    assert nonfinite_in_words(layers[1:], Ranks(None)) == f"{said}none"


def test_last_checkpoints_are_kept(make_config, data):
    config = make_config(steps=8, checkpoint_every=2, keep_checkpoints=2)
    train(config, data=data)
    names = [path.name for path in list_checkpoints(Path(config.out))]
    assert names == ["step-00000006", "step-00000008"]
    assert not list((Path(config.out) / "checkpoints").glob(".tmp*"))


def test_bad_runs_are_refused(make_config, data, tmp_path):
    config = make_config()
    with pytest.raises(ValueError, match="has no checkpoint"):
        train(dataclasses.replace(config, resume=True), data=data)
    train(config, data=data)
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, data=data)
    other = dataclasses.replace(
        config, resume=True, optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0)
    )
    with pytest.raises(ValueError, match=r"another config: optimizer.learning_rate is 0.01 there"):
        train(other, data=data)
    newest = list_checkpoints(Path(config.out))[-1]
    (newest / "train_state.json").write_text('{"format": 99}')
    (newest / "manifest.json").write_text(json.dumps(manifest.describe_files(newest, Ranks(None))))
    with pytest.raises(ValueError, match="is of format 99; this version reads 2"):
        train(dataclasses.replace(config, resume=True), data=data)


def test_config_round_trip(make_config):
    config = make_config("etr:frame=learned", {"losses": etr.LossConfig(z_beta=0.1)})
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    with pytest.raises(ValueError, match="no field nonsense"):
        type(config).from_dict({"nonsense": 1})


def test_thresholds_keep_what_the_policy_keeps(make_config, data):
    """On the same text, thresholds and the policy over the batch keep the same share."""
    routing = {"capacity": "factor:capacity_factor=0.6"}
    config = make_config("etr", routing, steps=40, eval_every=40, checkpoint_every=40)
    # A capacity counts tokens of one batch, so few tokens make a share noisy; and weights that
    # move fast leave their thresholds behind.
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=32),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-5),
    )
    with Trainer(config, data) as trainer:
        while not trainer.finished:
            trainer.advance()
        batches = list(islice(trainer.loader, 8))
        kept = {
            selection: evaluate(trainer.model, batches, data.dataset.domains, selection)
            for selection in ("threshold", "batch", "dropless")
        }
    assert kept["batch"].kept_fraction < 0.6
    gap = kept["threshold"].kept_fraction - kept["batch"].kept_fraction
    assert abs(gap) < 0.02
    assert kept["dropless"].kept_fraction == 1.0
    assert kept["dropless"].loss != kept["threshold"].loss


def test_the_device_asked_for_is_one_of_this_machine() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "npu", "xpu", "mps")
    for name in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ValueError, match=f"device='{name}' is not on this machine"):
            find_device(name)


def test_evaluation_and_checkpoints_are_logged(make_config, caplog):
    """Where output is not a terminal, the command line prints the last of these."""
    caplog.set_level(logging.INFO, "etr")
    train(make_config(steps=4))
    assert "held-out batch 1" in caplog.messages
    assert caplog.messages[-1] == "writing a checkpoint of step 4"
