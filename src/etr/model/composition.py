"""Several language models as one: who answers a prompt, or writes the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from etr.table import Table

Learned = dict[str, Tensor]
"""What a composition has learned, by name; saved beside its members."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """N prompts of S tokens from texts of several categories.

    Args:
        ids: int64 [N, S].
        category: of each, int64 [N]; none of 0 to the greatest is missing.
        score: of each of M members on what follows the prompt, the greater the better, float
            [N, M]; None where no member was run.
    """

    ids: Tensor
    category: Tensor
    score: Tensor | None = None


class Composition:
    """A frozen config of how language models of one vocabulary become one; a row of `COMPOSITIONS`.

    `etr.train.compose` runs the members and lets a composition learn; `etr.hf.composed` keeps what
    came out in a folder, and generates with it.
    """

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for pages."""

    def check(self, learned: Learned, num_members: int, vocab_size: int) -> None:
        """Refuse what cannot have been learned of so many members.

        Raises:
            ValueError: names the tensor.
        """
        raise NotImplementedError


class PromptComposition(Composition):
    """One member answers a prompt, and all that follows it."""

    def learn(
        self, prompts: Prompts, scored: Prompts, sizes: Tensor, vocab_size: int
    ) -> tuple[list[int], Learned]:
        """Who is kept, and what says who answers.

        Args:
            prompts: to learn from what categories look like.
            scored: other prompts of the same categories, with scores.
            sizes: bytes of each member's weights, float64 [M].
            vocab_size: tokens are smaller numbers.
        Returns:
            Members that are kept, in order, and tensors in which they are numbered from 0.
        """
        raise NotImplementedError

    def choose(self, learned: Learned, ids: Tensor, valid: Tensor) -> Tensor:
        """Who of the kept members answers each prompt, int64 [B]; by its row alone.

        Args:
            ids: int64 [B, S].
            valid: False on padding, bool [B, S].
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps in which a router is trained on one loss."""

    name: str
    steps: int
    learning_rate: float
    pairs: bool = False
    """Whether it also learns from pairs of continuations, of which one is better."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a router and M members say of B rows of S places.

    Args:
        own: logits of the router, float [B, S, V].
        choice: what it thinks of each member, float [B, S, M].
        members: log-probabilities of each, without gradient, float [B, S, M, V].
        labels: the token after each place; `IGNORED` where nothing is asked. int64 [B, S].
        before: the router's log-probability of each label when the phase began, float [B, S]; only
            of pairs.
    """

    own: Tensor
    choice: Tensor
    members: Tensor
    labels: Tensor
    before: Tensor | None = None


class TokenComposition(Composition):
    """A language model of its own, the router, is trained to choose for each token.

    The members run at every token, each with a cache: whom the next one will need is not known.
    """

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What the router is trained on, one after the other."""
        raise NotImplementedError

    def loss(self, phase: Phase, seen: Seen, pair: tuple[Seen, Seen] | None) -> Tensor:
        """What a step of a phase makes less.

        Args:
            seen: of text.
            pair: of continuations, the better ones first; None in a phase without pairs.
        """
        raise NotImplementedError

    def combine(self, own: Tensor, choice: Tensor, members: Tensor) -> Tensor:
        """The logits to choose by, [B, S, V]; places do not touch each other.

        Args:
            own, choice, members: see `Seen`.
        """
        raise NotImplementedError


def check_shapes(learned: Learned, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Refuse tensors of other names or sizes.

    Args:
        shapes: by name; None where any size will do.
    Raises:
        ValueError: names what is wrong.
    """
    if learned.keys() != shapes.keys():
        raise ValueError(f"learned tensors are {sorted(learned)}; they must be {sorted(shapes)}")
    for name, shape in shapes.items():
        found = tuple(learned[name].shape)
        if len(found) != len(shape) or any(
            want not in (None, size) for size, want in zip(found, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"learned tensor {name!r} has shape {found}; it must be ({wanted})")


COMPOSITIONS: Table[Composition] = Table("composition", ())
"""Compositions by name."""
