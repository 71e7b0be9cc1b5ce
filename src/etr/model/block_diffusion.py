"""Block diffusion: the tokens of a block at once from their noised block and the text before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etr.model.objective import IGNORED, Example, Objective, Text
from etr.moe.checked import check_types


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion(Objective):
    """Masked diffusion within blocks, which follow each other from left to right.

    Each block draws a time t, and each of its tokens becomes the mask with probability t. A masked
    token costs its cross-entropy over t; the mean over all tokens is an upper bound of the text's
    nats per token, exact where a block is one token. A row is noised and then clean: a noised token
    sees its own noised block and the clean blocks before it, a clean one the clean tokens of its
    own and earlier blocks, never noised ones. With one block a row there is no clean half. A block
    is a routing block (`RoutingContext.block`), in each half another one, and its share of masks is
    its `RoutingContext.time`.
    """

    name = "block_diffusion"
    summary = "masked tokens of a block, from the rest of it and the blocks before: an upper bound"
    bound = True
    fills = True

    block: int = 16
    """Tokens of a block; where a row has no more, it is one block."""
    least: float = 0.02
    """Smallest time; times are uniform between it and 1, and 1 masks all tokens."""
    recount: bool = False
    """Whether the time is the share of tokens that the draw masked, one at least."""
    mask: int | None = None
    """Id of the mask; None: that of the tokenizer."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1, tokens")
        if not 0 < self.least <= 1:
            raise ValueError(f"least={self.least} must lie in (0, 1]")
        if self.mask is not None and self.mask < 0:
            raise ValueError(f"mask={self.mask} must be the id of a token, or None")

    def masked_by(self, mask: int | None) -> BlockDiffusion:
        return self if self.mask is not None else replace(self, mask=mask)

    @property
    def mask_id(self) -> int:
        """Id of the mask.

        Raises:
            ValueError: neither the option nor a tokenizer says it.
        """
        if self.mask is None:
            raise ValueError(
                "the tokenizer has no mask token: add one and save it, or name the id of a token "
                f"that no text has, {self.name}:mask=ID"
            )
        return self.mask

    def served_by(self, selection: str) -> tuple[str, str | None]:
        if selection.partition(":")[0] != "threshold":
            return selection, None
        return "dropless", "thresholds were calibrated on noised and clean tokens together"

    def example(self, text: Text, generator: torch.Generator) -> Example:
        rows, length = text.ids.shape
        device, mask = text.ids.device, self.mask_id
        valid = torch.ones_like(text.ids, dtype=torch.bool) if text.valid is None else text.valid
        counted = _to_find(text, valid)
        number = torch.arange(length, device=device) // self.block
        hidden, time = self._noise(counted, number, generator)
        noised = text.ids.masked_fill(hidden, mask)
        share, last = _share(hidden, valid, number), (length - 1) // self.block
        if last == 0:
            clean = slice(0, 0)
            sees = valid[:, None].expand(rows, length, length)
        else:
            clean = slice(None)
            sees = two_streams(number)[None] & torch.cat([valid, valid], 1)[:, None]
        size = length + len(number[clean])
        # Padding sees itself, for a softmax over nothing is NaN.
        sees = sees | torch.eye(size, dtype=torch.bool, device=device)
        first = torch.arange(rows, device=device)[:, None] * (last + 1)
        blocks = torch.cat([number, rows * (last + 1) + number[clean]]) + first
        nothing, clean_ids = torch.full_like(text.ids, IGNORED)[:, clean], text.ids[:, clean]
        place = torch.arange(length, device=device)
        return Example(
            input_ids=torch.cat([noised, clean_ids], 1),
            labels=torch.cat([text.ids.masked_fill(~hidden, IGNORED), nothing], 1),
            counted=torch.cat([counted, torch.zeros_like(counted)[:, clean]], 1),
            valid=torch.cat([valid, valid[:, clean]], 1),
            attention=sees,
            position_ids=torch.cat([place, place[clean]]).expand(rows, size),
            weight=torch.cat([hidden / time, torch.zeros_like(time)[:, clean]], 1),
            block=blocks,
            time=torch.cat([share, torch.zeros_like(share)[:, clean]], 1),
        )

    def _noise(
        self, counted: Tensor, number: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which tokens are masked, bool [B, S], and the time of their blocks, float [B, S]."""
        rows, length = counted.shape
        blocks = (length - 1) // self.block + 1
        time = self.least + (1 - self.least) * torch.rand(rows, blocks, generator=generator)
        time = time.to(number.device)[:, number]
        drawn = torch.rand(rows, length, generator=generator).to(number.device)
        hidden = (drawn < time) & counted
        if not self.recount:
            return hidden, time
        # The smallest draw of a block without any: one token is masked at least.
        drawn = drawn.masked_fill(~counted, torch.inf)
        of_block = number.expand(rows, length)
        lowest = drawn.new_full((rows, blocks), torch.inf)
        lowest = lowest.scatter_reduce(1, of_block, drawn, "amin")
        hidden = hidden | ((drawn == lowest[:, number]) & counted)
        return hidden, _share(hidden, counted, number).clamp_min(1e-12)


def two_streams(number: Tensor) -> Tensor:
    """Which place sees which in a row that is noised and then clean, bool [2 S, 2 S].

    Args:
        number: block of each of the S tokens, int64 [S].
    """
    i, j = number[:, None], number[None]
    noised = torch.cat([i == j, i > j], 1)
    clean = torch.cat([torch.zeros_like(i == j), i >= j], 1)
    return torch.cat([noised, clean])


def _to_find(text: Text, valid: Tensor) -> Tensor:
    """Tokens that a model has to find: all but padding and what begins a document by itself."""
    found = valid.clone()
    found[:, 1:] &= text.following[:, :-1] != IGNORED
    return found


def _share(part: Tensor, whole: Tensor, number: Tensor) -> Tensor:
    """Share of each block's tokens `whole` that are in `part`, at each of its places, [B, S]."""
    rows, length = part.shape
    into, of_block = torch.zeros_like(part, dtype=torch.float32), number.expand(rows, length)
    count = into.scatter_add(1, of_block, part.float())
    size = into.scatter_add(1, of_block, whole.float())
    return (count / size.clamp_min(1))[:, number]
