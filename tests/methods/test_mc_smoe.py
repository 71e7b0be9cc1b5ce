"""MC-SMoE: who joins whom, neurons in order, and means by use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_lm import (
    family,
    loss,
    made,
    plan_in,
    same_weights,
    save,
    small,
    teach,
    text,
    tokens,
    trained,
)

from etr.hf import EtrForCausalLM, load_pretrained
from etr.hf.loading import load_causal
from etr.hf.transform import transform
from etr.methods.mc_smoe import McSmoe, merged
from etr.model.low_rank import DropRows, rank_of, with_rows
from etr.moe import MoE, MoEConfig, attach, moe_layers
from etr.moe.experts.low_rank_rows import RowPruner, share_at
from etr.moe.learner import Step

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def clones() -> EtrForCausalLM:
    """Experts 2 and 3 are 0 and 1 with their neurons in another order; routers tell them apart."""
    model = small()
    for layer in moe_layers(model):
        experts = layer.experts
        for expert in (0, 1):
            order = torch.randperm(12)
            halves = experts.gate_up_proj.data[expert].chunk(2)
            experts.gate_up_proj.data[expert + 2] = torch.cat([half[order] for half in halves])
            experts.down_proj.data[expert + 2] = experts.down_proj.data[expert][:, order]
        layer.router.weight.data[2:] = layer.router.weight.data[:2] * 1.01
    return model


@pytest.mark.criterion
@pytest.mark.measured
def test_aligned_merging(tmp_path: Path) -> None:
    """Experts whose neurons are another's in another order merge back into it within 1e-12, where
    without alignment the output changes by more than 0.1; on a small language model with half of
    the experts left, the loss aligned is at least 0.08 below that without, and with a quarter of
    the numbers left, of rank and rows alike, 60 steps from the model before end below low rank
    alone and at least 0.05 below rows that go by chance."""
    _clones_merge_back(tmp_path)
    source = save(trained(), tmp_path / "lm")
    found = {}
    for name, options in {"aligned": {}, "not": {"align": False}}.items():
        model, _ = made(source, tmp_path / name, McSmoe(**options), batches=text(6))
        found[name] = loss(model)
    groups = plan_in(tmp_path / "aligned")["groups"]
    print({"loss": loss(trained()), **found, "plan": groups})
    assert sum(len(set(hosts)) for hosts in groups) == sum(map(len, groups)) / 2
    assert found["aligned"] <= found["not"] - 0.08
    left = _learned(source, tmp_path)
    assert left["rows"] < left["low rank"]
    assert left["rows"] <= left["by chance"] - 0.05


def _learned(source: Path, folder: Path) -> dict[str, float]:
    """Losses of a quarter of the numbers, after 60 steps of learning from the whole model."""
    plan, numbers = plan_in(folder / "aligned"), numbers_of(trained())
    found = {}
    for name, options in {
        "rows": {"ratio": 0.25, "sparse": 0.25},
        "by chance": {"ratio": 0.25, "sparse": 0.25},
        "low rank": {"ratio": 0.5, "sparse": 0.0},
    }.items():
        model, _ = made(source, folder / name, McSmoe(**options), plan=plan)
        if name == "by chance":
            for layer in moe_layers(model):
                layer.experts.pruner.after_step = partial(by_chance, layer.experts.pruner)
        save(teach(model, trained(), 60, 1e-3), folder / f"{name} taught")
        small, _ = made(folder / f"{name} taught", folder / f"{name} left", DropRows())
        found[name] = loss(small)
        assert abs(numbers_of(small) / numbers - 0.25) < 0.01
    print(found)
    return found


def by_chance(pruner: RowPruner, step: Step) -> None:
    """Scores that are drawn once."""
    for score in pruner.buffers():
        if not score.any():
            score.uniform_()


def numbers_of(model: EtrForCausalLM) -> int:
    return sum(v.numel() for layer in moe_layers(model) for v in layer.experts.parameters())


def _clones_merge_back(folder: Path) -> None:
    source, (given, _) = save(clones(), folder / "a"), tokens(seed=3)
    with torch.no_grad():
        want = clones()(**given).logits
        scale = float(want.std())
        for align in (True, False):
            method = McSmoe(align=align)
            plan = {"groups": [[0, 1, 0, 1]] * 2, "usage": [[0.4, 0.3, 0.2, 0.1]] * 2}
            model, _ = made(source, folder / f"b{align}", method, plan=plan)
            off = float((model(**given).logits - want).abs().max()) / scale
            assert (off < 1e-12) if align else (off > 0.1)


def test_permuted_clones_merge_back(tmp_path: Path) -> None:
    _clones_merge_back(tmp_path)


def test_by_hand() -> None:
    """Usage .5, .3, .2; expert 2 joins 0: (.5 * 2 + .2 * 6) / .7."""
    values = {"up_proj": torch.tensor([2.0, 5, 6])[:, None, None], "down_proj": torch.ones(3, 1, 1)}
    found = merged({k: v.double() for k, v in values.items()}, [0, 1, 0], [0.5, 0.3, 0.2])
    torch.testing.assert_close(
        found["up_proj"].flatten()[:2], torch.tensor([2.2 / 0.7, 5.0]).double()
    )
    assert float(found["up_proj"][0]) == pytest.approx(3.142857, abs=1e-6)
    alike = merged(values, [0, 1, 0], [0.0, 0.3, 0.0])
    assert alike["up_proj"].flatten().tolist()[:2] == [4.0, 5.0]  # a plain mean


def layer_of(num_experts: int = 4, **options: Any) -> MoEConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "top_k": 1, "router": "token_choice"}
    return MoEConfig(**{**sizes, **options}, num_experts=num_experts)


def stats(tokens: list[int], near: list[tuple[int, int]] = ()) -> dict[str, torch.Tensor]:
    """Logits of pairs that are named are alike."""
    products = torch.eye(len(tokens)).double()
    for a, b in near:
        products[a, b] = products[b, a] = 0.9
    return {"tokens": torch.tensor(tokens), "products": products}


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"keep": 0.5}, [[0, 1, 0, 0], [0, 0, 0, 3]]),
        ({"keep": 0.01}, [[0, 0, 0, 0], [3, 3, 3, 3]]),  # the most used one of every layer
        ({"keep": 1.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"keep": 0.01, "protect": "0.0"}, [[0, 1, 1, 1], [3, 3, 3, 3]]),  # nobody joins it
        ({"keep": 0.5, "min_tokens": 5}, [[0, 0, 2, 2], [0, 1, 2, 3]]),
    ],
)
def test_who_joins_whom(options: dict, groups: list[list[int]]) -> None:
    """Usage is shares of a layer's choices; ties go to the lower number."""
    found = [stats([50, 30, 10, 10], [(2, 0), (3, 0)]), stats([20, 5, 5, 70], [(1, 0), (2, 0)])]
    if "min_tokens" in options:  # all of the second layer's and one of the first's are unseen
        found = [stats([50, 30, 4, 10], [(3, 2)]), stats([1, 1, 1, 1])]
    method = McSmoe(**options)
    plan = method.plan(found, [layer_of()] * 2)
    assert plan["groups"] == groups
    method.check(plan, [layer_of()] * 2)


