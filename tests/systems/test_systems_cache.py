"""Memories that hold a few experts: worked cases, and brute force over every way to evict."""

from __future__ import annotations

import math

import pytest
import torch

from etr.systems import CACHES, counts_of_passes, replay
from etr.systems.cache import Cache, FastMemory

LOADING = [name for name, kind in CACHES.items() if not kind().start(()).computes_elsewhere]
WORKED = torch.tensor([0, 1, 2, 0, 3, 1, 0, 2, 1, 3])[None, :, None]


def some(seed: int, layers: int = 2, tokens: int = 9, k: int = 2, experts: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.rand(layers, tokens, experts, generator=generator).topk(k).indices
    choices[torch.rand(layers, tokens, k, generator=generator) < 0.2] = -1
    return choices


def most_hits(uses: list[int], size: int) -> int:
    """The most hits of any way to choose who leaves, where every miss is loaded."""
    found = {frozenset(): 0}
    for expert in uses:
        following: dict[frozenset, int] = {}
        for held, hits in found.items():
            if expert in held:
                ways = [(held, hits + 1)]
            elif len(held) < size:
                ways = [(held | {expert}, hits)]
            else:
                ways = [(held - {leaves} | {expert}, hits) for leaves in held]
            for state, count in ways:
                following[state] = max(following.get(state, -1), count)
        found = following
    return max(found.values())


def test_worked_example():
    """0 of 10 by lru, 3 by Belady, two experts held."""
    hits = {n: replay(WORKED, CACHES[n](), 2, num_experts=4).hits for n in ("lru", "oracle")}
    assert hits == {"lru": 0, "oracle": 3}


def test_lru_by_hand():
    uses = torch.tensor([0, 1, 0, 2, 0, 1, 2, 2])[None, :, None]
    # 0 miss, 1 miss, 0 hit, 2 for 1, 0 hit, 1 for 2, 2 for 0, 2 hit
    found = replay(uses, CACHES["lru"](), 2, num_experts=3)
    assert (found.uses, found.hits, found.loads) == (8, 3, 5)
    assert found.hit_rate == 3 / 8
    assert found.bytes_moved(100) == 500


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_the_oracle_equals_brute_force_and_bounds_every_policy(seed, size, shared):
    choices = some(seed, tokens=6 if shared else 9)
    if shared:
        steps = [
            [e + 4 * n for e in c if e >= 0]
            for t in choices.unbind(1)
            for n, c in enumerate(t.tolist())
        ]
        best = most_hits([e for step in steps for e in step], size)
    else:
        best = sum(
            most_hits([e for e in layer.flatten().tolist() if e >= 0], size) for layer in choices
        )
    found = {
        name: replay(
            choices, kind(), size, num_experts=4, shared=shared, expected=some(seed + 50)
        ).hits
        for name, kind in CACHES.items()
        if not kind.prefetches
    }
    assert found["oracle"] == best
    assert all(hits <= best for hits in found.values())


@pytest.mark.parametrize("name", CACHES)
def test_every_policy_counts_every_use_and_misses_once_where_all_fit(name):
    choices = some(7, tokens=50)
    for size in (1, 2, 4, 9):
        found = replay(choices, CACHES[name](), size, num_experts=4, expected=choices)
        assert found.uses == int((choices >= 0).sum())
        assert name not in LOADING or found.loads >= found.uses - found.hits
    if name not in LOADING:
        assert (found.loads, found.hits) == (0, found.uses)  # all are there
        return
    different = sum(len(set(layer[layer >= 0].tolist())) for layer in choices)
    assert found.loads == different  # no miss after the first use
    options = {"num_experts": 4, "expected": choices}
    shared = replay(choices, CACHES[name](), 8, shared=True, **options)
    assert shared == found  # all of both layers fit
    nothing = replay(choices[:, :0], CACHES[name](), 1, **{**options, "expected": choices[:, :0]})
    assert (nothing.uses, nothing.loads) == (0, 0)
    assert math.isnan(nothing.hit_rate)


def test_lfu_by_hand():
    uses = torch.tensor([0, 0, 1, 2, 1, 0, 2])[None, :, None]
    # 0 miss, 0 hit, 1 miss, 2 for 1 (used once, 0 twice), 1 for 2, 0 hit, 2 for 1 (0 three times)
    found = replay(uses, CACHES["lfu"](), 2, num_experts=3)
    assert (found.hits, found.loads) == (2, 5)


def test_a_forward_uses_each_expert_once():
    """Tokens that run together, in the order of first use; then one by one."""
    choices = torch.tensor([[[0, 1], [1, 2], [0, -1], [2, 0]]])
    together = replay(
        choices, CACHES["lru"](), 2, num_experts=3, forward=torch.tensor([4, 4, 7, 8])
    )
    # 0 miss, 1 miss, 2 for 0; 0 for 1; 2 hit, 0 hit
    assert (together.uses, together.hits, together.loads) == (6, 2, 4)
    one_by_one = replay(choices, CACHES["lru"](), 2, num_experts=3, forward=torch.arange(4))
    assert one_by_one == replay(choices, CACHES["lru"](), 2, num_experts=3)


def test_steps_of_blocks_are_passes_whose_numbers_policies_are_told():
    """A prompt, two steps, a pass into the cache, a step; no step counts on from the one before."""

    class Told(FastMemory):
        def __init__(self) -> None:
            self.seen: list[tuple] = []

        def prepare(self, step, experts):
            self.seen.append((step, list(experts), dict(self.tokens)))
            return ()

        def leaves(self, held):
            return min(held)

    class Telling(Cache):
        name, summary = "telling", "for this test"

        def start(self, uses, expected=()):
            self.memory = Told()
            return self.memory

    cache = Telling()
    choices = torch.tensor(
        [[[0], [0], [1], [1], [2], [0], [0]], [[1], [2], [1], [1], [0], [0], [2]]]
    )
    step = torch.tensor([-1, -1, 0, 0, 1, -1, 0])
    found = replay(choices[:1], cache, 2, num_experts=3, step=step)
    tokens = [{0: 2}, {1: 2}, {2: 1}, {0: 1}, {0: 1}]
    assert cache.memory.seen == [
        (number, list(one), one) for number, one in zip((0, 0, 1, 2, 0), tokens, strict=True)
    ]
    forward = torch.tensor([0, 0, 1, 1, 2, 3, 4])
    assert found == replay(choices[:1], Telling(), 2, num_experts=3, forward=forward)
    replay(choices, cache, 2, num_experts=3, step=step, shared=True)
    assert [one[0] for one in cache.memory.seen] == [0, 1, 0, 1, 2, 3, 4, 5, 0, 1]
    nothing = replay(choices[:, :0], cache, 2, num_experts=3, step=step[:0])
    assert nothing.uses == 0


def test_counts_of_passes():
    choices = some(3, layers=3, tokens=20, k=2, experts=5)
    step = torch.tensor([-1] * 4 + [0] * 3 + [1] * 3 + [-1] * 3 + [0] * 6 + [1])
    counts, steps = counts_of_passes(choices, step, 5)
    assert steps.tolist() == [-1, 0, 1, -1, 0, 1]
    for layer, found in zip(choices, counts, strict=True):
        for part, row in zip(layer.split([4, 3, 3, 3, 6, 1]), found.tolist(), strict=True):
            assert row == [part.flatten().tolist().count(expert) for expert in range(5)]
    counts, steps = counts_of_passes(choices[:, :0], step[:0], 5)
    assert (counts.shape, steps.shape) == ((3, 0, 5), (0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": torch.zeros(10)}, "give forward or step"),
        ({"step": torch.zeros(9)}, r"step has shape \(9,\); choices has 10 tokens"),
    ],
)
def test_steps_that_do_not_fit_are_refused(options, message):
    given = {"step": torch.zeros(10), **options}
    with pytest.raises(ValueError, match=message):
        replay(WORKED, CACHES["lru"](), 2, num_experts=4, **given)


def test_time_is_that_of_what_was_moved():
    found = replay(WORKED, CACHES["oracle"](), 2, num_experts=4)
    assert found.loads == 7
    assert found.seconds(1000, bandwidth=500.0, latency=0.5) == 7 * 2.5


def test_what_is_brought_in_beforehand_is_a_load_and_then_a_hit():
    class Early(FastMemory):
        def __init__(self) -> None:
            self.seen: list[tuple] = []

        def prepare(self, step, experts):
            self.seen.append((step, list(experts)))
            return experts

        def leaves(self, held):
            return min(held)

    class Prefetching(Cache):
        name, summary = "prefetching", "for this test"

        def start(self, uses, expected=()):
            self.memory = Early()
            return self.memory

    cache = Prefetching()
    found = replay(torch.tensor([[[0, 1], [2, -1]]]), cache, 2, num_experts=3)
    assert cache.memory.seen == [(0, [0, 1]), (1, [2])]
    assert (found.hits, found.loads) == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WORKED, 0, 4), "size=0"),
        ((WORKED[0], 1, 4), r"choices has shape \(10, 1\)"),
        ((WORKED, 1, 3), "choices holds 3; num_experts=3"),
    ],
)
def test_arguments_are_checked(arguments, message):
    choices, size, experts = arguments
    with pytest.raises(ValueError, match=message):
        replay(choices, CACHES["lru"](), size, num_experts=experts)
