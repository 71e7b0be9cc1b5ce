"""Transforms on a single layer: what renumbering keeps, for every router."""

from __future__ import annotations

import math
import typing

import pytest
import torch

from etr.model import TRANSFORMS, LazyTensor
from etr.model.transform import Need, Renumber, Transform, holds_experts, largest, summed
from etr.moe import ROUTERS, MoE, MoEConfig, RoutingContext, attach
from etr.moe.watch import watch
from etr.systems import Devices, Plan
from etr.table import config_to_dict

E, H = 4, 16
ORDER = [2, 0, 3, 1]
"""Old number of each new expert, with ranks of one expert."""
VARIANTS = [
    *ROUTERS,
    "etr:frame=fixed",
    "etr:score=cosine",
    "etr:gate=sigmoid",
    "token_choice:bias=true",
    "token_choice:bias_update=sign",
]


def plan_of(*orders: list[int]) -> dict:
    ranks = torch.tensor(orders).argsort(dim=1)
    return Plan(rank_of_expert=ranks, devices=Devices(num_ranks=ranks.shape[1])).to_dict()


def config_of(router: str, **options: object) -> MoEConfig:
    options = {"num_shared_experts": 1, "shared_gate": True, **options}
    return MoEConfig(
        hidden_size=H,
        intermediate_size=8,
        num_experts=E,
        top_k=1 if router in ("locmoe", "baseline") else 2,
        router=ROUTERS.parse(router),
        backend="loop",
        **options,
    )


def trained(config: MoEConfig) -> MoE:
    """A layer whose state has moved."""
    torch.manual_seed(0)
    layer = MoE(config)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer, total_steps=4)
    for _ in range(3):
        output = layer(torch.randn(64, H), RoutingContext(token_ids=torch.arange(64)))
        (output.hidden_states.square().mean() + sum(output.losses.values())).backward()
        optimizer.step()
    return layer


def applied(method: Transform, layer: MoE, plan: object) -> MoE:
    tensors = {
        name: LazyTensor(name=name, shape=tuple(v.shape), dtype=v.dtype, make=v.clone)
        for name, v in layer.state_dict().items()
    }
    made = method.apply(tensors, plan, 0)
    other = MoE(method.options(layer.config, plan, 0))
    other.load_state_dict({name: tensor.make() for name, tensor in made.items()})
    return other


@pytest.mark.parametrize("router", VARIANTS)
@pytest.mark.parametrize("mode", ["threshold", "dropless"])
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_renumbering_keeps_the_function_or_is_refused(router, mode):
    """A router that goes by an expert's number must say so: this fails where it does not."""
    layer, plan, method = trained(config_of(router)), plan_of(ORDER), Renumber()
    if layer.traits.numbered:
        with pytest.raises(ValueError, match="by their numbers"):
            method.check(plan, [layer.config])
        return
    method.check(plan, [layer.config])
    other = applied(method, layer, plan)
    x, context = torch.randn(200, H), RoutingContext(token_ids=torch.arange(200))
    seen = []
    for each in (layer, other):
        each.eval()
        each.eval_selection = mode
        with watch(each, lambda place, view: seen.append(view)):
            each.out = each(x, context).hidden_states
    old = torch.tensor(ORDER)
    assert (
        torch.equal(seen[1].selection.kept, seen[0].selection.kept)
        or not layer.traits.tokens_choose
    )
    if layer.traits.tokens_choose:
        valid = seen[0].routing.valid
        assert torch.equal(old[seen[1].routing.expert[valid]], seen[0].routing.expert[valid])
    counts = [view.selection.num_tokens_per_expert for view in seen]
    assert torch.equal(counts[1], counts[0][old])
    torch.testing.assert_close(other.out, layer.out, rtol=1e-5, atol=1e-6)
    assert not torch.equal(layer.experts.down_proj, other.experts.down_proj)
    for name in ("threshold", "histogram", "chosen", "kept"):
        state, moved = (getattr(each.calibration, name) for each in (layer, other))
        assert torch.equal(moved, state[old])
    assert torch.equal(other.state.previous_load, layer.state.previous_load[old])


