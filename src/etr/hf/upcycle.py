"""Dense checkpoints to Mixture-of-Experts models, shard by shard."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from etr.hf.config import EtrConfig
from etr.hf.convert import (
    LogitsComparison,
    TransformReport,
    folder_config,
    is_beyond,
    write_tensors,
)
from etr.hf.dense import DENSE
from etr.hf.matching import initial_state, skeleton
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shard_writer import ShardWriter
from etr.hf.shards import LazyTensor, ShardReader
from etr.moe.config import parse_capacity, parse_router
from etr.moe.routers import TokenChoice
from etr.moe.table import config_to_dict
from etr.pretrained import from_local

ExpertSource = Literal["copy", "slice"]


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """What the experts are made of, and who routes to them."""

    num_experts: int
    """Experts of each layer."""
    experts: ExpertSource = "copy"
    """copy: every expert is the whole dense feed-forward, and weights are normalised over those
    that keep a token. slice: each is an equal part of its
    inner width, so the experts together are as large as the dense layer."""
    top_k: int = 2
    """Experts a token may choose."""
    noise: float = 0.0
    """Normal noise on the experts, as a share of each matrix's standard deviation, so that copies
    differ from the start; 0 keeps the dense model's function where it can be kept."""
    router: str = "etr"
    """Router with options, e.g. token_choice; starts at random."""
    capacity: str = "factor"
    """Capacity policy in training; trained experts lose by one that starts by dropping much."""
    seed: int = 0
    """Seed of routers and noise."""

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.experts not in ("copy", "slice"):
            raise ValueError(f"experts={self.experts!r} must be 'copy' or 'slice'")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} must be >= 0")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")
        parse_router(self.router)
        parse_capacity(self.capacity)

    @property
    def even(self) -> bool:
        """Whether the router starts with the same weight for every expert."""
        return self.experts == "slice" and isinstance(parse_router(self.router), TokenChoice)

    def changes_function(self) -> str | None:
        """Why the new model computes something else than the dense one, or None if it does not.

        In evaluation, where nothing is dropped.
        """
        if self.noise:
            return f"noise={self.noise} changes the experts"
        if self.experts == "copy":
            if self.top_k > 1:
                return None  # equal experts, and weights that sum to 1
            return "with top_k=1 a token's one copy is weighed by its gate, which is below 1"
        if self.top_k < self.num_experts:
            return f"a token gets top_k={self.top_k} of num_experts={self.num_experts} slices"
        if not self.even:
            return f"router {self.router!r} weighs slices unevenly from the start"
        return None  # each weight is 1 / E, times routed_scale = E


UpcycleReport = TransformReport
"""Its old name, for one release."""


def upcycle(
    source: str | Path,
    target: str | Path,
    config: UpcycleConfig,
    *,
    max_shard_bytes: int = 4 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
    compare: bool = False,
) -> TransformReport:
    """Make a model of this library from a dense one; memory holds one layer's experts at a time.

    Attention, norms and embeddings are taken over as they are.

    Args:
        source: transformers folder of a family in `DENSE`, with safetensors.
        target: new folder; an interrupted run goes on where it stopped.
        config: experts and router.
        max_shard_bytes: size from which a new file of weights begins.
        progress: called with bytes done and bytes in all.
        compare: run both models on a few tokens before the new folder gets its name; they must
            agree where the function is the same.
    Raises:
        FileNotFoundError: no such folder, no config.json, or a missing shard.
        ValueError: another family, options of it that no MoE family has, sizes that do not divide,
            unknown or missing tensors, or a target that exists.
    """
    reader = ShardReader(source)
    moe_config = upcycled_config(reader, config)
    tensors = upcycled_tensors(reader, skeleton(moe_config), config)
    options = {f.name: getattr(config, f.name) for f in fields(UpcycleConfig)}
    recipe = {"upcycle": options, "source": reader.fingerprint()}
    writer = ShardWriter(target, recipe, max_shard_bytes)
    write_tensors(writer, tensors, progress)
    writer.copy_beside(source)
    reason = config.changes_function()
    comparison = LogitsComparison(source, demand=reason is None)
    new = folder_config(moe_config, "etr", reader.config)
    writer.finish(new, comparison if compare else lambda folder: None)
    return TransformReport(
        target=Path(target),
        family=moe_config.family.model_type,
        to="etr",
        num_tensors=len(tensors),
        same_function=reason is None,
        reason=reason or "",
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        difference=comparison.found,
    )


def upcycled_config(reader: ShardReader, config: UpcycleConfig) -> EtrConfig:
    """Config of the new model.

    Raises:
        ValueError: see `upcycle`.
    """
    model_type = reader.config.get("model_type")
    if model_type not in DENSE:
        raise ValueError(
            f"{reader.folder / 'config.json'} has model_type={model_type!r}; dense families that "
            f"can be upcycled: {', '.join(DENSE)}"
        )
    row = DENSE[model_type]
    dense = from_local(AutoConfig, reader.folder)
    for name in row.must_be_off:
        if getattr(dense, name, False):
            raise ValueError(
                f"{name}=True of the {model_type} config has no counterpart in "
                f"{row.moe.model_type}, which would hold the new model's attention"
            )
    width = dense.intermediate_size
    if config.experts == "slice":
        if width % config.num_experts:
            raise ValueError(
                f"num_experts={config.num_experts} must divide intermediate_size={width} of the "
                "dense model, or use experts='copy'"
            )
        width //= config.num_experts
    shared = {k: v for k, v in dense.to_dict().items() if k in row.moe().to_dict()}
    for name in ("model_type", "architectures", "transformers_version"):
        shared.pop(name, None)
    sizes = {row.width: width, row.num_experts: config.num_experts}
    base = row.moe(**{**shared, **row.fixed, **sizes, "num_experts_per_tok": config.top_k})
    return EtrConfig(base_config=base, moe=_layer_options(config))


