"""What the tests here share: a tiny run, and ranks to run it on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from etr.data import DataConfig
from etr.moe import LossConfig
from etr.parallel import ParallelConfig
from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig

WORDS = ("the", "cat", "sat", "on", "a", "mat", "12", "+", "30", "=", "42", ";")
LOSSES = LossConfig(aux_alpha=0.05, aux_mode="ranks", locality_mu=0.0)


def write_corpus(folder: Path) -> Path:
    """Two domains of seeded documents."""
    for domain in ("one", "two"):
        (folder / domain).mkdir(parents=True)
        for number in range(40):
            stream = random.Random(f"{domain} {number}")
            words = stream.choices(WORDS[:8] if domain == "one" else WORDS[4:], k=120)
            (folder / domain / f"{number}.txt").write_text(f"{number} {' '.join(words)}\n")
    return folder


def tiny_config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """A run of `name` on the corpus in `folder`."""
    values: dict[str, Any] = {
        "out": str(folder / name),
        "data": DataConfig(
            data=(str(folder / "corpus"),),
            sequence_length=16,
            batch_size=8,
            cache_dir=str(folder / "cache"),
        ),
        "model": tiny_model(),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        "steps": 6,
        "eval_every": 4,
        "eval_tokens_per_domain": 80,
        "checkpoint_every": 4,
        "device": "cpu",
        "diagnostics": False,
        "profile_every": None,
    }
    return TrainConfig(**{**values, **changes})


def tiny_model(router: str = "etr") -> ModelConfig:
    return ModelConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=2,
        routing=RoutingOptions(
            router=router,
            capacity="factor:capacity_factor=0.7",
            num_experts=4,
            top_k=2,
            expert_size=12,
            num_shared_experts=1,
            losses=LOSSES,
        ),
    )


def layouts(world: int) -> list[ParallelConfig]:
    """Every mesh of so many ranks, with and without FSDP."""
    return [
        ParallelConfig(expert_ranks=expert, fsdp=fsdp)
        for expert in range(1, world + 1)
        if world % expert == 0
        for fsdp in (True, False)
    ]