def test_the_state_of_a_trained_layer_is_not_even():
    """Or the test above would say little."""
    layer = trained(config_of("token_choice:bias_update=sign"))
    assert layer.state.previous_load.unique().numel() > 1
    assert layer.router.selection.bias.unique().numel() > 1
    assert layer.calibration.threshold.isfinite().any()


def test_groups_stay_whole():
    layer = config_of("token_choice:num_groups=2,top_groups=1")
    Renumber().check(plan_of([2, 3, 1, 0]), [layer])  # groups change places, experts within them
    with pytest.raises(ValueError, match=r"tears groups of layer 0 apart: .* 2 groups"):
        Renumber().check(plan_of(ORDER), [layer])
    whole = trained(layer)
    other = applied(Renumber(), whole, plan_of([2, 3, 1, 0]))
    x = torch.randn(100, H)
    old, new = whole.eval()(x).hidden_states, other.eval()(x).hidden_states
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


def test_plans_for_other_models_are_refused():
    layers = [config_of("etr")] * 2
    with pytest.raises(ValueError, match=r"plan is for 1 layers of 4 experts, and the model has 2"):
        Renumber().check(plan_of(ORDER), layers)
    with pytest.raises(
        ValueError, match=r"for 2 layers of 2 experts, and the model has 2 layers of 4"
    ):
        Renumber().check(plan_of([0, 1], [1, 0]), layers)
    with pytest.raises(ValueError, match="give the file of etr plan"):
        Renumber().plan([{}, {}], layers)
    uneven = Plan(rank_of_expert=torch.tensor([[0, 0, 0, 1]]), devices=Devices(num_ranks=2))
    with pytest.raises(ValueError, match="different numbers of experts"):
        Renumber().check(uneven.to_dict(), layers[:1])


def test_experts_that_are_not_uniform_are_refused():
    with pytest.raises(ValueError, match="experts='nulls': only uniform experts can be renumbered"):
        Renumber().check(plan_of(ORDER), [config_of("token_choice", experts="nulls")])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_is_a_frozen_config_with_a_summary(name):
    method = TRANSFORMS.parse(name)
    assert TRANSFORMS.from_dict(config_to_dict(method)) == method
    assert method.summary
    assert set(method.needs) <= set(typing.get_args(Need))
    assert method.inspects <= ("inspect" in vars(type(method)))
    assert method.measures <= bool({"observe", "inspect"} & vars(type(method)).keys())


def test_tensors_of_experts():
    assert holds_experts("router.weight", (4, 16), 4)
    assert holds_experts("calibration.threshold", (4,), 4)
    assert not holds_experts("shared_experts.up_proj", (1, 8, 16), 1)
    assert not holds_experts("state.step", (), 4)
    assert not holds_experts("router.log_temperature", (1,), 4)


def test_lazy_tensors_are_made_once_and_say_what_they_become():
    calls = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.arange(6.0).view(2, 3)

    lazy = LazyTensor(name="x", shape=(2, 3), dtype=torch.float32, make=make)
    half = lazy.then(lambda v: v[:1].half(), shape=(1, 3), dtype=torch.float16)
    assert (half.num_bytes, lazy.num_bytes, calls) == (6, 24, [])
    assert half.make().tolist() == [[0, 1, 2]]
    assert calls == [1]


def test_statistics_add_up():
    total = summed(summed({}, {"a": torch.tensor(1)}), {"a": torch.tensor(2), "b": torch.tensor(3)})
    assert {name: int(value) for name, value in total.items()} == {"a": 3, "b": 3}
    assert math.isclose(float(total["a"]), 3)
    peak = largest({"a": torch.tensor([1, 5])}, {"a": torch.tensor([2, 3]), "b": torch.tensor([4])})
    assert {name: value.tolist() for name, value in peak.items()} == {"a": [2, 5], "b": [4]}
