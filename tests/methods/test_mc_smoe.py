"""MC-SMoE: who joins whom, neurons in order, and means by use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_lm import family, loss, made, plan_in, same_weights, save, small, text, tokens, trained

from etr.hf import EtrForCausalLM
from etr.hf.loading import load_causal
from etr.hf.transform import transform
from etr.methods.mc_smoe import McSmoe, merged
from etr.moe import MoEConfig, moe_layers

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
    the experts left, the loss aligned is at least 0.08 below that without."""
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
