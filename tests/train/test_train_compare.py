"""Comparisons: same work for all, complete rows, stop and go on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

import etr
from etr.data import open_data
from etr.report import load_results, write_report
from etr.train import CompareConfig, compare, parse_variant
from etr.train.compare import environment
from etr.train.metrics import read_metrics
from etr.train.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

REQUIRED = {
    "name",
    "router",
    "capacity",
    "seed",
    "steps",
    "val_loss",
    "val_loss_by_domain",
    "kept_fraction",
    "kept_fraction_eval",
    "drop_rate",
    "num_tokens_per_expert_mean",
    "max_violation",
    "step_time_seconds_median",
    "expert_flops_per_step",
    "parameters",
}


def test_results_name_the_commit_of_a_checkout_alone(tmp_path, monkeypatch):
    package = tmp_path / "src" / "etr"
    package.mkdir(parents=True)
    monkeypatch.setattr(etr, "__file__", str(package / "__init__.py"))
    assert environment()["etr"] == etr.__version__
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert environment()["etr"] == etr.__version__  # it has no commit yet
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "a"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert environment()["etr"] == f"{etr.__version__}, commit {head.stdout[:12]}"
    subprocess.run([*git, "tag", "-m", "a", "v9"], check=True)  # the commit is named all the same
    (package / "new.py").touch()  # in no commit yet, and no change of one
    assert environment()["etr"] == f"{etr.__version__}, commit {head.stdout[:12]}"
    subprocess.run([*git, "add", "."], check=True)
    assert environment()["etr"] == f"{etr.__version__}, commit {head.stdout[:12]}-dirty"


@pytest.fixture
def config(make_config, tmp_path) -> CompareConfig:
    return CompareConfig(
        variants=("baseline", "etr-0.5=etr/capacity=factor:capacity_factor=0.5"),
        seeds=(0, 1),
        run=make_config(out=str(tmp_path / "compare")),
    )


def test_rows_are_complete_and_reported(config, tmp_path):
    run = dataclasses.replace(config.run, diagnostics=True, profile_every=0)
    config = dataclasses.replace(config, run=run)
    results = compare(config, command="etr compare ...")
    assert results is not None
    stored = json.loads((Path(config.run.out) / "results.json").read_text())
    assert stored["rows"] == results["rows"]
    assert stored["command"] == "etr compare ..."
    assert stored["environment"] == results["environment"]
    corpus = open_data(config.run.data).dataset.corpus_fingerprint
    assert results["environment"]["corpus"] == corpus[:16] != ""
    assert results["environment"]["etr"].startswith(etr.__version__)
    assert [(r["name"], r["seed"]) for r in results["rows"]] == [
        ("baseline", 0),
        ("baseline", 1),
        ("etr-0.5", 0),
        ("etr-0.5", 1),
    ]
    for row in results["rows"]:
        assert set(row) >= REQUIRED
        assert (Path(config.run.out) / row["metrics"]).exists()
    base, _, small, _ = results["rows"]
    assert base["step_time_ratio_median"] == 1.0
    assert small["kept_fraction"] <= 0.5
    assert small["selection"] == "threshold"
    assert base["selection"] == "dropless"
    load_results(Path(config.run.out) / "results.json")
    page = write_report(Path(config.run.out) / "results.json", tmp_path / "report.html")
    text = page.read_text()
    assert "etr-0.5" in text
    assert "<svg" in text


def test_finished_runs_are_read_not_repeated(config):
    compare(config)
    seen = []
    compare(config, on_step=lambda name, seed, row: seen.append(name))
    assert not seen


def test_a_stopped_comparison_goes_on_to_the_same_result(config, make_config, tmp_path):
    whole = compare(config)

    def interrupt(name, seed, row):
        if (name, seed, row["step"], row["kind"]) == ("etr-0.5", 1, 3, "train"):
            os.kill(os.getpid(), signal.SIGINT)

    other = CompareConfig(
        variants=config.variants, seeds=config.seeds, run=make_config(out=str(tmp_path / "again"))
    )
    assert compare(other, on_step=interrupt) is None
    again = compare(other)
    assert whole is not None
    assert again is not None
    for a, b in zip(whole["rows"], again["rows"], strict=True):
        assert a["val_loss"] == b["val_loss"]
        assert a["kept_fraction"] == b["kept_fraction"]


def test_variants_see_the_same_tokens_and_start_alike(make_config, data):
    models = [
        build_model(parse_variant(router).apply(make_config()).model, data.tokenizer, 32, seed=3)
        for router in etr.ROUTERS
    ]
    starts = [
        {name: p for name, p in model.named_parameters() if ".router." not in name}
        for model in models
    ]
    alike = [start for start in starts if start.keys() == starts[0].keys()]
    assert len(alike) > len(starts) / 2  # others bring experts of their own
    for start in alike[1:]:
        for name, parameter in start.items():
            assert parameter.equal(alike[0][name]), name


def test_changed_config_is_refused(config, make_config):
    compare(config)
    changed = CompareConfig(
        variants=config.variants,
        seeds=config.seeds,
        run=make_config(out=config.run.out, accumulation_steps=2),
    )
    with pytest.raises(ValueError, match="another config"):
        compare(changed)


@pytest.mark.parametrize(
    ("text", "name", "changes"),
    [
        ("baseline", "baseline", {"router": "baseline"}),
        (
            "x=etr:frame=learned/capacity=factor:capacity_factor=0.6/top_k=2",
            "x",
            {"router": "etr:frame=learned", "capacity": "factor:capacity_factor=0.6", "top_k": 2},
        ),
        ("etr:frame=learned", "etr:frame=learned", {"router": "etr:frame=learned"}),
        ("a=token_choice/aux_alpha=0", "a", {"router": "token_choice", "aux_alpha": 0}),
    ],
)
def test_variant_spelling(text, name, changes):
    variant = parse_variant(text)
    assert variant.name == name
    assert variant.changes == changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "router='nonsense' is unknown"),
        ("etr/colour=red", "must read field=value"),
        ("etr/top_k", "must read field=value"),
        ("etr:frame", "must read option=value"),
        ("etr:colour=1", "has no option colour"),
        ("etr/capacity=factor:capacity_factor=0", "capacity_factor=0"),
    ],
)
def test_bad_variants(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_metrics_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
