"""MADE-IT: overlaps, which tasks become one expert, and whom tokens go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_lm import made, plan_in, same_weights, save, small, tokens

from etr.hf import EtrForCausalLM
from etr.methods.made_it import Expert, Factors, MadeIt, Stream, affinity, merged, truncated
from etr.moe import MoE, MoEConfig, moe_layers
from etr.moe.routers.projection import cosines
from etr.moe.watch import watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
TASKS = (0, 1, 2, 0, 1, 3)
"""Two pairs of one task, and two alone."""
SIZE, RANK = 64, 6


def frame(left: list[int], right: list[int], size: int = 8) -> Expert:
    """An expert whose outputs and inputs are some of the axes."""
    eye = torch.eye(size).double()
    return (Factors(eye[:, left], torch.ones(len(left)).double(), eye[right]),)


def test_affinity_by_hand() -> None:
    """Of itself 1, of others 0, half of it shared .5; whichever bases span it."""
    one = frame([0, 1], [0, 1])
    assert affinity(one, one) == 1.0
    assert affinity(one, frame([2, 3], [2, 3])) == 0.0
    assert affinity(one, frame([1, 2], [1, 2])) == 0.5
    assert affinity(one, frame([0, 1], [4, 5])) == 0.5
    (factors,) = (truncated(torch.randn(9, 7).double(), 3),)
    turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
    turned = Factors(factors.left @ turn, factors.values, turn.T @ factors.right)
    assert affinity((factors,), (turned,)) == pytest.approx(1.0)


def test_cosines_by_hand() -> None:
    """(3, 4, 0, 0) on the first and the second axis: .6 and .8; a token of zeros is in none."""
    basis = torch.eye(4)[:2, None, None]
    found = cosines(torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]]), basis)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]]))
    both = torch.eye(4)[[0, 1, 0, 2]].view(2, 2, 1, 4)
    found = cosines(torch.tensor([[3.0, 4, 0, 0]]), both)
    torch.testing.assert_close(found, torch.tensor([[(25 / 2) ** 0.5 / 5, (9 / 2) ** 0.5 / 5]]))


def planted() -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Outputs and inputs of four tasks, and six matrices tuned for them, two of them twice."""
    torch.manual_seed(0)
    bases = [
        (torch.linalg.qr(torch.randn(SIZE, RANK)).Q, torch.linalg.qr(torch.randn(SIZE, RANK)).Q)
        for _ in range(4)
    ]
    values = torch.linspace(2, 1, RANK)
    return bases, [
        (bases[t][0] * values) @ bases[t][1].T + 0.02 * torch.randn(SIZE, SIZE) for t in TASKS
    ]


