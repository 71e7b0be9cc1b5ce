"""From a model and text to a trace file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from etr.data import Batch
from etr.hf import family_of
from etr.model.objective import Causal, Example, Objective, draws
from etr.moe import moe_layers, selecting
from etr.moe.layers import effective_serving
from etr.trace.recorder import RoutingRecorder, routers_of
from etr.trace.schema import TokenRows, TraceInfo
from etr.trace.writer import TraceWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe(model: nn.Module, source: str = "", columns: tuple[str, ...] = ()) -> TraceInfo:
    """What a trace of `model`, as it stands, would be of.

    Args:
        model: as it will run.
        source: where it came from.
        columns: of `etr.trace.schema.OPTIONAL`.
    Raises:
        ValueError: the model has no MoE layer that can be recorded.
    """
    layers = moe_layers(model)
    if not layers:
        config: Any = getattr(model, "config", None)
        num_layers = len(routers_of(model))
        sizes = family_of(config).sizes(config)
        return TraceInfo(
            num_experts=sizes["num_experts"],
            num_layers=num_layers,
            top_k=sizes["top_k"],
            router=config.model_type,
            selection="dropless",
            affinity="logit",
            source=source,
            columns=columns,
        )
    return TraceInfo(
        num_experts=max(layer.config.num_choices for layer in layers),
        num_layers=len(layers),
        top_k=max(layer.config.top_k for layer in layers),
        router=layers[0].config.router_config.name,
        selection=effective_serving(model, layers[0].serving)[0].text,
        affinity="score" if layers[0].traits.has_scores else "none",
        source=source,
        columns=columns,
    )


@torch.no_grad()
def record_trace(
    model: nn.Module,
    batches: Iterable[Batch],
    path: str | Path,
    *,
    domains: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    selection: str = "threshold",
    source: str = "",
    objective: Objective | None = None,
) -> TraceInfo:
    """Run a model over batches in eval mode and write its routing; mode and selection are restored.

    Args:
        model: called with `input_ids` and `attention_mask`, on its own device.
        batches: text; padding is left out.
        path: the file to write, see `etr.trace.schema`.
        domains: names by the batches' domain numbers.
        tokenizer: turns token ids into text; None leaves the column empty.
        selection: how experts select, a name in `etr.moe.SERVING`, perhaps with options; dropless
            where that refuses. Layers of this library only.
        source: where the model came from, for the file's metadata.
        objective: what the model was trained on; None for the next token. Where its examples are
            several times as long as the text, each part is a sequence of its own. The trace of one
            that fills blocks says the block of each place.
    Returns:
        What the trace is of.
    Raises:
        ValueError: the model has no MoE layer that can be recorded, or there is no token.
    """
    recorder, objective = RoutingRecorder(model), objective or Causal()
    # Logits of every place would take more memory than all routing together.
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if few else {}
    rows = _TokenRows(domains, tokenizer)
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    with selecting(model, objective.served_by(selection)[0]):
        info = describe(model, source, columns=("block",) if objective.fills else ())
        with TraceWriter(path, info) as writer, recorder:
            for number, batch in enumerate(batches, 1):
                example = objective.example(batch.to(device).text(), draws("held out", number))
                assert example.valid is not None  # there may be padding
                model(**example.arguments(dtype), **options)
                layers = recorder.take(example.valid)
                writer.write(rows.of(batch, example), layers)
            if not writer.num_tokens:
                raise ValueError("no tokens to trace: the data has no held-out documents")
    return info


class _TokenRows:
    """Numbers the rows of text, and names their domains and tokens."""

    def __init__(self, domains: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._domains, self._text = domains, texts_of(tokenizer)
        self._num_sequences = 0

    def of(self, batch: Batch, example: Example) -> TokenRows:
        """The real tokens of what the model was given for a batch; each part is a sequence."""
        length = batch.input_ids.shape[1]
        assert example.valid is not None
        mask, ids = (t.cpu().view(-1, length) for t in (example.valid, example.input_ids))
        domain = batch.domain.repeat_interleave(len(mask) // len(batch.domain))
        row, _ = mask.nonzero(as_tuple=True)
        token_id, block = ids[mask].numpy(), None
        if example.block is not None:
            number = example.block.cpu().view(-1, length)  # counted over all rows
            block = (number - number[:, :1])[mask].numpy()
        found = TokenRows(
            sequence=(row + self._num_sequences).numpy(),
            position=(mask.cumsum(1) - 1)[mask].numpy(),
            token_id=token_id,
            text=None if self._text is None else [self._text(i) for i in token_id.tolist()],
            domain=[self._domains[d] for d in domain[row].tolist()],
            block=block,
        )
        self._num_sequences += len(mask)
        return found


def texts_of(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[int], str] | None:
    """`token_text` of a tokenizer, each token's once; None without one."""
    return None if tokenizer is None else cache(partial(token_text, tokenizer))


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as text; a piece that is not a whole character as the tokenizer writes it."""
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token_id))
