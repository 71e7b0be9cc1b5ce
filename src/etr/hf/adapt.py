"""Runs the fitting of a `Decoding`: what is added to routers' logits, by the text so far."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.hf.modeling import EtrForCausalLM
from etr.hf.versions import CACHE_NAMES
from etr.model.decoding import Decoding, Deltas
from etr.moe import RoutingContext, moe_layers

ROWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda value, rows: value.index_select(0, rows),
    "batch_select_indices": lambda value, rows: value[rows],
    "batch_repeat_interleave": lambda value, times: value.repeat_interleave(times, 0),
}
"""Methods of a cache by which search moves its rows, and what they do."""


class Adapting:
    """Hook before a model's forward: fits at a new text and every so many tokens, and adds.

    What a cache holds was computed with the deltas of its time, and stays.

    Args:
        model: whose weights stay as they are.
        decoding: one that fits.
    """

    def __init__(self, model: EtrForCausalLM, decoding: Decoding) -> None:
        self._decoding = decoding
        self._signature = inspect.signature(model.forward)
        self._cache: Any = None
        self._text: Tensor | None = None
        self._deltas: Deltas = {}
        self._fitted = 0

    def before(
        self, model: EtrForCausalLM, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Follow the text, fit where it is time, and add to the logits of this forward."""
        given = {**dict(zip(self._signature.parameters, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError(f"decoding {self._decoding.name!r} fits to a text: give input_ids")
        cache = next((found for n in CACHE_NAMES if (found := given.get(n)) is not None), None)
        held = 0 if cache is None else int(cache.get_seq_length())
        if held and cache is self._cache and self._text is not None:
            self._text = torch.cat([self._text[:, :held], ids], 1)  # search may have cropped
        else:
            rows = self._followed(ids) if cache is None else None
            self._text = ids
            if rows is None:
                self._deltas, self._fitted = {}, 0
            else:
                self._move(lambda value: value[rows], text=False)
        if cache is not None and cache is not self._cache:
            self._move_with(cache)
        self._cache = cache
        length, every = self._text.shape[1], self._decoding.refits_after
        assert every is not None
        if not self._fitted or length - self._fitted >= every:
            self._fit(model, given.get("attention_mask"))
            self._fitted = length
        return (), {**given, "routing_context": _with(given, self._deltas, ids.shape[1])}

    def _followed(self, ids: Tensor) -> Tensor | None:
        """Of texts that are given as a whole, the row of the last ones that each goes on from.

        None where one goes on from none of them.
        """
        old = self._text
        if old is None or old.shape[0] != ids.shape[0] or old.shape[1] >= ids.shape[1]:
            return None
        same = (ids[:, None, : old.shape[1]] == old).all(-1)
        own = same.diagonal()[:, None]  # its own row rather than an equal one before
        same = torch.where(own, torch.eye(len(ids), dtype=torch.bool, device=ids.device), same)
        return same.int().argmax(1) if bool(same.any(1).all()) else None

    def _move(self, rows: Callable[[Tensor], Tensor], text: bool = True) -> None:
        if text and self._text is not None:
            self._text = rows(self._text)
        self._deltas = {layer: rows(value) for layer, value in self._deltas.items()}

    def _move_with(self, cache: Any) -> None:
        """Let texts and what is added to them go where search moves the rows of a cache."""
        for name, move in ROWS.items():
            if hasattr(cache, name):
                setattr(cache, name, self._moved(getattr(cache, name), move))

    def _moved(self, method: Any, move: Callable[[Tensor, Any], Tensor]) -> Any:
        def call(to: Any) -> None:
            method(to)
            self._move(lambda value: move(value, to))

        return call

    def _fit(self, model: EtrForCausalLM, mask: Any) -> None:
        text = self._text
        assert text is not None
        if text.shape[1] < 2:  # no token to predict from another
            return
        mask = _real(mask, text)
        counted = (mask[:, 1:] * mask[:, :-1]).to(torch.float32)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        fixed = {"attention_mask": mask, "position_ids": position, "use_cache": False}

        def loss(deltas: Deltas) -> Tensor:
            context = _with({}, deltas, text.shape[1])
            logits = model.forward(input_ids=text, routing_context=context, **fixed).logits
            nats = F.cross_entropy(
                logits[:, :-1].transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32)),
                text[:, 1:],
                reduction="none",
            )
            return (nats * counted).sum(1) / counted.sum(1).clamp_min(1)

        if not self._deltas:
            wide = torch.promote_types(model.dtype, torch.float32)
            self._deltas = {
                layer.layer_index: text.new_zeros(len(text), layer.num_choices, dtype=wide)
                for layer in moe_layers(model)
            }
        with torch.enable_grad():
            fitted = self._decoding.fit(loss, self._deltas)
        self._deltas = {layer: value.detach() for layer, value in fitted.items()}


def _real(mask: Any, text: Tensor) -> Tensor:
    """Which tokens of a text [B, S] are real, int64 [B, S].

    Args:
        mask: as a forward takes it; of one that says who sees whom (by kind of attention), what the
            last token sees.
    """
    if mask is None:
        return torch.ones_like(text)
    if isinstance(mask, Mapping):
        mask = mask["full_attention"]
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    found: Tensor = mask[:, : text.shape[1]].long()
    return found


def _with(given: dict[str, Any], deltas: Deltas, length: int) -> RoutingContext:
    """A context in which every token of a row gets the row's deltas."""
    context = given.get("routing_context") or RoutingContext()
    if not deltas:
        return context
    every = {
        layer: value[:, None].expand(-1, length, -1).flatten(0, 1)
        for layer, value in deltas.items()
    }
    return replace(context, logit_delta=every)
