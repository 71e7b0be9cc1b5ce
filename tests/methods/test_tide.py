"""TIDE: the worked example, what an interval costs, and tokens that no interval changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_lm import save, small

from etr.hf import load_pretrained
from etr.hf.fill import fill
from etr.hf.offload import Offload, banks, begin_step, load_offloaded
from etr.methods.tide import Exchanges, Tide, best_interval, exchanged
from etr.model import UNMASKINGS, BlockDiffusion
from etr.moe.watch import LayerView, watch
from etr.systems import CACHES, Memory

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
OBJECTIVE = BlockDiffusion(block=8, mask=127)
EXPERTS = 8


def drifting(steps: int = 8, blocks: int = 6, experts: int = 32) -> tuple[Tensor, Tensor]:
    """Tokens of each expert in each step of some blocks, which go over into others."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(blocks):
        likes = torch.randn(experts, generator=generator)
        for _ in range(steps):
            likes = 0.9 * likes + 0.44 * torch.randn(experts, generator=generator)
            used = likes.softmax(-1).multinomial(64, replacement=True, generator=generator)
            rows.append(torch.bincount(used, minlength=experts))
    return torch.stack(rows), torch.arange(steps).repeat(blocks)


@pytest.mark.criterion
def test_no_interval_changes_a_token_and_longer_ones_move_less_and_miss_more(
    tmp_path: Path,
) -> None:
    """Tokens are those of the whole model for every interval tau and every number C of experts
    held, and moves are those of a replay; C = E moves and misses nothing. Where a step's experts
    drift, moves fall and misses rise from tau = 1 to 2, 4 and 8."""
    folder = save(small(num_local_experts=EXPERTS), tmp_path / "model")
    prompt = torch.randint(127, (2, 11), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 13, "unmasking": UNMASKINGS.parse("quota:steps=4,threshold=1")}
    wanted = fill(load_pretrained(folder), OBJECTIVE, prompt, **options)
    for size in (1, 3, EXPERTS):
        for every in (1, 2, 4):
            cache = f"tide:every={every}"
            model = load_offloaded(folder, Offload(resident=size, cache=cache))
            counts, steps = [[], []], []

            def see(place: int, view: LayerView) -> None:
                kept = view.routing.expert[view.selection.kept]
                counts[place].append(torch.bincount(kept, minlength=EXPERTS))  # noqa: B023
                if place == 0:
                    steps.append(banks(model)[0][1].memory.step)  # noqa: B023

            with watch(model, see):
                found = fill(
                    model,
                    OBJECTIVE,
                    prompt,
                    **options,
                    on_step=lambda step: begin_step(model, step),  # noqa: B023
                )
            assert torch.equal(found, wanted)
            assert max(steps) == 4  # four steps of a block, and its way into the cache
            for (_, bank), rows in zip(banks(model), counts, strict=True):
                replayed = exchanged(torch.stack(rows), torch.tensor(steps), size, every)
                assert bank.memory.loads == replayed.moves
                assert (replayed.moves == replayed.missed == 0) == (size == EXPERTS)
    counts, steps = drifting()
    for size in (8, 16):
        found = [exchanged(counts, steps, size, every) for every in (1, 2, 4, 8)]
        moves, missed = [one.moves for one in found], [one.missed for one in found]
        assert moves == sorted(moves, reverse=True)
        assert missed == sorted(missed)
        assert len(set(moves)) == len(set(missed)) == 4


def test_worked_example() -> None:
    """Two are held, 0 and 1; counts 5, 3, 0, 4: 3 for 1, and 3 of 12 pairs miss, 4 without it."""
    counts = torch.tensor([[5, 3, 0, 4]])
    assert exchanged(counts, torch.tensor([0]), 2, 4) == Exchanges(moves=1, missed=3)
    assert exchanged(counts, torch.tensor([1]), 2, 4) == Exchanges(moves=0, missed=4)
    moved = []
    memory = Memory(Tide().start(()), 2, lambda comes, leaves: moved.append((comes, leaves)))
    memory.begin({0: 5, 1: 3, 3: 4})
    assert moved == [(0, None), (1, None), (3, 1)]
    assert memory.held == {0, 3}


def test_the_lowest_leave_and_others_stay() -> None:
    """Fewer than C experts are used: of those without tokens, just as many leave as come."""
    memory = Memory(Tide(every=1).start(()), 3)
    memory.begin({7: 2})
    assert memory.held == {1, 2, 7}
    memory.use(7)
    memory.begin({4: 1, 5: 1, 2: 1, 7: 3})
    assert memory.held == {2, 4, 7}  # of equal ones the lower
    memory.use(5)
    assert memory.held == {2, 4, 7}
    assert (memory.uses, memory.hits, memory.loads) == (2, 1, 2)


def test_the_interval_of_least_cost() -> None:
    """Moves and misses of 12,288 pairs as they were measured on a block-diffusion model."""
    shares = {1: (572, 0.034), 2: (407, 0.058), 4: (306, 0.131), 8: (149, 0.374)}
    found = {n: Exchanges(moves=m, missed=round(12288 * s)) for n, (m, s) in shares.items()}
    assert best_interval(found, move=4, miss=1) == 2
    assert best_interval(found, move=1.7, miss=1) == 1
    assert best_interval(found, move=9, miss=1) == 4
    assert best_interval(found, move=1, miss=0) == 8


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="every=0"):
        CACHES.parse("tide:every=0")
