"""Export for engines that know only linear routers with top-k weights, and drop nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2MoeConfig

from etr.hf.config import EtrConfig
from etr.hf.convert import ROUTING, TransformReport, folder_config, write_tensors
from etr.hf.loading import read_config
from etr.hf.matching import skeleton, to_theirs
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shard_writer import ShardWriter
from etr.hf.shards import LazyTensor, ShardReader
from etr.moe import MoE, moe_layers
from etr.moe.affinity import router_dtype, token_norm
from etr.moe.routers import EtrRouter, Router, RouterConfig, TokenChoice
from etr.moe.watch import LayerView, watch

PLAIN = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Families whose router is a linear softmax with top-k weights. Mixtral normalises them; a Mixtral
whose weights are not becomes a Qwen2-MoE without biases and shared expert, which has the same
attention."""
FOLDED = ("router", "normalize", "routed_scale")
"""Options of the layer that the export takes care of; the others must be the family's own."""


PlainReport = TransformReport
"""Its old name, for one release."""


def export_plain(
    source: str | Path,
    target: str | Path,
    *,
    inverse_norms: Sequence[float] | None = None,
    max_shard_bytes: int = 4 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TransformReport:
    """Write a model of this library as one of transformers' own with a linear router.

    Choices of a token's experts stay the same always: a token's norm scales all its logits. Their
    weights stay the same where the router is linear (`token_choice`, or `etr` with norm=assumed);
    elsewhere the mean norm takes the place of each token's.

    Args:
        source: folder of a model of this library.
        target: new folder; an interrupted run goes on where it stopped.
        inverse_norms: of `mean_inverse_norms`, one a layer; None for ``1 / sqrt(hidden_size)``.
        max_shard_bytes: size from which a new file of weights begins.
        progress: called with bytes done and bytes in all.
    Raises:
        FileNotFoundError: no such folder, no config.json, or a missing shard.
        ValueError: a model or router that no such family can hold, or a target that exists.
    """
    plain = ShardReader(source)
    if plain.config.get("model_type") != "etr":
        raise ValueError(f"{str(source)!r} holds no model of this library, so it is plain already")
    config = read_config(plain)
    new = plain_config(config)
    reader = _PlainReader(plain, config, inverse_norms)
    tensors = [*to_theirs(reader, skeleton(new)), *_empty_shared_experts(new, reader)]
    recipe = {
        "plain": None if inverse_norms is None else list(inverse_norms),
        "source": plain.fingerprint(),
    }
    writer = ShardWriter(target, recipe, max_shard_bytes)
    write_tensors(writer, tensors, progress)
    writer.copy_beside(source)
    writer.finish(folder_config(new, "hf", plain.config))
    exact = not divides_by_norm(config.moe_config.router_config)
    return TransformReport(
        target=Path(target),
        family=new.base_config.model_type,
        to="hf",
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        same_function=exact,
        reason="" if exact else "the router divides by each token's norm, and a plain one cannot",
    )


def divides_by_norm(router: RouterConfig) -> bool:
    """Whether a router's logits are not linear in the token."""
    return isinstance(router, EtrRouter) and router.norm == "token"


@torch.no_grad()
def mean_inverse_norms(
    model: EtrForCausalLM, batches: Iterable[Mapping[str, Tensor]]
) -> list[float]:
    """Mean over tokens of 1 / norm of each MoE layer's input.

    Args:
        model: run in its present mode.
        batches: text as arguments of the model's forward.
    Raises:
        ValueError: there is no token.
    """
    sums, count = [0.0] * len(moe_layers(model)), 0

    def see(place: int, view: LayerView) -> None:
        nonlocal count
        x = view.x[view.routing.valid_mask]
        sums[place] += float((1 / token_norm(router_dtype(x))).sum())
        count += len(x) if place == 0 else 0

    with watch(model, see):
        for batch in batches:
            model(**{name: value.to(model.device) for name, value in batch.items()})
    if not count:
        raise ValueError("batches hold no token to measure norms on")
    return [value / count for value in sums]


def plain_config(config: EtrConfig) -> EtrConfig:
    """Config of a model of a plain family with the same experts.

    Raises:
        ValueError: no such family can hold the model; says what is in the way.
    """
    moe, base = config.moe_config, copy.deepcopy(config.base_config)
    router = moe.router_config
    if isinstance(router, EtrRouter):
        fits = router.gate == "softmax" and router.choice != "expert"
    else:
        fits = router == TokenChoice()
    if not fits:
        raise ValueError(
            f"router {router!r} is not a softmax over linear logits from which tokens choose, "
            "which is all that plain engines know"
        )
    if base.model_type not in PLAIN:
        raise ValueError(
            f"the model's base family is {base.model_type}; plain exports exist for "
            f"{', '.join(PLAIN)}"
        )
    normalized = moe.resolved_normalize != "none"
    if base.model_type == "mixtral":
        base = base if normalized else _as_qwen2_moe(base)
    else:
        base.norm_topk_prob = normalized
    if base.model_type == "qwen2_moe" and not moe.num_shared_experts:
        base.shared_expert_intermediate_size = 0
    new = EtrConfig.from_base(base, "keep", num_shared_experts=moe.num_shared_experts)
    wrong = [
        f"{name}={config.moe[name]!r} where {base.model_type} has {new.moe[name]!r}"
        for name in ROUTING
        if name not in FOLDED and config.moe[name] != new.moe[name]
    ]
    if moe.num_shared_experts and base.model_type != "qwen2_moe":
        wrong.append(f"num_shared_experts={moe.num_shared_experts} where {base.model_type} has 0")
    if wrong:
        raise ValueError(f"{base.model_type} cannot hold this model: {'; '.join(wrong)}")
    return new


def _as_qwen2_moe(base: PreTrainedConfig) -> PreTrainedConfig:
    """A Mixtral config as that of a Qwen2-MoE with the same attention."""
    if getattr(base, "sliding_window", None) is not None:
        raise ValueError(
            f"sliding_window={base.sliding_window} together with weights that are not normalised "
            "has no plain family; use normalize='chosen'"
        )
    known = Qwen2MoeConfig().to_dict()
    shared = {name: value for name, value in base.to_dict().items() if name in known}
    for name in ("model_type", "architectures", "transformers_version", "layer_types"):
        shared.pop(name, None)
    heads: Any = base.num_attention_heads
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // heads
    own = {
        "num_experts": base.num_local_experts,
        "moe_intermediate_size": base.intermediate_size,
        "shared_expert_intermediate_size": 0,
        "qkv_bias": False,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "head_dim": head_dim,
    }
    return Qwen2MoeConfig(**{**shared, **own})


class _PlainReader(ShardReader):
    """A folder of this library, read as if its router were linear and its state not there.

    Args:
        source: the folder.
        config: its config.
        inverse_norms: see `export_plain`.
    """

    def __init__(
        self, source: ShardReader, config: EtrConfig, inverse_norms: Sequence[float] | None
    ) -> None:
        super().__init__(source.folder)
        model = skeleton(config)
        state = model.state_keys()
        self._scale = config.moe_config.routed_scale
        self._routers: dict[str, Tensor] = {}
        names = [name for name, layer in model.named_modules() if isinstance(layer, MoE)]
        if inverse_norms is not None and len(inverse_norms) != len(names):
            raise ValueError(
                f"inverse_norms has {len(inverse_norms)} values; the model has {len(names)} layers"
            )
        for place, name in enumerate(names):
            scale = None if inverse_norms is None else inverse_norms[place]
            weight = _linear_weight(source, f"{name}.router", config, scale)
            self._routers[f"{name}.router.weight"] = weight
        # The state is left out, and routers are replaced.
        self._left = [
            key
            for key in super().keys()  # noqa: SIM118  it is not a dict
            if key not in state and not any(key.startswith(f"{name}.router.") for name in names)
        ]

    def keys(self) -> list[str]:
        return [*self._left, *self._routers]

    def __contains__(self, key: str) -> bool:
        return key in self._routers or key in self._left

    def shape(self, key: str) -> tuple[int, ...]:
        found = self._routers.get(key)
        return super().shape(key) if found is None else tuple(found.shape)

    def dtype(self, key: str) -> torch.dtype:
        found = self._routers.get(key)
        return super().dtype(key) if found is None else found.dtype

    def tensor(self, key: str) -> Tensor:
        if key in self._routers:
            return self._routers[key]
        value = super().tensor(key)
        if self._scale != 1 and key.endswith(".experts.down_proj"):
            value = value * self._scale
        return value


@torch.no_grad()
def _linear_weight(
    reader: ShardReader, prefix: str, config: EtrConfig, inverse_norm: float | None
) -> Tensor:
    """The weight [E, H] whose products with tokens are the router's logits, in the saved dtype."""
    moe = config.moe_config
    router: Router = moe.router_config.build(moe.hidden_size, moe.num_choices, moe.top_k).double()
    dtypes = []
    for name, parameter in router.named_parameters():
        key = f"{prefix}.{name}"
        parameter.copy_(reader.tensor(key))
        dtypes.append(reader.dtype(key))
    unit = torch.eye(moe.hidden_size, dtype=torch.float64)
    inputs: Any = None  # what a router of these kinds knows besides the token, it does not use
    logits = router.scores(unit, inputs).logits
    assert logits is not None
    weight = logits.T.contiguous()
    if divides_by_norm(moe.router_config):
        weight *= inverse_norm or 1 / math.sqrt(moe.hidden_size)
    saved = dtypes[0] if dtypes else config.base_config.dtype
    return weight.to(saved or torch.float32)


def _empty_shared_experts(new: EtrConfig, reader: ShardReader) -> list[LazyTensor]:
    """Tensors without elements that transformers' Qwen2-MoE asks for where nothing is shared."""
    base = new.base_config
    if base.model_type != "qwen2_moe" or new.moe_config.num_shared_experts:
        return []
    found, hidden = [], base.hidden_size
    shapes = {
        "shared_expert.gate_proj": (0, hidden),
        "shared_expert.up_proj": (0, hidden),
        "shared_expert.down_proj": (hidden, 0),
        "shared_expert_gate": (1, hidden),
    }
    dtype = reader.dtype("model.embed_tokens.weight")
    for layer in range(base.num_hidden_layers):
        for name, shape in shapes.items():
            found.append(
                LazyTensor(
                    name=f"model.layers.{layer}.mlp.{name}.weight",
                    shape=shape,
                    dtype=dtype,
                    make=partial(torch.zeros, shape, dtype=dtype),
                )
            )
    return found
