"""Runs a `Decoding`: a forward and a cache for each branch, one set of logits for transformers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from etr.hf.adapt import Adapting
from etr.hf.modeling import EtrCausalLMOutput, EtrForCausalLM
from etr.hf.versions import CACHE_NAMES
from etr.model.decoding import Decoding
from etr.moe import RoutingContext

MOVES = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")
"""Methods of a cache that search calls between forwards; caches of all branches move together."""


def generate(model: EtrForCausalLM, decoding: Decoding, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``, choosing by what a decoding makes of its branches.

    Sampling, beams, stopping and every other option are transformers' own.

    Args:
        model: in eval mode, or layers select as in it.
        decoding: the branches, and what becomes of their logits.
        args, kwargs: of ``model.generate``.
    Raises:
        ValueError: a cache that holds tokens already.
    """
    with decoding_by(model, decoding):
        return model.generate(*args, **kwargs)


@contextmanager
def decoding_by(model: EtrForCausalLM, decoding: Decoding) -> Iterator[None]:
    """Let every forward of the model give the logits that a decoding combines.

    Branches beyond the first have caches of their own, which begin as copies of an empty one.

    Raises:
        ValueError: a decoding without branches.
    """
    if not decoding.branches:
        raise ValueError(f"decoding {decoding.name!r} has no branch")
    pairs = [(model, serving) for serving in decoding.branches]
    branches = _Branches(pairs, decoding.combine, f"decoding {decoding.name!r}")
    adapting = None if decoding.refits_after is None else Adapting(model, decoding)
    with branches.hooked(*([] if adapting is None else [adapting.before])):
        yield


@contextmanager
def together(
    model: EtrForCausalLM,
    others: Sequence[EtrForCausalLM],
    combine: Callable[[Sequence[Tensor]], Tensor],
) -> Iterator[None]:
    """Let every forward of a model run others too, and give what is made of all their logits.

    Each has a cache of its own, which moves with the model's.

    Args:
        model: whose ``generate`` and forward are called.
        others: of the same vocabulary, perhaps of other sizes.
        combine: the logits to choose by, [B, S, V], of the model's and those of each other.
    """
    branches = _Branches([(one, None) for one in (model, *others)], combine, "composed models")
    with branches.hooked():
        yield


class _Branches:
    """Hooks of a model's forward, which is the first branch's; the others run after it.

    Args:
        branches: the model of each, and its serving policy.
        combine: logits of all of them to one.
        what: what they are branches of, for errors.
    """

    def __init__(
        self,
        branches: Sequence[tuple[EtrForCausalLM, str | None]],
        combine: Callable[[Sequence[Tensor]], Tensor],
        what: str,
    ) -> None:
        (self._model, self._first), *self._rest = branches
        self._combine, self._what = combine, what
        self._signature = inspect.signature(self._model.forward)
        self._given: dict[str, Any] = {}
        self._main: Any = None
        self._others: list[Any] = []

    @contextmanager
    def hooked(self, *first: Callable[..., Any]) -> Iterator[None]:
        """Hook the model's forward, after hooks that come first."""
        handles = [
            *(
                self._model.register_forward_pre_hook(hook, with_kwargs=True)
                for hook in (*first, self.before)
            ),
            self._model.register_forward_hook(self.after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def before(
        self, model: EtrForCausalLM, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the first branch its serving policy; at a new cache, give the others theirs."""
        names = list(self._signature.parameters)
        self._given = {**dict(zip(names, args, strict=False)), **kwargs}
        main = next((found for n in CACHE_NAMES if (found := self._given.get(n)) is not None), None)
        if main is not self._main:
            self._begin(main)
        return (), _branch(self._given, self._first, main)

    def after(
        self,
        model: EtrForCausalLM,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: EtrCausalLMOutput,
    ) -> EtrCausalLMOutput:
        """Run the other branches, and put in the combined logits."""
        found = [_wide(output.logits)]
        caches = self._others or [None] * len(self._rest)
        for (other, serving), cache in zip(self._rest, caches, strict=True):
            run = model.forward if other is model else other  # or these hooks would run again
            found.append(_wide(run(**_branch(self._given, serving, cache)).logits))
        output.logits = self._combine(found)
        return output

    def _begin(self, main: Any) -> None:
        """Another generation: a cache for each further branch, which moves with the first."""
        self._main, self._others = main, []
        if main is None:
            return
        if int(main.get_seq_length()) > 0:
            raise ValueError(
                f"the cache holds {int(main.get_seq_length())} tokens already, which only one of "
                f"the branches of {self._what} has seen; begin with the text"
            )
        self._others = [
            copy.deepcopy(main) if other is self._model else _like(main, other)
            for other, _ in self._rest
        ]
        for name in MOVES if self._others else ():
            if hasattr(main, name):
                setattr(main, name, _together(name, [main, *self._others]))


def _branch(given: dict[str, Any], serving: str | None, cache: Any) -> dict[str, Any]:
    """Arguments of the forward of one branch."""
    name = next((name for name in CACHE_NAMES if given.get(name) is not None), None)
    found = dict(given) if name is None else {**given, name: cache}
    if serving is not None:
        context = given.get("routing_context") or RoutingContext()
        found["routing_context"] = replace(context, serving=serving)
    return found


def _like(cache: Any, model: EtrForCausalLM) -> Any:
    """An empty cache of the same kind for another model."""
    size = {}
    if isinstance(cache, StaticCache):  # a layer with a sliding window has fewer places
        layers: list[Any] = cache.layers
        size["max_cache_len"] = max(layer.max_cache_len for layer in layers)
    return type(cache)(config=model.config.get_text_config(decoder=True), **size)


def _together(name: str, caches: list[Any]) -> Any:
    """One method of several caches."""
    methods = [getattr(cache, name) for cache in caches]

    def call(*args: Any, **kwargs: Any) -> None:
        for method in methods:
            method(*args, **kwargs)

    return call


def _wide(logits: Any) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
