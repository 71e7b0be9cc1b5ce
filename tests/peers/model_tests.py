"""transformers' tests of a causal language model, run on `EtrForCausalLM` over each base.

`make test-peers` collects this file, after `import_tests`; the suite's own run does not.
"""

from __future__ import annotations

import importlib
import unittest
from typing import Any

import torch
from peer_bases import BASES, SIZES, etr_config
from torch import Tensor
from transformers import MODEL_MAPPING

from etr.hf import EtrConfig, EtrForCausalLM
from etr.hf.backbone import base_model_class

common: Any = importlib.import_module("tests.test_modeling_common")
try:
    causal: Any = importlib.import_module("tests.causal_lm_tester")
except ModuleNotFoundError as error:  # a source archive has none
    if error.name != "tests.causal_lm_tester":
        raise
    causal = None


class ArchiveTester:
    """What the common tests ask of a model's tester."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, parent: unittest.TestCase) -> None:
        vars(self).update(SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[EtrConfig, dict[str, Tensor]]:
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(3, SIZES["vocab_size"], shape)
        config: EtrConfig = self.get_config()  # type: ignore[attr-defined]
        return config, {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long)}


class Checks:
    """Mixed into transformers' test case: the model's class, and input that it needs.

    Labels are supplied, because the common tests know by name which classes take them.
    """

    all_model_classes = (EtrForCausalLM,)
    pipeline_model_mapping: dict[str, type] = {}  # noqa: RUF012
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        common.global_rng.seed(0)
        self.model_tester = self.model_tester_class(self)  # type: ignore[attr-defined]
        if causal is not None:
            super().setUp()  # type: ignore[misc]

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)  # type: ignore[misc]
        if return_labels:
            inputs.setdefault("labels", inputs["input_ids"].clone())
        return inputs


def make_tester(base: str) -> type:
    """The tester of a base: transformers' own where there is one."""
    config_class, _ = BASES[base]
    members: dict[str, Any] = {
        "config_class": EtrConfig,
        "base_model_class": base_model_class(MODEL_MAPPING[config_class]),
        "causal_lm_class": EtrForCausalLM,
        "get_config": lambda self: etr_config(base),
    }
    if causal is None:
        return type("Tester", (ArchiveTester,), members)

    class Tester(causal.CausalLMModelTester):
        def __init__(self, parent: unittest.TestCase) -> None:
            super().__init__(parent, **SIZES)

    return type("Tester", (Tester,), members)


def make_case(base: str) -> type[unittest.TestCase]:
    """The test case of a base."""
    parents: tuple[type, ...] = (
        (common.ModelTesterMixin, common.GenerationTesterMixin)
        if causal is None
        else (causal.CausalLMModelTest,)
    )
    members: dict[str, Any] = {"model_tester_class": make_tester(base), "__module__": __name__}
    for name in dir(parents[0]):
        if name.startswith("test_pipeline_"):  # they ask for models that would be downloaded
            members[name] = None
    return type(base, (Checks, *parents, unittest.TestCase), members)


globals().update({base: make_case(base) for base in BASES})
