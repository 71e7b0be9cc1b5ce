"""Rows that `etr theory` prints: the theory at given sizes, and what it does not say there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etr.theory._ranges import Array, between, counts
from etr.theory.bounds import (
    TOKEN_LEAST_CAPACITY,
    TOKEN_UPPER,
    Bounds,
    expert_choice_paper,
    expert_choice_tight,
    token_choice_paper,
    token_choice_tight,
)
from etr.theory.geometric import (
    CHOICES,
    Choice,
    crossover,
    false_positive,
    geometric_success,
    true_positive,
)
from etr.theory.lower_bound import capacity_lower_bound
from etr.theory.monte_carlo import GeometricModel, simulate
from etr.theory.success import expert_choice_success, required_capacity

SuccessRow = tuple[float, int, Choice, float, Bounds | None, Bounds | None]
"""Capacity factor, capacity in tokens, choice, exact rate, the paper's interval of the rate and a
tighter one, where there is one."""
CrossoverRow = tuple[float, int, float, float, float]
"""Capacity factor, capacity in tokens, the signal in standard deviations from which expert choice
is ahead with a fixed score, both rates there, and that signal with a noisy score; NaN for none."""
CheckRow = tuple[bool, float, Choice, float, float, float, float]
"""Noisy score or not, signal, choice, exact rate, share of samples that succeeded, and both ends of
its Wilson interval."""


def agrees(row: CheckRow) -> bool:
    """Whether the interval holds the exact rate."""
    *_, exact, _, low, high = row
    return low <= exact <= high


def capacity_of(factor: ArrayLike, num_tokens: int, num_experts: int) -> NDArray[np.int64]:
    """``ceil(factor s / E - 1e-6)``, at least 1, tokens.

    Raises:
        ValueError: an argument is out of range.
    """
    f = between("capacity_factor", factor, 0.0, 1e9)
    s, e = counts("num_tokens", num_tokens), counts("num_experts", num_experts)
    return np.maximum(np.ceil(f * s / e - 1e-6), 1).astype(np.int64)


def success_rows(
    factors: Sequence[float], num_tokens: int, num_experts: int, signal: float, noisy: bool = False
) -> list[SuccessRow]:
    """Exact rates and bounds; expert choice has no bounds with a noisy score."""
    p = np.full(num_experts, true_positive(signal, num_experts, noisy))
    q = np.full(num_experts, false_positive(signal, noisy))
    rows: list[SuccessRow] = []
    for factor in factors:
        c = int(capacity_of(factor, num_tokens, num_experts))
        paper: dict[Choice, Bounds] = {"token": token_choice_paper(c, num_tokens, p)}
        tight: dict[Choice, Bounds] = {"token": token_choice_tight(c, num_tokens, p)}
        if not noisy:
            paper["expert"] = expert_choice_paper(c, num_tokens, q)
            tight["expert"] = expert_choice_tight(c, num_tokens, q)
        for choice in CHOICES:
            exact = geometric_success(choice, c, num_tokens, num_experts, signal, noisy)
            rows.append((factor, c, choice, float(exact), paper.get(choice), tight.get(choice)))
    return rows


def capacity_rows(
    wanted: Sequence[float], num_tokens: int, num_experts: int, signal: float, noisy: bool = False
) -> list[dict[Choice, int | None]]:
    """The least capacity of each choice, tokens, for each wanted rate; None if none reaches it."""
    between("wanted", wanted, 0.0, 1.0)

    def needed(choice: Choice, rate: float) -> int | None:
        def success(c: Array) -> Array:
            return geometric_success(choice, c, num_tokens, num_experts, signal, noisy)

        reachable = float(success(np.asarray(float(num_tokens))))
        return None if rate > reachable else int(required_capacity(rate, num_tokens, success))

    return [{choice: needed(choice, rate) for choice in CHOICES} for rate in wanted]


def crossover_rows(
    factors: Sequence[float], num_tokens: int, num_experts: int
) -> list[CrossoverRow]:
    """The crossover by capacity, for a fixed and for a noisy score."""
    c = capacity_of(factors, num_tokens, num_experts)
    fixed = crossover(c, num_tokens, num_experts)
    noisy = crossover(c, num_tokens, num_experts, noisy=True)
    rate = geometric_success("token", c, num_tokens, num_experts, np.nan_to_num(fixed))
    rate = np.where(np.isnan(fixed), np.nan, rate)
    columns = (c.tolist(), fixed.tolist(), rate.tolist(), noisy.tolist())
    return list(zip(factors, *columns, strict=True))


def check_rows(
    factor: float,
    num_tokens: int,
    num_experts: int,
    signals: Sequence[float],
    samples: int,
    seed: int,
    confidence: float = 0.999,
) -> list[CheckRow]:
    """Samples against the exact forms; `confidence` is that all intervals hold at once."""
    c = int(capacity_of(factor, num_tokens, num_experts))
    cases = [(noisy, signal) for noisy in (False, True) for signal in signals]
    each = 1 - (1 - confidence) / max(1, len(cases) * len(CHOICES))  # Bonferroni
    rows: list[CheckRow] = []
    for number, (noisy, signal) in enumerate(cases):
        model = GeometricModel(
            num_tokens=num_tokens,
            num_experts=num_experts,
            hidden_size=max(16, num_experts),
            capacity=c,
            signal=signal,
            noisy=noisy,
        )
        estimates = simulate(model, samples, seed + number)
        for choice in CHOICES:
            exact = geometric_success(choice, c, num_tokens, num_experts, signal, noisy)
            low, high = estimates[choice].interval(each)
            rate = estimates[choice].rate
            rows.append((noisy, signal, choice, float(exact), rate, low, high))
    return rows


def findings(
    num_tokens: int, num_experts: int, signal: float, hidden_size: int = 128
) -> list[tuple[str, str]]:
    """Where the paper's statements are vacuous or rest on an assumption: (statement, here)."""
    s, mean_load = num_tokens, num_tokens / num_experts
    p, q = float(true_positive(signal, num_experts)), float(false_positive(signal))
    most = 5 * mean_load
    lower = f"C from {TOKEN_LEAST_CAPACITY} to {most:g}" if most >= TOKEN_LEAST_CAPACITY else "no C"
    c = np.arange(1, s + 1)
    noisy = geometric_success("expert", c, s, num_experts, signal, True)
    marginal = expert_choice_success(c, s, [float(false_positive(signal, True))])
    gap = np.abs(noisy - marginal)
    d = np.linspace(0, 1, 10_001)
    bound = capacity_lower_bound(hidden_size, num_experts, d)
    band = d[(bound >= 1) & (bound <= mean_load)]
    inside = f"affinity {band[0]:.3f} to {band[-1]:.3f}" if band.size else "no affinity"
    fixed = float(crossover(capacity_of(1.0, s, num_experts), s, num_experts))
    return [
        (
            "token choice, upper constant 10: says nothing from",
            f"factor {1 / (TOKEN_UPPER * p):.3g}",
        ),
        ("token choice, lower constant 1/5: stated only for", lower),
        ("expert choice: silent between", f"C = {(s - 1) * q / 2:.3g} and {2 * s * q:.3g}"),
        ("expert choice: true transition at", f"C = {s * q:.3g}"),
        (
            "expert choice, noisy score, the mean q in place of the score: wrong by up to",
            f"{gap.max():.3f} (C = {int(c[gap.argmax()])})",
        ),
        (f"lower bound, H {hidden_size}: between 1 and the mean load {mean_load:g} for", inside),
        ("crossover at factor 1, fixed score", f"signal {fixed:.3f}"),
        ("crossover, noisy score", "none: expert choice is never behind"),
    ]
