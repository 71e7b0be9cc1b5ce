"""Prefill and decode of a whole language model, against transformers' own on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import TOLERANCE, row_error
from benchmarks.measures.steps import OnNote, reason_of, run_rounds
from benchmarks.results import Row
from benchmarks.rounds import Seconds, now
from benchmarks.settings import Settings
from etr.hf.versions import CACHE

HF = "transformers grouped_mm"
SAME, OWN = "etr, linear router", "etr, its own router"
NUM_LAYERS, VOCAB_SIZE, PAST = 2, 1024, 128
"""Layers and vocabulary of the models; tokens in the cache before a decoding step."""


def measure_generate(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of transformers' model, of ours with its weights, and of ours with its own router.

    Nothing is dropped. `prefill` is one sequence of T tokens, `decode` one token of each of T
    sequences with 128 tokens in their caches, and `compiled decode` the same as one graph with a
    static cache; on a CUDA device it runs as a CUDA graph.
    """
    models, wrong = build_models(case, settings.device)
    torch._dynamo.reset()  # of earlier cases; those of one case stay compiled side by side
    ids = torch.randint(VOCAB_SIZE, (case.num_tokens, PAST + 1), device=settings.device)
    run = RUNS[case.label]
    refused = {SAME: f"failed its check: logits differ by {wrong:.2g}"} if wrong else {}
    steps: dict[str, Callable[[], Seconds]] = {}
    for name, model in models.items():
        if name not in refused:
            on_note(f"preparing {name}")
            try:
                steps[name] = run(model, ids)
            except Exception as error:  # whatever a compiler raises is the row's reason
                refused[name] = reason_of(error)
    found = run_rounds(steps, case.budget, on_note)
    return [
        Row(
            system=name,
            kind="rival" if name == HF else "ours",
            default=name == OWN,
            seconds=found.get(name, {}),
            refused=refused.get(name, ""),
        )
        for name in models
    ]


def build_models(case: Case, device: torch.device) -> tuple[dict[str, Any], float]:
    """The models in eval mode, and by how much the logits of the two that share weights differ.

    The difference is 0 where it is within what the order of sums explains. It is measured in
    float32: in half precision the routers round at other places.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    from etr.hf import EtrConfig, EtrForCausalLM

    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    base._experts_implementation = "grouped_mm"
    theirs: Any = MixtralForCausalLM(copy.deepcopy(base)).eval()
    # Mixtral's weights sum to 1 over the chosen experts, for one expert too.
    options: dict[str, Any] = {"capacity": "none", "eval_selection": "dropless"}
    same: Any = EtrForCausalLM(EtrConfig.from_base(base, "token_choice", **options)).eval()
    weights = {k.replace(".mlp.gate.", ".mlp.router."): v for k, v in theirs.state_dict().items()}
    same.load_state_dict({**same.state_dict(), **weights})
    own: Any = EtrForCausalLM(EtrConfig.from_base(base, "etr", **options)).eval()
    ids = torch.randint(VOCAB_SIZE, (1, 64))
    with torch.no_grad():
        error = row_error(same(ids).logits[0], theirs(ids).logits[0])
    dtype = getattr(torch, case.dtype)
    models = {name: m.to(device, dtype) for name, m in ((HF, theirs), (SAME, same), (OWN, own))}
    return models, error if error > TOLERANCE[torch.float32] else 0.0


def prefill(model: Any, ids: Tensor) -> Callable[[], Seconds]:
    """One sequence as long as `ids` has rows, with an empty cache that is filled."""
    prompt = ids[None, :, 0]
    return partial(timed, lambda: model(prompt, use_cache=True, logits_to_keep=1), ids.device)


def decode(model: Any, ids: Tensor) -> Callable[[], Seconds]:
    """One token for each row of `ids`; the cache is cut back after the clock has stopped."""
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1)[CACHE]
    step = partial(timed, lambda: model(ids[:, -1:], **{CACHE: cache}, use_cache=True), ids.device)
    return partial(cut_back, step, lambda: cache.crop(-1))


def compiled_decode(model: Any, ids: Tensor) -> Callable[[], Seconds]:
    """`decode` as one graph; compiled, and compared with the model as it is, before it is timed.

    Raises:
        RuntimeError: the graph computes something else.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=PAST + 1)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")

    def call(run: Any) -> Any:
        return run(ids[:, -1:], **{CACHE: cache}, use_cache=True).logits

    def crop() -> None:
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)

    with torch.no_grad():
        model(ids[:, :-1], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        logits = []
        for run in (model, compiled):
            logits.append(call(run).flatten(0, 1).clone())
            crop()
    error = row_error(logits[1], logits[0].float())
    if error > TOLERANCE[logits[0].dtype]:
        raise RuntimeError(f"compiled logits differ by {error:.2g}")
    return partial(cut_back, partial(timed, lambda: call(compiled), ids.device), crop)


def cut_back(step: Callable[[], Seconds], crop: Callable[[], None]) -> Seconds:
    """A timed step, after which the cache is as it was."""
    seconds = step()
    crop()
    return seconds


RUNS = {"prefill": prefill, "decode": decode, "compiled decode": compiled_decode}


@torch.no_grad()
def timed(call: Callable[[], Any], device: torch.device) -> Seconds:
    """Seconds of one forward."""
    began = now(device)
    call()
    return {"forward": now(device) - began}
