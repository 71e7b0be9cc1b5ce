"""Every method beside its reference: the recipe, what is measured, and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from etr.cli import main
from etr.methods import METHODS
from etr.moe import ROUTERS, MoE, MoEConfig, RoutingContext
from etr.moe.context import Replay
from etr.moe.view import LayerView
from etr.moe.watch import watch
from etr.recipes.rivals import CLAIMED, reference, rivals, smoke
from etr.report.statistics import estimate, holm
from etr.study.collection import Collection
from etr.study.grid import Block, runs_of
from etr.study.rivals import authors, compared, sentences, tables
from etr.study.served import of_view, router_share
from etr.study.study import Study
from etr.study.summary import StudyRow


def p_value(*values: float) -> float:
    found = estimate(values)
    assert found is not None
    return found.p_value()


def test_p_values_and_holms_correction() -> None:
    """1, 2, 3 have t = 2 sqrt(3) at 2 degrees of freedom; then a worked correction of four."""
    assert p_value(1.0, 2.0, 3.0) == pytest.approx(0.0741799, abs=1e-6)
    assert p_value(-1.0, -2.0, -3.0) == p_value(1.0, 2.0, 3.0)
    assert estimate([1.0]) is None
    assert p_value(2.0, 2.0) == 0.0
    assert p_value(0.0, 0.0) == 1.0
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04, 0.04]) == [False, False]
    assert holm([0.05]) == [True]
    assert holm([]) == []


def test_every_method_with_a_router_runs_beside_its_reference() -> None:
    study = rivals()
    for task in ("text-x", "lm"):
        (block,) = (block for block in study.blocks if block.name == task)
        rows = set(block.rows)
        for name, card in METHODS.items():
            if "router" in card.options:
                assert name in rows
                assert study.reference_of(name) in rows
    for block in (*study.blocks, *smoke().blocks):
        assert len(set(block.rows)) == len(block.rows)
        for run in runs_of(block, lambda *_: 1.0):
            run.config()
    assert set(CLAIMED) <= set(METHODS)


def test_rows_take_as_many_experts_as_their_references_and_end_their_warm_up() -> None:
    study = rivals()
    for block in study.blocks:
        configs = {run.row: run.config() for run in runs_of(block, lambda *_: 1.0)}
        for name in ("moe_pp", "tc_moe", "remoe", "dtop_p", "dynamic_top_p", "dynamoe"):
            if name in configs and block.match == "steps":
                base = configs[study.reference_of(name)].model.routing
                assert base.top_k == 2
                assert name.startswith("dyna") or configs[name].model.routing.top_k == 2
        for config in configs.values():
            warmup = getattr(config.model.moe_config().router_config, "warmup", 0)
            assert warmup <= block.steps / 4
            assert (warmup > 0) == ("expert_threshold" in config.model.routing.router)


@pytest.mark.parametrize("name", [n for n, card in METHODS.items() if "router" in card.options])
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_the_layer_of_every_row_can_be_measured(name: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}
    layer = MoE(MoEConfig(**{**sizes, **METHODS[name].config_options()})).eval()
    views, x = list[LayerView](), torch.randn(40, 16)
    with torch.no_grad(), watch(layer, lambda place, view: views.append(view)):
        layer(x, RoutingContext(token_ids=torch.arange(40), logits={}))
    found = of_view(layer, views[0])
    assert found["experts_mean"] > 0
    assert ("balance_loss" in found) == (views[0].routing.probs is not None)
    with torch.no_grad():
        assert router_share(layer, x) > 0


def test_widths_of_a_reference_are_those_of_the_task() -> None:
    name, text = reference(METHODS["deepseek_moe"], "text-x")
    assert name == "token_choice-num_experts-3-top_k-1-capacity-none"
    assert text == f"{name}=token_choice/num_experts=3/top_k=1/expert_size=576/capacity=none"
    assert "expert_size=1536" in reference(METHODS["deepseek_moe"], "lm")[1]
    assert reference(METHODS["etr"], "lm") == ("baseline", "baseline")


def test_what_a_layer_does_with_tokens() -> None:
    """8 tokens on two nodes, 4 experts and a null choice; node 0 holds experts 0 and 1."""
    config = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=4,
        top_k=2,
        router="token_choice",
        experts="nulls:count=1",
        capacity="none",
    )
    layer, views = MoE(config), list[LayerView]()
    choices = [[0, 1], [0, 2], [0, 4], [4, 3], [0, 1], [0, 2], [0, 4], [2, 3]]
    context = RoutingContext(replay={0: Replay(expert=torch.tensor(choices))})
    with watch(layer, lambda place, view: views.append(view)):
        layer.eval()(torch.randn(8, 16), context)
    found = of_view(layer, views[0])
    each = torch.tensor([2, 2, 1, 1, 2, 2, 1, 2], dtype=torch.float64)
    assert found["experts_mean"] == float(each.mean())
    assert found["experts_spread"] == pytest.approx(float(each.std(correction=0)))
    assert found["unique_experts"] == 4
    away = 1 + 1 + 2 + 1 + 1  # tokens 1 and 3 go up, tokens 4, 5 and 6 down
    assert found["bytes_between_nodes"] == 2 * 4 * 16 * away / 8
    assert found["max_violation"] == pytest.approx(6 / (16 / 5) - 1)
    share = torch.tensor([6, 2, 3, 2, 3]) / 16
    mean = views[0].routing.probs.mean(0)
    assert found["balance_loss"] == pytest.approx(float(5 * share @ mean.detach()), rel=1e-6)
    mask = torch.arange(8) < 6  # padding has no probability
    with watch(layer, lambda place, view: views.append(view)), torch.no_grad():
        layer(torch.randn(8, 16), RoutingContext(replay=context.replay, valid_mask=mask))
    share = torch.tensor([5, 2, 2, 1, 2]) / 12
    mean = views[1].routing.probs[mask].mean(0)
    found = of_view(layer, views[1])
    assert found["balance_loss"] == pytest.approx(float(5 * share @ mean), rel=1e-6)


def result(variant: str, seed: int, loss: float, flops: float = 2.0) -> dict[str, Any]:
    """What a run would have written."""
    router = variant if variant in ROUTERS else "token_choice"
    return {
        "run": {"variant": variant, "seed": seed},
        "config": {"model": {"routing": {"top_k": 2, "router": router}}},
        "steps": 10,
        "tokens_per_step": 4,
        "expert_flops": 10 * flops,
        "step_seconds_median": 0.5 * flops,
        "parameters": 1000,
        "kept_per_token": 1.5,
        "final": {"served_loss": loss, "dropless": {"loss": loss + 0.1}},
        "measures": {
            "layers": [{"max_violation": 0.25, "experts_mean": 1.5, "experts_spread": 0.5}]
        },
    }


def stored(losses: dict[str, list[float]]) -> tuple[Collection, Study]:
    """Results of chain_of_experts, bip and what both are compared with."""
    rows = tuple(
        StudyRow(
            name=name,
            results=tuple(
                result(name, seed, loss, 4.0 if name == "bip" else 2.0)
                for seed, loss in enumerate(values)
            ),
        )
        for name, values in losses.items()
    )
    block = Block(name="text-x", task="text-x", variants=tuple(losses), steps=10, seeds=(0,))
    references = dict.fromkeys(("bip", "chain_of_experts"), "token_choice")
    plan = Study(blocks=(block,), reference="token_choice", references=references)
    return Collection(blocks={"text-x": ("text-x", "steps", rows)}, times={}), plan


def test_the_page_says_what_survives_and_what_it_costs() -> None:
    losses = {
        "token_choice": [2.0, 2.1, 2.2],
        "bip": [1.9, 2.001, 2.1],
        "chain_of_experts": [2.1, 2.05, 2.2],
    }
    found = compared(*stored(losses))
    assert [(one.card.name, one.side, one.survives) for one in found] == [
        ("bip", "lower", True),
        ("chain_of_experts", "cannot be told apart", False),
    ]
    text = sentences(found)
    assert (
        f"- **{METHODS['bip'].title}** gains 0.0997 nats on `text-x` at equal steps, after the "
        "correction; a step costs 2.00 times the expert FLOPs and 2.00 times the time, with 1.00 "
        "times the parameters."
    ) in text
    assert "cannot be told apart from `token_choice` on `text-x` at equal steps" in text
    beside = authors(found, CLAIMED)
    assert "`chain_of_experts`" in beside
    assert "`bip`" not in beside
    causal, looking = tables(found)
    assert "`chain_of_experts`" in causal
    assert "`bip`" in looking
    assert "| 25.0% | 1.50 ± 0.50 |" in causal


def test_the_page_says_what_has_not_been_run() -> None:
    found, plan = stored({"token_choice": [2.0, 2.1], "bip": [1.9]})
    more = Block(name="text-x, matched", task="text-x", variants=("bip",), steps=10, seeds=(0, 1))
    plan = replace(plan, blocks=(replace(plan.blocks[0], seeds=(0, 1)), more))
    assert "text-x (3 of 4); text-x, matched (0 of 2)." in plan.still_to_run(found)
    assert replace(plan, blocks=(replace(plan.blocks[0], seeds=(0,)),)).still_to_run(found) == ""


def test_what_is_dropped_is_said_where_tokens_ask_for_a_fixed_number() -> None:
    rows = {name: [2.0, 2.1] for name in ("token_choice", "dynamic_top_p", "chain_of_experts")}
    study, plan = stored(rows)
    plan = replace(plan, references=dict.fromkeys(rows, "token_choice"))
    (causal,) = tables(compared(study, plan))
    assert "| 25.0% | 1.50 ± 0.50 |" in causal
    assert "|  | 1.50 ± 0.50 |" in causal


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_the_smoke_path_writes_its_page_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--preset", "rivals", "--smoke", "--out", str(tmp_path)]
    assert main(command) == 0
    page = (tmp_path / "rivals.md").read_text(encoding="utf-8")
    for heading in ("`text-x`, equal steps: causal", "equal expert FLOPs", "How many comparisons"):
        assert heading in page
    assert "Not all of it has been run" not in page
    for name in ("dynamic_top_p", "bip", "token_choice"):
        assert f"`{name}`" in page
    for picture in ("images/rivals-text-x-flops.svg", "images/rivals-text-x-time.svg"):
        assert picture in page
        assert (tmp_path / picture).is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rivals").rglob("*.json")}
    assert len(before) >= 10
    assert main(command) == 0
    assert (tmp_path / "rivals.md").read_text(encoding="utf-8") == page
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "rivals").rglob("*.json")}


def test_another_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--preset", "others"])
    assert "rivals" in capsys.readouterr().err
