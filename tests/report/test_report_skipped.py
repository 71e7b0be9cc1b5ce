"""Every figure is drawn where its data are there, and skipped with a reason where they are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invented_results import make_results

from etr.report import FIGURES, draw_figures, write_report
from etr.report.chart import Skipped

Line = dict[str, Any]


def _without(*fields: str) -> Callable[[Line], Line | None]:
    return lambda line: {key: value for key, value in line.items() if key not in fields}


def _no(kind: str) -> Callable[[Line], Line | None]:
    return lambda line: None if line["kind"] == kind else line


def _in_layers(field: str) -> Callable[[Line], Line | None]:
    def strip(line: Line) -> Line:
        layers = [_without(field)(layer) for layer in line.get("layers", [])]
        return {**line, "layers": layers}

    return strip


OF_DIAGNOSTICS = {
    "calinski-harabasz",
    "affinity-histograms",
    "token-correlation",
    "expert-by-domain",
    "expert-similarity",
}


@pytest.mark.parametrize(
    ("strip", "skipped"),
    [
        (lambda line: line, set()),
        (_without("loss"), {"loss-by-steps", "loss-by-compute"}),
        (_without("expert_flops"), {"loss-by-compute"}),
        (_no("eval"), {"perplexity", "difference"}),
        (_without("step_time_seconds"), {"step-time"}),
        (_no("profile"), {"step-time-split", "operator-time"}),
        (_without("operators"), {"operator-time"}),
        (_without("memory_bytes"), {"memory"}),
        (_without("bytes_within_node", "bytes_between_nodes"), {"traffic"}),
        (_without("bytes_within_node"), set()),
        (_without("drop_rate"), {"drop-rate"}),
        (_without("tokens_without_expert"), {"tokens-without-expert"}),
        (_without("capacity_factor"), {"capacity-factor"}),
        (_in_layers("capacity_lower_bound"), {"capacity-lower-bound"}),
        (_in_layers("capacity"), set()),  # without a limit the busiest expert is the room
        (_in_layers("kept_affinity_mass"), {"kept-affinity-mass"}),
        (_in_layers("num_choices_per_expert"), {"expert-load", "load-distribution"}),
        (_in_layers("num_tokens_per_expert"), {"utilisation"}),
        (_no("diagnostics"), OF_DIAGNOSTICS),
        (_without("token_correlation"), {"token-correlation"}),
        (_in_layers("affinity_own"), {"affinity-histograms"}),
        (_in_layers("domain_expert"), {"expert-by-domain"}),
        (_in_layers("expert_similarity"), {"expert-similarity"}),
    ],
)
def test_a_figure_needs_its_own_data_alone(
    tmp_path: Path, strip: Callable[[Line], Line | None], skipped: set[str]
) -> None:
    content = make_results(tmp_path, seeds=1, steps=3, variants=2, layers=1, experts=4)
    for row in content["rows"]:
        path = tmp_path / row["metrics"]
        lines = [strip(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))
    found = {f.key: f.reason for f in draw_figures(tmp_path) if isinstance(f, Skipped)}
    assert set(found) == skipped
    assert all(reason and not reason.endswith(".") for reason in found.values())


def test_one_run_alone_is_not_compared(tmp_path: Path) -> None:
    make_results(tmp_path, seeds=2, steps=3, variants=1, layers=1, experts=4)
    skipped = {f.key for f in draw_figures(tmp_path) if isinstance(f, Skipped)}
    assert {spec.key for spec in FIGURES if spec.compares} <= skipped
    page = write_report(tmp_path, tmp_path / "r.html").read_text()
    assert "nothing to compare" not in page


def test_without_any_data_no_figure_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    found = draw_figures([tmp_path])
    assert [f.key for f in found] == [spec.key for spec in FIGURES]
    assert all(isinstance(f, Skipped) for f in found)
