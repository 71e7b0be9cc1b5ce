"""Every registered system that is installed passes its check, and the check can fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, all_cases
from benchmarks.check import Reference, check, plain_moe, row_error
from benchmarks.measures import MEASURES
from benchmarks.measures.layer import measure_systems, traced
from benchmarks.results import Row
from benchmarks.settings import Settings
from benchmarks.systems import SYSTEMS, Built, Problem, System, make_problem
from benchmarks.systems.base import linear_routing
from benchmarks.systems.floors import DENSE, PER_EXPERT
from benchmarks.systems.gpu_kernels import interleave, swap_halves
from benchmarks.systems.layer import default_backend, make_layer
from etr.moe import RoutingContext, reference

CPU = torch.device("cpu")
SETTINGS = Settings(device=CPU, threads=1)
CHECKED = [name for name, system in SYSTEMS.items() if system.kind != "floor"]


def small_case(top_k: int = 2, dtype: str = "float32", num_experts: int = 4) -> Case:
    return Case(
        group="layer",
        num_tokens=48,
        hidden_size=32,
        intermediate_size=16,
        num_experts=num_experts,
        top_k=top_k,
        dtype=dtype,
        budget=0.0,
    )


def small_problem(top_k: int = 2, dtype: str = "float32", num_experts: int = 4) -> Problem:
    return make_problem(small_case(top_k, dtype, num_experts), CPU)


def reference_of(problem: Problem) -> Reference:
    return Reference(problem.x, problem.upstream, problem.up, problem.down)


def built_or_skip(name: str, problem: Problem) -> Built:
    system = SYSTEMS[name]
    reason = system.missing(CPU) or system.refuses(problem.case)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return system.build(problem)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 4), (2, 4), (4, 16)])
@pytest.mark.parametrize("name", CHECKED)
def test_systems_pass_their_check(name: str, top_k: int, num_experts: int, dtype: str) -> None:
    if name == "st-moe-pytorch" and dtype == "bfloat16":
        pytest.skip("it mixes dtypes in bfloat16")
    problem = small_problem(top_k, dtype, num_experts)
    built = built_or_skip(name, problem)
    assert check(built, problem.x, problem.upstream, reference_of(problem)) == ""
    row, _ = traced(Row(system=name, kind="rival"), built, problem)
    assert row.kept_pairs == problem.case.num_tokens * top_k
    assert row.drop_rate == 0
    if dtype == "float32":  # in bfloat16 some route in half precision
        assert row.routing == "same"


@pytest.mark.parametrize("name", CHECKED)
def test_the_timed_call_is_the_checked_one(name: str) -> None:
    problem = small_problem()
    built = built_or_skip(name, problem)
    assert built.traced is not None
    torch.testing.assert_close(built.call(problem.x), built.traced(problem.x)[0])


def broken(kind: str) -> Built:
    """The layer with one mistake."""
    problem = small_problem()
    built = SYSTEMS["etr loop"].build(problem)
    assert built.traced is not None
    right = built.traced

    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        y, weight = right(x)
        if kind == "a token":
            y = torch.cat((y[1:2], y[1:]))
        if kind == "a gradient of the input":
            y = y.detach() + (y - y.detach()) * 1.1
        if kind == "an expert's gradient":
            y = y + 0.1 * (problem.down[0].sum() - problem.down[0].sum().detach())
        return y, weight

    return dataclasses.replace(built, traced=wrong)


@pytest.mark.parametrize("kind", ["a token", "a gradient of the input", "an expert's gradient"])
def test_the_check_finds_a_mistake(kind: str) -> None:
    problem = small_problem()
    assert check(broken("none"), problem.x, problem.upstream, reference_of(problem)) == ""
    assert "differs" in check(broken(kind), problem.x, problem.upstream, reference_of(problem))


def test_what_fails_has_no_time() -> None:
    """Neither a wrong system nor one that raises, while the others are timed."""

    def raising(problem: Problem) -> Built:
        raise RuntimeError("no such kernel\nmore")

    def system(name: str, build: object, **values: object) -> System:
        return System(name=name, kind="rival", summary="", build=build, **values)  # type: ignore[arg-type]

    systems = [
        SYSTEMS[DENSE],
        SYSTEMS["etr loop"],
        system("wrong", lambda problem: broken("a token")),
        system("raising", raising),
        system("absent", raising, requires=("no_such_module_at_all",)),
        system("unreadable", lambda p: dataclasses.replace(broken("none"), traced=None)),
        system("refusing", raising, refuses=lambda case: "too large"),
    ]
    rows = {
        row.system: row
        for row in measure_systems(small_case(), SETTINGS, lambda note: None, systems)
    }
    assert rows["etr loop"].refused == ""
    assert rows["etr loop"].spread_of("forward+backward") is not None
    reasons = {name: row.refused for name, row in rows.items() if row.refused}
    assert reasons["wrong"].startswith("failed its check: output differs")
    assert reasons["raising"] == "RuntimeError: no such kernel"
    assert reasons["absent"] == "not installed"
    assert "cannot be checked" in reasons["unreadable"]
    assert reasons["refusing"] == "too large"
    assert not any(rows[name].seconds for name in reasons)


def test_plain_loops_agree_with_the_oracle_of_the_layer() -> None:
    problem = small_problem()
    layer = make_layer(problem)
    routing, limit = layer.route(problem.x, RoutingContext())
    expected, kept = reference.moe(layer, problem.x, routing, layer.keep(routing, limit).limit)
    index, _ = linear_routing(problem.x, problem.gate, problem.case.top_k)
    assert kept == {(t, int(e)) for t, row in enumerate(index) for e in row}
    y = plain_moe(problem.x, problem.weight, problem.up, problem.down)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [DENSE, PER_EXPERT])
def test_floors_multiply_as_much_as_the_experts(name: str) -> None:
    problem = small_problem()
    floor = SYSTEMS[name].build(problem)
    assert floor.inputs is not None
    with FlopCounterMode(display=False) as counted:
        floor.call(*floor.inputs[0])
    case = problem.case
    pairs = case.num_tokens * case.top_k
    assert counted.get_total_flops() == 2 * 3 * pairs * case.hidden_size * case.intermediate_size


def test_systems_share_the_weights() -> None:
    """No copies: what differs is the computation."""
    problem = small_problem()
    shared = problem.up.untyped_storage().data_ptr()
    for name in ("etr loop", "etr grouped_mm", "transformers eager", "GShard one-hot", PER_EXPERT):
        built = built_or_skip(name, problem)
        assert {leaf.untyped_storage().data_ptr() for leaf in built.up} == {shared}


def test_one_backend_is_the_default() -> None:
    problem = small_problem()
    built = {name: built_or_skip(name, problem) for name in SYSTEMS if name.startswith("etr ")}
    assert [name for name, one in built.items() if one.default] == [
        f"etr {default_backend(problem)}"
    ]


@pytest.mark.parametrize("group", [None, 16])
def test_max_load_is_the_largest_of_any_group(group: int | None) -> None:
    problem = small_problem()
    chosen = problem.weight != 0
    parts = chosen.split(group or len(chosen))
    assert problem.max_load(group) == max(int(part.sum(0).max()) for part in parts)


def test_row_error_sees_one_wrong_row() -> None:
    expected = torch.randn(1000, 8)
    found = expected.clone()
    assert row_error(found, expected) == 0
    found[17] = -found[17]
    assert row_error(found, expected) > 0.5


def test_a_foreign_layout_of_weights_is_undone() -> None:
    up = torch.randn(3, 8, 4)
    assert torch.equal(swap_halves(swap_halves(up)), up)
    alternating = interleave(up)
    back = torch.cat((alternating[:, ::2], alternating[:, 1::2]), dim=1)
    assert torch.equal(back, up)
    assert torch.equal(alternating[:, 1], up[:, 4])


def test_names_of_cases_are_unique() -> None:
    names = [case.slug for case in all_cases()]
    assert len(names) == len(set(names))
    groups = {case.group for case in all_cases()}
    assert groups == set(MEASURES)
