"""Rows, paired differences and verdict words, on invented results."""

from __future__ import annotations

from typing import Any

import pytest

from etr.study.collection import Collection
from etr.study.markdown import page
from etr.study.summary import StudyRow, difference, resolution, rows_of


def result(name: str, seed: int, loss: float, steps: int = 100) -> dict[str, Any]:
    mode = {
        "loss": loss,
        "kept_per_token": 0.9,
        "dropped_loss": None,
        "kept_loss": loss,
    }
    return {
        "run": {"task": "text-x", "variant": f"{name}=etr", "steps": steps, "seed": seed},
        "steps": steps,
        "expert_flops": 10.0 * steps,
        "kept_per_token": 0.9,
        "max_violation_last": 0.1,
        "environment": {"torch": "0", "python": "0", "machine": "m", "threads": 1},
        "curve": [{"step": steps, "served_loss": loss}],
        "final": {"served_loss": loss, "served": "dropless", "dropless": mode},
    }


def rows(*pairs: tuple[str, list[float]]) -> list[StudyRow]:
    return rows_of(
        [result(name, seed, loss) for name, losses in pairs for seed, loss in enumerate(losses)]
    )


def test_differences_are_paired_by_seed() -> None:
    a, b = rows(("a", [1.0, 2.0, 3.0]), ("b", [1.1, 2.1, 3.1]))
    found = difference(b, a)
    assert found.mean == pytest.approx(0.1)
    assert found.verdict == "higher"
    assert difference(a, b).verdict == "lower"
    assert found.interval[0] == pytest.approx(0.1)  # no spread once paired


def with_documents(name: str, losses: list[list[float]]) -> StudyRow:
    tokens, domain = [30, 10], [0, 0]
    found = []
    for seed, of_document in enumerate(losses):
        mean = sum(t * x for t, x in zip(tokens, of_document, strict=True)) / sum(tokens)
        documents = {"tokens": tokens, "domain": domain, "loss": of_document}
        found.append({**result(name, seed, mean), "documents": documents})
    return rows_of(found)[0]


def test_intervals_cover_documents_where_both_rows_have_them() -> None:
    a = with_documents("a", [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    b = with_documents("b", [[1.1, 1.4], [2.1, 2.4], [3.1, 3.4]])
    found, (plain,) = difference(b, a), rows(("a", [1.0, 2.0, 3.0]))
    assert found.documents == 2
    assert found.mean == pytest.approx(0.175)
    assert found.interval[0] < 0.1 < 0.4 < found.interval[1]
    assert difference(b, plain).documents == 0
    assert difference(b, plain).interval[0] == pytest.approx(0.175)


@pytest.mark.parametrize(
    ("own", "verdict"),
    [([1.0, 2.2, 2.9], "cannot be told apart"), ([1.5], "one seed")],
)
def test_what_cannot_be_said_is_not_said(own: list[float], verdict: str) -> None:
    a, b = rows(("a", [1.0, 2.0, 3.0]), ("b", own))
    assert difference(b, a).verdict == verdict


def test_rows_with_other_steps_are_other_rows() -> None:
    found = rows_of([result("a", 0, 1.0, 100), result("a", 0, 1.0, 200)])
    assert [row.steps for row in found] == [100, 200]


def test_resolution_is_the_median_half_width() -> None:
    found = rows(("a", [1.0, 1.0, 1.0]), ("b", [1.1, 1.2, 1.3]), ("c", [1.1, 1.1, 1.1]))
    widths = sorted(
        (d.interval[1] - d.interval[0]) / 2 for d in (difference(r, found[0]) for r in found[1:])
    )
    assert resolution(found, found[0]) == pytest.approx(sum(widths) / 2)


def test_a_page_without_most_results_stands() -> None:
    found = rows(("linear-1.1", [1.0, 1.1]), ("etr", [0.9, 1.0]))
    study = Collection(blocks={"headline": ("text-x", "steps", tuple(found))}, times={})
    text = page(study, "linear-1.1", {}, "notes at the end")
    assert "-0.1000" in text
    assert "lower" in text
    assert text.rstrip().endswith("per run.")
    assert "notes at the end" in text
