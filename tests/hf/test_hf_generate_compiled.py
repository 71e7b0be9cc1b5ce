"""Decoding compiled as one graph with a static cache, and where that is not possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import calibrated, make_model, tokens
from torch import Tensor
from transformers import StaticCache

import etr

pytestmark = [
    pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@torch.no_grad()
def decode(model: Any, call: Any, x: Tensor, steps: int) -> tuple[Tensor, list[Any]]:
    """Logits of greedy steps after a prefill; `call` runs the steps, of one token each.

    And the counters of the last step, which are found here.
    """
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    out = model(x, cache=cache, use_cache=True)
    found = [out.logits[:, -1:]]
    for step in range(steps):
        token = found[-1].argmax(-1)
        position = torch.full_like(token, x.shape[1] + step)
        out = call(token, position_ids=position, cache=cache, use_cache=True)
        found.append(out.logits.clone())
    return torch.cat(found, dim=1), [dict(layer) for layer in out.routing_stats]


@pytest.mark.parametrize(
    ("selection", "backend"),
    [("threshold", "bmm"), ("dropless", "bmm"), ("dropless", "auto"), ("dropless", "loop")],
)
def test_decoding_is_one_graph_where_rows_are_padded_or_all_kept(
    selection: Any, backend: str
) -> None:
    model = calibrated(make_model("etr", backend=backend)).float()
    etr.set_eval_selection(model, selection)
    x = tokens(2, 8)
    expected = decode(model, model, x, steps=3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    found = decode(model, compiled, x, steps=3)
    assert all(len(layer) > 5 for layer in found[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_dropped_rows_break_the_graph_of_the_other_backends() -> None:
    """How many rows an expert gets is known when the step runs, not when it is compiled."""
    model = calibrated(make_model("etr", backend="grouped_mm")).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with pytest.raises(RuntimeError, match="data-dependent"):
        decode(model, compiled, tokens(2, 8), steps=1)
