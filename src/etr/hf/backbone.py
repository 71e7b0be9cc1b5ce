"""A family's decoder with its MoE blocks swapped for `etr.moe.MoE` layers."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import can_return_tuple

from etr.hf.carried import carry
from etr.hf.config import EtrConfig
from etr.hf.families import Family
from etr.hf.initialize import initialize
from etr.moe import Collector, MoE, MoEConfig, RoutingContext, moe_layers
from etr.moe.layers import tie_experts
from etr.moe.losses import Balance, Loss, loss_rows, reweighted
from etr.moe.notice import warn
from etr.moe.state import GlobalState
from etr.moe.watch import LayerView, watch


class MoEBlock(MoE):
    """The layer in the place of a family's MoE block: tensor in, tensor out.

    Args:
        config, layer_index: see `MoE`.
        model_config: of the model; trainers may change its balance coefficient and jitter at any
            time.
    """

    def __init__(self, config: MoEConfig, layer_index: int, model_config: EtrConfig) -> None:
        super().__init__(config, layer_index)
        self.context: RoutingContext | None = None
        self.model_config = model_config

    def forward(self, hidden_states: Tensor) -> Any:  # type: ignore[override]
        """Run the layer with the context of the decoder layer's call, [B, S, H]."""
        family, context = self.model_config.family, self.context or RoutingContext()
        jitter = family.jitter and getattr(self.model_config, family.jitter)
        if jitter and self.learns_from(context):
            noise = torch.empty_like(hidden_states).uniform_(1 - jitter, 1 + jitter)
            hidden_states = hidden_states * noise
        result = super().forward(hidden_states, context).hidden_states
        return (result, None) if family.returns_scores else result

    def loss_rows(self) -> tuple[Loss, ...]:
        """The losses, with the weight that a trainer may have given the balance loss."""
        changed = self.model_config.changed_aux_alpha(self.config.top_k)
        if changed is None:
            return super().loss_rows()
        if changed and not self.traits.can_balance:
            raise ValueError(
                f"{self.model_config.family.aux_coefficient} of the config was changed, and router "
                f"{self.config.router_config.name!r} can have no balance loss"
            )
        return loss_rows(reweighted(super().loss_rows(), Balance.name, changed))


