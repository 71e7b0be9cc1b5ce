"""transformers' Trainer on two ranks through accelerate: the same training as on one."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import start
from tiny_models import make_model, tokens

import etr
from etr.moe import moe_layers

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless"),
    pytest.mark.distributed,
]
STEPS = 4
FSDP = {
    "fsdp": "full_shard",
    "fsdp_config": {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
    },
}
SETUPS: dict[str, dict[str, Any]] = {"ddp": {"ddp_backend": "gloo"}, "fsdp2": FSDP}


def train(folder: Path, batch_size: int, **options: Any) -> dict[str, Any]:
    """Losses and counters of a few dropless steps on the same eight rows a step."""
    from transformers import Trainer, TrainingArguments

    from etr.hf.callback import EtrCallback

    model = make_model(etr.EtrRouter(), capacity="none").float()
    ids = tokens(8, 12)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            **options,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[EtrCallback()],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    names = ("loss", "grad_norm", "router_loss_aux", "max_violation")
    return {
        "rows": [{name: float(row[name]) for name in names} for row in logged],
        "previous_load": [x.state.previous_load.tolist() for x in moe_layers(model)],
        "steps": [int(x.state.step) for x in moe_layers(model)],
    }


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, options in SETUPS.items():
        try:
            found = train(Path(folder) / name, 4, **options)
        except Exception as error:
            found = {"error": repr(error)}
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(work, (port, str(folder)), 2)
    return folder


@pytest.mark.parametrize("setup", SETUPS)
def test_two_ranks_train_as_one(setup: str, ranks: Path, tmp_path: Path) -> None:
    one = train(tmp_path, 8)
    for rank in range(2):
        two = json.loads((ranks / f"{setup}-{rank}.json").read_text())
        assert "error" not in two, two
        assert two["steps"] == one["steps"] == [STEPS, STEPS]
        assert two["previous_load"] == one["previous_load"]
        if rank == 0:
            for mine, theirs in zip(one["rows"], two["rows"], strict=True):
                assert theirs == pytest.approx(mine, rel=1e-3)
