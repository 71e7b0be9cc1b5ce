"""Transformers models whose MoE blocks are `etr.moe.MoE` layers.

Importing this registers `EtrConfig` and `EtrForCausalLM` with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from etr.hf import earlier
from etr.hf.backbone import MoEBlock
from etr.hf.config import EtrConfig
from etr.hf.convert import ConvertReport, convert
from etr.hf.families import FAMILIES, Family, family_of
from etr.hf.loading import load_pretrained
from etr.hf.modeling import EtrCausalLMOutput, EtrForCausalLM

AutoConfig.register("etr", EtrConfig, exist_ok=True)
AutoModelForCausalLM.register(EtrConfig, EtrForCausalLM, exist_ok=True)
earlier.register()
# Trainer's label smoother and pipelines ask the table of names, which `register` leaves alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["etr"] = EtrForCausalLM.__name__

__all__ = [
    "FAMILIES",
    "ConvertReport",
    "EtrCausalLMOutput",
    "EtrConfig",
    "EtrForCausalLM",
    "Family",
    "MoEBlock",
    "convert",
    "family_of",
    "load_pretrained",
]
