"""TRL's trainers, given a folder, or a model without a reference."""

from __future__ import annotations

import pytest
import torch
from tiny_models import base_config

from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained

trl = pytest.importorskip("trl", reason="needs the extra sft")
datasets = pytest.importorskip("datasets", reason="needs the extra sft")

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    base = base_config(vocab_size=BYTE_VOCAB_SIZE, pad_token_id=None)
    EtrForCausalLM(EtrConfig.from_base(base, top_k=1)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "router_aux_loss_coef": 0.0,
        "gradient_checkpointing": False,
    }


def rows(**values):
    return datasets.Dataset.from_list([values] * 8)


def test_sft_of_a_folder(folder, options):
    trainer = trl.SFTTrainer(
        folder,
        args=trl.SFTConfig(**options),
        train_dataset=rows(text="question and answer"),
        processing_class=byte_tokenizer(),
    )
    assert type(trainer.model) is EtrForCausalLM
    assert trainer.train().global_step == 1


def test_grpo_of_a_folder(folder, options):
    args = trl.GRPOConfig(**options, num_generations=4, max_completion_length=2, beta=0.1)
    trainer = trl.GRPOTrainer(
        folder,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=args,
        train_dataset=rows(prompt="a"),
        processing_class=byte_tokenizer(),
    )
    assert type(trainer.model) is type(trainer.ref_model) is EtrForCausalLM
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("load", [str, EtrForCausalLM.from_pretrained, load_pretrained])
def test_dpo_makes_its_own_reference(folder, options, load):
    trainer = trl.DPOTrainer(
        load(folder),
        args=trl.DPOConfig(**options),
        train_dataset=rows(prompt="q: ", chosen="yes", rejected="no!"),
        processing_class=byte_tokenizer(),
    )
    reference = trainer.ref_model or trainer.model
    assert type(reference) is EtrForCausalLM
    assert trainer.train().global_step == 1