class _BaseModel:
    """Mixed into a family's base model: swaps the blocks and initialises them."""

    family_class: type[PreTrainedModel]

    def __init__(self, config: EtrConfig) -> None:
        # The family's experts are gone, and with them the choice of how to run them.
        config.base_config._experts_implementation = None
        super().__init__(config.base_config)  # type: ignore[call-arg]
        self.prepare_context: list[Callable[[RoutingContext], RoutingContext]] = []
        self._etr_config, self._built_for = config, _layer_options(config)
        swap_blocks(self.layers, config)  # type: ignore[attr-defined]
        of_family: dict[str, str] | None = getattr(self, "_tied_weights_keys", None)
        self._tied_weights_keys = {**(of_family or {}), **self._tied_experts()}
        keep_in_float32(self, config.family)  # type: ignore[arg-type]
        self._leave_blocks_whole(config.family.block)

    def _leave_blocks_whole(self, block: str) -> None:
        """Take the MoE blocks out of the family's plans for several ranks.

        What is left divides attention, embeddings and dense layers; every rank holds all experts.
        """
        dense = {
            re.sub(r"\d+", "*", f"layers.{number}.{block}.{name}", count=1)
            for number, layer in enumerate(self.layers)  # type: ignore[attr-defined]
            if not isinstance(getattr(layer, block), MoEBlock)
            for name, _ in getattr(layer, block).named_modules()
        }
        for plan in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
            rules = getattr(self, plan, None) or {}
            kept = (n for n in rules if n in dense or not n.startswith(f"layers.*.{block}"))
            setattr(self, plan, {name: rules[name] for name in kept})

    def _tied_experts(self) -> dict[str, str]:
        """Names of weights that MoE layers share, as those of the first of them."""
        first: dict[Tensor, str] = {}
        named = self.named_parameters(remove_duplicate=False)  # type: ignore[attr-defined]
        both = [(name, first.setdefault(value, name)) for name, value in named]
        of_experts = re.compile(r"\.(experts|shared_experts|shared_gate)\.")
        return {own: other for own, other in both if own != other and of_experts.search(own)}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Also the experts that layers share, whatever the embeddings do."""
        found = super().get_expanded_tied_weights_keys(all_submodels)  # type: ignore[misc]
        return {**found, **self._tied_experts()}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        etr_context: RoutingContext | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's decoder, with the rest of the context filled in.

        Trainers that bring an output projection of their own (TRL's) call it past
        `EtrForCausalLM`; what it returns then carries the router losses, see `etr.hf.carried`.

        Args:
            output_router_logits: also return the logits of each MoE layer's router, [B * S, E], in
                `router_logits`; None: as the config says.
        Raises:
            ValueError: an option of the config that is built into the layers has changed, or a
                router has no logits.
        """
        _check_unchanged(self._built_for, self.config)
        if self.training and self._etr_config.leaves_balance():  # type: ignore[attr-defined]
            _warn_of_zero(self._etr_config)
        context = etr_context or RoutingContext()
        for prepare in self.prepare_context:
            context = prepare(context)
        if context.valid_mask is None:
            mask = valid_mask(attention_mask, input_ids, inputs_embeds)
            context = replace(context, valid_mask=mask)
        logits = {} if context.logits is None else context.logits
        context = replace(context, token_ids=input_ids, logits=logits)
        by_config = getattr(self.config, "output_router_logits", False)
        if by_config:  # not to be looked for among the family's routers, which are gone
            kwargs["output_router_logits"] = False
        run = functools.partial(
            super().forward,  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if by_config if output_router_logits is None else output_router_logits:
            run = functools.partial(_with_router_logits, self, run)
        if context.collector is not None:
            return run(etr_context=context)
        with Collector(self, ambient=False) as collector:  # type: ignore[arg-type]
            outputs = run(etr_context=replace(context, collector=collector))
        losses, scale = collector.losses(), collector.layers[0].loss_scale
        for name, value in carry(dict(outputs), losses, scale).items():
            outputs[name] = value
        return outputs

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the decoder alone, under the config of the whole model.

        Under the family's the folder would load as the family's model, with a random router.
        """
        config, self.config = self.config, copy.deepcopy(self._etr_config)  # type: ignore[has-type]
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config = config

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _by_maker(self, protocol, base_model_class, self.family_class)

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module, self.config.initializer_range):
            super()._init_weights(module)  # type: ignore[misc]


class _DecoderLayer:
    """Mixed into a family's decoder layer: hands the context to its MoE block.

    The context is part of the call, so activation recomputation finds it again.
    """

    layer_class: Any
    block_name: str

    def forward(self, *args: Any, etr_context: RoutingContext | None = None, **kwargs: Any) -> Any:
        block = getattr(self, self.block_name)
        if not isinstance(block, MoEBlock):  # a dense layer
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        block.context = etr_context
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            block.context = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _by_maker(self, protocol, decoder_layer_class, self.layer_class, self.block_name)


@functools.cache
def base_model_class(family_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`family_class` that takes an `EtrConfig` and has its MoE blocks swapped."""
    members: dict[str, Any] = {
        "family_class": family_class,
        "__module__": __name__,  # also keeps transformers from renaming the weights on disk
        # What the family's router gives away went with it.
        "_can_record_outputs": {
            name: source
            for name, source in (family_class._can_record_outputs or {}).items()
            if name != "router_logits"
        },
    }
    return type(f"Etr{family_class.__name__}", (_BaseModel, family_class), members)


@functools.cache
def decoder_layer_class(layer_class: Any, block_name: str) -> Any:
    """`layer_class` that hands `etr_context` to its MoE block.

    It keeps its name: device maps and FSDP know layers by it.
    """
    return type(
        layer_class.__name__,
        (_DecoderLayer, layer_class),
        {"__module__": __name__, "layer_class": layer_class, "block_name": block_name},
    )


def _by_maker(instance: Any, protocol: Any, maker: Callable[..., type], *args: Any) -> Any:
    """Reduce an instance of a class made here, which pickle finds by no name, for copies too."""
    state = object.__reduce_ex__(instance, protocol)[2]
    return _blank, (maker, *args), state


def _blank(maker: Callable[..., type], *args: Any) -> Any:
    made: Any = maker(*args)
    return made.__new__(made)


def swap_blocks(layers: Sequence[nn.Module] | nn.ModuleList, config: EtrConfig) -> None:
    """Replace the MoE blocks of decoder layers in place; dense layers keep theirs.

    Raises:
        ValueError: all layers are dense.
    """
    family = config.family
    sparse = [layer for layer in layers if family.is_moe(layer)]
    if not sparse:
        raise ValueError(
            f"base_config of model_type={family.model_type!r} makes every layer dense, so there "
            "is no MoE block to swap"
        )
    for index, own in enumerate(config.layer_configs(len(sparse))):
        setattr(sparse[index], family.block, MoEBlock(own, index, config))
    tie_experts([getattr(layer, family.block) for layer in sparse])
    for layer in layers:
        layer_class: Any = type(layer)
        layer.__class__ = decoder_layer_class(layer_class, family.block)


def keep_in_float32(model: PreTrainedModel, family: Family) -> None:
    """Name what stays float32 where transformers loads a checkpoint in half precision.

    The routing state does, and of the block's parameters those whose counterpart the family keeps.
    """
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    names = {
        f"{path}.{name}"
        for block in blocks
        for path, module in block.named_modules()
        if isinstance(module, GlobalState)
        for name, value in module.named_buffers(recurse=False)
        if value.is_floating_point()
    }
    flags: Any = set(model._keep_in_fp32_modules_strict or ())
    for key in family.keys:
        found = {f for f in flags for name in key.theirs if f".{name}".endswith(f".{f}")}
        flags -= found
        having = [b for b in blocks if any(name == key.ours for name, _ in b.named_parameters())]
        if found and having:
            names.add(key.ours)
            for block in having:
                weight = block.get_parameter(key.ours)
                weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
    model._keep_in_fp32_modules_strict = flags | {f"{family.block}.{name}" for name in names}


def _with_router_logits(model: Any, run: Callable[..., Any], **kwargs: Any) -> Any:
    """`run`, and the logits of each MoE layer's router in `router_logits` of what it returns."""
    found: list[Tensor] = []

    def see(place: int, view: LayerView) -> None:
        if view.routing.logits is None:
            name = moe_layers(model)[place].config.router_config.name
            raise ValueError(f"output_router_logits=True: router {name!r} has no logits")
        found.append(view.routing.logits)

    with watch(model, see):
        outputs = run(**kwargs)
    outputs["router_logits"] = tuple(found)
    return outputs


def _layer_options(config: EtrConfig) -> dict[str, Any]:
    """Options of the base config that are built into the layers."""
    base = config.base_config
    names = [name for name in config.family.built_in if hasattr(base, name)]
    return {name: copy.copy(getattr(base, name)) for name in names}  # some are lists


def _check_unchanged(built_for: dict[str, Any], config: PreTrainedConfig) -> None:
    for name, value in built_for.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} of the config differs from {value!r}, for which "
                "the layers were built; make a new model from the changed config"
            )


def _warn_of_zero(config: EtrConfig) -> None:
    warn(
        f"{config.family.aux_coefficient}=0 with output_router_logits=False says that a trainer "
        "adds no balance loss of its own: the layers keep theirs, which "
        "losses=LossConfig(aux_alpha=0) or output_router_logits=True would turn off"
    )


def valid_mask(
    attention_mask: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor | None:
    """True = real token, bool [B, S]; None where no 2-D mask tells."""
    inputs = input_ids if input_ids is not None else inputs_embeds
    if inputs is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, attention_mask.shape[1] - inputs.shape[1] :].bool()
