"""Serving policies in models: cached generation, and one that is a new row of the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import base_config, calibrated, make_model, tokens
from torch import Tensor

from etr.cli._options import parse
from etr.cli.generate import GenerateConfig, continue_text
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.evaluate.held_out import describe_selection, effective_selection
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import SERVING, RoutingContext, moe_layers, selecting
from etr.moe.calibration import Calibration
from etr.moe.context import RouterInput
from etr.moe.routers import Router
from etr.moe.routing import Limit, Routing
from etr.moe.serving import Serving

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


@dataclass(frozen=True, kw_only=True)
class First(Serving):
    """Tokens choose among the first experts alone."""

    name = "first"
    summary = "the first experts alone"

    experts: int = 1
    """How many experts there are to choose from."""

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, Limit]:
        routing = router(x, inputs, tokens_choose=True)
        expert = torch.where(routing.expert < self.experts, routing.expert, routing.num_experts)
        return replace(routing, expert=expert), Limit()


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> str:
    """The new row in the table; its text with an option."""
    monkeypatch.setitem(SERVING, First.name, First)
    return "first:experts=2"


@pytest.mark.parametrize("text", [name for name in SERVING if SERVING[name].causal])
def test_generation_with_a_cache_is_that_without(text: str) -> None:
    model, x = calibrated(make_model()), tokens(2, 8)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with selecting(model, text):
        found = model.generate(x, **options)
        assert torch.equal(found, model.generate(x, use_cache=False, **options))


def test_a_row_of_the_table_serves_a_model_by_its_text(row: str, tmp_path: Path) -> None:
    model, x = make_model(eval_selection=row).eval(), tokens()
    loads = [stats["num_tokens_per_expert"] for stats in model(x).routing_stats]
    assert all(int(load[:2].sum()) > 0 == int(load[2:].sum()) for load in loads)
    assert effective_selection(model, row) == row
    assert describe_selection(model, row) == f"{row} selection"
    model.save_pretrained(tmp_path)
    loaded = EtrForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert [layer.eval_selection for layer in moe_layers(loaded)] == [row] * 2
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_a_row_of_the_table_serves_one_call(row: str) -> None:
    model, x = make_model().eval(), tokens()
    with selecting(model, row):
        want = model(x).logits
    own = model(x).logits
    assert not torch.equal(own, want)
    for training in (False, True):
        model.train(training)
        assert torch.equal(model(x, routing_context=RoutingContext(serving=row)).logits, want)
    assert torch.equal(model.eval()(x).logits, own)


def test_a_row_of_the_table_serves_the_command_that_generates(row: str) -> None:
    config = parse(GenerateConfig, "generate", ["a-model", "--selection", row, "--prompt", "a"])
    config = replace(config, max_new_tokens=8, temperature=0.0)
    torch.manual_seed(0)
    base = base_config(vocab_size=BYTE_VOCAB_SIZE)
    model = EtrForCausalLM(EtrConfig.from_base(base))
    found = continue_text(model, byte_tokenizer(), config)
    assert [layer.eval_selection for layer in moe_layers(model)] == [row] * 2
    other = continue_text(model, byte_tokenizer(), replace(config, selection="first:experts=4"))
    assert found != other


def test_the_command_refuses_a_policy_that_there_is_not(row: str) -> None:
    with pytest.raises(ValueError, match=r"selection='last' is unknown; .*batch, .*first"):
        GenerateConfig(model="a-model", selection="last")
    with pytest.raises(ValueError, match="selection 'first' has no option size; it has experts"):
        GenerateConfig(model="a-model", selection="first:size=2")
