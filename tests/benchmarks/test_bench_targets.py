"""Targets, tables and the page, on invented results."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks import targets
from benchmarks.cases import Case, all_cases
from benchmarks.measures import few, generate
from benchmarks.measures.memory import PADDED, TIGHT
from benchmarks.measures.router import ETR_GIVEN, GRAP, GRAP_ROUTER, LINEAR, LINEAR_ROUTER
from benchmarks.measures.routing import CHOICE, LAYER, ROUTING
from benchmarks.page import page
from benchmarks.results import STEP, CaseResult, Row
from benchmarks.systems.floors import DENSE, PER_EXPERT
from benchmarks.tables import losses_table, slopes_table, targets_table
from benchmarks.targets import TARGETS, Target, judge, judge_all

RIVALS = {"grouped_mm": "transformers grouped_mm"}


def row(system: str, seconds: float, kind: str = "rival", **values: Any) -> Row:
    rounds: list[float | None] = [seconds, seconds * 1.5, seconds]
    times = {"forward": rounds, STEP: rounds, "step": rounds}
    return Row(system=system, kind=kind, seconds=times, **values)


def layer(tokens: int = 4096, experts: int = 8, top_k: int = 1, **times: float) -> CaseResult:
    """Invented seconds by system; ours is "etr"."""
    case = Case(
        group="layer",
        num_tokens=tokens,
        hidden_size=512,
        intermediate_size=128,
        num_experts=experts,
        top_k=top_k,
        budget=1.0,
    )
    floors = {"dense": DENSE, "per_expert": PER_EXPERT}
    rows = [row(floors[name], times[name], kind="floor") for name in floors if name in times]
    for name, value in times.items():
        if name == "etr":
            rows.append(row("etr grouped_mm", value, kind="ours", default=True))
        elif name not in floors:
            rows.append(row(RIVALS.get(name, name), value))
    return CaseResult(name=case.name, group=case.group, sizes=case.sizes(), rows=rows)


def target(start: str) -> Target:
    (found,) = [one for one in TARGETS if one.name.startswith(start)]
    return found


@pytest.mark.parametrize(("etr", "outcome"), [(1.09, "met"), (1.11, "missed")])
def test_the_dense_floor_binds_loaded_experts(etr: float, outcome: str) -> None:
    verdict = judge(target("etr over dense floor, 8"), [layer(dense=1.0, etr=etr)])
    assert verdict.outcome == outcome
    assert verdict.readings[0].value.median == pytest.approx(etr)


def test_the_dense_floor_does_not_bind_starved_experts() -> None:
    results = [layer(tokens=256, dense=1.0, per_expert=2.0, etr=2.2)]
    assert judge(target("etr over dense floor, 8"), results).outcome == "not measured"
    assert judge(target("etr over per-expert floor"), results).outcome == "met"


def test_the_worst_case_decides() -> None:
    results = [layer(grouped_mm=1.3, etr=1.0), layer(top_k=2, grouped_mm=1.1, etr=1.0)]
    verdict = judge(target("transformers grouped_mm over etr, 4096"), results)
    assert (verdict.outcome, verdict.met, len(verdict.readings)) == ("missed", 1, 2)
    assert "top-2" in verdict.readings[0].case


def test_eager_counts_at_many_experts_alone() -> None:
    results = [layer(**{"transformers eager": 1.1, "etr": 1.0})]
    eager = target("transformers eager over etr, 4096")
    assert judge(eager, results).outcome == "not measured"
    results.append(layer(experts=64, top_k=8, **{"transformers eager": 3.0, "etr": 1.0}))
    assert judge(eager, results).outcome == "met"


def test_a_system_without_time_gives_no_reading() -> None:
    result = layer(etr=1.0)
    result.rows.append(Row(system="DeepSpeed", kind="rival", refused="failed its check"))
    assert judge(target("DeepSpeed over etr, 4096"), [result]).outcome == "not measured"


def test_dropping_pairs_is_not_speed() -> None:
    """Half the pairs in half the time is the same speed."""
    ours = row("etr grouped_mm", 1.0, kind="ours", default=True, kept_pairs=1000)
    rival = row("st-moe-pytorch", 0.5, kept_pairs=500)
    result = layer()
    result.rows.extend([ours, rival])
    (reading,) = target("st-moe-pytorch over etr, 4096").read([result])
    assert reading.value.median == pytest.approx(1.0)


@pytest.mark.parametrize(("share", "outcome"), [(0.02, "met"), (0.04, "missed")])
def test_routing_share(share: float, outcome: str) -> None:
    base = layer()
    rows = [row(LAYER, 1.0, default=True), row(ROUTING, share), row(CHOICE, share / 2)]
    result = CaseResult(name="routing/x", group="routing", sizes=base.sizes, rows=rows)
    assert judge(target("routing's share of the layer, 8"), [result]).outcome == outcome
    assert judge(target("routing's share of the layer, 64"), [result]).outcome == "not measured"


def router(width: int, experts: int, linear: float, dtype: str = "float32") -> CaseResult:
    sizes = {"hidden_size": width, "num_experts": experts, "dtype": dtype}
    rows = [row(GRAP, 1.0, default=True), row(LINEAR, linear)]
    name = f"router/{width} {experts} {dtype}"
    return CaseResult(name=name, group="router", sizes=sizes, rows=rows)


def test_grap_counts_in_float32_at_64_experts_and_more() -> None:
    few, half = router(1024, 8, 1.0), router(1024, 64, 1.0, "bfloat16")
    many = router(1024, 64, 4.5)
    grap = target("linear over GrAP scores, 64 experts or more, float32, forward+backward")
    assert judge(grap, [few, half]).outcome == "not measured"
    assert judge(grap, [few, half, many]).outcome == "met"
    assert judge(grap, [many, router(2048, 256, 3.9)]).outcome == "missed"


@pytest.mark.parametrize(("ours", "outcome"), [(50, "met"), (51, "missed")])
def test_saved_bytes(ours: int, outcome: str) -> None:
    result = layer()
    result.rows.append(row("etr grouped_mm", 1.0, default=True, saved_bytes=ours))
    result.rows.append(row("transformers grouped_mm", 1.0, saved_bytes=100))
    assert judge(target("saved bytes"), [result]).outcome == outcome


def test_few_tokens_are_judged_by_their_number() -> None:
    one, eight = (
        CaseResult(
            name=f"few/{tokens}",
            group="few",
            sizes={"num_tokens": tokens},
            rows=[row(few.HF, 1.0), row(few.SAME, seconds), row(few.DROPS, 0.9)],
        )
        for tokens, seconds in ((1, 1.2), (8, 1.01))
    )
    found = {
        verdict.target.name: verdict.outcome
        for verdict in judge_all([one, eight])
        if verdict.target.name.startswith((few.SAME, few.DROPS))
    }
    assert list(found.values()) == ["missed", "met", "not measured", "met", "met", "not measured"]
    reason = judge(target(f"{few.SAME} over transformers' block, 1"), [one]).reason
    assert "bookkeeping (operations, below)" in reason


def test_peak_bytes_are_of_one_case() -> None:
    rows = [row(PADDED, 1.0, peak_bytes=100), row(TIGHT, 1.0, peak_bytes=59)]
    result = CaseResult(name="memory/x", group="memory", sizes={}, rows=rows)
    verdict = judge(target("peak bytes"), [result])
    assert verdict.outcome == "met"
    assert verdict.readings[0].value.median == pytest.approx(0.59)


def test_the_demo_step_is_compared_with_the_other_checkout() -> None:
    result = CaseResult(
        name="training/demo",
        group="training",
        sizes={},
        rows=[row("etr", 1.1, default=True), row("baseline", 1.0), row("etr, other checkout", 1.0)],
    )
    verdict = judge(target("demo step"), [result])
    assert (verdict.outcome, len(verdict.readings)) == ("missed", 1)
    assert verdict.readings[0].value.median == pytest.approx(1.1)


def test_a_missed_target_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [layer(dense=1.0, etr=1.5)]
    floor = target("etr over dense floor, 8")
    monkeypatch.setattr(targets, "REASONS", {})
    assert judge(floor, results).reason == ""
    rows = [row(LAYER, 1.0), row(ROUTING, 0.25), row(CHOICE, 0.125)]
    name = results[0].name.replace("layer/", "routing/")
    stages = CaseResult(name=name, group="routing", sizes=results[0].sizes, rows=rows)
    assert "routing takes 25.0% of the layer" in judge(floor, [*results, stages]).reason
    monkeypatch.setitem(targets.REASONS, floor.name, "page faults")
    assert judge(floor, results).reason == "page faults"
    assert judge(floor, [layer(dense=1.0, etr=1.0)]).reason == ""


def test_every_target_can_be_read_off_the_cases_that_run() -> None:
    """A target whose cases no longer exist would pass unseen."""
    measured = []
    for case in all_cases():
        ours = row("etr", 1.0, default=True, saved_bytes=1, kept_pairs=1)
        names = ["transformers grouped_mm", "transformers eager", "GShard one-hot"]
        names += ["st-moe-pytorch", "DeepSpeed", DENSE, PER_EXPERT]
        names += [LAYER, ROUTING, CHOICE, GRAP, LINEAR, "etr, other checkout"]
        names += [GRAP_ROUTER, LINEAR_ROUTER, ETR_GIVEN, PADDED, TIGHT]
        names += [few.SAME, few.OWN, few.DROPS, generate.SAME, generate.OWN]
        bytes_ = {"saved_bytes": 1, "peak_bytes": 1}
        rows = [ours, *(row(name, 1.0, **bytes_, kept_pairs=1) for name in names)]
        measured.append(CaseResult(name=case.name, group=case.group, sizes=case.sizes(), rows=rows))
    assert [v.target.name for v in judge_all(measured) if not v.readings] == []


def test_losses_list_who_is_faster() -> None:
    results = [layer(dense=0.5, grouped_mm=0.8, DeepSpeed=1.2, etr=1.0)]
    (line,) = losses_table(results).rows
    assert line[0] == "transformers grouped_mm"
    assert line[2] == "1.25"


def test_slopes_come_from_growing_sizes() -> None:
    def grown(tokens: int) -> CaseResult:
        result = layer(tokens=tokens, etr=tokens**1.5)
        sizes = {**result.sizes, "label": "tokens"}
        return CaseResult(name=f"growth/{tokens}", group="growth", sizes=sizes, rows=result.rows)

    (line,) = slopes_table([grown(64), grown(128), grown(256)]).rows
    assert line == ["layer, tokens", "etr grouped_mm", "64", "256", "1.50"]


def test_the_page_holds_targets_losses_and_refusals() -> None:
    result = layer(dense=1.0, grouped_mm=1.3, etr=1.05)
    result.rows.append(Row(system="DeepSpeed", kind="rival", refused="not installed"))
    found = {"environment": {"torch": "2.13", "load average": [0.1, 0.2]}}
    text = page({**found, "cases": [result.to_dict()]}, "python -m benchmarks")
    assert "| etr over dense floor, 8 experts, 500 tokens each or more | ≤ 1.10x | 1.05x |" in text
    assert "In no case of this run was another checked system faster." in text
    assert "No time for DeepSpeed: not installed." in text
    assert "- **DeepSpeed** (not installed):" in text
    assert targets_table([result]).columns[0] == "target"
    assert text.count("\n| :--- |") >= 2


def test_the_page_says_which_cases_were_left_out() -> None:
    results = [layer(dense=1.0, etr=1.05), layer(tokens=256)]
    results[1].rows.clear()
    absent = dataclasses.replace(results[1], left_out="it would take 9 s")
    values = [result.to_dict() for result in (results[0], absent)]
    text = page({"environment": {}, "cases": values}, "python -m benchmarks")
    assert f"Left out:\n\n- {absent.name}: it would take 9 s.\n" in text
    assert f"### {absent.name.replace('/', ', ')}" not in text


def test_results_survive_json() -> None:
    result = layer(dense=1.0, etr=1.05)
    assert CaseResult.from_dict(result.to_dict()) == result