def _layer_options(config: UpcycleConfig) -> dict[str, Any]:
    traits = parse_router(config.router).traits
    summed = config.top_k > 1 and traits.tokens_choose and traits.normalize in (None, "chosen")
    return {
        # What one copy drops the others give, so that a token loses nothing until all drop it.
        "normalize": "kept" if summed and config.experts == "copy" else None,
        "router": config_to_dict(parse_router(config.router)),
        "capacity": config_to_dict(parse_capacity(config.capacity)),
        "num_shared_experts": 0,
        # Slices add up to the dense layer, so that their weights must average 1.
        "routed_scale": float(config.num_experts) if config.experts == "slice" else 1.0,
    }


def upcycled_tensors(
    reader: ShardReader, model: EtrForCausalLM, config: UpcycleConfig
) -> list[LazyTensor]:
    """Every tensor of the new folder."""
    block = model.config.family.block
    found: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for number in range(len(model.model.layers)):
        prefix = f"model.layers.{number}.{block}"
        names = {part: f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")}
        missing = [name for name in names.values() if name not in reader]
        if missing:
            raise ValueError(f"{str(reader.folder)!r} lacks {', '.join(missing)}")
        used.update(names.values())
        dtype = reader.dtype(names["gate"])
        routers = _router(model, prefix, config, dtype)
        for tensor in (*_experts(reader, prefix, names, config), *routers):
            found[tensor.name] = tensor
    state, tied = model.state_keys(), set(model.all_tied_weights_keys or ())
    lacking = []
    for name in model.state_dict():
        if name in found or name in state:
            continue
        if name in reader:
            found[name] = reader.lazy(name)
        elif name not in tied:
            lacking.append(name)
    unknown = [
        name
        for name in reader.keys()  # noqa: SIM118  it is not a dict
        if name not in found
        and name not in used
        and not name.endswith("rotary_emb.inv_freq")
        and not is_beyond(name, len(model.model.layers))
    ]
    for kind, keys in (("lacks", lacking), ("holds the unknown", unknown)):
        if keys:
            raise ValueError(f"{str(reader.folder)!r} {kind} {', '.join(sorted(keys)[:5])}")
    return [*found.values(), *initial_state(model, set(found))]


def _experts(
    reader: ShardReader, prefix: str, names: dict[str, str], config: UpcycleConfig
) -> list[LazyTensor]:
    """Both tensors of a layer's experts."""
    width, hidden = reader.shape(names["gate"])
    if config.experts == "slice":
        width //= config.num_experts
    dtype = reader.dtype(names["gate"])

    def make(parts: tuple[str, ...], dim: int) -> Tensor:
        matrices = [
            _expert_stack(reader.tensor(names[part]), config, dim, f"{prefix}.{part}")
            for part in parts
        ]
        return torch.cat(matrices, dim=1) if len(matrices) > 1 else matrices[0]

    return [
        LazyTensor(
            name=f"{prefix}.experts.gate_up_proj",
            shape=(config.num_experts, 2 * width, hidden),
            dtype=dtype,
            make=partial(make, ("gate", "up"), 0),
        ),
        LazyTensor(
            name=f"{prefix}.experts.down_proj",
            shape=(config.num_experts, hidden, width),
            dtype=dtype,
            make=partial(make, ("down",), 1),
        ),
    ]


def _expert_stack(matrix: Tensor, config: UpcycleConfig, dim: int, name: str) -> Tensor:
    """A dense matrix as every expert's, [E, ...]; `dim` is its inner width."""
    if config.experts == "slice":
        stack = torch.stack(matrix.chunk(config.num_experts, dim))
    else:
        stack = matrix.expand(config.num_experts, *matrix.shape).clone()
    if config.noise:
        generator = torch.Generator().manual_seed(_seed(config.seed, name))
        noise = torch.randn(stack.shape, generator=generator, dtype=torch.float32) * config.noise
        stack = (stack.float() + noise * matrix.float().std()).to(matrix.dtype)
    return stack


def _router(
    model: EtrForCausalLM, prefix: str, config: UpcycleConfig, dtype: torch.dtype
) -> list[LazyTensor]:
    """The router's parameters at their start."""
    layer = model.config.moe_config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(config.seed, prefix))
        router = layer.router_config.build(layer.hidden_size, layer.num_experts, layer.top_k)
    if config.even:
        torch.nn.init.zeros_(router.get_parameter("weight"))
    return [
        LazyTensor(
            name=f"{prefix}.router.{name}",
            shape=tuple(value.shape),
            dtype=dtype,
            make=partial(value.detach().to, dtype),
        )
        for name, value in router.named_parameters()
    ]


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every tensor."""
    return seed * 2**32 + zlib.crc32(name.encode())
