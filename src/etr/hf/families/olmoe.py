"""OLMoE: softmax over all experts, weights as they are unless the config normalises them."""

from etr.hf.families.base import MLP_EXPERTS, MLP_ROUTER, Family

FAMILY = Family(model_type="olmoe", options=("norm_topk_prob",), keys=(MLP_ROUTER, *MLP_EXPERTS))