def test_keeping_all_changes_no_bit(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", McSmoe(keep=1.0), batches=tokens(), compare=True)
    assert report.same_function
    assert same_weights(model, small())


def test_merged_experts_are_stored_once_or_as_copies(tmp_path: Path) -> None:
    """The same function; a family of transformers holds the copies."""
    source = family(tmp_path / "a")
    copies = transform(source, tmp_path / "b", McSmoe(store="copies"), batches=tokens())
    plan = plan_in(tmp_path / "b")
    model, report = made(source, tmp_path / "c", McSmoe(), plan=plan)
    assert (copies.to, report.to) == ("hf", "etr")
    left = sum(len(set(groups)) for groups in plan["groups"])
    assert left == 4
    experts = sum(v.numel() for each in moe_layers(model) for v in each.experts.parameters())
    assert experts == left * 3 * 16 * 12
    assert report.source_bytes - report.num_bytes == 4 * (8 - left) * 3 * 16 * 12
    theirs, (given, _) = load_causal(tmp_path / "b"), tokens(seed=3)
    with torch.no_grad():
        found, want = theirs(**given).logits, model(**given).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[0, 1, 0]], "groups of layer 0 must name 4 experts"),
        ([[0, 1, 0, 4]], "must be different numbers below 4"),
        ([[1, 2, 2, 3]], "must join experts that join none"),
    ],
)
def test_plans_are_checked(groups: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        McSmoe().check({"groups": groups, "usage": [[0.25] * 4]}, [layer_of()])


def test_ranks_by_hand() -> None:
    """Two factors of rank r have r (h + w) numbers."""
    assert rank_of(0.25, 48, 48) == 6
    assert rank_of(0.1, 48, 48) == 3  # 2.4
    assert rank_of(0.5, 16, 12) == 4  # 3.43
    assert rank_of(1.0, 2, 100) == 2


def random_experts(count: int = 3, rows: int = 12, columns: int = 16) -> dict[str, Tensor]:
    up, down = torch.randn(count, 2 * rows, columns), torch.randn(count, columns, rows)
    return {"gate_up_proj": up.double(), "down_proj": down.double()}


def bank_layer(text: str, num_experts: int = 3, **options: Any) -> MoE:
    sizes = {"hidden_size": 16, "intermediate_size": 12, "top_k": 1, "router": "token_choice"}
    fixed = {"capacity": "none", "losses": ""}
    config = MoEConfig(**{**sizes, **fixed, **options}, num_experts=num_experts, experts=text)
    return MoE(config).double()


@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_low_rank_and_every_row_are_the_matrix(rank: int) -> None:
    """To rounding; the nearest of that rank alone without rows."""
    values = random_experts()
    whole, alone = (with_rows(values, rank, every=every) for every in (True, False))
    layer = bank_layer(f"low_rank_rows:rank={rank}")
    layer.experts.load_state_dict(whole)
    params = layer.experts.params(torch.float64)
    torch.testing.assert_close(params.up, values["gate_up_proj"], rtol=0, atol=1e-12)
    torch.testing.assert_close(params.down, values["down_proj"], rtol=0, atol=1e-12)
    layer = bank_layer(f"low_rank_rows:rank={rank},rows=3x0")
    layer.experts.load_state_dict(alone)
    near = layer.experts.params(torch.float64).down
    for matrix, found in zip(values["down_proj"], near, strict=True):
        left_out = torch.linalg.svdvals(matrix)[rank:].norm()
        torch.testing.assert_close((matrix - found).norm(), left_out)


def test_rows_are_added_where_they_belong() -> None:
    """Row by row, for choices of which two mean the same."""
    layer = bank_layer("low_rank_rows:rank=2,rows=4+0+7,of=0+1+0+2", 4)
    bank = layer.experts
    bank.gate_index.copy_(torch.tensor([1, 11, 12, 35]))
    bank.down_index.copy_(torch.tensor([0, 3, 15, 16, 20, 40, 47]))
    nn.init.normal_(bank.gate_right)
    found = bank.params(torch.float64)
    for choice, expert in enumerate((0, 1, 0, 2)):
        gate = bank.gate_left[:, 2 * expert : 2 * expert + 2] @ bank.gate_right.split(2)[expert]
        gate = gate.detach().clone()
        for place, row in zip(bank.gate_index.tolist(), bank.gate_rows, strict=True):
            if place // 12 == expert:
                gate[place % 12] += row
        torch.testing.assert_close(found.up[choice, :12], gate)
    down = torch.zeros(48, 12).double()
    down[[0, 3, 15, 16, 20, 40, 47]] = bank.down_rows.detach()
    torch.testing.assert_close(found.down[3], down[32:])
    assert bank.parameters_of_a_token(2) == 2 * (3 * 2 * 28 + (4 * 16 + 7 * 12) / 3)


def test_the_start_is_the_merged_model_and_its_bytes_are_as_planned(tmp_path: Path) -> None:
    source, (given, _) = save(small(), tmp_path / "a"), tokens(seed=3)
    merged_alone, _ = made(source, tmp_path / "m", McSmoe(), batches=tokens())
    plan = plan_in(tmp_path / "m")
    rank = rank_of(0.3, 16, 12)
    for sparse in (0.5, 0.0):
        method = McSmoe(ratio=0.3, sparse=sparse)
        model, report = made(source, tmp_path / f"{sparse}", method, plan=plan)
        # of 4 experts left in both layers together 3 matrices each
        numbers = 4 * 3 * rank * (16 + 12) + (4 * 3 * 16 * 12 if sparse else 0)
        assert numbers_of(model) == numbers
        rows = 4 * (12 + 12 + 16) if sparse else 0  # each an int32, and a float32 score
        experts = 8 * 3 * 16 * 12
        assert report.source_bytes - report.num_bytes == 8 * (experts - numbers) - 8 * rows
        with torch.no_grad():
            off = (model(**given).logits - merged_alone(**given).logits).abs().max()
        assert (float(off) < 1e-12) == bool(sparse)
    assert f"into 4, of rank {rank} and rows" in McSmoe(ratio=0.3).describe(plan, [layer_16()] * 2)


def layer_16() -> MoEConfig:
    return layer_of(hidden_size=16, intermediate_size=12)


def test_keeping_all_with_every_row_is_the_same_function(tmp_path: Path) -> None:
    source = family(tmp_path / "a")
    method = McSmoe(keep=1.0, ratio=0.25)
    _, report = made(source, tmp_path / "b", method, batches=tokens(), compare=True)
    assert report.same_function
    assert McSmoe(keep=1.0, ratio=0.25, sparse=0.0).changes_function() is not None


@pytest.mark.parametrize(
    ("progress", "share"),
    [(0, 1), (0.1, 1), (0.4, 0.2 + 0.8 / 8), (0.55, 0.2 + 0.8 / 64), (0.7, 0.2), (1, 0.2)],
)
def test_the_schedule_by_hand(progress: float, share: float) -> None:
    assert share_at(progress, 0.2) == pytest.approx(share)


def test_rows_go_by_weight_times_gradient() -> None:
    """Scores by hand over two steps, and the cheapest of a budget of numbers."""
    rows = {"up": nn.Parameter(torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 1.0]]))}
    rows["down"] = nn.Parameter(torch.tensor([[1.0, 1.0], [5.0, 5.0], [0.5, 0.5]]))
    pruner = RowPruner(lambda: rows, 0.5)
    step = Step(counters={}, layers=[], affinity_p99=torch.tensor(0.0), number=torch.tensor(1))
    pruner.set_progress(1.0)  # nothing is known
    assert all(value.all(1).any() for value in rows.values())
    with torch.no_grad():
        for gradients in ([[1.0, -1, 1], [0, 9, 0]], [[0.0, 0, 2], [1, 0, 2]]):
            rows["up"].grad = torch.tensor(gradients)
            rows["down"].grad = torch.tensor([[3.0, -3], [0.1, 0.1], [0, 0]])
            pruner.after_step(step)
    torch.testing.assert_close(pruner.up_score, torch.tensor([0.85 * 0.3 + 0.15 * 2, 0.15 * 2]))
    want = torch.tensor([3.0, 0.5, 0]) * 0.15 * 1.85
    torch.testing.assert_close(pruner.down_score, want)
    pruner.set_progress(0.05)
    assert rows["down"].all()
    pruner.set_progress(1.0)  # 6 of 12 numbers: rows of 2 and 3, the next of 3 is too much
    assert [bool(row.any()) for row in rows["up"]] == [True, False]
    assert [bool(row.any()) for row in rows["down"]] == [True, False, False]
    rows["up"].grad = None
    pruner.after_step(step)  # a part that does not train keeps its scores


