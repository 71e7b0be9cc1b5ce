"""Model folders of a known family to ours and back, without loading the model."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from etr.hf.config import EtrConfig
from etr.hf.families import FAMILIES
from etr.hf.loading import load_causal, read_config
from etr.hf.matching import skeleton, to_ours, to_theirs
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shard_writer import ShardWriter
from etr.hf.shards import LazyTensor, ShardReader
from etr.moe import MoEConfig, set_eval_selection
from etr.pretrained import from_local

Direction = Literal["etr", "hf"]
ROUTING = (
    "router",
    "normalize",
    "routed_scale",
    "activation",
    "swiglu_limit",
    "swiglu_alpha",
    "expert_bias",
    "num_shared_experts",
    "shared_intermediate_size",
    "shared_gate",
    "experts",
    "inner_steps",
)
"""Options of the layer that a family's own block must share to hold the same function."""

TOLERANCE = 1e-3
"""Largest share of the largest logit by which two models of one function may differ in float32."""


@dataclass(frozen=True, kw_only=True)
class LogitsDifference:
    """How far apart the logits of two models are, in float32 and dropless, on random tokens."""

    largest: float
    """Largest difference, over all tokens."""
    median: float
    """Median of the largest of each row of tokens. Where two experts are level, rounding may
    choose the other one, which changes a few rows."""
    logit: float
    """Largest logit of the first model."""

    @property
    def same_function(self) -> bool:
        """Whether it is rounding."""
        return self.median <= TOLERANCE * self.logit  # NaN is not

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.2e} in float32 (the largest is "
            f"{self.logit:.3g})"
        )


@dataclass(frozen=True, kw_only=True)
class TransformReport:
    """What was made of a folder."""

    target: Path
    """The new folder."""
    family: str
    """Model type of the family."""
    to: Direction
    """Whose folder it is, this library's ("etr") or transformers' own ("hf")."""
    num_tensors: int
    """Tensors that were written."""
    num_bytes: int
    """Number of bytes of the weights."""
    same_function: bool = True
    """Whether it computes what the source does, dropless."""
    reason: str = ""
    """Why not, or empty."""
    ignored: tuple[str, ...] = ()
    """Keys that were left out, since transformers does not load them either."""
    difference: LogitsDifference | None = None
    """Difference of the logits of both folders, if they were compared."""
    source_bytes: int | None = None
    """Number of bytes of the source's weights and state, if that was asked."""
    plan: str = ""
    """What was done, in a line, or empty."""
    flops: float | None = None
    """Floating-point operations of the experts for a token, at most, if that was asked."""
    source_flops: float | None = None
    """The same of the source."""
    why_ours: str = ""
    """Why the folder is of this library's format where the source is not, or empty."""


