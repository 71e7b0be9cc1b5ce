"""Every family, converted and loaded, against transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import InFloat64, family_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from etr.hf import FAMILIES, EtrForCausalLM, convert
from etr.hf.layouts import LAYOUTS
from etr.hf.matching import match_keys
from etr.hf.versions import CACHE
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("mixtral", {"tie_word_embeddings": True}),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "num_hidden_layers": 3}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
    ("deepseek_v2", {"topk_method": "greedy", "first_k_dense_replace": 1}),
    ("deepseek_v3", {"norm_topk_prob": False, "first_k_dense_replace": 1}),
]
"""Families, and what their configs can change about the block."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Any]]:
    """Filled on demand: (their model, ours) in float64, by place in VARIANTS."""
    return {}


@pytest.fixture(
    params=range(len(VARIANTS)), ids=lambda i: "-".join([VARIANTS[i][0], *VARIANTS[i][1]])
)
def pair(
    request: pytest.FixtureRequest,
    pairs: dict[int, tuple[Any, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PreTrainedModel, EtrForCausalLM]:
    if request.param not in pairs:
        folder = tmp_path_factory.mktemp("pair")
        pairs[request.param] = make_pair(folder, *VARIANTS[request.param])
    theirs, mine = pairs[request.param]
    for model in (theirs, mine):
        model.zero_grad()
    return theirs, mine


def make_pair(folder: Path, family: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = family_model(family, **changes).double()
    theirs.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    mine = AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert isinstance(mine, EtrForCausalLM)
    assert mine.dtype == torch.float64
    theirs.set_experts_implementation("eager")  # the others know no float64
    return theirs, mine.eval()


def padded() -> tuple[Tensor, Tensor]:
    """Two rows of ten tokens, the first with three of padding on its left."""
    x, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.int64)
    x[0, :3], mask[0, :3] = 0, 0
    return x, mask


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_logits_of_a_left_padded_batch(pair: tuple[Any, Any]) -> None:
    theirs, mine = pair
    x, mask = padded()
    with InFloat64():
        expected, found = (model(x, attention_mask=mask).logits for model in (theirs, mine))
    close(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_logits_where_the_family_rounds_to_float32(pair: tuple[Any, Any]) -> None:
    theirs, mine = pair
    x = tokens(2, 10)
    close(mine(x).logits, theirs(x).logits, 2e-5)


@torch.no_grad()
def test_decoding_with_a_cache(pair: tuple[Any, Any]) -> None:
    theirs, mine = pair
    x, mask = padded()
    results = []
    with InFloat64():
        for model in (theirs, mine):
            output = model(x[:, :6], attention_mask=mask[:, :6], use_cache=True)
            logits = [output.logits[:, -1]]
            for i in range(6, 10):
                output = model(
                    x[:, i : i + 1],
                    attention_mask=mask[:, : i + 1],
                    **{CACHE: output[CACHE]},
                    position_ids=mask[:, : i + 1].cumsum(1)[:, -1:] - 1,
                )
                logits.append(output.logits[:, -1])
            results.append(torch.stack(logits))
    close(results[1], results[0])


@torch.no_grad()
def test_greedy_generation(pair: tuple[Any, Any]) -> None:
    theirs, mine = pair
    x, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with InFloat64():
        assert torch.equal(mine.generate(x, **options), theirs.generate(x, **options))


def test_gradients_of_the_loss(pair: tuple[Any, Any]) -> None:
    theirs, mine = pair
    x, mask = padded()
    labels = x.clone()
    labels[0, :4] = -100  # nothing predicted at padding counts
    with InFloat64():
        losses = [model(x, attention_mask=mask, labels=labels).loss for model in (theirs, mine)]
        for loss in losses:
            loss.backward()
    close(losses[1], losses[0])
    expected = {name: value.grad for name, value in theirs.named_parameters()}
    own = dict(mine.named_parameters())
    compared = 0
    for match in match_keys(mine):
        if match.ours not in own:  # state, and weights that are tied to another
            continue
        names, layout = match.theirs, match.layout
        if match.fused in expected:
            names, layout = (match.fused,), LAYOUTS["same"]
        grads = [expected[name] for name in names]
        torch.testing.assert_close(
            _grad(own[match.ours]), layout.join(grads, match.parts), rtol=0, atol=1e-9
        )
        compared += 1
    assert compared == len(own)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_layers_drop_nothing_and_balance_as_the_family_does(pair: tuple[Any, Any]) -> None:
    theirs, mine = pair
    family = mine.config.family
    wanted = family.aux_alpha(theirs.config)
    if family.aux_coefficient is not None:
        assert wanted == getattr(theirs.config, family.aux_coefficient) * 2
    for layer in moe_layers(mine):
        assert layer.config.loss_weights["balance"] == wanted
        assert layer.config.capacity_config.name == "none"


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_sparse_layers_are_told_apart(family: str) -> None:
    model = family_model(family)
    row = FAMILIES[family]
    assert all(row.is_moe(layer) for layer in model.model.layers)
    assert hasattr(getattr(model.model.layers[0], row.block), row.router_name)


def test_the_families_of_the_table_cover_every_option() -> None:
    """So that the tests above reach biases, groups, scales, gates and shared experts."""
    seen: set[str] = set()
    for family, changes in VARIANTS:
        config = family_model(family, **changes).config
        row = FAMILIES[family]
        options = {**row.experts(config), **row.router(config)}
        router = options.pop("router")
        off = (None, False, 0, "none")
        seen |= {name for name, value in options.items() if value not in off}
        seen |= {name for name in ("bias", "selection_bias") if getattr(router, name)}
        assert options.get("routed_scale") != 1
        seen |= {"groups"} if router.num_groups > 1 else set()
    assert seen >= {
        "expert_bias",
        "swiglu_limit",
        "routed_scale",
        "num_shared_experts",
        "shared_gate",
        "bias",
        "selection_bias",
        "groups",
        "normalize",
    }
