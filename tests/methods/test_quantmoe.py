"""QuantMoE-Bench: scores, budgets, packing, and that what is packed is what is rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_lm import (
    family,
    loss,
    made,
    model_of,
    plan_in,
    same_weights,
    save,
    small,
    text,
    tokens,
    trained,
)

from etr.hf import EtrForCausalLM
from etr.hf.loading import load_causal
from etr.hf.transform import transform
from etr.methods.quantmoe import QuantMoe, fitted, scores_of
from etr.model.bits import matrices, rounded
from etr.moe import MoEConfig, moe_layers
from etr.moe.experts.packed import grid_of, num_bytes, on_grid, packed, unpacked

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def test_by_hand() -> None:
    """Columns (1, 1) and (1, -5): 1 and 5 / 3."""
    assert scores_of(torch.tensor([[1.0, 1], [1, -5]])) == pytest.approx(5 / 3)
    assert scores_of(torch.tensor([[1.0, 0], [1, 0]])) == 1.0  # a dead column
    assert scores_of(torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_packing_is_exact(bits: int, size: int) -> None:
    codes = torch.randint(2**bits, (size,), dtype=torch.uint8)
    data = packed(codes, bits)
    assert (data.dtype, len(data)) == (torch.uint8, num_bytes(size, bits))
    assert len(data) == -(-size * bits // 8)
    assert torch.equal(unpacked(data, bits, size), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_rounded_to_their_own_steps(bits: int) -> None:
    weight = torch.randn(6, 40)
    codes, grid = grid_of(weight, bits)
    found = on_grid(codes, grid)
    assert torch.equal(found.amin(1), weight.amin(1))
    torch.testing.assert_close(found.amax(1), weight.amax(1), rtol=1e-6, atol=1e-6)
    step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    assert ((found - weight).abs() <= step[:, None] / 2 * (1 + 1e-4)).all()
    again = on_grid(*grid_of(found, bits))
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)
    even = torch.full((1, 3), 0.7)
    torch.testing.assert_close(on_grid(*grid_of(even, bits)), even)


def test_more_bits_are_nearer() -> None:
    weight = torch.randn(48, 48)
    errors = [float((on_grid(*grid_of(weight, b)) - weight).square().mean()) for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


OUTLIERS = 6


def with_outliers(model: EtrForCausalLM) -> list[int]:
    """Six of the 48 matrices get six weights of 12 times their size; which ones."""
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:OUTLIERS].tolist()
    every = [m for layer in moe_layers(model) for m in matrices(dict(layer.experts.weights()))]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number in chosen:
            weight = every[number]
            for place in torch.randperm(weight.numel(), generator=generator)[:6].tolist():
                weight[place // weight.shape[1], place % weight.shape[1]] *= 12
    return sorted(chosen)


@pytest.mark.criterion
def test_outliers_get_the_bits(tmp_path: Path) -> None:
    """Of 48 matrices of experts 6 that are given 6 outliers of 12 times their size have the 6
    highest scores; 12 of 48 at 4 bits and 36 at 2 are 2.5 bits a weight, to the byte; what is
    packed computes what is rounded, bit for bit, and 16 bits are the identity."""
    torch.manual_seed(0)
    model = model_of().eval()
    bad = with_outliers(model)
    source = save(model, tmp_path / "a")
    stored, report = made(source, tmp_path / "b", QuantMoe())
    plan = plan_in(tmp_path / "b")
    score = torch.tensor(plan["score"]).flatten()
    assert sorted(score.topk(OUTLIERS).indices.tolist()) == bad
    bits = [width for layer in plan["bits"] for width in layer]
    assert (bits.count(4), bits.count(2)) == (12, 36)
    assert all(bits[number] == 4 for number in bad)
    size, rows = 48 * 48, 48 * 48
    codes = sum(layer.experts.codes.numel() for layer in moe_layers(stored))
    assert codes * 8 == 2.5 * 48 * size
    assert report.source_bytes - report.num_bytes == 4 * 48 * size - codes - 8 * rows
    assert report.plan.startswith("2.5 bits a weight")
    plain, _ = made(source, tmp_path / "c", QuantMoe(store="plain"), plan=plan)
    (given, _) = tokens()
    with torch.no_grad():
        assert torch.equal(stored(**given).logits, plain(**given).logits)
    whole = QuantMoe(low=16, high=16, average=16)
    same, report = made(source, tmp_path / "d", whole, compare=True)
    assert report.same_function
    assert same_weights(same, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_rounded_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(small().to(dtype), tmp_path / "a")
    plan = {"bits": [[2, 4, 8, 16, 2, 2, 4, 4, 4, 8, 8, 16]] * 2}
    stored, _ = made(source, tmp_path / "b", QuantMoe(), plan=plan)
    plain, _ = made(source, tmp_path / "c", QuantMoe(store="plain"), plan=plan)
    for one, other in zip(moe_layers(stored), moe_layers(plain), strict=True):
        found, want = one.experts.params(dtype), other.experts.params(dtype)
        assert torch.equal(found.up, want.up)
        assert torch.equal(found.down, want.down)
    stored.save_pretrained(tmp_path / "d")
    again = load_causal(tmp_path / "d")
    (given, _) = tokens()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, stored(**given).logits)


def test_a_family_holds_what_is_rounded(tmp_path: Path) -> None:
    source = family(tmp_path / "a")
    assert transform(source, tmp_path / "b", QuantMoe(store="plain")).to == "hf"
    model, report = made(source, tmp_path / "c", QuantMoe())
    assert "experts" in report.why_ours
    theirs, (given, _) = load_causal(tmp_path / "b"), tokens(seed=3)
    with torch.no_grad():
        found, want = theirs(**given).logits, model(**given).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_network_expects_cosines() -> None:
    """Of tokens that it has not seen it misses a fifth of what their mean does, or less."""
    torch.manual_seed(0)
    x = torch.randn(1024, 8)
    cosine = (x[:, 0] - x[:, 1]).tanh()
    network = fitted(x[:768], cosine[:768], 0)
    with torch.no_grad():
        found = network(x[768:])
    assert found.shape == (256,)
    assert (found - cosine[768:]).square().mean() < 0.2 * cosine[768:].var()


def test_layers_that_turn_tokens_get_the_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest cosine first, then the next; where bits run out within a layer, by outliers."""
    rising = torch.arange(6.0).double()
    stats = [
        {"score": rising, "expected": torch.tensor(value), "cosine": torch.tensor([value])}
        for value in (0.4, -0.2, 0.1)
    ]
    found = QuantMoe(average=3, score="block").plan(stats, [LAYER] * 3)
    assert found["bits"] == [[2] * 6, [4] * 6, [2, 2, 2, 4, 4, 4]]
    assert found["cosine"] == pytest.approx([0.4, -0.2, 0.1])
    monkeypatch.setattr("etr.methods.quantmoe.STEPS", 30)
    model = small().float()
    for value in moe_layers(model)[0].experts.parameters():
        value.data.zero_()
    source = save(model, tmp_path / "a")
    method = QuantMoe(average=3, score="block")
    made(source, tmp_path / "b", method, batches=tokens())
    plan = plan_in(tmp_path / "b")
    assert plan["cosine"][0] == 0.0
    first, second = plan["expected_cosine"]
    lower, higher = plan["bits"] if first < second else plan["bits"][::-1]
    assert (lower, higher) == ([4] * 12, [2] * 12)
    assert abs(first) < 0.05
    made(source, tmp_path / "again", method, batches=tokens())
    assert plan_in(tmp_path / "again") == plan
    with pytest.raises(ValueError, match="measures on text, and there is none"):
        transform(source, tmp_path / "c", method)


