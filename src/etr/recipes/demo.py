"""The demo, in a minute and in full, and a smoke test of the whole path."""

from __future__ import annotations

from dataclasses import replace

from etr.data import DataConfig
from etr.train import CompareConfig, ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig


def quick_demo(out: str = "runs/demo", seeds: tuple[int, ...] = (0,)) -> CompareConfig:
    """Baseline and ETR on the model of `demo`, with a fifth of its tokens: one to two minutes.

    Args:
        out: folder of the comparison.
        seeds: each variant runs once with every seed.
    """
    config = demo(out, seeds)
    run = replace(
        config.run,
        data=replace(config.run.data, sequence_length=128, max_bytes_per_domain=1_000_000),
        steps=160,
        eval_every=80,
        eval_tokens_per_domain=4096,
        checkpoint_every=160,
    )
    return replace(config, variants=("baseline", "etr"), run=run)


def demo(out: str = "runs/demo-full", seeds: tuple[int, ...] = (0,)) -> CompareConfig:
    """Baseline, LocMoE, published ETR and ETR on a byte-level language model.

    Args:
        out: folder of the comparison.
        seeds: each variant runs once with every seed.
    """
    return CompareConfig(
        variants=("baseline", "locmoe", "etr_paper", "etr"),
        seeds=seeds,
        run=TrainConfig(
            out=out,
            data=DataConfig(sequence_length=256, batch_size=8),
            model=ModelConfig(
                hidden_size=128,
                num_layers=3,
                num_heads=4,
                num_key_value_heads=4,
                routing=RoutingOptions(num_experts=8, top_k=1, expert_size=256),
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
            steps=400,
            eval_every=100,
            eval_tokens_per_domain=8192,
            checkpoint_every=400,
            keep_checkpoints=1,
        ),
    )


def smoke(out: str = "runs/smoke") -> CompareConfig:
    """The whole path in seconds: for tests, not for conclusions."""
    return CompareConfig(
        variants=("baseline", "etr"),
        seeds=(0,),
        run=TrainConfig(
            out=out,
            data=DataConfig(sequence_length=32, batch_size=2, max_bytes_per_domain=60_000),
            model=ModelConfig(
                hidden_size=32,
                num_layers=1,
                num_heads=2,
                num_key_value_heads=2,
                routing=RoutingOptions(num_experts=4, top_k=1, expert_size=16),
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
            steps=12,
            eval_every=6,
            eval_tokens_per_domain=128,
            checkpoint_every=6,
        ),
    )
