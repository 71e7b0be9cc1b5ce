"""What a model that fills blocks routes while it writes, step after step, as a trace file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from etr.hf import EtrForCausalLM
from etr.hf.fill import fill
from etr.model import BlockDiffusion
from etr.trace.record import describe, texts_of
from etr.trace.recorder import RoutingRecorder
from etr.trace.schema import OPTIONAL, TokenRows
from etr.trace.writer import TraceWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_STEP = -1
"""Step of a pass that puts blocks into the cache and fills none."""


def record_fill(
    model: EtrForCausalLM,
    objective: BlockDiffusion,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str = "",
    domain: str = "written",
    on_step: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> Tensor:
    """Write as `etr.hf.fill.fill` does, and record every pass of the model as it ends.

    A pass is the tokens that it was given, padding left out: rows of the batch are sequences, masks
    are tokens, and what a finished row is filled up with while others go on is there too. Memory
    holds one pass, and the rows that wait to be written.

    Args:
        model, objective, input_ids, attention_mask, on_step, options: see `fill`.
        path: the file to write, see `etr.trace.schema`.
        tokenizer: turns token ids into text; None leaves the column empty.
        source: where the model came from, for the file's metadata.
        domain: name of the domain.
    Returns:
        What `fill` does.
    Raises:
        ValueError: see `fill`, or the model has no MoE layer that can be recorded.
    """
    info = describe(model, source, columns=tuple(OPTIONAL.names))
    with TraceWriter(path, info) as writer, RoutingRecorder(model) as recorder:
        passes = _Passes(recorder, writer, objective.block, texts_of(tokenizer), domain)

        def begin(step: int) -> None:
            passes.step = step
            on_step(step)

        handle = model.register_forward_hook(passes.ended, with_kwargs=True)
        try:
            return fill(model, objective, input_ids, attention_mask, on_step=begin, **options)
        finally:
            handle.remove()


class _Passes:
    """Writes what each forward of a model was given and routed."""

    def __init__(
        self,
        recorder: RoutingRecorder,
        writer: TraceWriter,
        block: int,
        text: Callable[[int], str] | None,
        domain: str,
    ) -> None:
        self._recorder, self._writer, self._block = recorder, writer, block
        self._text, self._domain = text, domain
        self.step = NO_STEP
        """Of the next forward."""

    def ended(self, model: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        """Of the forward that was given ids, places and a context by their names."""
        valid = given["routing_context"].valid_mask
        sequence, _ = valid.nonzero(as_tuple=True)
        token_id, position = (given[name][valid] for name in ("input_ids", "position_ids"))
        tokens = TokenRows(
            sequence=sequence.cpu().numpy(),
            position=position.cpu().numpy(),
            token_id=token_id.cpu().numpy(),
            text=None if self._text is None else [self._text(i) for i in token_id.tolist()],
            domain=[self._domain] * len(token_id),
            # Blocks are counted from a row's first token, as positions are.
            block=(position // self._block).cpu().numpy(),
            step=sequence.new_full(sequence.shape, self.step).cpu().numpy(),
        )
        self._writer.write(tokens, self._recorder.take(valid))
        self.step = NO_STEP
