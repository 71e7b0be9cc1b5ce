"""The models of the page of transforms, and what is done to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

SHRINK = (
    *(f"easy_ep:keep={share}" for share in (0.75, 0.5, 0.25)),
    *(f"heapr:ratio={share}" for share in (0.25, 0.5, 0.75)),
    *(f"heapr:ratio={share},score=activation" for share in (0.25, 0.5, 0.75)),
    *(f"mc_smoe:keep={share}" for share in (0.75, 0.5, 0.25)),
    *(f"mc_smoe:keep={share},align=false" for share in (0.75, 0.5, 0.25)),
    *(f"mc_smoe:keep=1,ratio={share},sparse=0" for share in (0.75, 0.5, 0.25)),
    *(f"flexmore:rank={rank}" for rank in (32, 8, 2)),
    *(f"compressed_experts:main={main}" for main in (3, 2, 1)),
    *(f"quantmoe:average={bits}" for bits in (3.5, 3, 2.5)),
    *(f"quantmoe:average={bits},score=block" for bits in (3.5, 3, 2.5)),
    *(f"quantmoe:low={bits},high={bits},average={bits}" for bits in (8, 4, 2)),
    *(f"edgemoe:tolerance={nats}" for nats in (0.01, 0.05, 0.2)),
    *(f"eaquant:bits={bits}" for bits in (8, 4, 2)),
    *(f"eaquant:bits={bits},smooth=false" for bits in (8, 4, 2)),
    *(f"d2moe:use={levels}" for levels in (3, 2, 1)),
    *(f"super_experts:median=0,silence={who}" for who in ("found", "random")),
)
"""For models of experts: three budgets where a method has them, with and without its idea."""
LARGE = tuple(text for text in SHRINK if "," not in text and not text.startswith("edgemoe"))
"""The same without what goes without an idea, and without what runs the text for each expert."""
GROW = tuple(f"expert_upcycling:factor={factor}" for factor in (2, 3, 4))
FROM_DENSE = (
    *(f"dynamic_dino:copies={copies}" for copies in (2, 4, 8)),
    *(f"read_me:keep={share}" for share in (0.75, 0.5, 0.25)),
)
FROM_VERSIONS = tuple(f"made_it:share={share}" for share in (0.1, 0.25, 0.5))
HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
STEPS, TUNING_STEPS = 160, 40
LENGTH = 128
"""Of rows, as in the demo."""
TUNED_ON = ("python", "cpp", "docs", "math", "arithmetic", "english", "python", "arithmetic")
"""Domains of the versions; two come twice."""


class MissingError(ValueError):
    """A model cannot be made here."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of the page."""

    about: str
    """What it is, in Markdown."""
    make: Callable[[Path], None]
    """Writes it into a folder, or goes on where it stopped; MissingError where it cannot."""
    folder: str = ""
    """Where it then is in that folder."""
    base: str = ""
    """Folder beside it of the model whose loss and time are compared with; itself by default."""
    methods: tuple[str, ...] = SHRINK
    """What is done to it."""
    text: str = "builtin"
    """Its text: "builtin", or a file in that folder."""


def demo(out: Path) -> None:
    """The baseline of the demo, on more of the same text."""
    from etr.recipes.downstream import run_etr

    run_etr(["train", "--router", "baseline", "--steps", str(STEPS), "--sequence-length",
             str(LENGTH), "--checkpoint-every", str(STEPS), "--eval-every", str(STEPS),
             "--no-diagnostics", "--device", "cpu", "--auto-resume",
             "--out", str(out)])  # fmt: skip


def qwen3_moe(out: Path) -> None:
    """A Qwen3-MoE of transformers, trained in transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True}
    more = {"head_dim": 32, "output_router_logits": True, "router_aux_loss_coef": 0.01}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**common(), **sizes, **experts, **more)
    save(trained(Qwen3MoeForCausalLM(config), STEPS), out)


def dense(out: Path) -> None:
    """A dense Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**common(), hidden_size=128, intermediate_size=256)
    save(trained(LlamaForCausalLM(config), STEPS), out)


