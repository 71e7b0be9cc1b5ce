import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented_results import make_results, write_results

from etr.report import load_metrics, load_results


def test_loads_rows_metrics_and_histograms(comparison: Path) -> None:
    results = load_results(comparison)
    assert len(results.rows) == 15
    assert results.names[0] == "baseline 1.1"
    assert [row.seed for row in results.of("etr schedule")] == [0, 1, 2]
    metrics = results.rows[0].metrics
    assert metrics is not None
    assert metrics.step.tolist() == list(range(1, 121))
    assert metrics.choices is not None
    assert metrics.choices.shape == (120, 3, 8)
    assert results.rows[0].histogram is None
    histogram = results.of("etr schedule")[0].histogram
    assert histogram is not None
    assert float((histogram.own * np.diff(histogram.edges)).sum()) == pytest.approx(1)
    (note,) = results.notes
    assert note.endswith(
        "and 12 more: metrics.jsonl has 1 key that the report does not read: a_key_of_tomorrow."
    )
    assert results.rows[0].trace is not None


def test_file_folder_mapping_and_results_load_the_same(comparison: Path) -> None:
    path = comparison / "results.json"
    from_file = load_results(path)
    content = json.loads(path.read_text())
    from_mapping = load_results(content, metrics_root=comparison)
    for other in (load_results(comparison), from_mapping, load_results(from_file)):
        assert [row.values for row in other.rows] == [row.values for row in from_file.rows]
        assert all(row.metrics is not None for row in other.rows)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json does not exist"):
        load_results(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match=r"results\.json does not exist"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 1, "rows": [{"na', "not complete JSON"),
        (b"", "not complete JSON"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"[1, 2]", "no `format` and `rows`"),
        (b'{"rows": []}', "no `format` and `rows`"),
        (b'{"format": 2, "rows": [{}]}', "format 2 is unknown; this version reads format 1"),
        (b'{"format": true, "rows": [{}]}', "format True is unknown"),
        (b'{"format": "1", "rows": [{}]}', "format '1' is unknown"),
        (b'{"format": 1, "rows": []}', "at least one run"),
        (b'{"format": 1, "rows": "abc"}', "at least one run"),
        (b'{"format": 1, "rows": [3]}', r"rows\[0\] must be an object, got int"),
        (b'{"format": 1, "rows": [{}]}', r"rows\[0\] has no 'name'"),
    ],
)
def test_foreign_and_damaged_files_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_results(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "", "name must be a text"),
        ("name", "\x00\n", "name must be a text"),
        ("seed", 1.5, "seed must be an integer"),
        ("seed", True, "seed must be an integer"),
        ("selection", 3, "selection must be a text"),
        ("selection", "", "selection must be a text"),
        ("causal", "yes", "causal must be true or false"),
        ("val_loss", "low", "val_loss must be a number or null, got 'low'"),
        ("val_loss_by_domain", [1], "val_loss_by_domain must be an object"),
        ("affinity_histogram", {"edges": [0, 1]}, "`edges`, `own` and `others`"),
        (
            "affinity_histogram",
            {"edges": [0, 1], "own": [1, 2], "others": [1]},
            "n \\+ 1 edges for n values, got 2 edges, 2 own, 1 others",
        ),
        ("affinity_histogram", {"edges": [1, 0], "own": [1], "others": [1]}, "ascending"),
    ],
)
def test_malformed_fields_are_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1)
    content["rows"][0][field] = value
    with pytest.raises(ValueError, match=rf"rows\[0\].*{message}"):
        load_results(content, metrics_root=tmp_path)


def test_same_variant_and_seed_twice_is_refused(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1)
    content["rows"] *= 2
    with pytest.raises(ValueError, match=r"'baseline 1\.1' has seed 0 twice"):
        load_results(content)


def test_one_name_with_two_configurations_is_refused(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=2, steps=2, variants=1)
    content["rows"][1]["causal"] = False
    with pytest.raises(ValueError, match="causal True and False"):
        load_results(content)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 10**400])
def test_values_that_are_not_finite_become_none(tmp_path: Path, bad: Any) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1)
    content["rows"][0]["val_loss"] = bad
    content["rows"][0]["val_loss_by_domain"]["python"] = bad
    row = load_results(write_results(tmp_path, content)).rows[0]
    assert row.values["val_loss"] is None
    assert row.val_loss_by_domain["python"] is None


def test_labels_are_one_printable_line(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1)
    content["rows"][0]["name"] = "two\nlines\x00 and \ud800half"
    assert load_results(content).rows[0].name == "two lines and half"


