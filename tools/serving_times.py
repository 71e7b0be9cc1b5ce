"""How long policies and decodings take on one core, as ratios; `tools/serving.py` calls it.

Processor time, everything in turn, round by round; a ratio is within a round, the median counts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 40
Step = Callable[[], Any]


def medians(steps: dict[str, Step], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of each step over those of the first, the median of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first one warms up
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                found[name].append(time.process_time() - began)
    first = next(iter(found.values()))
    return {
        name: statistics.median(a / b for a, b in zip(times, first, strict=True))
        for name, times in found.items()
    }


def filled(model: Any, ids: Tensor) -> Any:
    """A cache that holds ids [R, S], as `generate` fills it."""
    from transformers import DynamicCache

    from etr.hf.versions import CACHE

    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


def prefill(model: Any, ids: Tensor) -> Step:
    """A prompt [1, S] with an empty cache that is filled."""
    return lambda: filled(model, ids)


def decode(model: Any, ids: Tensor) -> Step:
    """The last token of each row of ids [R, S], the others in the cache, which is then cut back."""
    from etr.hf.versions import CACHE

    cache = filled(model, ids[:, :-1])

    def step() -> None:
        model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache})
        cache.crop(-1)

    return step


def both(models: dict[str, Any], ids: Tensor) -> dict[str, list[float]]:
    """Prefill of the first row and decode of all rows, of each model over the first."""
    with torch.no_grad():
        first = medians({name: prefill(model, ids[:1]) for name, model in models.items()})
        then = medians({name: decode(model, ids) for name, model in models.items()})
    return {name: [first[name], then[name]] for name in models}


def of_policies(model: Any, names: tuple[str, ...], ids: Tensor) -> dict[str, list[float]]:
    """Prefill and decode of each serving policy over the first."""
    from etr.moe import set_eval_selection

    models = {name: copy.deepcopy(model) for name in names}
    for name, one in models.items():
        set_eval_selection(one, name)
    return both(models, ids)


@contextmanager
def decoding(model: Any, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A copy of a model for each decoding, whose forwards it changes."""
    from etr.hf.decode import decoding_by
    from etr.model import DECODINGS

    models = {name: copy.deepcopy(model) for name in names}
    with ExitStack() as opened:
        for name, one in models.items():
            opened.enter_context(decoding_by(one, DECODINGS.parse(name)))
        yield models


def of_decodings(model: Any, names: tuple[str, ...], rows: Tensor) -> dict[str, dict[str, float]]:
    """What each decoding takes over the first, and what it makes of second halves of rows [R, S].

    Guessed is the share of next tokens that greedy decoding would choose; loss is that of all of
    them in nats, absent where a decoding rules tokens out.
    """
    half = rows.shape[1] // 2
    found: dict[str, dict[str, float]] = {}
    with decoding(model, names) as models:
        taken = both(models, rows[:16, : half + 1])
        for name, one in models.items():
            logits = torch.cat([continued(one, row[None], half) for row in rows])
            wanted = rows[:, half + 1 :]
            nats = F.cross_entropy(logits.flatten(0, 1).double(), wanted.flatten())
            guessed = (logits.argmax(-1) == wanted).double().mean()
            found[name] = dict(zip(("prefill", "decode"), taken[name], strict=True))
            found[name] |= {"guessed": float(guessed)}
            found[name] |= {"loss": float(nats)} if nats.isfinite() else {}
    return found


@torch.no_grad()
def continued(model: Any, row: Tensor, half: int) -> Tensor:
    """Logits of a row's places from `half` on but the last, its first half given before."""
    from etr.hf.versions import CACHE

    cache = filled(model, row[:, :half])
    logits: Tensor = model(input_ids=row[:, half:-1], use_cache=True, **{CACHE: cache}).logits
    return logits


def of_memories(folder: Path, names: tuple[str, ...], size: int, ids: Tensor) -> dict[str, float]:
    """Decode of one request with `size` experts of each layer in memory over all of them there."""
    from etr.hf import load_pretrained
    from etr.hf.offload import Offload, load_offloaded
    from etr.moe import set_eval_selection

    models = {"whole": load_pretrained(folder)}
    for name in names:
        models[name] = load_offloaded(folder, Offload(resident=size, cache=name))
    for model in models.values():
        set_eval_selection(model, "dropless")
    with torch.no_grad():
        return medians({name: written(model, ids) for name, model in models.items()}, 10)


def written(model: Any, ids: Tensor) -> Step:
    """Tokens of a text one by one: what is in memory is what those before used."""
    from etr.hf.versions import CACHE

    def step() -> None:
        cache = filled(model, ids[:, :1])
        for token in ids[:, 1:].split(1, dim=1):
            model(input_ids=token, use_cache=True, **{CACHE: cache})

    return step