ConvertReport = TransformReport
"""Its old name, for one release."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Direction | None = None,
    max_shard_bytes: int = 4 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
    compare: bool = False,
) -> TransformReport:
    """Turn a model folder of a known family into one of this library with the same function.

    The router stays what it is, and nothing is dropped. Or back: a folder of this library whose
    router the family has. Tensors are moved one after another, so memory holds one tensor of one
    layer, never the model. An interrupted conversion goes on where it stopped; until it is complete
    the folder is called ``TARGET.partial``.

    Args:
        source: transformers folder with safetensors.
        target: new folder.
        to: "etr", "hf", or None for the one that `source` is not.
        max_shard_bytes: size from which a new file of weights begins.
        progress: called with bytes done and bytes in all.
        compare: run both models on a few tokens, one after the other, before the new folder gets
            its name. Each is then in memory as a whole.
    Raises:
        FileNotFoundError: no such folder, no config.json, or a missing shard.
        ValueError: an unknown family; unknown, missing or misshapen tensors; an option that the
            family does not have; a target that exists; models that do not compute the same.
    """
    reader = ShardReader(source)
    found: Direction = "hf" if reader.config.get("model_type") == "etr" else "etr"
    if to not in (None, found):
        raise ValueError(
            f"to={to!r}: {str(source)!r} has model_type={reader.config.get('model_type')!r} already"
        )
    config = _config(reader)
    model = skeleton(config)
    ignored = ignored_keys(config, reader.keys()) if found == "etr" else ()
    tensors = to_ours(reader, model, ignored) if found == "etr" else to_theirs(reader, model)
    recipe = {"convert": found, "source": reader.fingerprint()}
    writer = ShardWriter(target, recipe, max_shard_bytes)
    write_tensors(writer, tensors, progress)
    writer.copy_beside(source)
    comparison = LogitsComparison(source)
    new = folder_config(config, found, reader.config)
    writer.finish(new, comparison if compare else lambda folder: None)
    return TransformReport(
        target=Path(target),
        family=config.family.model_type,
        to=found,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        ignored=ignored,
        difference=comparison.found,
    )


class LogitsComparison:
    """A check for `ShardWriter.finish`: the new folder computes what `source` does.

    Args:
        source: folder of the first model.
        demand: raise where it does not.

    Attributes:
        found: the difference, once it was called.
    """

    def __init__(self, source: str | Path, demand: bool = True) -> None:
        self._source, self._demand = source, demand
        self.found: LogitsDifference | None = None

    def __call__(self, folder: Path) -> None:
        """Compare.

        Raises:
            ValueError: the folder computes something else.
        """
        self.found = logits_difference(self._source, folder)
        if self._demand and not self.found.same_function:
            raise ValueError(
                f"what was made of {str(self._source)!r} does not compute the same: {self.found}; "
                "nothing was kept (without comparing them, it would be)"
            )


def write_model(model: EtrForCausalLM, target: str | Path, source: str | Path) -> Path:
    """Write a loaded model as a folder, complete or not at all.

    Args:
        model: to write.
        target: new folder.
        source: folder whose tokenizer, generation options and the like go along.
    Raises:
        ValueError: the target exists.
    """
    tied = set(model.all_tied_weights_keys or ())
    tensors = [
        LazyTensor(
            name=name,
            shape=tuple(value.shape),
            dtype=value.dtype,
            make=partial(value.detach().to, "cpu"),
        )
        for name, value in model.state_dict().items()
        if name not in tied
    ]
    writer = ShardWriter(target, {"write": secrets.token_hex()})  # never resumed: weights may move
    writer.write(tensors)
    writer.copy_beside(source)
    dtype = str(model.dtype).removeprefix("torch.")
    return writer.finish(folder_config(model.config, "etr", {"dtype": dtype}))


@torch.no_grad()
def logits_difference(first: str | Path, second: str | Path) -> LogitsDifference:
    """Compare two model folders; one model at a time is in memory."""
    logits = []
    for folder in (first, second):
        model = load_causal(folder, torch.float32)
        set_eval_selection(model, "dropless")  # thresholds are ours alone
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (16, 8), generator=generator)
        logits.append(model(input_ids=ids).logits)
        del model
    rows = (logits[0] - logits[1]).abs().amax((1, 2))
    return LogitsDifference(
        largest=float(rows.max()), median=float(rows.median()), logit=float(logits[0].abs().max())
    )


def _config(reader: ShardReader) -> EtrConfig:
    """Config of our side of the conversion, checked against what the family can do."""
    model_type = reader.config.get("model_type")
    if model_type == "etr":
        config = read_config(reader)
        check_same_function(config)
        return config
    return family_config(reader)


def family_config(reader: ShardReader) -> EtrConfig:
    """Config of ours that routes as the family of a folder does.

    Raises:
        ValueError: an unknown family.
    """
    model_type = reader.config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{reader.folder / 'config.json'} has model_type={model_type!r}, which is not a known "
            f"family; choose one of {', '.join(FAMILIES)}"
        )
    return EtrConfig.from_base(from_local(AutoConfig, reader.folder), "keep")


def check_same_function(config: EtrConfig) -> None:
    """Refuse what the family of the base config cannot hold.

    Raises:
        ValueError: names the options in which they differ.
    """
    family = EtrConfig.from_base(config.base_config, "keep")
    ours, own = (_routing(c.moe_config) for c in (config, family))
    wrong = [
        f"{name} is {_short(ours[name])} and the family's is {_short(own[name])}"
        for name in ROUTING
        if ours[name] != own[name]
    ]
    if wrong:
        raise ValueError(
            f"{config.family.model_type} cannot hold this model: {'; '.join(wrong)}; models with "
            "another router can be exported for serving with `etr export`"
        )


def _routing(config: MoEConfig) -> dict[str, Any]:
    return {**config.to_dict(), "normalize": config.resolved_normalize}


def _short(value: Any) -> str:
    return repr(value["name"] if isinstance(value, dict) and "name" in value else value)


def ignored_keys(config: EtrConfig, keys: list[str]) -> tuple[str, ...]:
    """Keys of a family's folder that transformers does not load either."""
    patterns = [re.compile(pattern) for pattern in config.family.ignored]
    return tuple(
        key
        for key in keys
        if any(pattern.search(key) for pattern in patterns)
        or is_beyond(key, config.num_hidden_layers)
    )


def is_beyond(key: str, num_layers: int) -> bool:
    """Whether a tensor belongs to a layer behind the model's last one.

    Layers that predict further tokens stand there; transformers does not load them.
    """
    found = re.match(r"model\.layers\.(\d+)\.", key)
    return found is not None and int(found[1]) >= num_layers


def write_tensors(
    writer: ShardWriter, tensors: list[LazyTensor], progress: Callable[[int, int], None]
) -> None:
    total = sum(tensor.num_bytes for tensor in tensors)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    writer.write(tensors, advance)


def folder_config(config: EtrConfig, to: Direction, source: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds: the other side's config, in the source's data type."""
    dtype = source.get("dtype", source.get("torch_dtype"))
    result: Any = config if to == "etr" else config.base_config
    values: dict[str, Any] = json.loads(result.to_json_string())
    theirs: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)]
    values["architectures"] = ["EtrForCausalLM" if to == "etr" else theirs.__name__]
    return values if dtype is None else {**values, "dtype": dtype}
