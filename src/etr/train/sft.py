"""Supervised fine-tuning on conversations: TRL's SFTTrainer with what MoE layers need."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from etr.data.batch import IGNORED, Batch
from etr.evaluate import calibrate
from etr.files import write_json
from etr.hf import EtrForCausalLM
from etr.hf.callback import EtrCallback
from etr.moe import moe_layers
from etr.train.conversations import encode, read_conversations
from etr.train.model import SaveDtype, widen_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPERTS = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
"""Ends of the names of expert weights, for adapters."""
Precision = Literal["fp32", "bf16"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """What to learn from, and how."""

    data: str
    """File of JSON lines, a JSON array or Parquet, whose records are chats ({"messages": [...]}),
    ShareGPT ({"conversations": [...]}), {"prompt", "completion"}, or Alpaca ({"instruction",
    "input", "output"})."""
    out: str = "runs/sft"
    """Folder for the model; must not exist."""
    epochs: float = 1.0
    """Passes over the data, unless `steps` is given."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 8
    """Conversations per micro-batch on each rank."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    max_length: int = 1024
    """Longest conversation, tokens; the rest is cut off."""
    learning_rate: float = 2e-5
    """Peak learning rate; adapters usually take ten times as much."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up."""
    lora_rank: int = 0
    """Train adapters of this rank on attention and experts, merged at the end; 0 trains all
    weights. Needs peft."""
    precision: Precision = "fp32"
    """bf16: autocast, with float32 weights and a float32 router."""
    save_dtype: SaveDtype = "float32"
    """float32: weights as trained. checkpoint: rounded to the data type that they came in, which
    undoes small changes; thresholds stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    calibration_batches: int = 64
    """Micro-batches of the data on which thresholds are found anew with the final weights; those
    learned on the way are those of weights that moved. 0: keep them."""
    use_cpu: bool = False
    """Leave an accelerator alone."""
    seed: int = 0
    """Seed of the order of the data and of the adapters."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, known in (("precision", Precision), ("save_dtype", SaveDtype)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {get_args(known)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1, or None to use epochs")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("warmup_steps", "lora_rank", "calibration_batches", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")


@dataclass(frozen=True, kw_only=True)
class SftResult:
    """What the training left."""

    out: Path
    """Folder with model, tokenizer and sft.json (the rows)."""
    rows: list[dict[str, Any]]
    """Metrics of each logged step."""
    notes: tuple[str, ...]
    """What a person should know, in words."""


def sft(model: Any, tokenizer: PreTrainedTokenizerBase, config: SftConfig) -> SftResult:
    """Fine-tune on the assistant's turns of conversations.

    Args:
        model: of this library or of transformers; trained in place, with float32 weights.
        tokenizer: its own; gets its end-of-text token as padding if it has none.
        config: what to learn from, and how.
    Raises:
        FileNotFoundError: no such data.
        ValueError: a package is missing, the folder exists, a line is no conversation, or the
            tokenizer has neither padding nor end of text.
    """
    _require("trl", "sft")
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"out={config.out!r} exists already; name a new folder")
    notes = [*_padding(tokenizer), *_template(tokenizer)]
    conversations = read_conversations(config.data)
    rows = encode(conversations, tokenizer, config.max_length)
    if not rows:
        raise ValueError(
            f"max_length={config.max_length} cuts off the answer of every conversation"
        )
    if len(rows) < len(conversations):
        notes.append(
            f"{len(conversations) - len(rows)} of {len(conversations)} conversations have no "
            f"answer within max_length={config.max_length} tokens and are left out"
        )
    dtype = widen_weights(model)
    trainer = _trainer(model, tokenizer, rows, config)
    trainer.train()
    trained = trainer.model.merge_and_unload() if config.lora_rank else trainer.model
    logged = [row for row in trainer.state.log_history if "loss" in row]
    if config.save_dtype == "checkpoint":
        trained.to(dtype)
    notes += _calibrate(trained, trainer, config)
    if trainer.is_world_process_zero():
        _save(trained, tokenizer, logged, out)
    return SftResult(out=out, rows=logged, notes=tuple(notes))


def _trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], config: SftConfig
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ours = isinstance(model, EtrForCausalLM)
    # Renamed in later versions of transformers, which deprecate the old name.
    known = SFTConfig.__dataclass_fields__
    kind = "activation" if "activation_checkpointing" in known else "gradient"
    recompute: dict[str, Any] = {
        f"{kind}_checkpointing": config.gradient_checkpointing,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": False},
    }
    arguments = SFTConfig(
        output_dir=str(_temporary(Path(config.out))),
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        max_length=config.max_length,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        bf16=config.precision == "bf16",
        use_cpu=config.use_cpu,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        # The layers have a balance loss of their own.
        router_aux_loss_coef=0.0 if ours else None,
        **recompute,
    )
    coefficient = getattr(model.config, "router_aux_loss_coef", None)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=_adapter(model, config) if config.lora_rank else None,
    )
    if ours:
        EtrCallback.add_to(trainer)
        if coefficient is not None:  # TRL has written its 0.0 into the config
            model.config.router_aux_loss_coef = coefficient
    return trainer


def _calibrate(model: Any, trainer: Any, config: SftConfig) -> list[str]:
    """Find the thresholds of the final weights on what they were trained on.

    Returns:
        What they keep, as a note; none where nothing is served by thresholds.
    """
    if not isinstance(model, EtrForCausalLM) or not config.calibration_batches:
        return []
    if not all(layer.facts(wait=False).ranks_by_score for layer in moe_layers(model)):
        return []
    loader = trainer.get_train_dataloader()
    number = min(config.calibration_batches, len(loader))
    several = dist.is_initialized() and dist.get_world_size() > 1
    batches = (_batch(row["input_ids"], row["attention_mask"]) for row in islice(loader, number))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        kept = calibrate(model, batches, group=dist.group.WORLD if several else None)
    shares = ", ".join(f"{share:.1%}" for share in kept)
    return [f"thresholds, found on {number} micro-batches, keep {shares} of the layers' choices"]


def _batch(ids: Tensor, valid: Tensor) -> Batch:
    """Rows of conversations, padded on the right, of which every token counts."""
    labels = ids.where(valid.bool(), IGNORED)
    return Batch(
        input_ids=ids, labels=labels, domain=ids.new_zeros(len(ids)), position=valid.cumsum(1) - 1
    )


def _adapter(model: Any, config: SftConfig) -> Any:
    _require("peft", "peft")
    from peft import LoraConfig

    names = [name for name, _ in model.named_parameters()]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=[n for n in ATTENTION if any(f".{n}." in name for name in names)],
        target_parameters=[n for n in EXPERTS if any(name.endswith(f".{n}") for name in names)],
    )


def _padding(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if tokenizer.pad_token_id is not None:
        return []
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a pad_token nor an eos_token; set one and save it beside "
            "the model"
        )
    tokenizer.pad_token = tokenizer.eos_token
    return [f"the tokenizer has no pad_token; its eos_token {tokenizer.eos_token!r} pads"]


def _template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if getattr(tokenizer, "chat_template", None):
        return []
    return ["the tokenizer has no chat template; turns are written as 'User: ...\\nAssistant: ...'"]


def _save(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], out: Path
) -> None:
    temporary = _temporary(out)
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_json(temporary / "sft.json", {"rows": rows})
    os.replace(temporary, out)


def _temporary(out: Path) -> Path:
    return out.with_name(f".tmp-{out.name}")


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"needs the package {package}: pip install 'etr-moe[{extra}]'")
