"""Super Experts: who stands out, and that finding them changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_lm import made, plan_in, same_weights, save, small, tokens

from etr.hf import EtrForCausalLM
from etr.hf.measure import measure
from etr.methods.super_experts import SuperExperts
from etr.moe import moe_layers
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def planted(model: EtrForCausalLM) -> EtrForCausalLM:
    """A neuron of expert 3 of the first layer fires on one token of the text."""
    seen: list[LayerView] = []
    with watch(model, lambda place, view: seen.append(view)), torch.no_grad():
        model(**tokens()[0])
    routing = seen[0].routing
    token = routing.token[(routing.expert == 3).nonzero()[0, 0]]
    along = torch.nn.functional.normalize(seen[0].x[token], dim=0)
    experts = moe_layers(model)[0].experts
    with torch.no_grad():
        experts.gate_up_proj[3, [0, 12]] = 6 * along
        experts.down_proj[3, :, 0] = 0.0
        experts.down_proj[3, 7, 0] = 8.0
    return model


@pytest.mark.criterion
def test_a_planted_expert_is_found_alone(tmp_path: Path) -> None:
    """An expert of a small untrained model in which one neuron's weights are planted so that it
    fires over 100 times as strongly as any other is found, and found alone; without it nothing is
    found, and finding changes no bit of the weights."""
    method = SuperExperts(layers=1.0)
    plain = made(save(small(), tmp_path / "a"), tmp_path / "b", method, batches=tokens())[0]
    assert plan_in(tmp_path / "b")["found"] == []
    assert same_weights(plain, small())
    source = save(planted(small()), tmp_path / "c")
    found, report = made(source, tmp_path / "d", method, batches=tokens(), compare=True)
    plan = plan_in(tmp_path / "d")
    assert plan["found"] == [[0, 3]]
    assert report.plan.endswith("protect=0.3")
    peaks = torch.tensor(plan["largest"]).flatten().sort().values
    assert peaks[-1] > 100 * peaks[-2]
    assert same_weights(found, planted(small()))


def table(*outliers: tuple[int, int, float], base: float = 0.2, step: float = 0.01) -> list:
    values = base + step * torch.arange(32.0).double().view(4, 8)
    for layer, expert, value in outliers:
        values[layer, expert] = value
    return list(values)


def test_by_hand() -> None:
    two = table((1, 2, 9.0), (3, 7, 50.0))
    assert SuperExperts().found(two) == [[1, 2]]  # the last of 4 layers is not looked at
    assert SuperExperts(layers=1.0).found(two) == [[3, 7]]
    near = table((0, 1, 5.0), (0, 0, 0.45), step=0.0)
    assert SuperExperts(percentile=90).found(near) == [[0, 1]]
    assert SuperExperts(median=0).found(table()) == [[2, 7]]  # one is always found without it
    assert SuperExperts().found(table()) == []


@pytest.mark.parametrize("scale", [1e-3, 0.5, 7.0])
def test_a_scale_of_all_outputs_changes_nothing(scale: float) -> None:
    two = table((1, 2, 9.0), (3, 7, 50.0))
    for method in (SuperExperts(), SuperExperts(median=0, layers=1.0)):
        assert method.found([row * scale for row in two]) == method.found(two)


def test_experts_that_no_token_chose_are_never_found() -> None:
    assert SuperExperts(median=0).found(list(torch.zeros(2, 3))) == []
    all_seen = SuperExperts(median=0, percentile=0, share=0, layers=1)
    assert all_seen.found([torch.tensor([0.0, 1])]) == [[0, 1]]
    assert SuperExperts(median=0).found([torch.ones(1)] * 4) == []  # the percentile is 1 itself


@pytest.mark.parametrize("silence", ["found", "random"])
def test_silencing_is_of_equally_many(silence: str, tmp_path: Path) -> None:
    source = save(planted(small()), tmp_path / "a")
    method = SuperExperts(layers=1.0, silence=silence)
    model, report = made(source, tmp_path / "b", method, batches=tokens())
    plan, silent = plan_in(tmp_path / "b"), []
    for place, layer in enumerate(moe_layers(model)):
        rows = layer.experts.down_proj.flatten(1).abs().amax(1)
        silent += [[place, e] for e in (rows == 0).nonzero().flatten().tolist()]
    assert silent == [[p, e] for p, numbers in enumerate(plan["silenced"]) for e in numbers]
    assert len(silent) == 1
    assert (silent == plan["found"]) == (silence == "found")
    assert not report.same_function


def test_peaks_are_those_of_plain_loops() -> None:
    """Over both batches, of every expert that a token chose."""
    model = small().requires_grad_(False)
    found = measure(model, SuperExperts(), tokens())
    for place, layer in enumerate(moe_layers(model)):
        peaks = [0.0] * 4
        for given in tokens():
            views: list[LayerView] = []
            with watch(model, lambda at, view, to=views: to.append(view)), torch.no_grad():
                model(**given)
            view = views[place]
            params = layer.experts.params(torch.float64)
            for token, expert in zip(view.routing.token, view.routing.expert.tolist(), strict=True):
                gate, up = (params.up[expert] @ view.x[token]).chunk(2)
                out = params.down[expert] @ (gate * gate.sigmoid() * up)
                peaks[expert] = max(peaks[expert], float(out.abs().max()))
        torch.testing.assert_close(found[place]["largest"].tolist(), peaks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"percentile": 101}, "percentile=101 must lie between 0 and 100"),
        ({"silence": "all"}, "silence='all' must be one of"),
        ({"protect": "3"}, "must be experts as layer.expert"),
        ({"median": -1}, "median=-1 must be at least 0"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SuperExperts(**options)
