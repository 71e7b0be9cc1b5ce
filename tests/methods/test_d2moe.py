"""D2MoE: levels by hand, prefixes, what is stored, and the order of loading."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from toy_lm import made, same_weights, save, small, tokens

from etr.hf import load_pretrained
from etr.methods.d2moe import D2Moe, loading_order, makespan
from etr.moe import MoEConfig, moe_layers
from etr.moe.experts.nested import nested, read

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
NEEDS = [[5, 3, 1], [9, 2, 0], [2, 2, 2]]
LOADS, COMPUTE = [2.0, 1.0, 1.0], 0.4


def by_expert(needs: list[list[int]]) -> list[tuple[int, int]]:
    return [(e, level) for e, counts in enumerate(needs) for level, n in enumerate(counts) if n]


@pytest.mark.criterion
def test_levels_and_loading() -> None:
    """Of Gaussian weights each of 3 levels has at most 0.4 of the error of the one below, and is
    the same bit for bit where those above are missing; loading by need ends no later than expert by
    expert in 200 of 200 cases, and at 12.4 where that ends at 12.8."""
    weight = torch.randn(64, 128)
    levels = nested(weight, 2, 3, 16)
    errors = [float((read(levels, use) - weight).square().mean()) for use in (1, 2, 3)]
    assert errors[1] <= 0.4 * errors[0]
    assert errors[2] <= 0.4 * errors[1]
    for use in (1, 2):
        fewer = nested(weight, 2, use, 16)
        assert torch.equal(fewer.base, levels.base)
        assert torch.equal(fewer.signs, levels.signs[: use - 1])
        assert torch.equal(read(fewer, use), read(levels, use))
    order = loading_order(NEEDS)
    assert makespan(order, NEEDS, LOADS, COMPUTE) == pytest.approx(12.4)
    assert makespan(by_expert(NEEDS), NEEDS, LOADS, COMPUTE) == pytest.approx(12.8)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        most = torch.randint(0, 12, (6,), generator=generator).tolist()
        needs = [[n, int(0.6 * n), int(0.3 * n)] for n in most]
        found = makespan(loading_order(needs), needs, LOADS, COMPUTE)
        assert found <= makespan(by_expert(needs), needs, LOADS, COMPUTE) + 1e-9


def test_by_hand() -> None:
    """Weights 0, .1, .4, 1 in one group: steps of a third, then of .041667 twice."""
    levels = nested(torch.tensor([[0.0, 0.1, 0.4, 1.0]]), 2, 3, 4)
    wants = (
        [0, 0, 1 / 3, 1],
        [0.041667, 0.041667, 0.375, 1.041667],
        [0, 0.083333, 0.416667, 1],
    )
    for use, want in enumerate(wants, 1):
        torch.testing.assert_close(read(levels, use)[0], torch.tensor(want), atol=1e-6, rtol=0)


def test_the_order_by_hand_is_the_best_of_all() -> None:
    """Nested levels come in order, the most needed head first, and nobody's levels never."""
    order = loading_order(NEEDS)
    assert order == [(1, 0), (0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (2, 2), (0, 2)]
    spans = []
    for experts in set(permutations([expert for expert, _ in order])):
        heads, items = [0, 0, 0], []
        for expert in experts:
            items.append((expert, heads[expert]))
            heads[expert] += 1
        spans.append(makespan(items, NEEDS, LOADS, COMPUTE))
    assert min(spans) == pytest.approx(12.4)
    total = sum(LOADS[level] for _, level in order)
    work = COMPUTE * sum(NEEDS[expert][level] for expert, level in order)
    assert min(spans) >= max(total, LOADS[0] + work)
    assert loading_order([[0, 0], []]) == []


@pytest.mark.parametrize("group", [1, 5, 7, 128])
def test_groups_divide_a_row(group: int) -> None:
    weight = torch.randn(3, 12)
    levels = nested(weight, 4, 2, group)
    assert levels.grid.shape == (3, 12 // {1: 1, 5: 4, 7: 6, 128: 12}[group], 3)
    assert float((read(levels, 2) - weight).abs().max()) < 0.5
    even = nested(torch.full((2, 4), 0.3), 2, 3, group)
    torch.testing.assert_close(read(even, 3), torch.full((2, 4), 0.3))


def test_one_folder_serves_at_several_widths(tmp_path: Path) -> None:
    """A model told to read fewer levels is the one that has no more, bit for bit."""
    source, (given, _) = save(small(), tmp_path / "a"), tokens()
    whole, report = made(source, tmp_path / "all", D2Moe(group=4), compare=True)
    assert report.plan == "stores 4 bits a weight of the experts and their scales; reads 4"
    want = {}
    for use in (1, 2, 3):
        few, _ = made(source, tmp_path / f"few{use}", D2Moe(group=4, levels=use))
        told, _ = made(source, tmp_path / f"told{use}", D2Moe(group=4, use=use))
        with torch.no_grad():
            want[use] = few(**given).logits
            assert torch.equal(told(**given).logits, want[use])
    with torch.no_grad():
        assert torch.equal(whole(**given).logits, want[3])
        exact = small()(**given).logits
    errors = [float((want[use] - exact).abs().mean()) for use in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    layer = moe_layers(whole)[0].experts
    weights = 4 * 3 * 16 * 12
    assert layer.up_base.numel() + layer.down_base.numel() == weights // 4
    assert layer.up_signs.numel() + layer.down_signs.numel() == 2 * weights // 8
    grid = sum(value.numel() for value in (layer.up_grid, layer.down_grid))
    assert grid == 4 * weights // 4  # four numbers for each group of four
    saved = 8 * weights - weights // 4 - 2 * weights // 8 - 4 * grid
    assert report.source_bytes - report.num_bytes == 2 * saved
    whole.bfloat16().save_pretrained(tmp_path / "b")
    again = moe_layers(load_pretrained(tmp_path / "b"))[0].experts
    assert torch.equal(again.matrix("up", 1), layer.matrix("up", 1))


def test_sixteen_bits_are_the_identity(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", D2Moe(base=16), compare=True)
    assert report.same_function
    assert same_weights(model, small())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": 3}, "base=3 must be 1, 2, 4 or 8 bits"),
        ({"levels": 0}, "levels=0 must be at least 1"),
        ({"use": 4}, "use=4 must lie between 1 and levels=3"),
        ({"protect": "0.1"}, "all experts of a layer have as many bits"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        D2Moe(**options)
    layer = MoEConfig(hidden_size=2, intermediate_size=1, num_experts=1, router="token_choice")
    with pytest.raises(ValueError, match="use of layer 0 must lie between 1 and levels=3"):
        D2Moe().check({"use": [4]}, [layer])
