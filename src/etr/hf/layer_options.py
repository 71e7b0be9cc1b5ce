"""Options of a model's MoE layers: from what a config stores to the layers, and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Container, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from etr.hf.families import Family
from etr.hf.families.base import GATED_ACTIVATIONS
from etr.moe import MoEConfig, moe_layers
from etr.moe.config import SIZES
from etr.moe.losses import Balance, reweighted
from etr.moe.options import OPTIONS

OF_LAYERS = tuple(name for name in SIZES if name != "hidden_size")
"""Sizes that a MoE layer may have of its own; all others are the base config's alone."""


def stored_options(config: MoEConfig, given: Container[str]) -> dict[str, Any]:
    """What a model's config stores of a layer's: every option, and the sizes that were given."""
    return {k: v for k, v in config.to_dict().items() if k not in SIZES or k in given}


def store_options(model: nn.Module) -> None:
    """Write what the layers of `model` are now into its config, of which a saved folder is made."""
    config: Any = model.config
    each = zip(moe_layers(model), config.layer_options, strict=False)
    moe = [stored_options(layer.config, given) for layer, given in each]
    config.moe = moe if isinstance(config.moe, list) else moe[0]


def balanced_sizes(configs: Sequence[MoEConfig]) -> tuple[int, int]:
    """Experts, and choices of a token, of which transformers' balance loss knows one each.

    Raises:
        ValueError: layers differ in them.
    """
    sizes = {(config.num_experts, config.top_k) for config in configs}
    if len(sizes) > 1:
        raise ValueError(
            "output_router_logits=True asks for transformers' balance loss, which needs MoE layers "
            f"of one num_experts and top_k; they have {', '.join(map(str, sorted(sizes)))}"
        )
    return sizes.pop()


def balanced(
    family: Family, base: PreTrainedConfig, configs: list[MoEConfig]
) -> tuple[PreTrainedConfig, list[MoEConfig]]:
    """Both with one weight of the balance loss; a base that says another is copied.

    Where layers have weights of their own, the base gets the first one's.

    Raises:
        ValueError: the base asks for a balance loss, and the router can have none.
    """
    name, coefficient = family.aux_coefficient, family.coefficient(base)
    if name is None:
        return base, configs
    if coefficient is None:
        coefficient = getattr(type(base), name)
    configs = [_as_told(config, name, coefficient, getattr(type(base), name)) for config in configs]
    own, top_k = configs[0].loss_weights.get(Balance.name, 0.0), configs[0].top_k
    if coefficient * top_k != own:
        base = copy.copy(base)
        setattr(base, name, own / top_k)
    return base, configs


def _as_told(config: MoEConfig, name: str, coefficient: float, default: float) -> MoEConfig:
    """`config` with the base's coefficient, if that says anything and the config does not."""
    balance = {row.name: row for row in config.loss_rows}.get(Balance.name)
    own = config.loss_weights.get(Balance.name, 0.0)
    told = coefficient not in (default, own / config.top_k)
    if balance is None or balance.weight is not None or not told:
        return config
    if coefficient and not config.router_config.traits.can_balance:
        raise ValueError(
            f"{name}={coefficient} of the base config asks for a balance loss, which router "
            f"{config.router_config.name!r} cannot have; give losses=LossConfig(aux_alpha=0)"
        )
    losses = reweighted(config.losses, Balance.name, coefficient * config.top_k)
    return dataclasses.replace(config, losses=losses)


def moe_configs(
    family: Family, base: PreTrainedConfig, moe: dict[str, Any] | list[dict[str, Any]]
) -> list[MoEConfig]:
    """One config for all MoE layers, or one for each.

    Raises:
        ValueError: names the layer, and the option.
    """
    if isinstance(moe, dict):
        return [_moe_config(family, base, moe, OPTIONS, "moe")]
    if not moe or not all(isinstance(options, dict) for options in moe):
        raise ValueError("moe must be a dictionary, or a list with one for each MoE layer")
    known = (*OPTIONS, *OF_LAYERS)
    return [_moe_config(family, base, layer, known, f"moe[{i}]") for i, layer in enumerate(moe)]


def _moe_config(
    family: Family,
    base: PreTrainedConfig,
    options: dict[str, Any],
    known: tuple[str, ...],
    what: str,
) -> MoEConfig:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{what} has unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))} "
            f"({'' if what == 'moe' else 'other '}sizes belong to base_config)"
        )
    values = _family_options(family, base, options)
    if what == "moe":
        return MoEConfig.from_dict(values)
    try:
        return MoEConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _family_options(
    family: Family, base: PreTrainedConfig, options: dict[str, Any]
) -> dict[str, Any]:
    """`options` over what the family's config says about sizes and experts."""
    found = {**family.experts(base), **family.sizes(base), **options}
    if found["activation"] is None:
        raise ValueError(
            f"hidden_act={base.hidden_act!r} of the base config has no counterpart among the "
            f"experts' activations; known: {', '.join(GATED_ACTIVATIONS)}. Name one by "
            "activation=..."
        )
    if not found.get("num_shared_experts"):
        found |= {"shared_gate": False, "shared_intermediate_size": None}
    return found
