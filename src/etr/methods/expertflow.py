"""ExpertFlow: what a sequence will use is predicted, and decides who leaves (arXiv 2410.17954)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.moe.checked import check_types
from etr.systems.cache import CACHES, Cache, FastMemory, Forecast
from etr.systems.plan import Demand

ROWS = 1024
"""Tokens of a step of training, about."""


@dataclass(frozen=True, kw_only=True)
class ExpertFlow(Cache):
    """Whoever is used again last by prediction leaves; a miss is loaded, so that nothing is lost.

    The prediction is one forward of a small network over the ids of a sequence, before the model
    runs: it knows prompts, and of text that is being written no more than what stands.
    """

    name = "expertflow"
    summary = "the expert whose next use is predicted farthest leaves"
    predicts = True
    predicts_prompts = True

    width: int = 32
    """Of the embeddings, features."""
    steps: int = 150
    """Of training."""
    learning_rate: float = 5e-3
    """Of Adam."""
    seed: int = 0
    """Of the initial weights and of the order of tokens."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("width", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0")

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
        return _Expected(expected)

    def learn(self, past: Demand, tokens: Tensor) -> Forecast:
        predictor = Predictor.fitted(self, past, tokens)
        assert past.choices is not None  # or it could not be fitted
        most = past.choices.shape[-1]

        def forecast(demand: Demand, tokens: Tensor) -> Tensor:
            assert demand.sequence is not None
            return (
                predictor(tokens, demand.sequence).detach().topk(most, -1).indices.transpose(0, 1)
            )

        return forecast


class _Expected(FastMemory):
    """Knows the step that runs, and guesses of those to come."""

    def __init__(self, expected: Sequence[Sequence[int]]) -> None:
        self._places: dict[int, list[tuple[int, float]]] = {}
        for step, experts in enumerate(expected):
            for place, expert in enumerate(experts):
                self._places.setdefault(expert, []).append((step, place))
        self._step, self._now = 0, list[int]()

    def prepare(self, step: int, experts: Sequence[int]) -> Iterable[int]:
        self._step, self._now = step, list(experts)
        return ()

    def used(self, place: int, expert: int) -> None:
        self._now.remove(expert)

    def leaves(self, held: Collection[int]) -> int:
        return max(held, key=lambda expert: (self._next(expert), -expert))

    def _next(self, expert: int) -> tuple[float, float]:
        if expert in self._now:
            return self._step, self._now.index(expert)
        places = self._places.get(expert, [])
        later = bisect_right(places, (self._step, math.inf))
        return places[later] if later < len(places) else (math.inf, 0)


class Predictor(nn.Module):
    """A token, and the mean of its sequence, to a logit for each expert of each layer.

    Args:
        config: the sizes.
        vocabulary: ids that it knows; others share one embedding.
        num_layers, num_experts: of the model.
    """

    def __init__(
        self, config: ExpertFlow, vocabulary: int, num_layers: int, num_experts: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary + 1, config.width)
        self.inner = nn.Linear(2 * config.width, 2 * config.width)
        self.outer = nn.Linear(2 * config.width, num_layers * num_experts)
        self.shape = (num_layers, num_experts)

    def forward(self, tokens: Tensor, sequence: Tensor) -> Tensor:
        """Logits [N, L, E] of tokens of whole sequences, [N] each."""
        one = self.embedding(tokens.clamp_max(self.embedding.num_embeddings - 1))
        number = torch.unique_consecutive(sequence, return_inverse=True)[1]
        count = torch.bincount(number).clamp_min(1)
        mean = one.new_zeros(len(count), one.shape[1]).index_add(0, number, one) / count[:, None]
        hidden = self.inner(torch.cat([one, mean[number]], -1)).relu()
        return self.outer(hidden).view(-1, *self.shape)

    @classmethod
    def fitted(cls, config: ExpertFlow, past: Demand, tokens: Tensor) -> Predictor:
        """Trained on a trace by the cross-entropy of each expert, used or not.

        Raises:
            ValueError: only counts are known, or the tokens are others.
        """
        if past.choices is None or past.sequence is None:
            raise ValueError("cache 'expertflow' learns from the choices of every token")
        if tokens.shape != past.sequence.shape or not len(tokens):
            raise ValueError(f"{len(tokens)} ids for {len(past.sequence)} tokens; give one each")
        layers, experts = past.counts.shape
        used = F.one_hot(past.choices.transpose(0, 1).clamp_min(-1) + 1, experts + 1)
        used = used.amax(2)[..., 1:].to(torch.get_default_dtype())  # [N, L, E]
        number = torch.unique_consecutive(past.sequence, return_inverse=True)[1]
        sequences = int(number[-1]) + 1
        some = max(1, ROWS * sequences // len(number))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            model = cls(config, int(tokens.max()) + 1, layers, experts)
            optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
            for _ in range(config.steps):
                rows = torch.isin(number, torch.randperm(sequences)[:some])
                logits = model(tokens[rows], past.sequence[rows])
                loss = F.binary_cross_entropy_with_logits(logits, used[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.eval()


CARD = Card(
    name="expertflow",
    title="ExpertFlow",
    summary="who leaves a memory of experts, and which sequences run together, by a prediction",
    paper="2410.17954",
    level="system",
    branch="offloading and caching",
    rows=(Row(table=CACHES, kind=ExpertFlow),),
    against="lru",
    moves=("bytes",),
    claim=(
        "On held-out text of 4 topics the policy closes half of the way from LRU's hits to "
        "Belady's or more, with 4 of 16 experts held; told the truth it has Belady's hits; and "
        "batches of 4 regrouped sequences use 0.85 of the experts of those in order, or less "
        "(E = 64)."
    ),
    departs=(
        "The predictor is an embedding and the mean of its sequence, not a T5. It knows prompts; "
        "for text that a model writes there is no prediction, so `etr generate` refuses it. "
        "Regrouping is greedy; `etr cache TRACE --learn-from PAST --regroup 4` prints its gain."
    ),
)
