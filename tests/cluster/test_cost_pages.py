"""The pages of predictions are what their commands write, and plans are what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from etr.cli import main
from etr.cli._cluster_cost import TORNADO
from etr.cluster import paper, scale
from etr.cluster.bench.plan import ROWS, BenchConfig
from etr.cluster.calibration import (
    MOST_MEAN,
    MOST_WORST,
    Calibration,
    Fitted,
    calibrate,
    fit,
    predicted_seconds,
    timings_of,
)
from etr.cluster.cost import (
    Cluster,
    Layout,
    ModelShape,
    RoutingShape,
    known,
    read_described,
    routing_of_trace,
)
from etr.cluster.plan import PlanConfig, plan, progress_of
from etr.cluster.scale import Observed, ScaleConfig, Way, simulate, slope
from etr.trace import LayerRouting, TokenRows, TraceInfo, TraceWriter

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = json.loads((DOCS / "results/cluster.json").read_text())


def test_the_paper_page_and_its_picture_are_made_anew(tmp_path):
    assert main(["cluster", "paper", "--page", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == (DOCS / "results/paper-clusters.md").read_text()
    drawn = (tmp_path / TORNADO).read_text()
    for assumption in paper.ASSUMED.values():
        assert assumption.words.split(",")[0][:20] in drawn
    assert drawn == (DOCS / "results" / TORNADO).read_text()


def test_the_page_of_the_cost_model_is_made_anew():
    assert scale.page(ScaleConfig(), RESULTS) == (DOCS / "results/cost-model.md").read_text()


def test_layouts_of_the_paper_take_its_devices():
    model = read_described(ModelShape, "mixtral-8x7b")
    for devices, layout in paper.LAYOUTS.items():
        assert layout.num_devices == devices
        assert paper.BATCH % layout.data == model.num_experts % layout.expert == 0


def test_the_paper_router_is_compared_by_tokens_that_experts_keep():
    """A padded buffer with room for all keeps as many as choose an expert, not its places."""
    found = paper.outcomes({**paper.base(), "baseline_factor": 8.0, "hottest": 4.0})
    assert [one["baseline"].kept for one in found.values()] == pytest.approx([1.0] * 3)
    assert all(one["ETR"].kept < 1 for one in found.values())


# --- calibration ----------------------------------------------------------------------------------


def test_steps_kept_out_of_the_fit_are_predicted():
    found = calibrate(RESULTS, BenchConfig())
    errors = np.abs(found.errors(found.kept_out))
    assert errors.mean() < MOST_MEAN
    assert errors.max() < MOST_WORST
    assert {timing.group for timing in found.used} == {"2x2, own text, ratio 1"}
    assert {timing.group.split(",")[0] for timing in found.kept_out} == {"2x2", "4x1"}
    assert len(found.used) + len(found.kept_out) == len(timings_of(RESULTS, BenchConfig()))


def test_a_fit_finds_the_values_that_made_the_times():
    true = Fitted(
        latency_seconds=2e-3,
        between_bytes_per_second=2e7,
        compute_ratio=1.1,
        start_seconds=3e-3,
        rest_seconds=4e-3,
    )
    timings = [
        dataclasses.replace(timing, seconds=predicted_seconds(timing, true))
        for timing in timings_of(RESULTS, BenchConfig())[:60]
    ]
    found = fit(timings, BenchConfig())
    np.testing.assert_allclose(list(vars(found).values()), list(vars(true).values()), rtol=1e-3)


def test_orders_and_signs_of_what_is_kept_out():
    found = calibrate(RESULTS, BenchConfig())
    cells = {(t.group, t.variant): t for t in found.kept_out if t.shape == "4x1"}
    some = sorted(list(cells.values())[:3], key=lambda t: predicted_seconds(t, found.fitted))
    told = [predicted_seconds(timing, found.fitted) for timing in some]
    assert told == sorted(set(told))

    def measured(*seconds: float) -> Calibration:
        pairs = zip(some, seconds, strict=True)
        kept_out = [dataclasses.replace(timing, seconds=s) for timing, s in pairs]
        return dataclasses.replace(found, kept_out=kept_out)

    exact = measured(*told)
    assert exact.orders() == (3, 3, [])
    assert exact.by_shape()["4x1"].tolist() == [0.0] * 3
    longer = measured(*(2 * seconds for seconds in told))
    assert longer.by_shape()["4x1"].tolist() == pytest.approx([-0.5] * 3)
    swapped, apart = measured(told[0], told[2], told[1]), told[2] / told[1] - 1
    names = f"{some[1].variant} and {some[2].variant}"
    said = f"{names} ({some[0].group}; measured {apart:.1%} apart)"
    assert swapped.orders() == (3, 2, [said])
    # What is predicted equal is not in any order.
    sent = ROWS[some[0].variant].dispatch
    name = next(n for n, row in ROWS.items() if n != some[0].variant and row.dispatch == sent)
    twin = dataclasses.replace(some[0], variant=name, seconds=2 * told[0])
    same = dataclasses.replace(found, kept_out=[exact.kept_out[0], twin])
    assert same.orders()[:2] == (1, 0)
    assert same.orders()[2][0].endswith("measured 50.0% apart, predicted equal)")


# --- scale ----------------------------------------------------------------------------------------


def test_simulated_groups_without_a_network_or_chance():
    """An even load, one speed, a free network: the time of the products, at every size."""
    config = ScaleConfig(devices=64, experts=64, straggler_sigma=0.0, tokens=1 << 16, layers=1)
    model = dataclasses.replace(read_described(ModelShape, config.model), num_experts=64)
    known_cluster = read_described(Cluster, config.cluster)
    free = dataclasses.replace(
        known_cluster.links,
        latency_seconds=0.0,
        message_seconds=0.0,
        within_bytes_per_second=float("inf"),
        between_bytes_per_second=float("inf"),
    )
    cluster = dataclasses.replace(known_cluster, links=free)
    observed = Observed(loads=np.ones(3), odds=4.0)
    for ranks in (8, 64):
        found = simulate(config, model, cluster, observed, ranks)["padded 1.1"]
        rows = np.ceil(1.1 * ranks * config.tokens * 8 / 64)
        device = cluster.device
        want = device.product_seconds(rows, 2 * model.expert_size, model.hidden_size, 2)
        want += device.product_seconds(rows, model.hidden_size, model.expert_size, 2)
        assert found.seconds == pytest.approx(3 * float(want) * 64 / ranks)
        assert found.network_seconds == 0
        assert found.imbalance == 1


def test_ranks_that_share_a_link_inside_a_node_wait_for_each_other():
    config = ScaleConfig(devices=8, experts=64, straggler_sigma=0.0, tokens=1 << 10, layers=1)
    model = dataclasses.replace(read_described(ModelShape, config.model), num_experts=64)
    cluster = read_described(Cluster, config.cluster)
    observed = Observed(loads=np.ones(3), odds=4.0)
    times = []
    for shared in (False, True):
        links = dataclasses.replace(
            cluster.links, latency_seconds=0.0, message_seconds=0.0, within_is_shared=shared
        )
        found = simulate(config, model, dataclasses.replace(cluster, links=links), observed, 8)
        times.append(found["padded 1.1"].network_seconds)
    assert times[1] == pytest.approx(8 * times[0])


def test_copies_of_hot_experts_even_the_ranks():
    load = np.array([8.0, 1, 1, 1, 1, 1, 1, 2])
    rows = 10 * load[None]
    held = scale._replicated(rows, load, 4)
    assert held.shape == (1, 4, 3)
    assert held.sum() == rows.sum()
    assert held.sum(2).max() < rows.reshape(1, 4, 2).sum(2).max()


def test_local_share_follows_the_odds():
    observed = Observed(loads=np.ones(1), odds=4.0)
    assert observed.share_on_node(2) == 0.8
    assert Observed(loads=np.ones(1), odds=1.0).share_on_node(16) == 1 / 16
    assert slope([8, 16, 32], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert {way.padded for way in scale.WAYS.values()} == {True, False}
    assert Way().chunks > 1


# --- plan -----------------------------------------------------------------------------------------


def test_the_fastest_layout_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    given = ["--tensor", "4", "--batch", "64", "--routings", "padded", "etr"]
    assert main(["cluster", "plan", *given, "--pipeline", "4", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [one["routing"]["name"] for one in found] == [
        "linear 1.1, padded",
        "etr 0.4 to 1.1, chunked",
    ]
    for one in found:
        assert Layout(**one["layout"]).num_devices == 32
        assert sum(v for k, v in one["memory"].items()) < 80e9
        assert f"{one['seconds']:.3f}" in text
        assert sum(one["parts_seconds"].values()) == pytest.approx(one["seconds"])
    assert found[1]["seconds"] < found[0]["seconds"]
    assert "stage  3" in text
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for one in found:
        assert one["routing"]["name"] in (tmp_path / "timeline.svg").read_text()
    assert {event["pid"] for event in events} == {0, 1}


def test_a_plan_takes_load_and_shares_off_a_trace(tmp_path):
    info = TraceInfo(
        num_experts=4, num_layers=2, top_k=1, router="etr", selection="threshold",
        affinity="score", source="x",
    )  # fmt: skip
    tokens = TokenRows(
        sequence=np.array([0, 0, 1, 1]),
        position=np.array([0, 1, 0, 1]),
        token_id=np.arange(4),
        text=["a"] * 4,
        domain=["prose"] * 4,
    )

    def layer(experts: list[int], kept: list[bool]) -> LayerRouting:
        return LayerRouting(
            counts=np.ones(4, dtype=np.int64),
            experts=np.array(experts),
            weights=np.ones(4, dtype=np.float32),
            affinities=None,
            kept=np.array(kept),
        )

    path = tmp_path / "trace.parquet"
    with TraceWriter(path, info) as writer:
        writer.write(
            tokens,
            [layer([0, 0, 0, 3], [True, True, False, True]), layer([2, 2, 2, 1], [True] * 4)],
        )
    base = read_described(RoutingShape, "unpadded")
    found = routing_of_trace(path, base, num_nodes=2)
    # Each layer gives 0, 0, 1, 3 by rank of the load, whichever experts these are.
    assert found.load == (0.0, 0.0, 1.0, 3.0)
    assert found.kept_share == ((0.0, 7 / 8),)
    # Kept and near: tokens 0, 1 and 3 of the first layer, 2 of the second.
    assert found.local_share == 4 / 7
    assert (found.name, found.dispatch) == (base.name, base.dispatch)
    assert routing_of_trace(path, base).local_share is None
    assert sorted(found.load_of(4)) == [0.0, 0.0, 0.25, 0.75]


def test_no_faster_layout_was_passed_over():
    config = PlanConfig(tensor=4, pipeline=4, data=2, batch=32, routings=("padded",))
    _, _, (best,) = plan(config)
    assert progress_of(best.routing) == (1.0,)
    for expert in (1, 2):
        _, _, (other,) = plan(dataclasses.replace(config, expert=expert, expert_tensor=4))
        assert other.seconds >= best.seconds


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "deepseek-v3", "tensor": 8, "pipeline": 4}, "fits in no layout"),
        ({"pipeline": 3, "batch": 7}, "no layout of 32 devices"),
    ],
)
def test_a_plan_that_cannot_be(values, said):
    with pytest.raises(ValueError, match=said):
        plan(PlanConfig(routings=("padded",), **values))


def test_routings_that_come_with_the_library():
    found = {name: read_described(RoutingShape, name) for name in known(RoutingShape)}
    assert found.keys() == {"padded", "unpadded", "etr", "etr_paper"}
    assert found["etr"].factor_at(0.0) < found["etr"].factor_at(1.0)
    assert found["etr_paper"].factor_at(0.0) > found["etr_paper"].factor_at(1.0)
