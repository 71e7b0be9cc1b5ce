"""transformers' Trainer with EtrCallback against our own loop, and what it logs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_models import make_model, tokens

import etr
from etr.data import IGNORED, Batch, DataConfig, open_data
from etr.hf import FAMILIES
from etr.moe import moe_layers
from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig
from etr.train.loop import Trainer as OwnTrainer
from etr.train.optimizer import build_optimizer, learning_rate

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

from etr.hf.callback import EtrCallback

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
STEPS = 30
FRAMES: tuple[Literal["fixed", "learned", "orthonormal"], ...] = ("fixed", "learned", "orthonormal")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**values, **options})


def rows(count: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = tokens(count, length, seed=7)
    return [{"input_ids": row, "labels": row} for row in ids]


class InOrder(Trainer):
    """Batches come as the dataset has them."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Replayed:
    """A loader of our loop that gives a list of batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = iter(batches)
        self.tokens_per_batch = batches[0].input_ids.numel()

    def __iter__(self) -> Any:
        return self.batches


@pytest.fixture(scope="module")
def own_config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("own")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(
        "\n\n".join(f"{n} red cats saw {n * n}" for n in range(999))
    )
    routing = RoutingOptions(num_experts=4, top_k=2, expert_size=16)
    return TrainConfig(
        out=str(folder / "run"),
        data=DataConfig(
            data=(str(folder / "text"),),
            sequence_length=24,
            batch_size=4,
            cache_dir=str(folder / "cache"),
        ),
        model=ModelConfig(
            hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=2, routing=routing
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        steps=STEPS,
        device="cpu",
        diagnostics=False,
        profile_every=None,
        accumulation_steps=2,
    )


def test_thirty_steps_equal_our_own_loop(own_config: TrainConfig, tmp_path: Path) -> None:
    """Same weights, same batches, two micro-batches a step, a capacity that moves."""
    data = open_data(own_config.data)
    ours = OwnTrainer(own_config, data)
    ours.model.double()
    batches = []
    for _, batch in zip(range(2 * STEPS), ours.loader, strict=False):
        labels = batch.labels.clone()
        labels[:, -1] = IGNORED  # transformers shifts inside, so it has no label for the last
        batches.append(dataclasses.replace(batch, labels=labels))
    ours.loader = Replayed(batches)  # type: ignore[assignment]
    theirs = OwnTrainer(dataclasses.replace(own_config, out=str(tmp_path / "other")), data)
    theirs.attachment.detach()
    model = theirs.model.double()

    optimizer = build_optimizer(model, own_config.optimizer)
    peak = own_config.optimizer.learning_rate
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(own_config.optimizer, step, STEPS) / peak
    )
    trainer = InOrder(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=[
            {"input_ids": row, "labels": row} for batch in batches for row in batch.input_ids
        ],
        optimizers=(optimizer, schedule),
        callbacks=[EtrCallback()],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == STEPS
    for row in logged:
        (mine,) = (one for one in ours.train_step() if one["kind"] == "train")
        total = mine["loss"] + sum(mine["losses"].values())
        # The Trainer rounds the loss that it logs to four decimals or so; gradients do not.
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
        assert row["router_loss_aux"] == pytest.approx(mine["losses"]["aux"], rel=1e-5)
        for name in ("kept_fraction", "drop_rate", "capacity_factor", "max_violation"):
            assert row[name] == pytest.approx(mine[name], rel=1e-9), name
    assert logged[0]["capacity_factor"] < 0.6 < 1.0 < logged[-1]["capacity_factor"]
    for mine_layer, layer in zip(moe_layers(ours.model), moe_layers(model), strict=True):
        assert int(layer.state.step) == STEPS
        torch.testing.assert_close(
            layer.experts.down_proj, mine_layer.experts.down_proj, rtol=1e-4, atol=1e-6
        )


def test_the_trainer_learns_thresholds_and_lets_go(tmp_path: Path) -> None:
    model = make_model().float()
    trainer = Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows(12))
    seen: list[dict[str, Any]] = []
    first = EtrCallback.add_to(trainer)
    assert trainer.callback_handler.callbacks[0] is first

    class Tracker(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer.add_callback(Tracker())
    trainer.train()
    assert all(layer.calibration.is_calibrated for layer in moe_layers(model))
    assert "drop_rate" in seen[0]
    assert "drop_rate" not in seen[-1]  # the summary of the run is no step
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_fine_tuning_does_not_start_the_schedule_again(tmp_path: Path) -> None:
    model = make_model().float()
    for steps in (4, 6):
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=steps),
            train_dataset=rows(24),
            callbacks=[EtrCallback()],
        )
        trainer.train()
    logged = [row["capacity_factor"] for row in trainer.state.log_history if "loss" in row]
    assert min(logged) > 1.0
    assert [int(layer.state.step) for layer in moe_layers(model)] == [10, 10]


def test_a_resumed_training_goes_on(tmp_path: Path) -> None:
    """Stopped after half the steps and resumed, the schedule ends where it would have."""

    def trainer(folder: Path, seed: int = 0, **options: Any) -> Trainer:
        model = make_model(etr.EtrRouter(frame="learned"), seed=seed).float()
        return InOrder(
            model,
            arguments(folder, max_steps=6, save_steps=3, **options),
            train_dataset=rows(24),
            callbacks=[EtrCallback()],
        )

    whole = trainer(tmp_path / "whole", save_strategy="steps")
    whole.train()
    half = tmp_path / "whole" / "checkpoint-3"
    resumed = trainer(tmp_path / "again", seed=1)
    resumed.train(resume_from_checkpoint=str(half))
    ends = [run.state.log_history[-2] for run in (whole, resumed)]
    assert ends[0]["capacity_factor"] == ends[1]["capacity_factor"]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("router", "family"),
    [
        *((etr.EtrRouter(frame=frame, gate="sigmoid"), "mixtral") for frame in FRAMES),
        *(("keep", family) for family in FAMILIES),
    ],
)
def test_weight_decay_leaves_routers_alone(router: Any, family: str, tmp_path: Path) -> None:
    """Neither a temperature nor directions; the Trainer asks no callback about it."""
    model = make_model(router, family).float()
    trainer = Trainer(model, arguments(tmp_path, weight_decay=0.1))
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in trainer.optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert not any("router" in name for name in decayed)
    layer = "model.layers.0." + ("mlp" if family != "granitemoe" else "block_sparse_moe")
    assert {f"{layer}.experts.down_proj", "model.layers.0.self_attn.o_proj.weight"} <= decayed


def test_a_temperature_stays_under_weight_decay(tmp_path: Path) -> None:
    model = make_model(etr.EtrRouter(temperature=4.0)).float()
    options = {"weight_decay": 0.5, "learning_rate": 1.0, "max_grad_norm": 1e-12}
    options |= {"optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 3}
    Trainer(model, arguments(tmp_path, **options), train_dataset=rows(12)).train()
    for layer in moe_layers(model):
        assert float(layer.router.log_temperature.exp()) == pytest.approx(4.0, rel=1e-6)
    assert float(moe_layers(model)[0].experts.down_proj.abs().max()) < 0.2


def test_the_callback_tells_the_scale_of_float16_training(tmp_path: Path) -> None:
    """As accelerate prepares an optimizer for it, which it does not for CPUs."""
    from accelerate.optimizer import AcceleratedOptimizer

    model = make_model().float()
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), scaler=scaler)
    callback = EtrCallback.add_to(trainer)
    callback.on_train_begin(
        trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer
    )
    scale = moe_layers(model)[0].loss_scale
    assert scale is not None
    assert float(scale(torch.ones(()))) == 8.0
    trainer.current_gradient_accumulation_steps = 4
    callback.on_step_begin(trainer.args, trainer.state, trainer.control)
    assert float(scale(torch.ones(()))) == 2.0
    callback.on_train_end()
    assert moe_layers(model)[0].loss_scale is None


@pytest.mark.parametrize("labels", [True, False])
def test_accelerates_own_loop(labels: bool) -> None:
    """`accumulate` and `backward` divide the loss by the number of micro-batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model(capacity="none", losses=etr.LossConfig(aux_alpha=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    handle = etr.attach(model, optimizer, 4)
    expected = 0
    for seed in (1, 2):
        x = tokens(seed=seed)
        with accelerator.accumulate(model):
            output = model(x, labels=x)
            loss = output.loss
            if not labels:
                logits = output.logits[:, :-1].flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten())
            accelerator.backward(loss)
            optimizer.step()
        one = make_model(capacity="none", losses=etr.LossConfig(aux_alpha=1.0))
        one(x, labels=x).loss.backward()
        expected = expected + moe_layers(one)[0].router.weight.grad / 2
    grad = moe_layers(model)[0].router.weight.grad
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)
    assert int(handle.last_stats[0]["num_forwards"]) == 2
    assert int(moe_layers(model)[0].state.step) == 1


