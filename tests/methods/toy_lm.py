"""A small language model on text of four kinds, and what transforms make of it."""

from __future__ import annotations

import copy
import functools
import json
import os
import pydoc_data.topics
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from etr.data import Batch
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.hf.convert import TransformReport
from etr.hf.transform import transform
from etr.model import Causal, Transform
from etr.model.objective import IGNORED
from etr.train.briefly import train_briefly
from etr.train.config import OptimizerConfig
from etr.train.teach import Imitation, experts_alone

VOCAB, LENGTH, BATCH = 128, 64, 16
CODE = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "textwrap.py")


def small(seed: int = 0, **sizes: Any) -> EtrForCausalLM:
    """An untrained model, float64: H 16, I 12, two layers, 4 experts, top 2, or as told."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 4}
    return model_of(**{**given, **sizes}).double().eval()


def model_of(
    router: str = "token_choice", experts: Any = "uniform", **sizes: Any
) -> EtrForCausalLM:
    """Two layers of 8 experts of width 48, H 48, four heads, top 2, nothing dropped."""
    given: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    }
    base = MixtralConfig(**{**given, **sizes})
    options = {"capacity": "none", "losses": "balance:weight=0.01", "experts": experts}
    return EtrForCausalLM(EtrConfig.from_base(base, router, **options))


def tokens(count: int = 4, length: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Two batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(VOCAB, (count, length), generator=generator)} for _ in range(2)
    ]


def save(model: EtrForCausalLM, folder: Path) -> Path:
    """A folder of the model."""
    model.save_pretrained(folder)
    return folder


def family(folder: Path) -> Path:
    """A folder of transformers' own: the sizes of `small`, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small().config.base_config)
    model.save_pretrained(folder)
    return folder


def made(
    source: Path, target: Path, method: Transform, **options: Any
) -> tuple[EtrForCausalLM, TransformReport]:
    """What a method makes of a folder, loaded, and the report."""
    report = transform(source, target, method, **options)
    return load_pretrained(target).eval(), report


def plan_in(folder: Path) -> Any:
    """The plan that a folder was made by."""
    return json.loads((folder / "transform.json").read_text())["plan"]


def same_weights(first: EtrForCausalLM, second: EtrForCausalLM) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@functools.cache
def corpus(size: int = 120_000) -> list[tuple[Tensor, Tensor]]:
    """Code, English, sums and JSON as bytes: what trains, and the last tenth, of each."""
    rng = random.Random(0)
    library = Path(os.__file__).parent
    code = "".join((library / name).read_text(errors="ignore") for name in CODE)
    english = "".join(pydoc_data.topics.topics.values())
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(size // 2)]
    sums = "".join(f"{a}+{b}={a + b};" for a, b in pairs)
    rows = [
        {
            "id": rng.randrange(9999),
            "ok": rng.random() < 0.5,
            "tag": rng.choice(["alpha", "beta", "gamma"]),
            "xs": [rng.randrange(99) for _ in range(3)],
        }
        for _ in range(size // 40)
    ]
    found = []
    for text in (code, english, sums, "".join(json.dumps(row) + "\n" for row in rows)):
        data = torch.tensor(list(text.encode("ascii", "ignore")[:size]))
        cut = int(0.9 * len(data))
        found.append((data[:cut], data[cut:]))
    return found


def batch(generator: torch.Generator, split: int = 0, kind: int | None = None) -> Tensor:
    """Rows of all kinds in turn, or of one, [BATCH, LENGTH]."""
    rows = []
    for row in range(BATCH):
        text = corpus()[row % 4 if kind is None else kind][split]
        start = int(torch.randint(len(text) - LENGTH, (1,), generator=generator))
        rows.append(text[start : start + LENGTH])
    return torch.stack(rows)


def train(
    model: EtrForCausalLM,
    steps: int,
    rate: float = 3e-3,
    kind: int | None = None,
    parameters: Iterable[Tensor] | None = None,
) -> EtrForCausalLM:
    """AdamW without decay, 20 steps of warm-up, then linearly to a tenth."""
    optimizer = torch.optim.AdamW(
        model.parameters() if parameters is None else parameters, lr=rate, weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        ids = batch(generator, kind=kind)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()
    return model.eval()


def teach(
    model: EtrForCausalLM, teacher: EtrForCausalLM, steps: int, rate: float = 1e-2
) -> EtrForCausalLM:
    """Train the experts of a model to predict as another does, on what was trained on."""
    batches = []
    for ids in (given["input_ids"] for given in text(steps)):
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        place = torch.arange(ids.shape[1]).expand_as(ids)
        batches.append(
            Batch(input_ids=ids, labels=labels, domain=ids.new_zeros(len(ids)), position=place)
        )
    config = OptimizerConfig(learning_rate=rate, weight_decay=0.0)
    with experts_alone(model):
        train_briefly(model, batches, config, Imitation(teacher, Causal()))
    return model


@torch.no_grad()
def loss(model: EtrForCausalLM, batches: int = 12, kind: int | None = None) -> float:
    """Held-out loss, nats a token."""
    generator = torch.Generator().manual_seed(1)
    found = 0.0
    for _ in range(batches):
        ids = batch(generator, split=1, kind=kind)
        found += float(model(input_ids=ids, labels=ids).loss)
    return found / batches


def text(count: int) -> list[dict[str, Tensor]]:
    """Batches of what was trained on."""
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": batch(generator)} for _ in range(count)]


@functools.cache
def _trained(top_k: int) -> EtrForCausalLM:
    torch.manual_seed(0)
    return train(model_of(num_experts_per_tok=top_k), 600)


def trained(top_k: int = 2) -> EtrForCausalLM:
    """The model of `model_of` after 600 steps; a copy."""
    return copy.deepcopy(_trained(top_k))
