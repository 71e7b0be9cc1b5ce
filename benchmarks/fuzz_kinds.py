"""The files that are damaged: how a whole folder is made, and how the verbs read it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.fuzz import Kind, OtherWeights
from benchmarks.fuzz_mutations import (
    damage_bytes,
    damage_header,
    damage_json,
    damage_json_or_bytes,
    damage_lines,
)
from etr.cli import main
from etr.cli._of_run import parse_training
from etr.data import (
    BYTE_VOCAB_SIZE,
    DataConfig,
    OpenedData,
    byte_tokenizer,
    load_tokenizer,
    open_data,
)
from etr.files import read_json
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.hf.loading import load_causal
from etr.parallel import Ranks, manifest
from etr.report import load_report, terminal_table
from etr.report.dashboard import dashboard
from etr.report.live import LiveRun
from etr.trace import read_trace, segment_routing_best_performance
from etr.train import CompareConfig, ModelConfig, RoutingOptions, TrainConfig, compare
from etr.train.alarms import Alarms
from etr.train.checkpoint_folder import find_model
from etr.train.loop import Trainer
from etr.train.metrics import read_metrics
from etr.train.recorder import Recorder

EVIL = "open('ran', 'w')\nclass X:\n    from_pretrained = None\n"
"""A module of a folder that leaves a mark when it is run."""


def _new_folder() -> Path:
    """A folder that is removed when this process ends."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="fuzz-"))
    return Path(_FOLDERS[-1].name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _models() -> Path:
    """A folder with the models that kinds copy: ours, ours in shards, and a Mixtral."""
    folder = _new_folder()
    torch.manual_seed(0)
    sizes = {"vocab_size": BYTE_VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    base = MixtralConfig(num_local_experts=4, **sizes, **heads)
    model = EtrForCausalLM(EtrConfig.from_base(base, router="etr"))
    model.save_pretrained(folder / "ours")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    MixtralForCausalLM(base).save_pretrained(folder / "mixtral")
    for path in folder.iterdir():
        byte_tokenizer().save_pretrained(path)
        (path / "evil.py").write_text(EVIL)
    return folder


def _model(name: str, folder: Path) -> None:
    shutil.copytree(_models() / name, folder)


def _weights(folder: Path) -> dict[str, Tensor]:
    model = load_pretrained(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _weights_of_any(folder: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_causal(folder).state_dict().items()}


def _tokens(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("a b é ü", add_special_tokens=False)["input_ids"]
    return [list(ids), tokenizer.decode(ids), tokenizer.eos_token_id, tokenizer.pad_token_id]


def _damage_tokenizer(content: bytes, stream: random.Random) -> bytes:
    """Also such that code of the folder should run."""
    if stream.random() < 0.3:
        names = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["evil.X", "evil.X"]}}
        return json.dumps(json.loads(content) | names).encode()
    return damage_json_or_bytes(content, stream)


def _damage_config(content: bytes, stream: random.Random) -> bytes:
    if stream.random() < 0.1:
        names = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.X")}
        more = {"model_type": stream.choice(("x", "etr", "mixtral"))}
        return json.dumps(json.loads(content) | names | more).encode()
    return damage_json_or_bytes(content, stream)


@functools.cache
def _runs() -> Path:
    """A folder with a text and a comparison, whose runs have two checkpoints each, and a trace."""
    folder = _new_folder()
    (folder / "text").mkdir()
    for number in range(20):
        words = " ".join(str(number * i % 7) for i in range(200))
        (folder / "text" / f"{number}.txt").write_text(words)
    with contextlib.chdir(folder):
        compare(_comparison())
        main(["trace", str(RUN), "--max-tokens", "64"])
    return folder


def _comparison() -> CompareConfig:
    routing = RoutingOptions(num_experts=4, expert_size=16)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 2}
    run = TrainConfig(
        out="runs",
        data=DataConfig(data=("text",), sequence_length=16, batch_size=4, cache_dir="cache"),
        model=ModelConfig(routing=routing, **sizes),
        steps=4,
        eval_every=2,
        eval_tokens_per_domain=32,
        checkpoint_every=2,
        device="cpu",
        profile_every=None,
    )
    return CompareConfig(variants=("baseline", "etr"), run=run)


def _run(folder: Path) -> None:
    shutil.copytree(_runs(), folder)


def _options(folder: Path) -> Any:
    """Options with which the run would go on, and what the report and the view say of it."""
    config = parse_training(["--resume", "--out", str(RUN)])
    return [config.to_dict(), _shown([RUN])]


def _shown(paths: list[Path]) -> str:
    """The table of a report and a frame of the view, as a terminal has them."""
    console = Console(file=io.StringIO(), width=120, record=True)
    for part in load_report(paths).parts:
        console.print(terminal_table(part.results))
    live = LiveRun(folder=RUN)
    live.poll()
    console.print(dashboard([live], live, now=0.0, width=100, height=40))
    return console.export_text()


def _rows(folder: Path) -> Any:
    """Rows that a resumed run finds, and what the report and the view show."""
    recorder = Recorder(RUN, 4, Alarms({"aux": 0.01}), ())
    recorder.close()
    return [len(read_metrics(RUN / "metrics.jsonl")), _shown([RUN])]


def _compared(folder: Path) -> Any:
    """What a comparison that is finished already gives, and its report."""
    shown = _shown([Path("runs"), RUN])
    results = compare(_comparison())
    assert results is not None
    return [shown, results["rows"]]


def _gone_on(folder: Path) -> str:
    """The checkpoint that a run goes on from; its weights are those that it was written with."""
    config = TrainConfig.from_dict(read_json(_runs() / RUN / "config.json"))
    config = dataclasses.replace(config, out=str(RUN), auto_resume=False, resume=True)
    with Trainer(config, _text()) as trainer:
        saved = trainer.saver.saved
        assert saved is not None
        whole = load_file(_runs() / RUN / "checkpoints" / saved.name / "model.safetensors")
        state = trainer.model.state_dict()
        if any(not torch.equal(state[name], value) for name, value in whole.items()):
            raise OtherWeights(saved.name)
        return saved.name


@functools.cache
def _text() -> OpenedData:
    with contextlib.chdir(_runs()):
        return open_data(_comparison().run.data)


def _gone_on_restated(folder: Path) -> str:
    """As `_gone_on`, from files whose checksums somebody wrote anew."""
    checkpoint = RUN / "checkpoints" / "step-00000004"
    files = manifest.describe_files(checkpoint, Ranks(None))
    (checkpoint / manifest.NAME).write_text(json.dumps(files))
    return _gone_on(folder)


def _opened(folder: Path) -> dict[str, Tensor]:
    """The weights that a verb gets of a run."""
    return _weights(find_model(RUN))


def _traced(folder: Path) -> Any:
    trace = read_trace(RUN / "trace.parquet")
    found = []
    for number in range(trace.info.num_layers):
        layer = trace.layer(number)
        window = (layer.experts, layer.sequence, trace.info.num_experts, 4)
        found.append([layer.counts(trace.info.num_experts).tolist(), layer.kept.sum().item()])
        found.append(segment_routing_best_performance(*window))
    return [trace.domains, found]


RUN = Path("runs/etr-seed0")
MODELS = ("ours", "shards", "mixtral")


def _kinds() -> list[Kind]:
    newest = f"{RUN}/checkpoints/step-00000004"
    ours, shards, mixtral = (functools.partial(_model, name) for name in MODELS)
    either, config, tokens = damage_json_or_bytes, _damage_config, _damage_tokenizer
    weights, index = "model.safetensors", "model.safetensors.index.json"
    state, list_ = f"{newest}/train_state.json", f"{newest}/{manifest.NAME}"
    return [
        Kind("config.json", "config.json", config, _weights, ours, True),
        Kind("config.json of a Mixtral", "config.json", config, _weights_of_any, mixtral, True),
        Kind("generation_config.json", "generation_config.json", either, _weights, ours, True),
        Kind("tokenizer.json", "tokenizer.json", tokens, _tokens, ours),
        Kind("tokenizer_config.json", "tokenizer_config.json", tokens, _tokens, ours),
        Kind("index of shards", index, either, _weights, shards, True),
        Kind("header of safetensors", weights, damage_header, _weights, ours, True),
        Kind("weights of a run", f"{newest}/{weights}", damage_bytes, _opened, _run, True),
        Kind("manifest, resumed from", list_, either, _gone_on, _run),
        Kind("manifest, read by a verb", list_, either, _opened, _run, True),
        Kind("train_state.json", state, either, _gone_on, _run),
        Kind("train_state.json, listed anew", state, damage_json, _gone_on_restated, _run),
        Kind("config.json of a run", f"{RUN}/config.json", either, _options, _run),
        Kind("metrics.jsonl", f"{RUN}/metrics.jsonl", damage_lines, _rows, _run),
        Kind("row.json", f"{RUN}/row.json", either, _compared, _run),
        Kind("results.json", "runs/results.json", either, _compared, _run),
        Kind("trace.parquet", f"{RUN}/trace.parquet", damage_bytes, _traced, _run),
    ]


KINDS = {kind.name: kind for kind in _kinds()}
