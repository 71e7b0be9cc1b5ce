"""Bounded adaptive confidence decoding, with a denoiser that is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etr.methods.bacd import BoundedConfidence
from etr.model import UNMASKINGS
from etr.model.unmasking import fill_block

V, B = 12, 16


def chain() -> Tensor:
    """Transition probabilities of 12 states, each of which has a likeliest successor."""
    peak = torch.linspace(0.55, 0.97, V, dtype=torch.float64)
    table = torch.rand(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = table / table.sum(1, keepdim=True) * (1 - peak)[:, None]
    state = torch.arange(V)
    table[state, (5 * state + 1) % V] += peak
    return table / table.sum(1, keepdim=True)


def marginals(table: Tensor, first: int, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Log-probabilities of every place given the tokens that are shown, [B, V]."""
    seen = torch.ones(B, V, dtype=torch.float64)
    seen[~hidden] = torch.nn.functional.one_hot(tokens[~hidden], V).double()
    forward, backward = seen.clone(), torch.ones_like(seen)
    forward[0] *= table[first]
    for i in range(1, B):
        forward[i] *= forward[i - 1] @ table
        forward[i] /= forward[i].sum()
    for i in range(B - 2, -1, -1):
        backward[i] = table @ (backward[i + 1] * seen[i + 1])
        backward[i] /= backward[i].max()
    return (forward * backward).log()


def decoded(table: Tensor, low: float, high: float) -> tuple[float, float]:
    """Mean steps, and how far the mean log-likelihood is below that of the likeliest texts."""
    policy, steps, gap = BoundedConfidence(low=low, high=high), 0, 0.0
    for first in range(V):

        def predict(tokens: Tensor, hidden: Tensor, step: int) -> Tensor:
            return marginals(table, first, tokens[0], hidden[0])[None]  # noqa: B023

        blank, masked = torch.zeros(1, B).long(), torch.ones(1, B, dtype=torch.bool)
        found, count = fill_block(predict, blank, masked, policy)
        text = torch.cat([torch.tensor([first]), found[0]])
        best = table[first].log()
        for _ in range(B - 1):
            best = (best[:, None] + table.log()).amax(0)
        gap += float(best.max() - table[text[:-1], text[1:]].log().sum())
        steps += count
    return steps / V, gap / V


@pytest.mark.criterion
def test_steps_lie_between_those_of_fixed_bars() -> None:
    """With the exact denoiser of a Markov chain of 12 states, blocks of 16 take at least as many
    steps as with a fixed bar of 0.6, and at least 1.5 fewer than with 0.9; the mean log-likelihood
    is within 0.01 of the likeliest text's. low = high is a fixed bar."""
    table = chain()
    (least, _), (most, _) = decoded(table, 0.6, 0.6), decoded(table, 0.9, 0.9)
    steps, gap = decoded(table, 0.6, 0.9)
    assert (round(least, 2), round(steps, 2), round(most, 2)) == (9.58, 13.42, 16.0)
    assert least <= steps <= most - 1.5
    assert gap <= 0.01
    assert decoded(table, 2.0, 2.0)[0] == B
    confidence = torch.rand(50, 9, dtype=torch.float64)
    shown = torch.rand(50, 9, dtype=torch.float64)
    fixed = BoundedConfidence(low=0.7, high=0.7)
    assert torch.equal(fixed.reveals(confidence, shown, 3), confidence >= 0.7)


@pytest.mark.parametrize(
    ("best", "shown", "bar"),
    [
        (0.95, (), 0.9),
        (0.7, (), 0.7),
        (0.4, (), 0.6),
        (0.2, (0.95,), 0.9),
        (0.2, (0.95, 0.8), 0.875),
        (0.2, (0.5, 0.5), 0.6),
    ],
)
def test_the_bar(best: float, shown: tuple[float, ...], bar: float) -> None:
    before = torch.full((1, 4), torch.nan, dtype=torch.float64)
    before[0, : len(shown)] = torch.tensor(shown)
    confidence = torch.tensor([[-torch.inf, best, 0.1, 0.15]], dtype=torch.float64)
    found = BoundedConfidence().bar(confidence, before)
    torch.testing.assert_close(found, torch.tensor([[bar]]).double(), atol=1e-7, rtol=0)


def test_the_first_step_takes_the_best_and_its_ties_alone() -> None:
    confidence = torch.tensor([[0.7, 0.69, 0.7], [0.5, 0.4, 0.3]], dtype=torch.float64)
    nothing = torch.full((2, 3), torch.nan, dtype=torch.float64)
    found = BoundedConfidence().reveals(confidence, nothing, 0)
    assert found.tolist() == [[True, False, True], [False, False, False]]


@pytest.mark.parametrize("option", ["low=-0.1", "low=0.95", "high=0.5"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        UNMASKINGS.parse(f"bacd:{option}")
