"""EASY-EP: scores by hand, near-dead experts, what stays, and where it may not be pruned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_lm import family, made, plan_in, same_weights, save, small, tokens

from etr.hf import EtrForCausalLM
from etr.hf.convert import convert
from etr.hf.loading import load_causal
from etr.hf.measure import measure
from etr.hf.transform import transform
from etr.methods.easy_ep import EasyEp, scores_of
from etr.moe import MoEConfig, moe_layers
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def test_by_hand() -> None:
    """Before [1, 0]; outputs [0, 2] and [-1, 0] of weights .6, .4: after [.6, 1.2]."""
    rows, expert = torch.tensor([[0.0, 2], [-1, 0]]), torch.tensor([0, 1])
    given = (torch.tensor([0.6, 0.4]), torch.tensor([0, 0]), expert, 3)
    found = scores_of(torch.tensor([[1.0, 0]]), rows, *given)
    turned = 1 - 0.6 / (0.6**2 + 1.2**2) ** 0.5
    assert turned == pytest.approx(0.5528, abs=1e-4)
    torch.testing.assert_close(found, torch.tensor([1.2 * turned, 0.4 * turned, 0.0]))
    torch.testing.assert_close(found[:2], torch.tensor([0.6633, 0.2211]), atol=1e-4, rtol=0)
    along = scores_of(torch.tensor([[1.0, 0]]), torch.tensor([[3.0, 0], [2, 0]]), *given)
    assert along.tolist() == [0, 0, 0]  # nothing is turned


def near_dead(model: EtrForCausalLM, experts: tuple[int, ...]) -> EtrForCausalLM:
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.experts.down_proj[list(experts)] *= 1e-4
    return model


def gates_and_choices(model: EtrForCausalLM) -> torch.Tensor:
    """Of each expert of the first layer, over the text: the sum of gates, and how many, [2, 4]."""
    found = torch.zeros(2, 4).double()

    def see(place: int, view: LayerView) -> None:
        if place == 0:
            weight = view.selection.combine_weight.double()
            both = torch.stack([weight, torch.ones_like(weight)])
            found.index_add_(1, view.routing.expert, both)

    with watch(model, see), torch.no_grad():
        for given in tokens():
            model(**given)
    return found


@pytest.mark.criterion
def test_near_dead_experts_go_first(tmp_path: Path) -> None:
    """Two of 4 experts that are made near dead (outputs times 1e-4) but are chosen as often as
    before have the 2 lowest scores, where the sum of gates alone does not tell them; keeping all
    experts is the identity, bit for bit."""
    before = gates_and_choices(small())
    dead = tuple(sorted(before[0].topk(2).indices.tolist()))  # they weigh most
    assert torch.equal(gates_and_choices(near_dead(small(), dead)), before)
    source = save(near_dead(small(), dead), tmp_path / "a")
    model, report = made(source, tmp_path / "b", EasyEp(), batches=tokens(), compare=True)
    plan = plan_in(tmp_path / "b")
    assert plan["keep"][0] == sorted({0, 1, 2, 3} - set(dead))
    lowest = torch.tensor(plan["score"][0]).argsort()[:2]
    assert tuple(lowest.sort().values.tolist()) == dead
    assert (report.plan, report.same_function) == ("keeps 4 of 8 experts", False)
    assert [layer.config.num_experts for layer in moe_layers(model)] == [2, 2]
    whole, report = made(source, tmp_path / "c", EasyEp(keep=1.0), batches=tokens(), compare=True)
    assert report.same_function
    assert same_weights(whole, near_dead(small(), dead))


def test_scores_are_those_of_the_residual_stream() -> None:
    """What the model adds the layer to, in its own unit."""
    model = small()
    (given, _) = tokens()
    hidden: list[torch.Tensor] = []
    layer = model.model.layers[0]
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, x: hidden.append(x[0]))
    layer.register_forward_hook(lambda m, x, y: hidden.append(y[0] if isinstance(y, tuple) else y))
    found = measure(model, EasyEp(), [given])[0]
    before, after = (value.detach().flatten(0, 1) for value in hidden)
    turned = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
    views: list[LayerView] = []
    with watch(model, lambda at, view: views.append(view), ["rows"]), torch.no_grad():
        model(**given)
    pairs = views[0]
    want = torch.zeros(4).double()
    for pair, expert in enumerate(pairs.routing.expert.tolist()):
        length = pairs.rows[pair].norm() * pairs.selection.combine_weight[pair]
        want[expert] += length * turned[pairs.routing.token[pair]].clamp_min(0)
    torch.testing.assert_close(found["score"], want)


def test_a_pruned_family_serves_in_plain_transformers(tmp_path: Path) -> None:
    """In its own format, with the logits that this library has of the same experts."""
    source = family(tmp_path / "a")
    transform(source, tmp_path / "b", EasyEp(), batches=tokens())
    theirs = load_causal(tmp_path / "b")
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert theirs.config.num_local_experts == 2
    convert(source, tmp_path / "c")
    ours, _ = made(tmp_path / "c", tmp_path / "d", EasyEp(), plan=plan_in(tmp_path / "b"))
    (given, _) = tokens(seed=3)
    with torch.no_grad():
        found, want = theirs(**given).logits, ours(**given).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def config(**options: object) -> MoEConfig:
    values = {"num_experts": 4, "top_k": 2, "router": "token_choice", **options}
    return MoEConfig(hidden_size=8, intermediate_size=4, **values)


STATS = {"score": torch.tensor([4.0, 3, 2, 1]), "tokens": torch.tensor([5, 0, 5, 2])}


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({}, [0, 1]),
        ({"min_tokens": 3}, [1, 3]),  # both were not seen enough, so that they stay
        ({"unseen": "drop"}, [0, 2]),
        ({"unseen": "drop", "min_tokens": 3}, [0, 2]),
        ({"protect": "0.3"}, [1, 3]),
        ({"keep": 0.01}, [1]),
    ],
)
def test_unseen_and_protected_experts(options: dict, keep: list[int]) -> None:
    layers = [config(top_k=1)]
    assert EasyEp(**options).plan([STATS], layers)["keep"] == [keep]


def test_equal_scores_keep_the_first() -> None:
    stats = {"score": torch.ones(4), "tokens": torch.ones(4)}
    assert EasyEp().plan([stats], [config()])["keep"] == [[0, 1]]


def test_groups_keep_equally_many() -> None:
    layer = config(router="token_choice:num_groups=2,top_groups=1", top_k=1)
    assert EasyEp(min_tokens=0).plan([STATS], [layer])["keep"] == [[0, 2]]
    with pytest.raises(ValueError, match="keeps unequal numbers of the 2 groups"):
        EasyEp().check({"keep": [[0, 1]]}, [layer])


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        ({"keep": [[0, 1], [2]]}, {}, "'keep' is of 2 layers, and the model has 1 MoE layers"),
        ([], {}, "'keep' is missing"),
        ({"keep": [[0, 4]]}, {}, "kept experts of layer 0 must be different numbers below 4"),
        ({"keep": [[0, 0, 1]]}, {}, "must be different numbers"),
        ({"keep": [[0]]}, {}, "keeps 1 experts of layer 0, whose tokens choose top_k=2"),
        ({"keep": [[0, 1]]}, {"router": "hash"}, "by their numbers: none can be left out"),
        ({"keep": [[0, 1]]}, {"experts": "nulls"}, "takes uniform experts"),
    ],
)
def test_plans_are_checked(plan: object, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EasyEp().check(plan, [config(**options)])
    with pytest.raises(ValueError, match=r"unseen='refuse': experts \[1\] of layer 0 kept fewer"):
        EasyEp(unseen="refuse").plan([STATS], [config()])
    with pytest.raises(ValueError, match="names expert 9 of layer 0"):
        EasyEp(protect="0.9").plan([STATS], [config()])


def test_one_expert_and_all_chosen() -> None:
    """E = 1, and top_k = E: nothing can go, and the identity is what is planned."""
    one = {"score": torch.ones(1), "tokens": torch.ones(1)}
    layer = config(num_experts=1, top_k=1)
    assert EasyEp(keep=0.5).plan([one], [layer])["keep"] == [[0]]
    full = config(top_k=4)
    method = replace(EasyEp(), keep=1.0)
    method.check(method.plan([STATS], [full]), [full])
    with pytest.raises(ValueError, match="keeps 2 experts of layer 0, whose tokens choose top_k=4"):
        EasyEp().check(EasyEp().plan([STATS], [full]), [full])
