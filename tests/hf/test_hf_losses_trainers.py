"""Router losses have the same gradient under every trainer, whatever it computes its loss from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import base_config
from torch import Tensor, nn
from torch.nn import functional as F

from etr.data import byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import LossConfig, moe_layers

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

from etr.hf.callback import EtrCallback

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
VOCAB, ROWS, BATCH = 264, 6, 2


def build(alpha: float, seed: int = 0) -> EtrForCausalLM:
    """One layer, since TRL pools its own balance loss over layers."""
    torch.manual_seed(seed)
    base = base_config(vocab_size=VOCAB, num_hidden_layers=1)
    losses = LossConfig(aux_alpha=alpha)
    return EtrForCausalLM(EtrConfig.from_base(base, capacity="none", losses=losses))


class Spy(TrainerCallback):
    """The router's gradient in each step, and what the base model was given for it."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients: list[Tensor] = []
        self.inputs: list[list[dict[str, Any]]] = []
        self._now: list[dict[str, Any]] = []
        base = next(m for m in model.modules() if isinstance(m, EtrForCausalLM)).model
        base.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._now.append({name: kwargs[name] for name in ("input_ids", "attention_mask")})

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append(moe_layers(model)[0].router.weight.grad.clone())
        self.inputs.append(self._now)
        self._now = []


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def plain(model: EtrForCausalLM, folder: Path, **changes: Any) -> Trainer:
    function = changes.pop("compute_loss_func", None)
    ids = torch.randint(3, VOCAB, (ROWS, 12), generator=torch.Generator().manual_seed(1))
    return Trainer(
        model,
        TrainingArguments(**options(folder, **changes)),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        compute_loss_func=function,
    )


class OwnLoss(Trainer):
    """As people write it, with the labels left among the inputs."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        shifted = inputs["labels"][:, 1:].flatten()
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), shifted)


def overridden(model: EtrForCausalLM, folder: Path) -> Trainer:
    ids = torch.randint(3, VOCAB, (ROWS, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return OwnLoss(model, TrainingArguments(**options(folder)), train_dataset=rows)


def trl_sft(model: EtrForCausalLM, folder: Path, **changes: Any) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": f"question {number} and answer"} for number in range(ROWS)]
    return SFTTrainer(
        model,
        args=SFTConfig(**options(folder, bf16=False, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )


def trl_dpo(model: EtrForCausalLM, folder: Path, **changes: Any) -> Trainer:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pair = {"chosen": "yes good", "rejected": "no, that is bad"}
    rows = [{"prompt": f"q{number}: ", **pair} for number in range(ROWS)]
    return DPOTrainer(
        model,
        ref_model=build(0.0, seed=1),
        args=DPOConfig(**options(folder, bf16=False, gradient_checkpointing=False, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )


def trl_kto(model: EtrForCausalLM, folder: Path, **changes: Any) -> Trainer:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": f"q{number}: ", "completion": "so it is", "label": number % 2 == 0}
        for number in range(ROWS)
    ]
    return KTOTrainer(
        model,
        ref_model=build(0.0, seed=1),
        args=KTOConfig(**options(folder, bf16=False, gradient_checkpointing=False, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )


def trl_grpo(model: EtrForCausalLM, folder: Path, **changes: Any) -> Trainer:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    own = {"num_generations": 2, "max_completion_length": 4, "bf16": False, "beta": 0.0}
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(**options(folder, max_steps=2, **own, **changes)),
        train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "bc"}] * 4),
        processing_class=byte_tokenizer(),
    )


TRAINERS: dict[str, tuple[Callable[..., Trainer], dict[str, Any]]] = {
    "Trainer": (plain, {}),
    "Trainer, compute_loss_func": (plain, {"compute_loss_func": own_loss}),
    "Trainer, own loss": (overridden, {}),
    "Trainer, label smoothing": (plain, {"label_smoothing_factor": 0.1}),
    "Trainer, gradient checkpointing": (plain, {"gradient_checkpointing": True}),
    "SFT": (trl_sft, {}),
    "SFT, coefficient 0": (trl_sft, {"router_aux_loss_coef": 0.0}),
    "SFT, dft": (trl_sft, {"router_aux_loss_coef": 0.0, "loss_type": "dft"}),
    "DPO": (trl_dpo, {}),
    "DPO, coefficient 0": (trl_dpo, {"router_aux_loss_coef": 0.0}),
    "KTO": (trl_kto, {}),
    "KTO, coefficient 0": (trl_kto, {"router_aux_loss_coef": 0.0}),
    "GRPO": (trl_grpo, {}),
    "GRPO, coefficient 0": (trl_grpo, {"router_aux_loss_coef": 0.0}),
}


def trained(name: str, alpha: float, folder: Path, *, by_add_to: bool) -> Spy:
    make, changes = TRAINERS[name]
    model = build(alpha)
    trainer = make(model, folder, **changes)
    if by_add_to:
        EtrCallback.add_to(trainer)
    else:
        trainer.add_callback(EtrCallback())
    spy = Spy(trainer.model)
    trainer.add_callback(spy)
    torch.manual_seed(0)
    trainer.train()
    return spy


def expected(inputs: list[dict[str, Any]], alpha: float) -> Tensor:
    """Gradient of the mean router loss over the micro-batches of a step."""
    model = build(alpha).train()
    for given in inputs:
        losses = model(**given).router_losses
        (sum(losses.values()) / len(inputs)).backward()
    return moe_layers(model)[0].router.weight.grad


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef=0")
@pytest.mark.parametrize(
    ("name", "by_add_to"), [*((name, True) for name in TRAINERS), ("Trainer, own loss", False)]
)
def test_every_trainer_has_the_same_router_gradient(
    name: str, by_add_to: bool, tmp_path: Path
) -> None:
    """Three micro-batches make two steps, the second of which has but one."""
    if not name.startswith("Trainer"):
        pytest.importorskip("trl", reason="needs the extra sft")
    with_losses = trained(name, 1.0, tmp_path / "1", by_add_to=by_add_to)
    without = trained(name, 0.0, tmp_path / "0", by_add_to=by_add_to)
    sizes = [len(inputs) for inputs in with_losses.inputs]
    assert sizes == ([2, 2] if name.startswith("GRPO") else [2, 1])
    for step, inputs in enumerate(with_losses.inputs):
        found = with_losses.gradients[step] - without.gradients[step]
        wanted = expected(inputs, 1.0)
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
