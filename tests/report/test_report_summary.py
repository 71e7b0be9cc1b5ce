import random
from pathlib import Path
from typing import Any

import pytest

from etr.report import read, summarize
from etr.report.columns import footnotes, loss_cell
from etr.report.reading import headline
from etr.report.results import load_results
from etr.report.statistics import crossed_estimate, estimate, t_interval, t_quantile
from etr.report.summary import Difference, loss_note
from etr.report.wording import NBSP


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [
        # Printed tables of the t distribution, two-sided.
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.95, 2.7764),
        (5, 0.95, 2.5706),
        (9, 0.95, 2.2622),
        (10, 0.95, 2.2281),
        (30, 0.95, 2.0423),
        (120, 0.95, 1.9799),
        (2, 0.99, 9.9248),
        (5, 0.90, 2.0150),
        (1, 0.50, 1.0),
    ],
)
def test_t_quantile_equals_the_tables(freedom: int, confidence: float, expected: float) -> None:
    assert t_quantile(freedom, confidence) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("freedom", "confidence"), [(0, 0.95), (-1, 0.95), (2, 0.0), (2, 1.0)])
def test_t_quantile_refuses_nonsense(freedom: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"must"):
        t_quantile(freedom, confidence)


def test_t_interval_on_three_seeds_by_hand() -> None:
    # mean 0.02, standard deviation 0.01, t(2) = 4.302653: half width 0.01 / sqrt(3) * 4.302653
    interval = t_interval([0.01, 0.02, 0.03])
    assert interval is not None
    assert interval[0] == pytest.approx(0.02 - 0.0248414, abs=1e-7)
    assert interval[1] == pytest.approx(0.02 + 0.0248414, abs=1e-7)
    assert t_interval([1.0]) is None
    assert t_interval([2.0, 2.0]) == (2.0, 2.0)


def test_documents_that_agree_leave_the_interval_of_the_seeds() -> None:
    found = crossed_estimate([[0.1] * 4, [0.2] * 4, [0.3] * 4], [1, 5, 2, 2], [0, 0, 1, 1])
    assert found is not None
    seeds = estimate([0.1, 0.2, 0.3])
    assert found.interval() == pytest.approx(seeds.interval())
    assert crossed_estimate([[0.1, 0.2]], [1, 1], [0, 0]) is None


def test_documents_widen_the_interval_by_hand() -> None:
    # Seeds agree on the mean 0.2; documents of domain 0 lie 0.1 to either side of their mean, with
    # weights 1/4: variance 2 * (0.1 / 4)^2 * 2 / 1; the only one of domain 1 adds none.
    found = crossed_estimate([[0.1, 0.3, 0.2], [0.1, 0.3, 0.2]], [1, 1, 2], [0, 0, 1])
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.error == pytest.approx((4 * (0.1 / 4) ** 2) ** 0.5)
    assert found.freedom == pytest.approx(1.0)


def test_an_interval_over_documents_covers_the_truth_where_that_of_seeds_does_not() -> None:
    source, inside, narrow = random.Random(0), 0, 0
    for _ in range(300):
        of_document = [source.gauss(1.0, 1.0) for _ in range(12)]
        rows = [[d + source.gauss(0.0, 0.2) for d in of_document] for _ in range(3)]
        low, high = crossed_estimate(rows, [1.0] * 12, [0] * 12).interval()
        inside += low <= 1.0 <= high
        low, high = t_interval([sum(row) / 12 for row in rows])
        narrow += low <= 1.0 <= high
    assert inside >= 270  # 285 are expected; five standard deviations below
    assert narrow < 240


def test_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    source = random.Random(0)
    hits = 0
    for _ in range(1500):
        interval = t_interval([source.gauss(1.0, 2.0) for _ in range(3)])
        assert interval is not None
        hits += interval[0] <= 1.0 <= interval[1]
    assert hits / 1500 == pytest.approx(0.95, abs=0.02)


def _results(losses: dict[str, list[float | None]], **fields: Any) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "router": "etr",
            "capacity": "factor 1.0",
            "seed": seed,
            "selection": "threshold",
            "causal": True,
            "val_loss": loss,
            **fields.get(name, {}),
        }
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return {"format": 1, "rows": rows}


