"""What tools look up by name: transformers' tables, and what they do with the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, pipeline
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from etr.data import byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def toy(vocab_size: int = 64) -> EtrForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    base = MixtralConfig(vocab_size=vocab_size, **sizes, **heads)
    return EtrForCausalLM(EtrConfig.from_base(base))


def test_the_tables_know_the_model() -> None:
    model = toy()
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["etr"] == type(model).__name__
    assert MODEL_FOR_CAUSAL_LM_MAPPING[EtrConfig] is EtrForCausalLM
    assert LOSS_MAPPING[model.loss_type] is ForCausalLMLoss
    assert isinstance(AutoModelForCausalLM.from_config(model.config), EtrForCausalLM)
    len(MODEL_FOR_CAUSAL_LM_MAPPING), list(MODEL_FOR_CAUSAL_LM_MAPPING.keys())  # still readable


@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_is_of_the_next_token(adapted: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    model, ids = toy(), torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(1))
    if adapted:
        peft = pytest.importorskip("peft", reason="needs the extra peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    trainer = Trainer(model.eval(), arguments)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    assert float(loss) == pytest.approx(4.15356, abs=1e-5)


def test_pipelines_take_it_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    toy(vocab_size=264).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
        (found,) = generate("The model", max_new_tokens=4, do_sample=False)
    finally:
        logging.disable_propagation()
    assert found["generated_text"].startswith("The model")
    assert "is not supported" not in caplog.text
