"""Traces of running models, against the models' own account of their routing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

import etr
from etr.data import Batch, byte_tokenizer, load_corpus, write_shards
from etr.data.batch import make_batch
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import moe_layers
from etr.trace import read_trace
from etr.trace.record import record_trace, token_text
from etr.trace.recorder import RoutingRecorder
from etr.trace.sampling import SampledRows

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
BASES = {
    "mixtral": MixtralConfig(
        **SIZES, num_local_experts=4, intermediate_size=48, num_hidden_layers=2
    ),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, intermediate_size=48, num_hidden_layers=2),
    # The first of its three layers is dense.
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        num_experts=4,
        moe_intermediate_size=48,
        intermediate_size=48,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        head_dim=8,
    ),
}


def batches(seed: int = 0, lengths: tuple[int, ...] = (13, 9, 13, 5)) -> list[Batch]:
    """Two batches of two rows with padding, of two domains."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(0, 256, length) for length in lengths]
    return [
        make_batch(
            rows[i : i + 2],
            np.array([0, 1]),
            sequence_length=12,
            eos_token_id=258,
            pad_token_id=256,
        )
        for i in (0, 2)
    ]


TOKENS = 12 + 8 + 12 + 4


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BASES[family]).eval()


def ours(router: str = "etr", top_k: int = 2, calibrate: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    config = EtrConfig.from_base(BASES["mixtral"], router, top_k=top_k, **options)
    model = EtrForCausalLM(config).train()
    if calibrate:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = etr.attach(model, optimizer, 3)
        for _ in range(3):
            model(input_ids=torch.randint(256, (4, 16)), labels=torch.randint(256, (4, 16)))
            optimizer.step()
        handle.detach()
    return model.eval()


def trace_of(model: nn.Module, path: Path, **options: Any) -> Any:
    record_trace(model, batches(), path, domains=("a", "b"), **options)
    return read_trace(path)


@pytest.mark.parametrize("family", BASES)
def test_a_transformers_model_is_traced_as_it_routes(family, tmp_path):
    model = tiny(family)
    trace = trace_of(model, tmp_path / "t")
    logits = [[], []]
    with torch.no_grad():
        for batch in batches():
            mask = batch.valid_mask
            output = model(
                input_ids=batch.input_ids, attention_mask=mask.long(), output_router_logits=True
            )
            for index, layer in enumerate(output.router_logits):
                logits[index].append(layer.view(*mask.shape, -1)[mask])
    assert trace.info.num_layers == len(output.router_logits) == 2
    assert (trace.info.router, trace.info.affinity) == (family, "logit")
    for index in range(2):
        wanted = torch.cat(logits[index])
        probs, experts = wanted.softmax(-1).topk(2)
        if getattr(model.config, "norm_topk_prob", True):
            probs = probs / probs.sum(-1, keepdim=True)
        layer = trace.layer(index)
        np.testing.assert_array_equal(layer.experts, experts)
        np.testing.assert_allclose(layer.weights, probs, rtol=1e-5)
        np.testing.assert_allclose(layer.affinities, wanted.gather(1, experts), rtol=1e-5)
        assert layer.kept.all()
        assert len(layer.experts) == TOKENS


def own_counts(model: Any, selection: str) -> list[dict[str, Tensor]]:
    """Counters of each layer over all batches, by the model's own account."""
    etr.moe.set_eval_selection(model, selection)
    found: list[dict[str, Tensor]] = [{} for _ in moe_layers(model)]
    with torch.no_grad():
        for batch in batches():
            mask = batch.valid_mask.long()
            stats = model(input_ids=batch.input_ids, attention_mask=mask).routing_stats
            for total, layer in zip(found, stats, strict=True):
                for name in ("num_choices_per_expert", "num_tokens_per_expert"):
                    total[name] = total.get(name, 0) + layer[name]
    return found


@pytest.mark.parametrize("selection", ["threshold", "dropless", "batch"])
@pytest.mark.parametrize(
    ("router", "top_k"), [("etr", 2), ("token_choice", 2), ("expert_choice", 2), ("hash", 1)]
)
def test_counts_are_those_of_the_model(router, top_k, selection, tmp_path):
    scored = router != "hash"
    model = ours(
        router,
        top_k,
        calibrate=True,
        capacity=etr.moe.capacity.Factor(capacity_factor=0.6),
        rank_by="score" if scored else None,
    )
    trace = trace_of(model, tmp_path / "t", selection=selection)
    assert trace.info.selection == (selection if scored or selection == "batch" else "dropless")
    assert trace.info.affinity == ("score" if scored else "none")
    choices = kept = 0
    for index, counts in enumerate(own_counts(model, selection)):
        layer = trace.layer(index)
        assert len(layer.experts) == TOKENS
        np.testing.assert_array_equal(layer.counts(4), counts["num_choices_per_expert"])
        np.testing.assert_array_equal(layer.counts(4, kept=True), counts["num_tokens_per_expert"])
        assert not layer.weights[~layer.kept].any()
        assert (layer.weights[layer.kept] > 0).all()
        assert (layer.affinities is not None) == scored
        choices, kept = choices + layer.counts(4).sum(), kept + layer.kept.sum()
    # The test means nothing unless something is dropped where something can be.
    drops = trace.info.selection != "dropless" and router != "expert_choice"
    assert (kept < choices) == drops


def test_kept_is_what_stands_above_the_threshold(tmp_path):
    model = ours(calibrate=True)
    trace = trace_of(model, tmp_path / "t")
    for index, moe in enumerate(moe_layers(model)):
        layer, threshold = trace.layer(index), moe.calibration.threshold.numpy()
        np.testing.assert_array_equal(layer.kept, layer.affinities >= threshold[layer.experts])


def test_rows_say_which_token(tmp_path):
    trace = trace_of(tiny("mixtral"), tmp_path / "t", tokenizer=byte_tokenizer(), source="here")
    assert trace.info.source == "here"
    assert trace.info.columns == ()
    for index in range(2):
        rows = trace.rows(index)
        assert rows["sequence"].to_pylist() == [0] * 12 + [1] * 8 + [2] * 12 + [3] * 4
        assert rows["position"].to_pylist() == [*range(12), *range(8), *range(12), *range(4)]
        wanted = torch.cat([batch.input_ids[batch.valid_mask] for batch in batches()]).tolist()
        assert rows["token_id"].to_pylist() == wanted
        assert rows["domain"].to_pylist() == ["a"] * 12 + ["b"] * 8 + ["a"] * 12 + ["b"] * 4
        for token, text in zip(wanted, rows["text"].to_pylist(), strict=True):
            assert text == chr(token) if token < 128 else len(text) == 1


def test_without_a_tokenizer_there_is_no_text(tmp_path):
    trace = trace_of(tiny("mixtral"), tmp_path / "t")
    assert trace.table["text"].null_count == trace.table.num_rows


@pytest.mark.parametrize(("token", "text"), [(97, "a"), (10, "\n"), (0xC3, "Ã"), (258, "<eos>")])
def test_token_text(token, text):
    assert token_text(byte_tokenizer(), token) == text


def test_the_model_is_left_as_it_was(tmp_path):
    model = ours(calibrate=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_of(model, tmp_path / "t", selection="batch")
    assert model.training
    for layer in moe_layers(model):
        assert layer.eval_selection == "threshold"
        assert "select" not in vars(layer)
        assert not layer.pending
        assert not layer.router._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    hooked = tiny("mixtral")
    trace_of(hooked, tmp_path / "t")
    assert not any(module._forward_hooks for module in hooked.modules())


def test_a_failure_leaves_no_file(tmp_path):
    model = ours()
    bad = replace(batches()[0], input_ids=torch.full((2, 12), 9999))
    with pytest.raises(IndexError):
        record_trace(model, [bad], tmp_path / "t", domains=("a", "b"))
    assert not list(tmp_path.iterdir())
    assert "select" not in vars(moe_layers(model)[0])


def test_a_bare_layer_is_recorded():
    """Any module with our layers will do, and the caller decides what counts as a token."""
    layer = etr.MoE(etr.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=1))
    mask = torch.tensor([True, False, True, True])
    with RoutingRecorder(layer) as recorder:
        output = layer.eval()(torch.randn(4, 16))
        (found,) = recorder.take(mask)
    assert list(found.counts) == [1, 1, 1]
    everything = output.stats["num_choices_per_expert"].sum()
    assert found.counts.sum() == everything - 1


def test_every_forward_must_be_taken():
    layer = etr.MoE(etr.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=1))
    layer.eval()
    with RoutingRecorder(layer) as recorder:
        layer(torch.randn(4, 16))
        layer(torch.randn(4, 16))
        with pytest.raises(ValueError, match="ran 2 times"):
            recorder.take(torch.ones(4, dtype=torch.bool))
        layer(torch.randn(4, 16))
        with pytest.raises(ValueError, match="routed 4 tokens of 5"):
            recorder.take(torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "class Linear has no MoE layer of this library"),
        (
            AutoModelForCausalLM.from_config(
                LlamaConfig(
                    vocab_size=8,
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                )
            ),
            "model_type='llama'",
        ),
    ],
)
def test_models_that_cannot_be_traced(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        record_trace(model, batches(), tmp_path / "t", domains=("a", "b"))


def test_no_tokens(tmp_path):
    with pytest.raises(ValueError, match="no tokens to trace"):
        record_trace(tiny("mixtral"), [], tmp_path / "t", domains=())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for domain, documents in (("big", 120), ("small", 40)):
        (folder / domain).mkdir()
        for number in range(documents):
            words = generator.integers(0, 10**6, 60)
            (folder / domain / f"{number}.txt").write_text(" ".join(map(str, words)) + "\n")
    corpus = load_corpus([folder / "big", folder / "small"])
    return write_shards(corpus, byte_tokenizer(), folder / "shards")


def test_all_rows_without_a_budget(dataset):
    rows = SampledRows(dataset=dataset, sequence_length=32, batch_size=5)
    found = list(rows)
    assert len(found) == len(rows)
    labels = sum(int(batch.valid_mask.sum()) for batch in found)
    assert labels == sum(len(shard.tokens) for shard in dataset.held_out)


@pytest.mark.parametrize(("budget", "wanted"), [(1, 1), (64, 2), (640, 20), (10**9, None)])
def test_a_budget_is_spread_evenly(dataset, budget, wanted):
    full = SampledRows(dataset=dataset, sequence_length=32, batch_size=4)
    rows = replace(full, max_tokens=budget)
    found = list(rows)
    assert len(rows) == len(found)
    domains = torch.cat([batch.domain for batch in found])
    everything = torch.cat([batch.domain for batch in full])
    assert len(domains) == (wanted or len(everything))
    assert all(len(batch.domain) == 4 for batch in found[:-1])
    if len(domains) > 10:
        share = (domains == 0).float().mean() - (everything == 0).float().mean()
        assert abs(float(share)) < 0.1
    again = torch.cat([batch.input_ids for batch in rows])
    assert torch.equal(again, torch.cat([batch.input_ids for batch in found]))


@pytest.mark.parametrize("name", ["sequence_length", "batch_size", "max_tokens"])
def test_sampling_options_are_checked(dataset, name):
    rows = SampledRows(dataset=dataset, sequence_length=32, batch_size=4)
    with pytest.raises(ValueError, match=f"{name}=0"):
        replace(rows, **{name: 0})


def test_reading_needs_no_models():
    """The report reads traces without what runs models."""
    heavy = "{'transformers', 'etr.hf', 'etr.data', 'pandas'}"
    code = f"import sys, etr.trace; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
