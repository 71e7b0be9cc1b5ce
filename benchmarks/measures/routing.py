"""What routing takes of the layer: the same stages with experts that hand back their rows."""

from __future__ import annotations

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measures.steps import OnNote, run_rounds, step
from benchmarks.results import Row
from benchmarks.settings import Settings
from benchmarks.systems import make_problem
from benchmarks.systems.layer import make_layer
from etr.moe import EtrRouter, MoE, RoutingContext
from etr.moe.exchange import Traffic
from etr.moe.routing import Routing, Selection

LAYER = "layer"
ROUTING = "routing: affinity, selection, permutation"
CHOICE = "of it affinity and selection"
GRAP_ROUTING = "routing with GrAP (frame fixed)"


class RoutingOnly(MoE):
    """The layer without its feed-forward: rows travel to their experts and back.

    Gathering and summing are steps of their own here; a backend that does them inside its matrix
    products pays less, so this is an upper bound.
    """

    def run_experts(
        self, x: Tensor, routing: Routing, selection: Selection, traffic: Traffic | None = None
    ) -> Tensor:
        padded = self.backend_for(routing, selection).padded
        rows, handle = self.dispatcher.dispatch(x, routing, selection, padded=padded)
        return self.dispatcher.combine(rows, handle)


def measure_routing(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of the layer with its own router, of its routing, and of the choosing inside that."""
    problem = make_problem(case, settings.device)
    layer = make_layer(problem, router="etr")
    hollow = make_layer(problem, router="etr", kind=RoutingOnly)
    grap = make_layer(problem, router=EtrRouter(frame="fixed"), kind=RoutingOnly)

    def choose(x: Tensor) -> Tensor:
        routing, limit = layer.route(x, RoutingContext())
        return layer.keep(routing, limit).selection.combine_weight

    weight_grad = problem.upstream[:, : case.top_k].flatten().float()
    leaves = [*layer.parameters(), *hollow.parameters()]
    x, upstream = [problem.x], [problem.upstream]
    steps = {
        LAYER: lambda: step(lambda t: layer(t).hidden_states, x, upstream, leaves),
        ROUTING: lambda: step(lambda t: hollow(t).hidden_states, x, upstream, leaves),
        GRAP_ROUTING: lambda: step(lambda t: grap(t).hidden_states, x, upstream, leaves),
        CHOICE: lambda: step(choose, x, [weight_grad], leaves),
    }
    found = run_rounds(steps, case.budget, on_note)
    return [
        Row(system=name, kind="ours", default=name == LAYER, seconds=found[name]) for name in steps
    ]
