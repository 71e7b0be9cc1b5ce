"""SRP and SCH against worked cases and brute force."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from etr.systems import segment_cache_best_hit_rate as sch
from etr.systems import segment_routing_best_performance as srp


def one_sequence(experts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(experts), np.zeros(len(experts), dtype=np.int32)


def random_trace(seed: int, tokens: int = 7, k: int = 2, num_experts: int = 3):
    """Two sequences of distinct experts, some tokens with fewer than k."""
    generator = np.random.default_rng(seed)
    experts = np.stack([generator.permutation(num_experts)[:k] for _ in range(tokens)])
    experts[generator.random((tokens, k)) < 0.2] = -1
    return experts, (np.arange(tokens) >= tokens // 2 + 1).astype(np.int32)


def windows(experts: np.ndarray, sequence: np.ndarray, segment: int) -> list[list[set[int]]]:
    """Every stretch of `segment` tokens of one sequence, as the experts of its tokens."""
    rows = [{int(e) for e in row if e >= 0} for row in experts]
    return [
        rows[i : i + segment]
        for i in range(len(rows) - segment + 1)
        if sequence[i] == sequence[i + segment - 1]
    ]


def brute_srp(experts, sequence, num_experts, segment) -> float:
    """Best F1 over every way to switch every expert on or off in every window."""
    found = windows(experts, sequence, segment)
    counts = [sum(e in row for row in window) for window in found for e in range(num_experts)]
    best = 0.0
    for on in product([False, True], repeat=len(counts)):
        hits = sum(count for count, is_on in zip(counts, on, strict=True) if is_on)
        total = segment * sum(on) + sum(counts)
        best = max(best, 2 * hits / total if total else 0.0)
    return best


def brute_sch(experts, sequence, num_experts, segment, size) -> float:
    """Best hits over every cache content in every window."""
    hits = total = 0
    for window in windows(experts, sequence, segment):
        caches = combinations(range(num_experts), min(size, num_experts))
        hits += max(sum(len(row & set(cache)) for row in window) for cache in caches)
        total += sum(len(row) for row in window)
    return hits / total if total else float("nan")


@pytest.mark.parametrize("segment", [1, 2, 5, 8])
def test_constant_trace_is_fully_consistent(segment):
    trace = one_sequence([[2, 0]] * 8)
    assert srp(*trace, 4, segment) == 1
    assert sch(*trace, 4, segment, 2) == 1
    assert sch(*trace, 4, segment, 1) == 0.5


@pytest.mark.parametrize("segment", [2, 4, 5, 6])
def test_two_experts_in_turn(segment):
    """Each is on half of the time: switched on throughout, precision 1/2 and recall 1."""
    trace = one_sequence([[0], [1]] * 6)
    assert srp(*trace, 2, segment) == pytest.approx(2 / 3)
    assert sch(*trace, 2, segment, 1) == pytest.approx(-(-segment // 2) / segment)
    assert sch(*trace, 2, segment, 2) == 1


def test_single_tokens_are_imitated_perfectly():
    assert srp(*random_trace(0), 3, 1) == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("segment", [2, 3])
def test_srp_equals_brute_force(seed, segment):
    trace = random_trace(seed)
    assert srp(*trace, 3, segment) == pytest.approx(brute_srp(*trace, 3, segment))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("segment", "size"), [(2, 1), (3, 2), (4, 3), (3, 9)])
def test_sch_equals_brute_force(seed, segment, size):
    trace = random_trace(seed, tokens=12, k=2, num_experts=5)
    assert sch(*trace, 5, segment, size) == pytest.approx(brute_sch(*trace, 5, segment, size))


def test_windows_do_not_cross_sequences():
    """Each sequence keeps to one expert; a window across both would not."""
    experts, sequence = np.array([[0]] * 4 + [[1]] * 4), np.repeat([5, 3], 4)
    assert srp(experts, sequence, 2, 4) == 1
    assert sch(experts, sequence, 2, 4, 1) == 1


def test_more_mixing_is_less_consistent():
    generator = np.random.default_rng(0)
    blocks = np.repeat(generator.integers(0, 8, 64), 16)[:, None]
    shuffled = generator.permutation(blocks)
    sequence = np.zeros(len(blocks))
    assert srp(blocks, sequence, 8, 8) > srp(shuffled, sequence, 8, 8) + 0.2
    assert sch(blocks, sequence, 8, 8, 2) > sch(shuffled, sequence, 8, 8, 2) + 0.2


def test_too_short_sequences_and_no_experts():
    trace = one_sequence([[0]] * 3)
    assert np.isnan(srp(*trace, 2, 4))
    assert np.isnan(sch(*trace, 2, 4, 1))
    nobody = one_sequence([[-1]] * 3)
    assert srp(*nobody, 2, 2) == 0
    assert np.isnan(sch(*nobody, 2, 2, 1))
    empty = np.zeros((0, 0), dtype=int), np.zeros(0, dtype=int)
    assert np.isnan(srp(*empty, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 1), int), np.zeros(3), 2, 0, 1), "segment=0"),
        ((np.zeros((3, 1), int), np.zeros(3), 2, 1, 0), "cache_size=0"),
        ((np.zeros((3, 1), int), np.zeros(4), 2, 1, 1), r"experts has shape \(3, 1\)"),
        ((np.full((3, 1), 2), np.zeros(3), 2, 1, 1), "experts holds 2; num_experts=2"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        sch(*arguments)


@pytest.mark.filterwarnings("error")
def test_arrays_of_a_file_cannot_be_written_to():
    experts, sequence = one_sequence([[2, 0]] * 8)
    experts.flags.writeable = sequence.flags.writeable = False
    assert srp(experts, sequence, 4, 2) == 1