def test_training_leaves_the_share_and_dropping_changes_no_bit(tmp_path: Path) -> None:
    """In any training that is attached; scores are saved; what was dropped is stored no more."""
    source, batches = save(small(), tmp_path / "a"), tokens()
    method = McSmoe(keep=1.0, ratio=0.25, sparse=0.4)
    model, _ = made(source, tmp_path / "b", method, batches=batches)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    attachment = attach(model, optimizer, 10)
    for step in range(10):
        ids = batches[step % 2]["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            model.save_pretrained(tmp_path / "half")
            scores = moe_layers(model)[0].experts.pruner.gate_score.clone()
    attachment.detach()
    loaded = moe_layers(load_pretrained(tmp_path / "half"))[0].experts.pruner
    assert torch.equal(loaded.gate_score, scores)
    assert scores.all()
    of = 4 * (12 * 16 + 12 * 16 + 16 * 12)
    for layer in moe_layers(model):
        left = sum(int((v != 0).sum()) for v in layer.experts.rows().values())
        assert 0.4 * of - 16 < left <= 0.4 * of
        assert 0 < left < of
    trained_folder = save(model.eval(), tmp_path / "c")
    dropped, report = made(trained_folder, tmp_path / "d", DropRows(), compare=True)
    assert report.same_function
    with torch.no_grad():
        assert torch.equal(dropped(**batches[0]).logits, model(**batches[0]).logits)
    plan = plan_in(tmp_path / "d")
    kept = sum(len(rows) for layer in plan["left"] for rows in layer.values())
    assert report.plan == f"keeps {kept} of {2 * 4 * (12 + 12 + 16)} rows"
    for layer in moe_layers(dropped):
        assert layer.experts.pruner is None
        for rows in layer.experts.rows().values():
            assert rows.any(1).all()
    again, report = made(tmp_path / "d", tmp_path / "e", DropRows())
    assert same_weights(again, dropped)


def test_dropping_leaves_other_experts_alone(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", DropRows(), compare=True)
    assert report.plan == "keeps 0 of 0 rows"
    assert same_weights(model, small())
    with pytest.raises(ValueError, match="the plan's rows of layer 0 must be of nothing"):
        DropRows().check({"left": [{"up": [0]}], "of": [{"up": 1}]}, [layer_of()])
    rows = [layer_of(experts="low_rank_rows")]
    left, of = {"gate": [0], "up": [], "down": [5]}, {"gate": 2, "up": 2, "down": 5}
    plan = {"left": [left], "of": [of]}
    with pytest.raises(ValueError, match="rows of down of layer 0 must be different numbers below"):
        DropRows().check(plan, rows)
    with pytest.raises(ValueError, match="must be of gate, up, down"):
        DropRows().check({"left": [{}], "of": [{}]}, rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "ratio=0.0 must be a share of the numbers"),
        ({"ratio": 1.5}, "ratio=1.5 must be a share of the numbers"),
        ({"sparse": -0.1}, "sparse=-0.1 must be a share of S"),
        ({"ratio": 0.5, "protect": "0.1"}, "every expert gets a low rank"),
        ({"ratio": 0.5, "store": "copies"}, "every expert gets a low rank"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        McSmoe(**options)
