"""EtrConfig: a transformers model's config, and what replaces its MoE blocks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, MixtralConfig, PreTrainedConfig

from etr.hf.families import FAMILIES, Family, family_of
from etr.hf.layer_options import balanced, moe_configs, stored_options
from etr.hf.versions import CACHE_NAMES
from etr.moe import LossConfig, MoEConfig
from etr.moe.capacity import CapacityConfig
from etr.moe.routers import RouterConfig

SHOWN = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)
"""Values of the base config that `to_dict` shows beside its own: tools (PEFT) look there."""


class EtrConfig(PreTrainedConfig):
    """Config of `EtrForCausalLM`. Use `EtrConfig.from_base`.

    Every attribute that is not its own (vocab_size, num_hidden_layers, head_dim, use_cache, ...)
    is read from and written to `base_config`, so that caches, generation and tools see one model.

    Args:
        base_config: config of the model whose MoE blocks are swapped, or its dictionary.
        moe: options of the layers, as `LayerOptions.to_dict` gives them: one dictionary for all, or
            a list with one for each MoE layer, which may hold sizes too (`OF_LAYERS`).
        aux_coefficient: the base's coefficient of a balance loss that says the same as `moe` does;
            another value in the base is a change, and weighs the balance loss from then on. None
            for a config that is new, or older than this field: see `from_base`.
    Raises:
        ValueError: the base's family is not known, the options contradict the sizes or each other,
            or the values are a config of another model type.
    """

    model_type = "etr"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *CACHE_NAMES,
        "aux_loss",
        "lm_loss",
        "router_logits",
        "router_losses",
        "routing_stats",
    ]

    base_config: Any = None
    moe: Any = None
    aux_coefficient: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_model_type(kwargs.pop("model_type", self.model_type))
        base = _base_config(self.base_config)
        of_base = {name: kwargs.pop(name) for name in list(kwargs) if _is_of_base(base, name)}
        self.base_config = None  # nothing is delegated before the config is whole
        super().__post_init__(**kwargs)
        self.base_config = base
        for name, value in of_base.items():
            setattr(base, name, value)
        if self._attn_implementation is not None:
            base._attn_implementation = self._attn_implementation
        # Through the layers' own configs: checked, and complete with every default.
        given = self.layer_options
        configs = moe_configs(family_of(base), base, {} if self.moe is None else self.moe)
        if self.aux_coefficient is None:
            self.base_config, configs = balanced(family_of(base), base, configs)
            self.aux_coefficient = self.family.coefficient(self.base_config)
        moe = [stored_options(*each) for each in zip(configs, given, strict=True)]
        self.moe = moe if isinstance(self.moe, list) else moe[0]

    @classmethod
    def from_base(
        cls,
        hf_config: PreTrainedConfig,
        router: str | RouterConfig = "etr",
        capacity: str | CapacityConfig | None = None,
        *,
        top_k: int | None = None,
        layers: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> EtrConfig:
        """Config of a model like `hf_config` with its MoE blocks swapped.

        The balance loss is transformers' too (``router_aux_loss_coef``, whose loss is top_k where
        ours is 1), so both say the same: a coefficient other than the family's default gives
        ``aux_alpha = coefficient * top_k`` unless `losses` names one, and the config's own
        coefficient becomes ``aux_alpha / top_k``. Trainers may change it (and
        ``router_jitter_noise``) at any time; options that are built into the layers may not be
        changed any more. How the base's own router chooses (``norm_topk_prob``, ``n_group``, ...)
        goes with router="keep" alone.

        Args:
            hf_config: config of a family in `FAMILIES`; copied. What its experts are (activation,
                biases, shared experts, scale of the weights) is taken over.
            router: name in `etr.ROUTERS`, a router's config, or "keep": route and weigh as the
                base does, drop nothing, and balance with its own weight, unless told otherwise.
            capacity: name in `etr.CAPACITIES`, a policy's config, or None for the router's own.
            top_k: experts a token may choose; None keeps the base's.
            layers: what single MoE layers have of their own, one mapping each: options, and
                num_experts, intermediate_size and top_k. None: all are alike.
            options: other fields of `LayerOptions`. None for `activation` or `num_shared_experts`
                takes the base's, and shared experts then have the width of the base's.
        Raises:
            ValueError: the base's family is not known, or the options contradict the sizes or
                each other.
        """
        base = copy.deepcopy(hf_config)
        family = family_of(base)
        if top_k is not None:
            setattr(base, family.top_k, top_k)
        if router == "keep":
            own = family.router(base)
            router, capacity = own["router"], capacity or "none"
            options["normalize"] = options.get("normalize") or own["normalize"]
            if options.get("losses") is None:
                options["losses"] = LossConfig(aux_alpha=family.aux_alpha(base))
        unset = ("activation", "num_shared_experts", "losses")
        options = {k: v for k, v in options.items() if v is not None or k not in unset}
        options |= {"router": router, "capacity": capacity}
        alike = layers is None
        own_options = [{**options, **layer} for layer in ([{}] if layers is None else layers)]
        configs = moe_configs(family, base, own_options[0] if alike else own_options)
        moe = [stored_options(*each) for each in zip(configs, own_options, strict=True)]
        return cls(base_config=base, moe=moe[0] if alike else moe)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of a folder's config.json.

        Raises:
            ValueError: they are of another model type, or not whole.
        """
        values, rest = super().get_config_dict(*args, **kwargs)
        _check_saved(values)
        return values, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Config of what `to_dict` gave, or of what config.json holds.

        Raises:
            ValueError: the values are of another model type, or not whole.
        """
        _check_saved(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Config of one file; see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_dict(self) -> dict[str, Any]:
        """Every value, and those of the base config that tools look for (`SHOWN`)."""
        values = super().to_dict()
        base = values["base_config"]
        return {**{name: base[name] for name in SHOWN if name in base}, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: each value once."""
        values = super().to_diff_dict()
        return {name: value for name, value in values.items() if name not in SHOWN}

    @property
    def family(self) -> Family:
        """The row of the base model."""
        return family_of(self.base_config)

    @property
    def moe_config(self) -> MoEConfig:
        """Config of every MoE layer.

        Raises:
            ValueError: layers have options of their own.
        """
        first, *others = moe_configs(self.family, self.base_config, self.moe)
        differ = sorted(
            {k for c in others for k, v in c.to_dict().items() if v != first.to_dict()[k]}
        )
        if differ:
            raise ValueError(
                f"the MoE layers differ in {', '.join(differ)}, and this needs one config for all"
            )
        return first

    def layer_configs(self, num_layers: int) -> list[MoEConfig]:
        """Config of each of so many MoE layers.

        Raises:
            ValueError: `moe` is a list of another length.
        """
        configs = moe_configs(self.family, self.base_config, self.moe)
        if not isinstance(self.moe, list):
            return configs * num_layers
        if len(configs) != num_layers:
            raise ValueError(
                f"moe holds {len(configs)} dictionaries, and the model has {num_layers} MoE "
                "layers: give one for each, or one dictionary for all"
            )
        return configs

    @property
    def layer_options(self) -> list[dict[str, Any]]:
        """`moe` as a list, which has one entry where all layers are alike."""
        return self.moe if isinstance(self.moe, list) else [{} if self.moe is None else self.moe]

    def changed_aux_alpha(self, top_k: int | None = None) -> float | None:
        """Weight of the balance loss, where the base's coefficient was changed since; else None.

        Of a layer with a `top_k` of its own, or with the base's. 0 counts as no change without
        ``output_router_logits=True``: TRL's SFTTrainer writes both to say that it adds no balance
        loss of its own.
        """
        coefficient = self.family.coefficient(self.base_config)
        if coefficient is None or coefficient == self.aux_coefficient or self.leaves_balance():
            return None
        return coefficient * (top_k or getattr(self.base_config, self.family.top_k))

    def leaves_balance(self) -> bool:
        """Whether a trainer says by a coefficient of 0 that it adds no balance loss of its own."""
        base, own = self.base_config, self.aux_coefficient
        asked = getattr(base, "output_router_logits", False)
        return bool(own) and not asked and self.family.coefficient(base) == 0

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base config: it describes the language model to caches and generation."""
        return self.base_config

    def __getattr__(self, name: str) -> Any:
        if name == "auto_map":  # TRL asks for it: no code comes with a folder
            return {}
        base = self.__dict__.get("base_config")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_config")
        if base is not None and _is_of_base(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)


_OWN = frozenset(
    name
    for name in (
        "base_config",
        "moe",
        "aux_coefficient",
        *dir(PreTrainedConfig),
        "name_or_path",
        "quantization_config",
    )
    if name not in ("rope_scaling",)
) | {field.name for field in dataclasses.fields(PreTrainedConfig)}


def _is_of_base(base: PreTrainedConfig, name: str) -> bool:
    """Whether an attribute is the base config's, and not a config's own."""
    return not name.startswith("_") and name not in _OWN and hasattr(base, name)


def _check_model_type(found: Any) -> None:
    if found != EtrConfig.model_type:
        raise ValueError(
            f"config has model_type={found!r}; it must be {EtrConfig.model_type!r}. Make a folder "
            f"of this library first: `etr convert SRC DST` for {', '.join(FAMILIES)}, `etr upcycle "
            "SRC DST` for a dense model"
        )


def _check_saved(values: dict[str, Any]) -> None:
    """Refuse what would be filled up with the defaults of a whole other model."""
    _check_model_type(values.get("model_type"))
    missing = [name for name in ("base_config", "moe") if values.get(name) is None]
    if missing:
        raise ValueError(f"config has no {' and no '.join(missing)}; save the model again")


def _base_config(value: Any) -> PreTrainedConfig:
    if value is None:
        return MixtralConfig()
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"base_config={value!r} must be a transformers config or its dictionary")
    values = dict(value)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"base_config['model_type']={model_type!r} is unknown to transformers")
    return CONFIG_MAPPING[model_type].from_dict(values)
