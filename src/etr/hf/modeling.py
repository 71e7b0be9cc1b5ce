"""EtrForCausalLM: a transformers MoE model with its blocks swapped for `etr.moe.MoE`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from etr.hf.adapter_state import routing_state, save_with_adapters
from etr.hf.backbone import base_model_class
from etr.hf.carried import carry
from etr.hf.config import EtrConfig
from etr.hf.losses import aux_loss, share_of_step
from etr.hf.shards import INDEX, WEIGHTS, weight_map
from etr.hf.versions import CACHE, CACHE_NAMES
from etr.moe import Collector, RoutingContext, moe_layers
from etr.moe.notice import warn
from etr.pretrained import check_links

ATTENTION_FLAGS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")


@dataclass
class EtrCausalLMOutput(CausalLMOutputWithPast):
    """Result of `EtrForCausalLM`.

    Args:
        loss: cross-entropy in nats per token, plus the router losses while training; None
            without labels. A loss that a caller computes from the other fields gets the gradient of
            the router losses too, see `etr.hf.carried`.
        logits: [B, S, vocab_size].
        cache: for further tokens; `past_key_values` with transformers before 5.24.
        hidden_states, attentions: of each layer, where asked for.
        lm_loss: the cross-entropy alone, detached.
        router_losses: mean over layers of each scaled loss, by name; empty in eval mode.
        routing_stats: counters of each MoE layer, see `etr.moe.stats`.
        router_logits: of each MoE layer, [B * S, E], where asked for (output_router_logits).
        aux_loss: the balance loss as transformers' families compute it from them: top_k where the
            load is even. A caller who adds it to a loss takes the place of the layers' own.
    """

    lm_loss: Tensor | None = None
    router_losses: dict[str, Tensor] | None = None
    routing_stats: list[Mapping[str, Tensor]] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class EtrForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model of a known family whose MoE blocks are `etr.moe.MoE` layers.

    Args:
        config: see `EtrConfig.from_base`.

    Attributes:
        prepare_context: called in turn with each forward's `RoutingContext`, and return the one to
            use: the way in for tools whose caller passes none (`generate`, trainers).
    """

    config_class = EtrConfig
    config: EtrConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_attention_backend = True
    # The class says what some family can, for tools that ask it; an instance, what its own can.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: EtrConfig) -> None:
        if not isinstance(config, EtrConfig):
            raise TypeError(
                f"config is a {type(config).__name__}; make an EtrConfig of it with "
                "EtrConfig.from_base(config)"
            )
        family_class = MODEL_MAPPING[type(config.base_config)]
        for name in ATTENTION_FLAGS:  # a kind of attention that the family lacks is not chosen
            setattr(self, name, getattr(family_class, name))
        super().__init__(config)
        # The family's own experts are thrown away, so they must cost neither an initialisation nor
        # random numbers; `post_init` initialises everything once.
        with no_init_weights(), torch.random.fork_rng(devices=[]):
            self.model = base_model_class(family_class)(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prepare_context = self.model.prepare_context
        if "peft" in sys.modules:  # prompt tuning sets no `peft_config`
            save_with_adapters()
        self.post_init()
        head = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)]
        for plan in ("_tp_plan", "_fsdp_plan"):  # how the family divides the last projection
            rules = getattr(head, plan, None) or {}
            setattr(self, plan, {**rules, **(getattr(self, plan, None) or {})})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load like any transformers model; warns where the checkpoint lacks routing state.

        Raises:
            ValueError: the folder holds another model type, or its weights lie elsewhere; ways to
                divide the model over ranks that it does not know.
        """
        path = pretrained_model_name_or_path
        _check_folder(path, **kwargs)
        _check_parallel(kwargs.get("distributed_config"))
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        _align(model)
        missing = model.state_keys() & set(info["missing_keys"])
        if missing:
            name = path or getattr(kwargs.get("config"), "name_or_path", None)
            warn(
                f"checkpoint {str(name)!r} lacks {len(missing)} routing state tensors (such as "
                f"{min(missing)}): starting from the initial values; calibrate before evaluating "
                "with thresholds"
            )
        return (model, info) if output_loading_info else model

    def state_keys(self) -> set[str]:
        """Names of the routing state (thresholds, counters, ...) in the state dict."""
        return set(routing_state(self))

    @property
    def peft_config(self) -> Any:
        """Configs of PEFT's adapters by name, which PEFT sets on the model that it wraps."""
        try:
            return self.__dict__["_peft_config"]
        except KeyError:
            raise AttributeError("there is no adapter") from None

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        save_with_adapters()
        self.__dict__["_peft_config"] = value

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_peft_config"]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routing_context: RoutingContext | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> EtrCausalLMOutput:
        """Logits, and with labels the loss.

        Args:
            input_ids: int64 [B, S], or give inputs_embeds [B, S, H].
            attention_mask: 1 = real token, [B, past + S]; what it hides is not routed either. Or a
                mask to add to attention's scores, [B, 1, S, past + S], which hides nothing from
                routers: `routing_context` says what does.
            cache: of an earlier forward; `past_key_values` is its older name.
            labels: int64 [B, S], shifted inside; -100 is ignored.
            logits_to_keep: compute the last so many positions only, or those of an index; 0 = all.
            routing_context: placement, groups, replay and so on; the token ids and the collector
                are filled in, and the mask where it has none.
            kwargs: for the base model; `num_items_in_batch` divides the summed loss, as
                transformers' Trainer wants it, and `shift_labels` are labels shifted already.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):
                kwargs.setdefault(name, True)
        with Collector(self, ambient=False) as collector:
            context = replace(routing_context or RoutingContext(), collector=collector)
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                etr_context=context,
                **{CACHE: _one_cache(cache, past_key_values)},
                **kwargs,
            )
        logits = self._logits(outputs.last_hidden_state, logits_to_keep)
        losses = collector.losses()
        loss, lm_loss = self._loss(logits, labels, losses, **kwargs)
        fields: dict[str, Any] = {"loss": loss, "logits": logits, "router_losses": losses}
        for name in ("hidden_states", "attentions", "router_logits"):
            fields[name] = outputs.get(name)
        fields = carry(fields, losses, collector.layers[0].loss_scale)
        given = (attention_mask, input_ids, inputs_embeds)
        return EtrCausalLMOutput(
            **fields,
            lm_loss=lm_loss,
            routing_stats=collector.stats(),
            aux_loss=aux_loss(self.config, fields["router_logits"], *given),
            **{CACHE: outputs.get(CACHE)},
        )

    def _logits(self, hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: Tensor = self.lm_head(hidden[:, keep])
        divisor = self.config.family.logits_divisor
        return logits if divisor is None else logits / getattr(self.config, divisor)

    def _loss(
        self, logits: Tensor, labels: Tensor | None, losses: dict[str, Tensor], **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, with the router losses while training, and the cross-entropy alone."""
        if labels is None:
            return None, None
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        lm_loss = loss.detach()
        if self.training:
            loss = loss + sum(losses.values()) * share_of_step(labels, **kwargs)
        return loss, lm_loss

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; layers select as in eval mode, in training mode too."""
        with self._selecting_as_in_eval():
            return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The same with transformers' continuous batching."""
        with self._selecting_as_in_eval():
            return super().generate_batch(*args, **kwargs)

    @contextmanager
    def _selecting_as_in_eval(self) -> Iterator[None]:
        layers = [layer for layer in moe_layers(self) if layer.training]
        if not layers:
            yield
            return
        for layer in layers:
            layer.warn_about_eval()

        def select(context: RoutingContext) -> RoutingContext:
            own = context.serving
            return replace(context, serving=layers[0].serving if own is None else own)

        # Earlier transformers checkpoint without gradients too, and drop the cache for it.
        checkpointed = [m for m in self.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010
        self.prepare_context.append(select)
        try:
            yield
        finally:
            self.prepare_context.remove(select)
            for module in checkpointed:
                setattr(module, "gradient_checkpointing", True)  # noqa: B010

    def _set_gradient_checkpointing(  # type: ignore[override]
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **kwargs: Any,
    ) -> None:
        # Every public way to switch checkpointing on ends here.
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True loses the gradients of the router losses, which leave the "
                "checkpointed layers by the side; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        function = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)


def _check_folder(path: Any, subfolder: str = "", variant: str | None = None, **_: Any) -> None:
    """Refuse a folder of another model type, even with a config given; and see `ShardReader`."""
    folder = None if path is None else Path(path) / subfolder
    if folder is None or not folder.is_dir():
        return
    check_links(folder)
    if (folder / "config.json").is_file():
        EtrConfig.get_config_dict(folder)
    if not variant and ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        weight_map(folder)


def _check_parallel(config: Any) -> None:
    if getattr(config, "enable_expert_parallel", False):
        raise ValueError(
            "distributed_config asks for expert parallelism, for which transformers exchanges the "
            "experts' code; divide the experts with `MoE.distribute` instead, or leave ep_size at 1"
        )
    if (getattr(config, "pp_size", None) or 1) > 1:
        raise ValueError(
            f"distributed_config.pp_size={config.pp_size} is not supported; take tp_size instead"
        )


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, whichever of its two names it came under."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are names of one thing; give cache alone")
    return past_key_values if cache is None else cache


def _align(model: nn.Module) -> None:
    """Move CPU weights to memory as aligned as torch's own.

    Loaded ones lie where the file has them, and matrix products of misaligned operands differ in
    the last bit: training would not resume exactly.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()
