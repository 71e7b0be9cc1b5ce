"""Cases run, are stored, and go on; bytes are counted right."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.__main__ import Options, command, main
from benchmarks.cases import Case, all_cases
from benchmarks.measures import MEASURES, few
from benchmarks.measures.generate import HF, OWN, PAST, RUNS, SAME, build_models, decode
from benchmarks.measures.memory import measure_memory
from benchmarks.measures.router import plain_grap
from benchmarks.measures.routing import CHOICE, GRAP_ROUTING, LAYER, ROUTING
from benchmarks.measures.training import StepWorker
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.results import STEP, CaseResult
from benchmarks.settings import ROOT, Settings
from benchmarks.systems import SYSTEMS
from etr.hf.versions import CACHE
from etr.moe import reference

CPU = torch.device("cpu")
SETTINGS = Settings(device=CPU, threads=1, quick=True)


def tiny(group: str) -> Case:
    """The first case of a group, at sizes that take no time."""
    case = next(case for case in all_cases() if case.group == group)
    return dataclasses.replace(case.small(), num_tokens=32, hidden_size=32, budget=0.0)


@pytest.mark.parametrize("group", ["routing", "router", "growth", "memory"])
def test_groups_measure(group: str) -> None:
    rows = MEASURES[group](tiny(group), SETTINGS, lambda note: None)
    missing = [SYSTEMS[x.system].missing(CPU) if x.system in SYSTEMS else "" for x in rows]
    assert [row.refused for row in rows] == missing
    assert all(len(row.seconds[STEP]) == 2 for row in rows if not row.refused)
    assert sum(row.default for row in rows) == 1


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_few_tokens_are_served_by_layers_that_compute_the_same(num_tokens: int) -> None:
    case = dataclasses.replace(tiny("few"), num_tokens=num_tokens)
    rows = {row.system: row for row in MEASURES["few"](case, SETTINGS, lambda note: None)}
    assert set(rows) == {few.HF, few.SAME, few.OWN, few.DROPS}
    assert not any(row.refused for row in rows.values())
    assert all(len(row.seconds["forward"]) == 2 for row in rows.values())
    assert (rows[few.SAME].drop_rate, rows[few.OWN].drop_rate) == (0, 0)
    assert all((row.operations or 0) > 15 for row in rows.values())


@pytest.mark.parametrize("label", RUNS)
def test_generation_measures_models_that_compute_the_same(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = partial(torch.compile, fullgraph=True, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda model, **_: graph(model))
    case = dataclasses.replace(tiny("generate"), label=label, num_tokens=4)
    rows = {row.system: row for row in MEASURES["generate"](case, SETTINGS, lambda note: None)}
    assert set(rows) == {HF, SAME, OWN}
    assert not any(row.refused for row in rows.values())
    assert all(len(row.seconds["forward"]) == 2 for row in rows.values())


def test_a_cache_is_cut_back_after_each_decoding_step() -> None:
    models, wrong = build_models(dataclasses.replace(tiny("generate")), CPU)
    assert wrong == 0
    lengths: list[int] = []
    models[SAME].register_forward_pre_hook(
        lambda _, args, kwargs: (
            lengths.append(kwargs[CACHE].get_seq_length()) if CACHE in kwargs else None
        ),
        with_kwargs=True,
    )
    step = decode(models[SAME], torch.randint(64, (2, PAST + 1)))
    step(), step()
    assert lengths == [PAST, PAST]


def test_routing_rows_are_parts_of_the_layer() -> None:
    rows = MEASURES["routing"](tiny("routing"), SETTINGS, lambda note: None)
    assert [row.system for row in rows] == [LAYER, ROUTING, GRAP_ROUTING, CHOICE]


def test_less_capacity_keeps_and_saves_less() -> None:
    rows = {row.system: row for row in measure_memory(tiny("memory"), SETTINGS, lambda note: None)}
    tight, wide = rows["etr padded, factor 0.6"], rows["etr padded, factor 1.1"]
    assert (tight.kept_pairs or 0) < (wide.kept_pairs or 0)
    assert (tight.saved_bytes or 0) < (wide.saved_bytes or 0)
    assert rows["etr, dropless"].drop_rate == 0
    assert all((row.peak_bytes or 0) > 0 for row in rows.values())


def test_saved_bytes_count_each_storage_once() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)

    def call() -> torch.Tensor:
        y = (x @ weight).exp()  # saves x and weight, then its own result
        return y * y[:, :1]  # saves y twice, as a view too

    _, found = saved_bytes(call, [weight])
    assert found == (4 * 8 + 4 * 8) * 4
    _, found = saved_bytes(call)
    assert found == (4 * 8 + 4 * 8 + 8 * 8) * 4


def test_peak_bytes_see_what_lives_at_once() -> None:
    size = 4 * 250_000

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(250_000).fill_(1.0)

    def together() -> None:
        parts = [torch.empty(250_000) for _ in range(3)]
        del parts

    assert size <= peak_bytes(one_after_the_other, CPU) < 1.5 * size
    assert 3 * size <= peak_bytes(together, CPU) < 3.5 * size


def test_grap_by_definition_is_that_of_the_oracle() -> None:
    x = torch.randn(5, 12)
    torch.testing.assert_close(plain_grap(x, 4), reference.grap(x, 4))


def test_a_stored_case_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(case: Case, settings: Settings, on_note: object) -> CaseResult:
        measured.append(case.name)
        return CaseResult(name=case.name, group=case.group, sizes=case.sizes(), rows=[])

    monkeypatch.setattr(run, "measure", measure)
    cases = [tiny("routing"), tiny("router")]
    run.run_cases(cases[:1], SETTINGS, tmp_path)
    run.run_cases(cases, SETTINGS, tmp_path)
    assert measured == [case.name for case in cases]
    run.run_cases(cases, SETTINGS, tmp_path, again=True)
    other = dataclasses.replace(SETTINGS, threads=2)
    run.run_cases(cases, other, tmp_path)
    assert len(measured) == 6


def test_a_run_writes_results_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, markdown = tmp_path / "out", tmp_path / "speed.md"
    options = Options(
        only=("router/8 experts top-1, 2048 tokens, d 1024",),
        quick=True,
        threads=1,
        mallopt=False,
        out=str(out),
        markdown=str(markdown),
    )
    assert main(options) == 0
    found = json.loads((out / "speed.json").read_text(encoding="utf-8"))
    assert found["environment"]["threads"] == 1
    assert found["environment"]["allocator"] == "default"
    assert {case["group"] for case in found["cases"]} == {"router"}
    assert "linear over GrAP scores" in capsys.readouterr().out
    assert markdown.read_text(encoding="utf-8") == (out / "speed.md").read_text(encoding="utf-8")


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(ValueError, match="matches no case"):
        Options(only=("no such case",)).cases()


def test_the_page_says_how_to_repeat_it() -> None:
    options = Options(only=("layer", "router"), mallopt=False, markdown="a.md", out="b")
    assert command(options) == (
        "python -m benchmarks --only layer router --no-mallopt --markdown a.md"
    )


def test_another_checkout_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"against: .* holds no package etr"):
        StepWorker("etr", tmp_path / "src", SETTINGS)


@pytest.mark.slow
def test_a_worker_trains_steps() -> None:
    with StepWorker("etr", ROOT / "src", SETTINGS) as worker:
        assert worker.step()["step"] > 0
        assert worker.drop_rate is not None
        assert 0 <= worker.drop_rate < 1
