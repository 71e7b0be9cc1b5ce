"""`etr generate`: continue a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import tyro

from etr.cli._model import open_model
from etr.cli._of_run import say_which
from etr.cli._options import WithImports, parse
from etr.data import encode_prompt
from etr.hf import EtrForCausalLM
from etr.hf.decode import generate
from etr.model import DECODINGS
from etr.moe import set_eval_selection
from etr.moe.serving import serving_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(WithImports):
    """What to continue and how."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or a run's folder."""
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

    def __post_init__(self) -> None:
        serving_of(self.selection, "selection")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        DECODINGS.parse(self.decoding)


def run(arguments: list[str]) -> int:
    """Generate and print."""
    config = parse(GenerateConfig, "generate", arguments)
    model, tokenizer, folder = open_model(config.model)
    say_which(folder)
    print(continue_text(model, tokenizer, config))
    return 0


def continue_text(
    model: EtrForCausalLM, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig
) -> str:
    """Prompt and continuation as text."""
    model.eval()
    set_eval_selection(model, config.selection)
    prompt = torch.tensor([encode_prompt(tokenizer, config.prompt)], device=model.device)
    torch.manual_seed(config.seed)
    sampling = (
        {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        if config.temperature > 0
        else {"do_sample": False}
    )
    out = generate(
        model,
        DECODINGS.parse(config.decoding),
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
