"""EtrConfig: a transformers model's config, and what replaces its MoE blocks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, MixtralConfig, PreTrainedConfig

from etr.hf.families import FAMILIES, Family, family_of
from etr.hf.families.base import GATED_ACTIVATIONS
from etr.hf.versions import CACHE_NAMES
from etr.moe import LossConfig, MoEConfig
from etr.moe.capacity import CapacityConfig
from etr.moe.experts import Activation, BankConfig
from etr.moe.losses import Balance, Losses, reweighted
from etr.moe.routers import RouterConfig
from etr.moe.select import Normalize, RankBy

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")
"""Fields of MoEConfig that are read from the base config, so that each is stored once."""
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
        moe: options of the layers, as `MoEConfig.to_dict` gives them without the sizes.
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
        # Through the layer's own config: checked, and complete with every default.
        config = _moe_config(family_of(base), base, self.moe or {})
        if self.aux_coefficient is None:
            self.base_config, config = _balanced(family_of(base), base, config)
            self.aux_coefficient = self.family.coefficient(self.base_config)
        self.moe = {k: v for k, v in config.to_dict().items() if k not in SIZES}

    @classmethod
    def from_base(
        cls,
        hf_config: PreTrainedConfig,
        router: str | RouterConfig = "etr",
        capacity: str | CapacityConfig | None = None,
        *,
        top_k: int | None = None,
        rank_by: RankBy | None = None,
        normalize: Normalize | None = None,
        losses: Losses | None = None,
        activation: Activation | None = None,
        num_shared_experts: int | None = None,
        experts: str | BankConfig = "uniform",
        backend: str = "auto",
        dispatch: str = "auto",
        eval_selection: str = "threshold",
        local_bonus: float = 0.0,
        debug: bool = False,
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
            activation: inside the experts; None takes the base's.
            num_shared_experts: None keeps the base's; each then has the width of the base's.
            experts, rank_by, normalize, losses, backend, dispatch, eval_selection, local_bonus,
                debug: see `MoEConfig`.
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
            router, normalize = own["router"], normalize or own["normalize"]
            capacity = capacity or "none"
            losses = LossConfig(aux_alpha=family.aux_alpha(base)) if losses is None else losses
        own_experts: dict[str, Any] = {} if activation is None else {"activation": activation}
        if num_shared_experts is not None:
            own_experts["num_shared_experts"] = num_shared_experts
        config = MoEConfig(
            **_family_options(family, base, own_experts),
            experts=experts,
            router=router,
            capacity=capacity,
            rank_by=rank_by,
            normalize=normalize,
            losses=LossConfig() if losses is None else losses,
            backend=backend,
            dispatch=dispatch,
            eval_selection=eval_selection,
            local_bonus=local_bonus,
            debug=debug,
        )
        moe = {k: v for k, v in config.to_dict().items() if k not in SIZES}
        return cls(base_config=base, moe=moe)

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
        """Config of each MoE layer."""
        return _moe_config(self.family, self.base_config, self.moe)

    def changed_aux_alpha(self) -> float | None:
        """Weight of the balance loss, where the base's coefficient was changed since; else None.

        0 counts as no change without ``output_router_logits=True``: TRL's SFTTrainer writes both
        to say that it adds no balance loss of its own.
        """
        coefficient = self.family.coefficient(self.base_config)
        if coefficient is None or coefficient == self.aux_coefficient or self.leaves_balance():
            return None
        return coefficient * getattr(self.base_config, self.family.top_k)

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


def _balanced(
    family: Family, base: PreTrainedConfig, config: MoEConfig
) -> tuple[PreTrainedConfig, MoEConfig]:
    """Both with one weight of the balance loss; a base that says another is copied.

    Raises:
        ValueError: the base asks for a balance loss, and the router can have none.
    """
    name, coefficient = family.aux_coefficient, family.coefficient(base)
    if name is None:
        return base, config
    if coefficient is None:
        coefficient = getattr(type(base), name)
    rows = {row.name: row for row in config.loss_rows}
    own = config.loss_weights.get(Balance.name, 0.0)
    told = coefficient not in (getattr(type(base), name), own / config.top_k)
    if Balance.name in rows and rows[Balance.name].weight is None and told:
        if coefficient and not config.router_config.traits.can_balance:
            raise ValueError(
                f"{name}={coefficient} of the base config asks for a balance loss, which router "
                f"{config.router_config.name!r} cannot have; give losses=LossConfig(aux_alpha=0)"
            )
        own = coefficient * config.top_k
        losses = reweighted(config.losses, Balance.name, own)
        config = dataclasses.replace(config, losses=losses)
    if coefficient * config.top_k != own:
        base = copy.copy(base)
        setattr(base, name, own / config.top_k)
    return base, config


def _moe_config(family: Family, base: PreTrainedConfig, moe: dict[str, Any]) -> MoEConfig:
    known = {field.name for field in dataclasses.fields(MoEConfig)} - set(SIZES)
    unknown = sorted(set(moe) - known)
    if unknown:
        raise ValueError(
            f"moe has unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))} "
            "(sizes belong to base_config)"
        )
    return MoEConfig.from_dict(_family_options(family, base, moe))


def _family_options(
    family: Family, base: PreTrainedConfig, options: dict[str, Any]
) -> dict[str, Any]:
    """`options` over what the family's config says about sizes and experts."""
    found = {**family.experts(base), **options, **family.sizes(base)}
    if found["activation"] is None:
        raise ValueError(
            f"hidden_act={base.hidden_act!r} of the base config has no counterpart among the "
            f"experts' activations; known: {', '.join(GATED_ACTIVATIONS)}. Name one by "
            "activation=..."
        )
    if not found.get("num_shared_experts"):
        found |= {"shared_gate": False, "shared_intermediate_size": None}
    return found