def versions(out: Path) -> None:
    """A Mixtral whose expert 0 is a dense Llama's feed-forward, and the others that, tuned.

    Its router says nothing; `made_it` makes one.
    """
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    from etr.pretrained import from_local

    base = out.with_name("dense")
    if not (base / "config.json").is_file():
        dense(base)
    state = from_local(AutoModelForCausalLM, base).state_dict()
    states = [state]
    for seed, domain in enumerate(TUNED_ON):
        model = from_local(AutoModelForCausalLM, base)
        for name, value in model.named_parameters():
            value.requires_grad_(".mlp." in name)
        tuned = trained(model, TUNING_STEPS, f"builtin:{domain}", seed=seed, rate=1e-3)
        states.append(tuned.state_dict())
    experts = {"num_local_experts": len(states), "num_experts_per_tok": 2, "sliding_window": None}
    config = MixtralConfig(**common(), **experts, hidden_size=128, intermediate_size=256)
    model = MixtralForCausalLM(config)
    model.load_state_dict(of_versions(states))
    save(model, out)


def of_versions(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of a Mixtral whose experts are the feed-forwards of Llamas, alike in all else."""
    found = {name: value for name, value in states[0].items() if ".mlp." not in name}
    hidden_size = found["model.norm.weight"].shape[0]
    for name in states[0]:
        layer, _, rest = name.partition(".mlp.")
        if rest == "gate_proj.weight":
            both = [
                torch.cat([one[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
                for one in states
            ]
            down = [one[f"{layer}.mlp.down_proj.weight"] for one in states]
            found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
            found[f"{layer}.mlp.experts.down_proj"] = torch.stack(down)
            found[f"{layer}.mlp.gate.weight"] = torch.zeros(len(states), hidden_size)
    return found


def smollm2(out: Path) -> None:
    """SmolLM2-135M in copies, tuned on functions, as the page of it in downstream.md is made.

    Raises:
        MissingError: its package is not installed.
    """
    import json

    from etr.files import write_text
    from etr.recipes import downstream as recipe

    sizes = {"num_examples": 80, "steps": 20, "batch_size": 4, "sequence_length": 128}
    config = recipe.DownstreamConfig(teleqna="", out=str(out), num_experts=4, top_k=2, **sizes)
    base = out / recipe.BASE
    if not (base / "config.json").is_file():
        try:
            recipe.save_base(base)
        except ValueError as error:
            raise MissingError(str(error)) from error
    for name, rows in (
        ("instructions.jsonl", recipe.instructions(config.num_examples)),
        (recipe.HELD_OUT, recipe.other_functions()),
    ):
        write_text(out / name, "".join(json.dumps(row) + "\n" for row in rows))
    if not (out / "token_choice/config.json").is_file():
        recipe.run_etr(recipe.upcycle_words(config, "token_choice"))
    recipe.run_etr(recipe.sft_words(config, "token_choice"))


def common() -> dict[str, Any]:
    """Options of a tiny model of bytes, the same for every family."""
    from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "pad")}
    more = {"vocab_size": BYTE_VOCAB_SIZE, "initializer_range": 128**-0.5, "bos_token_id": None}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    tied = {"max_position_embeddings": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    return {**HEADS, **ids, **more, **rope, **tied}


def trained(
    model: Any, steps: int, text: str = "builtin", *, seed: int = 0, rate: float = 3e-3
) -> Any:
    """A model of transformers after so many batches of 8 rows; what takes no gradient stays.

    AdamW, 20 steps of warm-up, then linearly to a tenth, as `etr train` does by default.
    """
    from etr.cli._progress import track
    from etr.data import DataConfig, TokenLoader, open_data

    data = open_data(DataConfig(data=(text,)))
    loader: Iterable[Any] = TokenLoader(
        data.dataset, sequence_length=LENGTH, batch_size=8, seed=seed
    )
    values = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step, batch in enumerate(track(islice(loader, steps), "training", total=steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save(model: Any, out: Path) -> None:
    """The model and the tokenizer of bytes, as a folder that is there once it is whole."""
    from etr.data import byte_tokenizer
    from etr.files import whole_folder

    with whole_folder(out) as temporary:
        model.save_pretrained(temporary)
        byte_tokenizer().save_pretrained(temporary)