LAYER = MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2, router="token_choice")


def test_protected_experts_keep_their_weights_and_ties_go_to_the_first() -> None:
    stats = [{"score": torch.ones(6)}]
    assert QuantMoe(average=3).plan(stats, [LAYER])["bits"] == [[4, 4, 4, 2, 2, 2]]
    assert QuantMoe(average=3.3).plan(stats, [LAYER])["bits"] == [[4, 4, 4, 2, 2, 2]]
    found = QuantMoe(average=3, protect="0.1").plan(stats, [LAYER])["bits"]
    assert found == [[4, 4, 4, 16, 16, 16]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 3}, "low=3 must be one of 2, 4, 8, 16 bits"),
        ({"average": 5}, "average=5 must lie between low=2 and high=4"),
        ({"score": "usage"}, "score='usage' must be one of"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantMoe(**options)
    QuantMoe(low=3, average=3, store="plain").check({"bits": [[3] * 6]}, [LAYER])
    with pytest.raises(ValueError, match="bits of layer 0 must be 6 of 2, 4, 8, 16"):
        QuantMoe().check({"bits": [[2] * 5]}, [LAYER])


@pytest.mark.measured
@pytest.mark.criterion
def test_scores_on_a_language_model(tmp_path: Path) -> None:
    """Rounded to 2.5 bits by the scores, the weights of a small language model with outliers are no
    further off than by chance, the mean of 3 seeds; the loss is printed."""
    model = trained()
    with_outliers(model)
    source = save(model, tmp_path / "a")
    found: dict[str, tuple[float, float]] = {}
    for name, options in {
        "score": {},
        "block": {"score": "block"},
        **{f"random {seed}": {"score": "random", "seed": seed} for seed in range(3)},
        "lowest": {"score": "lowest"},
        "2 bits": {"high": 2, "average": 2},
        "4 bits": {"low": 4, "average": 4},
    }.items():
        method = QuantMoe(**{**options, "store": "plain"})  # type: ignore[arg-type]
        other, _ = made(source, tmp_path / name, method, batches=text(4))
        pairs: list[Any] = [
            (a, b)
            for one, two in zip(moe_layers(model), moe_layers(other), strict=True)
            for a, b in zip(
                matrices(dict(one.experts.weights())),
                matrices(dict(two.experts.weights())),
                strict=True,
            )
        ]
        error = sum(float((a - b).square().mean()) for a, b in pairs) / 48
        found[name] = (error, loss(other))
    print({name: (f"{error:.6f}", round(value, 4)) for name, (error, value) in found.items()})
    chance = sum(found[f"random {seed}"][0] for seed in range(3)) / 3
    assert found["score"][0] <= chance


def test_rounding_is_of_rows_of_each_matrix() -> None:
    values = {"up_proj": torch.randn(2, 3, 4), "down_proj": torch.randn(2, 4, 3)}
    found = rounded(values, [16, 2, 4, 16])
    assert torch.equal(found["up_proj"][0], values["up_proj"][0])
    assert torch.equal(found["down_proj"][1], values["down_proj"][1])
    assert all(len(row.unique()) <= 4 for row in found["down_proj"][0])
