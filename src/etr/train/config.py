"""What a training run needs to know. Field names are unique, so that they are flat options."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from etr.data import DataConfig
from etr.files import read_json
from etr.import_option import Imports
from etr.methods import check_router, told_to_import
from etr.model import OBJECTIVES, Objective
from etr.moe import LossConfig, MoEConfig
from etr.moe.checked import check_types
from etr.moe.options import LayerOptions
from etr.parallel import ParallelConfig
from etr.train.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(LayerOptions):
    """The MoE layers. The defaults are Expert-Token Resonance (router `etr`)."""

    router: str = "etr"
    """Method, or router with options: NAME or NAME:option=value,...  e.g. etr:frame=orthonormal."""
    capacity: str | None = None
    """Capacity policy with options, e.g. factor:capacity_factor=0.6. None: the router's own."""
    experts: str = "uniform"
    """Which weights a chosen expert means, e.g. nulls:count=4, or widths:widths=4x64+2x128."""
    losses: LossConfig = field(default_factory=LossConfig)
    """What is added to the loss."""
    num_experts: int = 8
    """Routed experts."""
    top_k: int = 1
    """Experts a token may choose."""
    expert_size: int = 256
    """Width inside each expert."""

    def __post_init__(self) -> None:
        check_types(self)
        check_router(self.router)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the language model: a transformers decoder whose feed-forwards are MoE layers."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 3
    """Decoder layers."""
    num_heads: int = 4
    """Attention heads."""
    num_key_value_heads: int = 4
    """Key-value heads, a divisor of num_heads."""
    tie_embeddings: bool = True
    """Use the input embedding as the output projection."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights; routers have their own. None:
    1 / sqrt(hidden_size), at which small models learn much faster than at the usual 0.02."""
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    """The MoE layers."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("hidden_size", "num_layers", "num_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads="
                f"{2 * self.num_heads}: rotary embeddings need an even head width"
            )
        if self.initializer_range is not None and not self.initializer_range > 0:
            raise ValueError(f"initializer_range={self.initializer_range} must be > 0, or None")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_heads={self.num_heads}"
            )
        self.moe_config()  # what does not go together is refused before any data is read

    def moe_config(self) -> MoEConfig:
        """Config of each MoE layer."""
        routing = self.routing
        return MoEConfig(
            hidden_size=self.hidden_size,
            intermediate_size=routing.expert_size,
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            **routing.options(),
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the end over its peak."""
    weight_decay: float = 0.1
    """Applied to matrices except embeddings and routers."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.95
    """Decay of the gradient's square."""
    max_grad_norm: float = 1.0
    """Largest norm of the whole gradient; larger ones are scaled down."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be >= 0")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ValueError(
                f"final_learning_rate_ratio={self.final_learning_rate_ratio} must be in [0, 1]"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be > 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    out: str = "runs/train"
    """Folder of the run: metrics, config, checkpoints."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and batches."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    steps: int = 400
    """Optimizer steps. A run that is resumed may be given more: from there on, learning rate and
    capacity follow the schedule of the new number."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    objective: str = "causal"
    """What the model is trained on, perhaps with options: causal."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, with float32 weights and a float32 router."""
    device: str = "auto"
    """auto, cpu, cuda, npu, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    eval_every: int = 100
    """Optimizer steps between evaluations; the last step is always evaluated."""
    eval_tokens_per_domain: int = 16384
    """Held-out tokens of each domain per evaluation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the ranks of a launch by torchrun share the model."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    background_checkpoints: bool = False
    """Copy to the host's memory and write from there while training goes on, one at a time."""
    diagnostics: bool = True
    """At the start and at each evaluation, write what routing does to held-out tokens. Only of one
    process: on many, no rank has the whole model."""
    diagnostics_tokens: int = 4096
    """Held-out tokens behind the diagnostics, about; every domain gives as many."""
    profile_every: int | None = 0
    """Optimizer steps between profiles of one forward and backward pass, beside the training; the
    last step always has one. 0: that one alone. None: no profile."""
    trackers: tuple[str, ...] = ()
    """Also send the numbers to tensorboard, wandb (offline) or trackio; each is an extra."""
    resume: bool = False
    """Go on from the newest checkpoint in `out` whose files are whole."""
    auto_resume: bool = False
    """Resume where `out` has a checkpoint, else start: for jobs that restart by themselves."""
    imports: Imports = ()
    """Python file that adds methods of your own (etr.methods.add); it runs first. May be repeated.
    The run notes it, and asks for it by name when it is resumed or evaluated."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "accumulation_steps", "eval_every", "eval_tokens_per_domain"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("checkpoint_every", "keep_checkpoints", "diagnostics_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")
        if self.profile_every is not None and self.profile_every < 0:
            raise ValueError(f"profile_every={self.profile_every} must be >= 0 steps, or None")
        check_trackers(self.trackers)
        self.trained_on()

    def trained_on(self) -> Objective:
        """The objective."""
        return OBJECTIVES.parse(self.objective)

    def fingerprint(self) -> dict[str, Any]:
        """Options that change what is learned, flat, so that a difference can be named."""
        values = {name: value for name, value in self.to_dict().items() if name not in _FREE}
        values["data"].pop("cache_dir", None)
        for name in ("dispatch", "debug"):
            values["model"]["routing"].pop(name)
        flat: dict[str, Any] = json.loads(json.dumps(_flat(values)))
        return flat

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`, also after a round trip through JSON.

        Raises:
            ValueError: an unknown field, or a value out of range.
        """
        return _build(cls, values)


def stored_config(run: Path) -> TrainConfig | None:
    """The config that a run wrote into its folder; None where there is none.

    Raises:
        ValueError: it is damaged; names the file.
    """
    path = run / "config.json"
    if not path.is_file():
        return None
    with told_to_import(str(run), imports_of(run)):
        try:
            return TrainConfig.from_dict(read_json(path))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not the config of a run: {error}") from error


def imports_of(run: Path) -> tuple[str, ...]:
    """Files that a run was made with, as it notes them; none where nothing readable is noted."""
    try:
        values = read_json(run / "config.json")
    except (OSError, ValueError):
        return ()
    paths = values.get("imports") if isinstance(values, dict) else None
    return tuple(map(str, paths)) if isinstance(paths, list) else ()


_FREE = {
    *("out", "resume", "auto_resume", "device", "gradient_checkpointing", "parallel"),
    *("eval_every", "eval_tokens_per_domain", "checkpoint_every", "keep_checkpoints"),
    *("background_checkpoints", "imports"),
    *("diagnostics", "diagnostics_tokens", "profile_every", "trackers"),
}
"""Options that change nothing of what is learned."""

_NESTED: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "routing": RoutingOptions,
    "losses": LossConfig,
    "parallel": ParallelConfig,
}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _build(cls: type, values: dict[str, Any]) -> Any:
    known = {entry.name for entry in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    built = {}
    for name, value in values.items():
        if name in _NESTED and isinstance(value, dict):
            value = _build(_NESTED[name], value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)
