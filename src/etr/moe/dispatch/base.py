"""What every dispatcher is: a frozen value that takes tokens to their experts and back."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from torch import Tensor

from etr.moe.checked import check_types
from etr.moe.exchange import Traffic
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import ExpertParallel
from etr.moe.routing import Routing, Selection
from etr.moe.select import selection_of

Steps: TypeAlias = Generator[None, None, Tensor]
"""A dispatch that can be interrupted while rows travel. It yields once before any row departs,
then after each departure, and returns the tokens [T, H]."""


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """Base of the dispatchers; fields are options, as in ``name:option=value``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def padded(self) -> bool:
        """Whether experts get [E, C, H], so that a padded backend can run them."""
        return False

    def check(self, parallel: ExpertParallel) -> None:
        """Refuse ranks that it cannot work with.

        Raises:
            ValueError: says what is missing.
        """

    def run(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic | None = None,
    ) -> Tensor:
        """Dispatch, experts and combine, [T, H].

        Every rank must call it, and run its backward pass, if only on no tokens.

        Args:
            x: tokens, float [T, H].
            routing, selection: the pairs and what is kept of them.
            backend: how the experts run.
            params: weights of this rank's experts.
            traffic: the ranks, and what is sent among them.
        """
        if traffic is None:
            raise ValueError(
                f"dispatch={self.name!r} sends rows across ranks, and this layer is on one: "
                "initialise a process group and call `MoE.distribute`, or use dispatch='auto'"
            )
        traffic.count_padded(x, routing)
        return finish(self.steps(x, routing, selection, backend, params, traffic))

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        """The same in steps."""
        raise NotImplementedError


def finish(steps: Steps) -> Tensor:
    """Result of a dispatch that nothing interrupts."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def part_of(
    routing: Routing, selection: Selection, weight: Tensor, start: int, stop: int
) -> tuple[Routing, Selection]:
    """The pairs of tokens `start` to `stop`; queues close up.

    Args:
        weight: their combine weights, cut out by the caller.
    """
    width = pairs_per_token(routing)
    pairs = slice(start * width, stop * width)
    part = replace(
        routing,
        token=routing.token[pairs] - start,
        expert=routing.expert[pairs],
        gate=weight,
        valid_mask=routing.valid_mask[start:stop],
        score=None,
        scores=None,
        logits=None,
        probs=None,
    )
    size = min(selection.buffer_size, stop - start)
    return part, selection_of(part, selection.kept[pairs], weight, size)


def pairs_per_token(routing: Routing) -> int:
    """Pairs of each token, unused ones included; 1 without tokens."""
    return max(routing.token.shape[0] // max(routing.num_tokens, 1), 1)
