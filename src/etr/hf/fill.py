"""Runs a model that fills blocks: a cache of the text before, and steps on the next block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from etr.hf.modeling import EtrForCausalLM
from etr.hf.versions import CACHE
from etr.model.block_diffusion import BlockDiffusion
from etr.model.unmasking import Quota, Unmasking, fill_block, likeliest
from etr.moe import RoutingContext

QUOTA = Quota()


@torch.no_grad()
def fill(
    model: EtrForCausalLM,
    objective: BlockDiffusion,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    unmasking: Unmasking = QUOTA,
    propose: Callable[[Tensor], Tensor] = likeliest,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    cache: Cache | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Continue texts block by block, as a model that was trained on `objective` writes.

    Blocks stand where training had them, counted from a row's first token: what is left of the
    prompt's last block is part of the first one that is filled. A finished block goes through the
    model once more, for the cache. Rows of a batch do not touch each other, as far as experts do
    not let them.

    Args:
        model: in eval mode; its layers select as they are set.
        objective: size of a block, and the mask.
        input_ids: int64 [R, P], padded on the left.
        attention_mask: 1 = real token, [R, P]; None for all.
        max_new_tokens: tokens to add.
        unmasking: which places a step fills.
        propose: logits to the token of each place.
        eos_token_id: ends a row, which holds `pad_token_id` from there on; None: nothing does.
        pad_token_id: the end's own id where None.
        cache: an empty one to use; a `DynamicCache` where None.
        on_step: called with the number of each step in its block, before it runs.
    Returns:
        The texts with what was added, int64 [R, P + max_new_tokens].
    Raises:
        ValueError: padding that is not on the left, a cache that holds tokens, or no room.
    """
    mask = _padded_left(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    writer = _Writer(model, objective, input_ids, mask.sum(1), cache)
    one = partial(
        fill_block,
        partial(writer.predict, on_step=on_step),
        unmasking=unmasking,
        mask=objective.mask_id,
        propose=propose,
    )
    blocks = _blocks(writer, one, max_new_tokens, eos_token_id)
    pad = eos_token_id if pad_token_id is None else pad_token_id
    place = writer.tail[:, None] + torch.arange(max_new_tokens, device=input_ids.device)
    rest = (-(-int(place.max() + 1) // objective.block) - len(blocks)) * objective.block
    added = F.pad(torch.cat(blocks, 1), (0, rest), value=pad or 0).gather(1, place)
    if eos_token_id is not None and pad is not None:
        end = (added == eos_token_id).long()
        added = added.masked_fill(end.cumsum(1) > end, pad)
    return torch.cat([input_ids, added], 1)


def _blocks(
    writer: _Writer, one: Callable[..., tuple[Tensor, int]], count: int, end: int | None
) -> list[Tensor]:
    """Blocks that hold the next `count` tokens of each row, or those up to its end, [R, B] each."""
    left = writer.tail + count  # places of each row from the block's beginning on
    goes_on, found = left > 0, list[Tensor]()
    while bool(goes_on.any()):
        if found:
            writer.keep(found[-1], torch.ones_like(found[-1], dtype=torch.bool))
        tokens, hidden = writer.next_block()
        hidden &= goes_on[:, None]
        found.append(one(tokens=tokens, hidden=hidden)[0])
        left = left - writer.block
        goes_on = goes_on & (left > 0)
        if end is not None:
            goes_on &= ~((found[-1] == end) & hidden).any(1)
    return found


def _padded_left(mask: Tensor) -> Tensor:
    seen = mask.bool()
    if bool((seen.cummax(1).values != seen).any()) or not bool(seen[:, -1:].all()):
        raise ValueError("attention_mask must be padded on the left, and each row have a token")
    return mask


def sampler(temperature: float, top_p: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Draws a token for each place; with temperature 0 the likeliest.

    Args:
        temperature: of the logits.
        top_p: draw from the likeliest tokens that hold this much probability.
    """
    if temperature == 0:
        return likeliest
    warpers: list[Any] = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]

    def propose(logits: Tensor) -> Tensor:
        rows = logits.flatten(0, 1)
        for warper in warpers:
            rows = warper(None, rows)
        return torch.multinomial(rows.softmax(-1), 1).view(logits.shape[:2])

    return propose


class _Writer:
    """Texts in columns whose blocks stand under each other, padded on the left by whole blocks."""

    def __init__(
        self,
        model: EtrForCausalLM,
        objective: BlockDiffusion,
        ids: Tensor,
        lengths: Tensor,
        cache: Cache | None,
    ) -> None:
        self.model, self.block, self.mask = model, objective.block, objective.mask_id
        # Without a config: no layer forgets what is out of a window, as none does in training.
        self.cache = DynamicCache() if cache is None else cache
        if int(self.cache.get_seq_length()) > 0:
            raise ValueError(f"the cache holds {int(self.cache.get_seq_length())} tokens already")
        if not all(hasattr(layer, "crop") for layer in getattr(self.cache, "layers", ())):
            raise ValueError(
                f"a {type(self.cache).__name__} of this version of transformers cannot forget a "
                "step's tokens; leave cache out"
            )
        self.tail, whole = lengths % self.block, lengths // self.block
        most = int(whole.max()) * self.block
        self.begin = most - whole * self.block  # column of each row's first token
        place = torch.arange(most + self.block, device=ids.device) - self.begin[:, None]
        inside = (place >= 0) & (place < lengths[:, None])
        source = (place + ids.shape[1] - lengths[:, None]).clamp(0, ids.shape[1] - 1)
        grid = ids.gather(1, source).masked_fill(~inside, self.mask)
        self.seen = inside[:, :0]
        if most:
            self.keep(grid[:, :most], inside[:, :most])
        self._prompt: Tensor | None = grid[:, most:]

    def next_block(self) -> tuple[Tensor, Tensor]:
        """Tokens of the block to fill, and which of them are masks; the first holds the tail."""
        tokens, self._prompt = self._prompt, None
        if tokens is None:
            tokens = self.seen.new_full((len(self.seen), self.block), self.mask, dtype=torch.int64)
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        place = torch.arange(self.block, device=tokens.device)
        return tokens, place >= self.tail[:, None]

    def predict(
        self, tokens: Tensor, hidden: Tensor, step: int, on_step: Callable[[int], None]
    ) -> Tensor:
        """Logits [R, B, V] of a block; the cache is as before."""
        on_step(step)
        time = hidden.float().mean(1, keepdim=True)
        logits = self._run(tokens, torch.ones_like(hidden), time)
        self.cache.crop(-self.block)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def keep(self, tokens: Tensor, valid: Tensor) -> None:
        """Put finished blocks into the cache."""
        self._run(tokens, valid, torch.zeros(len(tokens), 1, device=tokens.device), few=True)
        self.seen = torch.cat([self.seen, valid], 1)

    def _run(self, tokens: Tensor, valid: Tensor, time: Tensor, few: bool = False) -> Tensor:
        """Logits of tokens [R, N] that follow what the cache holds; of `few` the last alone."""
        rows, length = tokens.shape
        column = torch.arange(self.seen.shape[1] + length, device=tokens.device)
        new, number = column[-length:], column // self.block
        sees = torch.cat([self.seen, valid], 1)[:, None] & (number[-length:, None] >= number)
        sees = sees | (new[:, None] == column)  # padding too: a softmax over nothing is NaN
        if not isinstance(self.cache, DynamicCache):
            room = int(self.cache.get_mask_sizes(length, 0)[0])
            if room < len(column):
                raise ValueError(f"the cache has room for {room} tokens of {len(column)}")
            sees = F.pad(sees, (0, room - len(column)))
        hides = torch.zeros(sees.shape, dtype=self.model.dtype, device=tokens.device)
        hides = hides.masked_fill(~sees, torch.finfo(hides.dtype).min)
        first = torch.arange(rows, device=tokens.device)[:, None] * len(column)
        context = RoutingContext(
            valid_mask=valid, block=first + number[-length:], time=time.expand(rows, length)
        )
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=hides[:, None],
            position_ids=(new - self.begin[:, None]).clamp_min(0),
            use_cache=True,
            logits_to_keep=1 if few else 0,
            routing_context=context,
            **{CACHE: self.cache},
        ).logits
        return logits