def test_missing_metrics_cost_their_curves_and_damaged_ones_their_lines(tmp_path: Path) -> None:
    make_results(tmp_path, seeds=3, steps=4, variants=1)
    (tmp_path / "runs/0-0/metrics.jsonl").unlink()
    (tmp_path / "runs/0-1/metrics.jsonl").write_text('{"kind": "train"\n{"kind": "train"}\n')
    results = load_results(tmp_path)
    assert [row.metrics is None for row in results.rows] == [True, False, False]
    assert "seed 0: no curves, runs/0-0/metrics.jsonl does not exist" in results.notes[0]
    assert (
        "baseline 1.1, seed 1: metrics.jsonl has 2 lines left out: line 1 is not a JSON object and "
        "line 2: step "
        "must be an integer of at least 0, got None."
    ) in results.notes


def _write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _train(step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, **fields}


@pytest.mark.parametrize("tail", [b'{"kind":"train","st', b"1", b'{"kind":"train","x":"\xc3'])
def test_cut_last_line_is_left_out_and_said(tmp_path: Path, tail: bytes) -> None:
    path = _write(tmp_path / "metrics.jsonl", _train(1, loss=3.0), _train(2, loss=2.0))
    path.write_bytes(path.read_bytes() + tail)
    metrics = load_metrics(path)
    assert metrics.train["loss"].tolist() == [3.0, 2.0]
    assert metrics.notes == ("the last line of metrics.jsonl (line 3) is cut and left out.",)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"kind":"tra', "line 2 is not a JSON object"),
        (b"7", "line 2 is not a JSON object"),
        (b"[" * 100_000, "line 2 is not a JSON object"),
        (b'{"kind":"train","step":2,"loss":"\xff"}', "line 2 is not a JSON object"),
        (b'{"kind":"train","step":2,"loss":"low"}', "line 2: loss must be a number or null"),
        (b'{"kind":"eval","step":2,"val_loss":[1]}', "line 2: val_loss must be a number or null"),
        *(
            (b'{"kind":"train","step":%s}' % step, "line 2: step must be an integer of at least 0")
            for step in (b"null", b"-1", b"1.5", b'"1"', b"true", b"1" + b"0" * 30)
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "metrics.jsonl"
    first, third = (json.dumps(_train(step, loss=4.0 - step)).encode() for step in (1, 3))
    path.write_bytes(b"\n".join([first, line, third, b""]))
    metrics = load_metrics(path)
    assert metrics.train["loss"].tolist() == [3.0, 1.0]
    (note,) = metrics.notes
    assert note.startswith(f"metrics.jsonl has 1 line left out: {why}")


def test_empty_run(tmp_path: Path) -> None:
    metrics = load_metrics(_write(tmp_path / "metrics.jsonl"))
    assert metrics.step.size == 0
    assert metrics.choices is None
    assert metrics.evaluations == ()


def test_absent_values_are_nan_and_unknown_kinds_and_keys_ignored(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "metrics.jsonl",
        _train(1, loss=None, capacity_factor=1.1, new_key={"a": [1]}),
        {"kind": "system", "temperature": 40},
        _train(2, loss=math.nan),
    )
    metrics = load_metrics(path)
    assert np.isnan(metrics.train["loss"]).all()
    np.testing.assert_array_equal(metrics.train["capacity_factor"], [1.1, np.nan])


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "metrics.jsonl",
        *(_train(step, loss=float(step)) for step in (1, 2, 3)),
        *(_train(step, loss=10.0 * step) for step in (2, 3, 4)),
    )
    metrics = load_metrics(path)
    assert metrics.step.tolist() == [1, 2, 3, 4]
    assert metrics.train["loss"].tolist() == [1, 20, 30, 40]


@pytest.mark.parametrize(
    "layers",
    [None, [], [{}], [{"num_choices_per_expert": [1, 2]}, {"num_choices_per_expert": [1]}]],
)
def test_choices_need_a_full_grid_on_every_line(tmp_path: Path, layers: Any) -> None:
    good = [{"num_choices_per_expert": [1, 2]}]
    path = _write(tmp_path / "metrics.jsonl", _train(1, layers=good), _train(2, layers=layers))
    assert load_metrics(path).choices is None
    path = _write(tmp_path / "metrics.jsonl", _train(1, layers=good), _train(2, layers=good))
    choices = load_metrics(path).choices
    assert choices is not None
    assert choices.tolist() == [[[1, 2]], [[1, 2]]]