def test_a_model_without_our_layers_is_refused(tmp_path: Path) -> None:
    from tiny_models import base_config
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM(base_config())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(4), callbacks=[EtrCallback()])
    with pytest.raises(ValueError, match="no MoE layer"):
        trainer.train()


class Averaging(TrainerCallback):
    """An average of weights, as callbacks keep it: a copy of the model in training."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            self.average = torch.optim.swa_utils.AveragedModel(model)
        self.average.update_parameters(model)


def test_a_copy_of_a_model_in_training_takes_nothing_of_the_trainer_along(tmp_path: Path) -> None:
    model, keeper, callback = make_model(), Averaging(), EtrCallback()
    options = arguments(tmp_path, max_steps=3)
    Trainer(model, options, train_dataset=rows(8), callbacks=[callback, keeper]).train()
    average = keeper.average.module
    (prepare,) = average.prepare_context
    assert prepare.__self__ is not callback
    assert prepare.__self__._attachment is None
    assert prepare.__self__._models == []
    for copied, layer in zip(moe_layers(average), moe_layers(model), strict=True):
        assert copied.attachment is None
        assert int(copied.state.step) == int(layer.state.step) == 3
        assert torch.equal(copied.calibration.threshold, layer.calibration.threshold)


def test_training_without_the_callback_is_said_once(tmp_path: Path) -> None:
    trainer = Trainer(make_model(), arguments(tmp_path, max_steps=6), train_dataset=rows(8))
    with pytest.warns(UserWarning, match="learn neither thresholds.*EtrCallback") as caught:
        trainer.train()
    assert sum("learn neither thresholds" in str(w.message) for w in caught) == 1
