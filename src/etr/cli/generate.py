"""`etr generate`: continue a text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from etr.cli._model import open_model
from etr.cli._of_run import objective_for, say_which
from etr.cli._options import WithImports, parse
from etr.data import encode_prompt, load_tokenizer
from etr.hf import EtrForCausalLM, load_pretrained
from etr.hf.composed import Composed, is_composed, load_composed, member_folder
from etr.hf.decode import generate
from etr.hf.fill import fill, sampler
from etr.hf.offload import Offload, banks, begin_step, load_offloaded, resident_bytes, usage
from etr.model import DECODINGS, OBJECTIVES, UNMASKINGS, BlockDiffusion, Causal, Objective
from etr.moe import set_eval_selection
from etr.moe.serving import serving_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(WithImports):
    """What to continue and how."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, a run's folder, or what etr compose made."""
    prompt: str = ""
    """Text to continue; begun as the model's tokenizer begins texts (bos or nothing)."""
    max_new_tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """Temperature of the sampling; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that hold this much probability."""
    seed: int = 0
    """Seed of the sampling."""
    selection: str = "threshold"
    """How experts select: threshold, dropless, batch or another name in SERVING, perhaps with
    options."""
    decoding: str = "plain"
    """How logits become a choice, perhaps with options: plain."""
    objective: str | None = None
    """What the model was trained on, perhaps with options; by default what its run says. With
    block_diffusion it fills block after block."""
    unmasking: str = "quota"
    """Which places of a block a step fills, for models that fill blocks, perhaps with options:
    quota, bacd."""
    offload: Literal["disk", "cpu"] | None = None
    """Keep the experts on disk, in the model's folder, or in host memory, and read each when it is
    needed. None: all of them are on the model's device."""
    resident: int = 4
    """With --offload: experts of each layer that are in memory at a time."""
    cache: str = "lru"
    """With --offload: which expert makes room: lru, lfu or another name in CACHES."""
    trace: str | None = None
    """For models that fill blocks: Parquet file to write, of what each step routes."""

    def __post_init__(self) -> None:
        serving_of(self.selection, "selection")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        DECODINGS.parse(self.decoding)
        UNMASKINGS.parse(self.unmasking)
        if self.objective is not None:
            OBJECTIVES.parse(self.objective)
        self.offloaded()

    def offloaded(self) -> Offload | None:
        """Where experts are; None where they are with the model."""
        if self.offload is None:
            return None
        return Offload(where=self.offload, resident=self.resident, cache=self.cache)


def run(arguments: list[str]) -> int:
    """Generate and print."""
    config = parse(GenerateConfig, "generate", arguments)
    offload = config.offloaded()
    if is_composed(config.model):
        return run_composed(config)
    load = load_pretrained if offload is None else partial(load_offloaded, offload=offload)
    model, tokenizer, folder = open_model(config.model, load)
    say_which(folder)
    objective = objective_for(config.objective, config.model, tokenizer)
    print(continue_text(model, tokenizer, config, objective, str(folder)))
    if config.trace is not None:
        print(f"what each step routed: {config.trace}")
    if offload is not None:
        print(said_of_experts(model))
    return 0


def run_composed(config: GenerateConfig) -> int:
    """Generate with several models that answer as one, say who did, and print."""
    for name in ("offload", "objective", "trace"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(f"{name}={value!r} is for one model, not for {config.model}")
    model = load_composed(config.model)
    tokenizer = load_tokenizer(member_folder(config.model, 0))
    prompt = torch.tensor([encode_prompt(tokenizer, config.prompt)])
    chosen = model.answering(prompt, torch.ones_like(prompt))
    whose = "" if chosen is None else f": {member_folder(config.model, int(chosen))} answers"
    print(f"{config.model}{whose}", file=sys.stderr)
    print(continue_text(model, tokenizer, config))
    return 0


def said_of_experts(model: EtrForCausalLM) -> str:
    """How often experts were in memory, and what was read."""
    found, (_, bank) = usage(model), banks(model)[0]
    size = bank.expert_bytes(model.dtype)
    return (
        f"experts in memory: {bank.resident} of {bank.num_experts} in each layer, "
        f"{resident_bytes(model) / 1e6:,.1f} MB with the rest of the model; {found.hit_rate:.1%} "
        f"of {found.uses:,} uses found theirs, {found.loads:,} were read into their place "
        f"({found.bytes_moved(size) / 1e6:,.1f} MB)"
    )


def continue_text(
    model: EtrForCausalLM | Composed,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    objective: Objective | None = None,
    source: str = "",
) -> str:
    """Prompt and continuation as text.

    Args:
        model, tokenizer: go together.
        config: what to continue and how.
        objective: what the model was trained on; None for the next token.
        source: where the model came from, for a trace.
    Raises:
        ValueError: a decoding of next tokens, for a model that fills blocks; or a trace of steps,
            for one that does not.
    """
    model.eval()
    set_eval_selection(model, (objective or Causal()).served_by(config.selection)[0])
    prompt = torch.tensor([encode_prompt(tokenizer, config.prompt)], device=model.device)
    torch.manual_seed(config.seed)
    if isinstance(objective, BlockDiffusion) and not isinstance(model, Composed):
        filled = _filled(model, tokenizer, config, objective, prompt, source)
        return str(tokenizer.decode(filled[0], skip_special_tokens=True))
    if config.trace is not None:
        raise ValueError(
            f"trace={config.trace!r} records the steps of models that fill blocks; what a model of "
            "next tokens routes for a text, etr trace records"
        )
    sampling = (
        {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        if config.temperature > 0
        else {"do_sample": False}
    )
    out = (model.decode if isinstance(model, Composed) else partial(generate, model))(
        DECODINGS.parse(config.decoding),
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def _filled(
    model: EtrForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    objective: BlockDiffusion,
    prompt: torch.Tensor,
    source: str,
) -> torch.Tensor:
    """Prompt and continuation of a model that fills blocks, perhaps with a trace of its steps."""
    if config.decoding != "plain":
        raise ValueError(
            f"decoding={config.decoding!r} chooses next tokens; a model that was trained on "
            f"{objective.name} fills blocks: leave it out"
        )
    write: Callable[..., torch.Tensor] = fill
    if config.trace is not None:
        from etr.trace.steps import record_fill  # pyarrow, which writing alone does without

        write = partial(record_fill, path=config.trace, tokenizer=tokenizer, source=source)
    return write(
        model,
        objective,
        prompt,
        max_new_tokens=config.max_new_tokens,
        unmasking=UNMASKINGS.parse(config.unmasking),
        propose=sampler(config.temperature, config.top_p),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        on_step=partial(begin_step, model),
    )
