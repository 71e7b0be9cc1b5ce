"""A corpus and a model small enough to train in a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from etr.data import DataConfig, OpenedData, open_data
from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig

WORDS = {
    "alpha": ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "dogs", "run", "home"),
    "digits": ("12", "+", "30", "=", "42", ";", "7", "*", "8", "=", "56", ";", "100", "-", "1"),
}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of 80 seeded documents each."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, words in WORDS.items():
        (folder / domain).mkdir()
        for number in range(80):
            stream = random.Random(f"{domain} {number}")
            text = " ".join(stream.choice(words) for _ in range(120))
            (folder / domain / f"{number}.txt").write_text(f"{number} {text}\n")
    return folder


@pytest.fixture(scope="session")
def data_config(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        data=(str(corpus_folder),),
        sequence_length=32,
        batch_size=4,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture(scope="session")
def data(data_config: DataConfig) -> OpenedData:
    return open_data(data_config)


@pytest.fixture
def make_config(tmp_path: Path, data_config: DataConfig) -> Callable[..., TrainConfig]:
    """A config of a tiny run; routing options by name, the rest as keyword arguments."""

    def make(router: str = "etr", routing: dict | None = None, **changes: object) -> TrainConfig:
        values: dict = {
            "out": str(tmp_path / "run"),
            "data": data_config,
            "model": ModelConfig(
                hidden_size=32,
                num_layers=2,
                num_heads=2,
                num_key_value_heads=2,
                routing=RoutingOptions(
                    router=router, num_experts=4, expert_size=16, **(routing or {})
                ),
            ),
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            "steps": 8,
            "eval_every": 4,
            "eval_tokens_per_domain": 128,
            "checkpoint_every": 4,
            "device": "cpu",
            "diagnostics": False,
            "profile_every": None,
        }
        return TrainConfig(**{**values, **changes})

    return make