@pytest.mark.criterion
def test_alike_tasks_become_one(tmp_path: Path) -> None:
    """Of 6 tasks of which two pairs are one task tuned twice 4 experts are made in any of 5 orders,
    and 0.95 of the tokens or more go to their task's; one task at full rank is the tuned model
    within 1e-6."""
    bases, matrices = planted()
    for shuffle in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(shuffle)).tolist()
        stream = Stream()
        for task in order:
            stream.take((truncated(matrices[task], RANK),))
        assert len(stream.experts) == 4
        expert_of = dict(zip((TASKS[task] for task in order), stream.of, strict=True))
        assert [expert_of[TASKS[task]] for task in order] == stream.of
        basis = torch.stack([expert[0].right for expert in stream.experts])[:, None]
        right = 0.0
        for task in TASKS:
            x = torch.randn(500, RANK) @ bases[task][1].T + 0.3 * torch.randn(500, SIZE)
            chosen = cosines(x.double(), basis).argmax(-1)
            right += float((chosen == expert_of[task]).double().mean()) / len(TASKS)
        print(order, stream.of, round(right, 4), [round(a, 3) for a, _ in stream.decisions])
        assert right >= 0.95
    source = save(small(num_local_experts=2).float(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", MadeIt(share=1.0))
    assert report.plan == "1 tasks become 1 + 1 experts; layer 0 decides"
    tuned = small(num_local_experts=2).float()
    for layer in moe_layers(tuned):
        for value in layer.experts.parameters():
            value.data[0] = value.data[1]
    (given, _) = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, tuned(**given).logits, rtol=0, atol=1e-6)


def test_the_mean_is_weighed_by_tasks() -> None:
    """One task of 1 on the first axis and two of 4: 3 on it."""
    eye = torch.eye(3).double()
    one = Factors(eye[:, :1], eye[0, :1], eye[:1])
    four = one._replace(values=4 * one.values)
    ((left, values, right),) = merged((four,), (one,), (2, 1))
    torch.testing.assert_close((left * values) @ right, 3 * eye[:, :1] @ eye[:1])
    stream = Stream()
    for expert, number in ((four, 0), (four, 0), (one, 0), (one, 1)):
        stream.put((expert,), number)
    assert stream.of == [0, 0, 0, 1]
    torch.testing.assert_close(stream.experts[0][0].values, 3 * eye[0, :1])


def test_a_threshold_begins_with_chance() -> None:
    """Rank 2 of 8: .25 and .75, so .5 + .354; a half is not over it, and joins the list."""
    stream = Stream()
    for expert in (frame([0, 1], [0, 1]), frame([1, 2], [1, 2]), frame([0, 1], [0, 1])):
        stream.take(expert)
    assert stream.of == [0, 1, 0]
    (first, bound), (second, next_bound) = stream.decisions
    assert (first, second) == (0.5, 1.0)
    assert bound == pytest.approx(0.5 + 0.5**0.5 / 2)
    assert next_bound == pytest.approx(0.5 + 0.25)


def chosen(model: EtrForCausalLM, given: dict[str, Tensor]) -> list[Tensor]:
    """Choices of each layer."""
    found: list[Tensor] = []
    with torch.no_grad(), watch(model, lambda place, view: found.append(view.routing.expert)):
        model(**given)
    return found


PLAN: dict[str, Any] = {"of": [[0, 0, 1], [0, 1, 2]], "anchor": 1}


@pytest.mark.parametrize("anchor", [0, 1])
def test_layers_agree_on_a_task(anchor: int, tmp_path: Path) -> None:
    """Tasks 0 and 1 are one expert of the first layer: where that decides, the second has either,
    or the third where the first said so; where the second decides, each goes its own way."""
    source = save(small(), tmp_path / "a")
    method = MadeIt(share=0.25)
    model, _ = made(source, tmp_path / "b", method, plan={**PLAN, "anchor": anchor})
    (given, _) = tokens(seed=3)
    first, second = chosen(model, given)
    assert set(first.tolist()) == {0, 2}
    assert set(second.tolist()) == {0, 1, 2}
    assert torch.equal(first == 2, second == 2) == (anchor == 0)
    states: list[Tensor] = []
    with torch.no_grad(), watch(model, lambda place, view: states.append(view.x)):
        model(**given)
    own = cosines(states[1], moe_layers(model)[1].router.basis)  # type: ignore[arg-type]
    if anchor == 0:
        own = own.masked_fill((first == 2)[:, None] != (torch.arange(3) == 2), -1.0)
    assert torch.equal(own.argmax(-1), second)


def test_what_is_stored_is_the_nearest_of_the_rank(tmp_path: Path) -> None:
    """Base and differences; two tasks in one are the nearest to their mean, of their rank."""
    source = save(small(), tmp_path / "a")
    method = MadeIt(share=0.25, base=1)
    model, report = made(source, tmp_path / "b", method, plan={**PLAN, "anchor": 0})
    rank = 3
    old = {k: v.detach() for k, v in moe_layers(small())[0].experts.named_parameters()}
    new = moe_layers(model)[0].experts.params(torch.float64)
    near = [truncated(old["down_proj"][e] - old["down_proj"][1], rank).whole() for e in (0, 2, 3)]
    want = [truncated((near[0] + near[1]) / 2, rank).whole()] * 2 + near[2:]
    for expert in range(3):
        torch.testing.assert_close(new.down[expert], old["down_proj"][1] + want[expert])
    layers = moe_layers(model)
    one = 3 * 16 * 12
    for layer, count in zip(layers, (2, 3), strict=True):
        held = sum(value.numel() for value in layer.experts.parameters())
        assert held == one + count * rank * 3 * (16 + 12)
        assert layer.router.basis.shape == (count, 2, rank, 16)
        rows = layer.router.basis.flatten(0, 1)
        eye = torch.eye(rank).double().expand(len(rows), rank, rank)
        torch.testing.assert_close(rows @ rows.mT, eye)
        assert not list(layer.router.parameters())
        assert layer.bank.parameters_of_a_token(1) == one + rank * 3 * 28
    assert report.same_function is False


def test_directions_keep_their_precision(tmp_path: Path) -> None:
    """In a model of half precision too."""
    source = save(small().bfloat16(), tmp_path / "a")
    model, _ = made(source, tmp_path / "b", MadeIt(share=0.25))
    (given, _) = tokens()
    with torch.no_grad():
        assert model(**given).logits.isfinite().all()
    rows = moe_layers(model)[0].router.basis.flatten(0, 1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(3).expand(len(rows), 3, 3))


def test_the_plan_is_the_one_of_its_stream(tmp_path: Path) -> None:
    """The copy of a task joins it, in both layers, and the plan says by how much."""
    model = small()
    for layer in moe_layers(model):
        for value in layer.experts.parameters():
            value.data[3] = value.data[1]
    source = save(model, tmp_path / "a")
    method = MadeIt(share=0.25)
    _, report = made(source, tmp_path / "b", method)
    plan = plan_in(tmp_path / "b")
    assert plan["of"] == [[0, 1, 0]] * 2
    assert plan["anchor"] == 0
    for near, bounds in zip(plan["affinity"], plan["threshold"], strict=True):
        assert near[1] == pytest.approx(1.0)
        assert near[0] < bounds[0] < 1
    assert report.plan == "3 tasks become 2 + 2 experts; layer 0 decides"
    made(source, tmp_path / "c", method)
    assert plan_in(tmp_path / "c") == plan


def test_a_model_of_one_expert_stays(tmp_path: Path) -> None:
    one = small(num_local_experts=1, num_experts_per_tok=1)
    model, _ = made(save(one, tmp_path / "a"), tmp_path / "b", MadeIt())
    assert same_weights(model, one)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"of": [[0]]}, "anchor=None must be a layer below 1"),
        ({"of": [[0]], "anchor": 0}, "'of' of layer 0 must name the expert of each of 2 tasks"),
        ({"of": [[1, 0]], "anchor": 0}, r"new ones numbered in order: \[1, 0\]"),
        ({"of": [[0, 2]], "anchor": 0}, "new ones numbered in order"),
    ],
)
def test_plans_are_checked(plan: Any, words: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 3, "top_k": 1}
    layer = MoEConfig(**sizes, router="token_choice")
    with pytest.raises(ValueError, match=words):
        MadeIt().check(plan, [layer])
    with pytest.raises(ValueError, match="base=3 is not an expert of layer 0, which has 3"):
        MadeIt(base=3).check({"of": [[0, 1]], "anchor": 0}, [layer])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0.0}, "share=0.0 must be over 0 and up to 1"),
        ({"base": -1}, "base=-1 must be at least 0"),
        ({"protect": "0.1"}, "every expert becomes a difference"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MadeIt(**options)


@pytest.mark.parametrize("of", ["0+2", "0+1+0"])
def test_a_router_is_told_of_as_many_choices(of: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "top_k": 1}
    with pytest.raises(ValueError, match=r"of='0"):
        MoE(MoEConfig(**sizes, router=f"projection:of={of}"))
    with pytest.raises(ValueError, match="rank=9 must not exceed hidden_size=8"):
        MoE(MoEConfig(**sizes, router="projection:rank=9"))