def _difference(results: dict[str, Any], key: str = "val_loss") -> Difference:
    return summarize(results).challengers[0].differences[key]


def test_mean_range_and_paired_difference_by_hand() -> None:
    summary = summarize(_results({"base": [2.0, 2.5, 3.0], "new": [1.97, 2.48, 2.99]}))
    base = summary.baseline.estimates["val_loss"]
    assert (base.mean, base.low, base.high, base.half_range) == (2.5, 2.0, 3.0, 0.5)
    assert summary.baseline.differences == {}
    found = summary.challengers[0].differences["val_loss"]
    # -0.03, -0.02, -0.01: pairing leaves 0.01 of the seeds' 0.5.
    assert found.mean == pytest.approx(-0.02)
    assert found.interval == pytest.approx((-0.02 - 0.0248414, -0.02 + 0.0248414), abs=1e-7)
    assert found.verdict == "within noise"


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ([1.97, 2.47, 2.96], "lower"),
        ([2.03, 2.53, 3.04], "higher"),
        ([2.03, 2.47, 3.0], "within noise"),
        ([2.0, 2.5, 3.0], "within noise"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(new: list[float | None], verdict: str) -> None:
    assert _difference(_results({"base": [2.0, 2.5, 3.0], "new": new})).verdict == verdict


def test_rows_are_paired_by_seed_not_by_order() -> None:
    content = _results({"base": [1.0, 2.0, 3.0], "new": [0.9, 1.9, 2.9]})
    content["rows"][3:] = content["rows"][:2:-1]
    found = _difference(content)
    assert found.low == pytest.approx(-0.1)
    assert found.high == pytest.approx(-0.1)


def test_one_seed_decides_nothing() -> None:
    content = _results({"base": [2.0], "new": [1.0]})
    found = _difference(content)
    assert found.interval is None
    assert found.verdict == "within noise"
    assert found.reason == "undecided: one seed"
    assert any("one seed" in caveat for caveat in read(content).caveats)
    assert headline(summarize(content)) is None


def test_survivors_of_divergence_win_nothing() -> None:
    content = _results({"base": [2.0, 2.0, 2.01], "new": [1.0, 1.0, None]})
    summary = summarize(content)
    estimate = summary.challengers[0].estimates["val_loss"]
    assert (estimate.count, estimate.missing) == (2, 1)
    assert _difference(content).reason == "undecided: seeds missing"
    assert any("survivors" in caveat for caveat in read(content).caveats)
    assert read(content).gains == ()


def test_seeds_that_only_one_variant_has_count_as_missing() -> None:
    found = _difference(_results({"base": [2.0, 2.1, 2.2], "new": [1.0, 1.1]}))
    assert (found.count, found.missing) == (2, 1)
    assert found.verdict == "within noise"


def test_a_loss_that_no_seed_has() -> None:
    content = _results({"base": [2.0, 2.1], "new": [None, None]})
    variant = summarize(content).challengers[0]
    assert "val_loss" not in variant.estimates
    assert "val_loss" not in variant.differences
    assert any("no held-out loss in any seed" in caveat for caveat in read(content).caveats)


@pytest.mark.parametrize("baseline_is_causal", [True, False])
def test_other_causality_is_not_comparable(baseline_is_causal: bool) -> None:
    content = _results(
        {"base": [2.0, 2.1], "new": [1.0, 1.1], "same": [1.5, 1.6]},
        base={"causal": baseline_is_causal},
        new={"causal": not baseline_is_causal},
        same={"causal": baseline_is_causal},
    )
    summary, reading = summarize(content), read(content)
    assert _difference(content).reason == "not comparable"
    assert summary.incomparable == ("new",)
    assert [finding.name for finding in reading.gains] == ["same"]
    assert any(caveat.startswith("new is") for caveat in reading.caveats)
    assert headline(summary) == "same ends 0.500 nats/token below base"


@pytest.mark.parametrize(
    ("gap", "alarms"), [(0.0, False), (0.019, False), (-0.019, False), (0.021, True), (-0.03, True)]
)
def test_the_kept_gap_alarms_beyond_two_points(gap: float, alarms: bool) -> None:
    fields = {"kept_fraction": 0.6, "kept_fraction_eval": 0.6 + gap}
    content = _results({"base": [2.0]}, base=fields)
    variant = summarize(content).baseline
    assert variant.kept_gap == pytest.approx(gap)
    assert variant.kept_gap_alarms is alarms
    assert any("points" in caveat for caveat in read(content).caveats) is alarms
    dropless = _results({"base": [2.0]}, base={**fields, "selection": "dropless"})
    assert summarize(dropless).baseline.kept_gap is None


def test_different_budgets_are_said() -> None:
    content = _results({"base": [2.0], "new": [1.0]}, base={"tokens": 1000}, new={"tokens": 2000})
    assert "The variants differ in tokens (base: 1,000; new: 2,000)." in read(content).caveats


def test_reading_counts_both_losses_once_where_both_are_served_dropless() -> None:
    extra = {"selection": "dropless"}
    content = _results({"base": [2.0, 2.1], "new": [1.0, 1.1]}, base=extra, new=extra)
    for row in content["rows"]:
        row["val_loss_dropless"] = row["val_loss"]
    assert len(read(content).gains[0].parts) == 1
    for row in content["rows"]:
        row["selection"] = "threshold"
    assert len(read(content).gains[0].parts) == 2


@pytest.mark.parametrize("share", [0.5, 0.72 * 0.96])
def test_what_no_seed_changes_has_no_interval(share: float) -> None:
    """Nor where the mean of three equal numbers is not quite one of them."""
    same = {"base": [2.0, 2.1, 2.2], "new": [2.0, 2.1, 2.2]}
    content = _results(
        same, **{n: {"expert_flops_per_step": 5.82e9 * (share if n == "new" else 1)} for n in same}
    )
    (part,) = read(content).gains[0].parts
    assert part.endswith(
        f"{100 * (share - 1):.1f} % (the same in every seed)".replace("-", "\N{MINUS SIGN}")
    )


def test_headline_of_a_comparison_that_only_loses() -> None:
    content = _results({"base": [2.0, 2.1], "a": [2.5, 2.6], "b": [2.2, 2.3]})
    assert headline(summarize(content)) == "No variant reaches base: b ends 0.200 above it"
    content = _results({"base": [2.0, 2.1], "a": [2.5, 2.6], "b": [2.0, 2.1]})
    assert headline(summarize(content)) is None


def test_reading_of_a_whole_comparison(comparison: Path) -> None:
    reading = read(comparison)
    gains = {finding.name: str(finding) for finding in reading.gains}
    assert "expert compute per step \N{MINUS SIGN}28.0 %" in gains["etr schedule"]
    assert "expert choice" not in gains
    assert [finding.name for finding in reading.losses] == ["etr mass 0.7"]


def test_upper_bounds_are_labelled_and_compare_among_themselves() -> None:
    """By sign in the table, and by a sentence that names whose they are."""
    content = _results(
        {"base": [1.0, 1.1], "new": [0.9, 1.0], "other": [0.8, 0.7]},
        base={"bound": True},
        new={"bound": True},
    )
    summary = summarize(content)
    assert summary.bounds == ("base", "new")
    assert summary.incomparable == ("other",)
    assert [v.differences["val_loss"].comparable for v in summary.challengers] == [True, False]
    assert [loss_cell(v).text for v in summary.variants] == [
        f"≤{NBSP}1.0500",
        f"≤{NBSP}0.9500",
        "0.7500",
    ]
    said = "The loss of base and new is an upper bound of the text's nats."
    assert said in footnotes(summary)[0]
    assert said in read(content).caveats
    assert "other and base differ in that: no difference is given." in read(content).caveats
    assert headline(summary) == "new ends 0.100 nats/token (of an upper bound) below base"
    note = loss_note(load_results(content))
    assert note == f" {said} Not to be compared with base (what the loss is differs): other."
    plain = summarize(_results({"base": [1.0], "new": [0.9]}))
    assert "≤" not in "".join(footnotes(plain))


def test_one_variant_is_not_a_bound_in_one_seed_alone() -> None:
    content = _results({"base": [1.0, 1.1]})
    content["rows"][1]["bound"] = True
    with pytest.raises(ValueError, match="bound False and True"):
        summarize(content)
