"""Traces of a model while it fills blocks, against the same text run anew without a cache."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig

from etr.data import byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.hf.fill import fill
from etr.hf.offload import Offload, banks, begin_step, load_offloaded, usage
from etr.methods.tide import exchanged
from etr.model import UNMASKINGS, BlockDiffusion
from etr.model.block_diffusion import two_streams
from etr.moe import RoutingContext
from etr.systems import CACHES, counts_of_passes, replay
from etr.trace import Trace, read_trace
from etr.trace.recorder import RoutingRecorder
from etr.trace.steps import NO_STEP, record_fill

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
BLOCK, MASK = 4, 259
OBJECTIVE = BlockDiffusion(block=BLOCK, mask=MASK)
HALVES = UNMASKINGS.parse("quota:steps=2,threshold=1")
"""Two masks of four in a step, or one of two."""


@functools.cache
def model() -> EtrForCausalLM:
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=12,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    config = EtrConfig.from_base(base, "token_choice", capacity="none")
    return EtrForCausalLM(config).double().eval()


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(256, (rows, length))


def recorded(path: Path, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """What was written, and its trace."""
    options = {"max_new_tokens": 8, "unmasking": HALVES, **options}
    text = record_fill(model(), OBJECTIVE, ids, mask, path=path, **options)
    return text, read_trace(path)


def columns(trace: Trace, layer: int = 0) -> list[tuple[int, int, int, int, int]]:
    rows = trace.layer(layer)
    names = ("sequence", "position", "block", "step", "token_id")
    return list(zip(*(getattr(rows, name).tolist() for name in names), strict=True))


def test_every_pass_by_hand(tmp_path: Path) -> None:
    """Nine tokens are two blocks and a token of the third; eight more end in the fifth."""
    ids = prompts(1, 9)
    text, trace = recorded(tmp_path / "t", ids)
    assert torch.equal(text, fill(model(), OBJECTIVE, ids, max_new_tokens=8, unmasking=HALVES))
    assert trace.info.columns == ("block", "step")
    passes = [
        *[(NO_STEP, range(8)), (0, range(8, 12)), (1, range(8, 12)), (NO_STEP, range(8, 12))],
        *[(0, range(12, 16)), (1, range(12, 16)), (NO_STEP, range(12, 16))],
        *[(0, range(16, 20)), (1, range(16, 20))],
    ]
    wanted = [(0, p, p // BLOCK, step) for step, places in passes for p in places]
    for layer in (0, 1):
        assert [row[:4] for row in columns(trace, layer)] == wanted
    rows = columns(trace)
    final = dict(enumerate(text[0].tolist()))
    for _, place, _, step, token in rows:
        if step == NO_STEP or place < 9:
            assert token == final[place]
        elif step == 0:
            assert token == MASK
        elif place < 17:  # the last block goes on to where nobody looks
            assert token in (MASK, final[place])
    hidden = [sum(r[4] == MASK and r[2:4] == (block, 1) for r in rows) for block in (2, 3, 4)]
    assert hidden == [1, 2, 2]  # of three, four and four that were masks


def anew(tokens: Tensor, clean: Tensor) -> Any:
    """Routing of a row and of its clean half, all positions at once; [layer][half, position]."""
    length = tokens.shape[1]
    sees = two_streams(torch.arange(length) // BLOCK)
    hides = torch.zeros(sees.shape).double().masked_fill(~sees, -1e300)[None, None]
    both = torch.cat([tokens, clean], 1)
    with torch.no_grad(), RoutingRecorder(model()) as recorder:
        model()(
            input_ids=both,
            attention_mask=hides,
            position_ids=torch.arange(length).repeat(2)[None],
            routing_context=RoutingContext(block=torch.arange(2 * length)[None] // BLOCK),
        )
        found = recorder.take(torch.ones_like(both, dtype=torch.bool))
    return [(one.experts.reshape(2, length, 2), one.weights.reshape(2, length, 2)) for one in found]


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("name", list(UNMASKINGS))
def test_a_full_rerun_of_each_pass_routes_the_same(length: int, name: str, tmp_path: Path) -> None:
    """Without a cache: the halves of training, the noised one with the block as it stood then."""
    ids, policy = prompts(1, length), UNMASKINGS.parse(name)
    _, trace = recorded(tmp_path / "t", ids, unmasking=policy)
    first, layers = trace.layer(0), [trace.layer(index) for index in (0, 1)]
    row = torch.full((1, (length + 8 + 3) // BLOCK * BLOCK), MASK)
    change = np.flatnonzero(np.diff(first.step, prepend=-9))
    steps = []
    for part in np.split(np.arange(len(first.step)), change[1:]):
        places = first.position[part]
        row[0, places] = torch.from_numpy(first.token_id[part].astype(int))
        steps.append(int(first.step[part[0]]))
        half = int(steps[-1] == NO_STEP)
        for layer, (experts, weights) in zip(layers, anew(row, row), strict=True):
            np.testing.assert_array_equal(layer.experts[part], experts[half, places])
            np.testing.assert_allclose(layer.weights[part], weights[half, places], rtol=1e-5)
    for before, now in itertools.pairwise(steps):
        assert now == before + 1 or (now == NO_STEP and before >= 0)


def test_rows_of_a_batch_are_sequences_whose_blocks_count_from_their_first_token(tmp_path) -> None:
    lengths, ids = (3, 11, 6), prompts(3, 11)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : 11 - length] = 0
    text, trace = recorded(tmp_path / "t", ids, mask)
    rows = columns(trace)
    assert all(block == position // BLOCK for _, position, block, _, _ in rows)
    for sequence, length in enumerate(lengths):
        alone, other = recorded(tmp_path / f"{sequence}", ids[sequence, None, -length:])
        assert torch.equal(alone[0], text[sequence, -length - 8 :])
        own = [row[1:] for row in columns(other)]
        # A row that is done with a block or its text waits for the others, in further passes.
        asked = {(block, step) for _, block, step, _ in own}
        mine = [i for i, row in enumerate(rows) if row[0] == sequence and row[2:4] in asked]
        assert [rows[i][1:] for i in mine] == own
        np.testing.assert_array_equal(trace.layer(1).experts[mine], other.layer(1).experts)
    passes = np.flatnonzero(np.diff(trace.step, prepend=-9))
    for part in np.split(np.arange(trace.num_tokens), passes[1:]):
        order = [rows[i][:2] for i in part]
        assert order == sorted(set(order))


POLICIES = [name for name, kind in CACHES.items() if not (kind.foresees or kind.predicts)]


@pytest.mark.parametrize("name", [*POLICIES, "tide:every=1", "tide:every=3"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_replay_has_the_hits_of_the_model_that_wrote(rows: int, name: str, tmp_path) -> None:
    """With experts on disk; TIDE counts the pass into the cache as a step more, and so does it."""
    model().save_pretrained(tmp_path / "model")
    ids, size = prompts(rows, 9), 2
    offloaded = load_offloaded(tmp_path / "model", Offload(resident=size, cache=name))
    options = {"max_new_tokens": 12, "unmasking": UNMASKINGS.parse("quota:steps=4,threshold=1")}
    text = record_fill(
        offloaded,
        OBJECTIVE,
        ids,
        path=tmp_path / "t",
        on_step=functools.partial(begin_step, offloaded),
        **options,
    )
    assert torch.equal(text, fill(load_pretrained(tmp_path / "model"), OBJECTIVE, ids, **options))
    trace = read_trace(tmp_path / "t")
    choices, step = torch.from_numpy(trace.choices(kept=True)[0]), torch.tensor(trace.step)
    found = replay(choices, CACHES.parse(name), size, num_experts=6, step=step)
    assert found == usage(offloaded)
    assert found.loads > 2 * size * (not name.startswith("tide"))
    if name.startswith("tide"):
        counts, steps = counts_of_passes(choices, step, 6)
        every = CACHES.parse(name).every
        moves = [exchanged(layer, steps, size, every).moves for layer in counts]
        assert moves == [bank.memory.loads for _, bank in banks(offloaded)]


def test_text_and_the_end_of_a_recording(tmp_path: Path) -> None:
    tokenizer, ids = byte_tokenizer(), prompts(1, 5) % 128
    options = {"tokenizer": tokenizer, "source": "here", "domain": "mine"}
    _, trace = recorded(tmp_path / "t", ids, **options)
    assert (trace.info.source, trace.domains) == ("here", ("mine",))
    assert trace.rows(0)["text"].to_pylist()[:4] == [chr(i) for i in ids[0, :4].tolist()]
    _, plain = recorded(tmp_path / "p", ids)
    assert plain.table["text"].null_count == plain.table.num_rows
    before = (tmp_path / "t").read_bytes()
    for bad in ({"max_new_tokens": 0}, {"unmasking": None}):
        with pytest.raises((ValueError, AttributeError)):
            recorded(tmp_path / "t", ids, **bad)
    assert (tmp_path / "t").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "t"]
    assert not model()._forward_hooks
    assert not any(layer.mlp.watchers for layer in model().model.layers)
