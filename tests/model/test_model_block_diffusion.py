"""Block diffusion's examples: what is masked, what it weighs, who sees whom."""

from __future__ import annotations

import pytest
import torch

from etr.model import BlockDiffusion, Text
from etr.model.block_diffusion import two_streams
from etr.model.objective import IGNORED, draws

MASK = 16


def a_text(rows: int = 4, length: int = 12) -> Text:
    ids = torch.randint(MASK, (rows, length), generator=draws("text"))
    following = ids.roll(-1, 1)
    return Text(ids=ids, following=following)


def test_noised_places_of_a_block_weigh_one_over_its_time() -> None:
    text = a_text(200)
    example = BlockDiffusion(block=4, mask=MASK).example(text, draws(0))
    noised, clean = example.input_ids.split(12, 1)
    assert torch.equal(clean, text.ids)
    hidden = noised == MASK
    assert torch.equal(noised[~hidden], text.ids[~hidden])
    labels, nothing = example.labels.split(12, 1)
    assert torch.equal(labels, text.ids.masked_fill(~hidden, IGNORED))
    assert (nothing == IGNORED).all()
    weight, rest = example.weight.split(12, 1)
    assert (rest == 0).all()
    assert (weight[~hidden] == 0).all()
    of_block, there = weight.view(200, 3, 4), hidden.view(200, 3, 4)
    times = torch.where(there, of_block, torch.nan).nanmedian(-1).values
    assert torch.equal(of_block, torch.where(there, times[..., None], 0.0))
    times = 1 / times[times.isfinite()]
    assert (times >= 0.02).all()
    assert (times <= 1).all()
    # The weights of a token average 1, or the bound would be none (600 blocks).
    assert abs(float(weight.mean()) - 1) < 0.1
    assert example.counted.sum(1).tolist() == [12] * 200
    share = there.float().mean(-1).repeat_interleave(4, 1)
    torch.testing.assert_close(example.time, torch.cat([share, torch.zeros_like(share)], 1))


def test_blocks_of_halves_and_rows_are_routing_blocks_of_their_own() -> None:
    example = BlockDiffusion(block=4, mask=MASK).example(a_text(2, 10), draws(0))
    assert example.block[0].tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [6] * 4 + [7] * 4 + [8] * 2
    assert not set(example.block[0].tolist()) & set(example.block[1].tolist())
    assert len(example.block.unique()) == 12
    context = example.arguments()["routing_context"]
    assert context.block is example.block
    assert context.time is example.time


def test_who_sees_whom() -> None:
    wanted = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 0, 1, 1, 1, 1],
        ]
    )
    assert torch.equal(two_streams(torch.arange(4) // 2), wanted.bool())
    example = BlockDiffusion(block=2, mask=MASK).example(a_text(1, 4), draws(0))
    assert torch.equal(example.attention[0], wanted.bool())
    assert example.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


def test_one_block_a_row_is_one_stream_and_time_can_be_what_was_drawn() -> None:
    """EC-DLM's form: one token is masked at least, and the weight is what the draw came to."""
    text = a_text(300, 6)
    example = BlockDiffusion(block=6, mask=MASK, recount=True).example(text, draws(1))
    assert example.input_ids.shape == (300, 6)
    assert example.attention.all()
    hidden = example.labels != IGNORED
    count = hidden.sum(1)
    assert count.min() == 1  # times of .02 mask no token of six in most draws
    torch.testing.assert_close(example.time, (count / 6)[:, None].expand(300, 6))
    torch.testing.assert_close(example.weight, hidden * (6 / count)[:, None])


def test_padding_and_what_begins_documents_is_not_asked() -> None:
    text = a_text(2, 8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 5:], text.following[0, 4:] = False, IGNORED
    text.following[1, 2] = IGNORED  # token 3 begins a document
    text = Text(ids=text.ids, following=text.following, valid=valid)
    example = BlockDiffusion(block=4, least=1, mask=MASK).example(text, draws(0))
    hidden = example.input_ids[:, :8] == MASK
    assert hidden.tolist() == [[True] * 5 + [False] * 3, [True] * 3 + [False] + [True] * 4]
    assert torch.equal(example.counted[:, :8], hidden)
    assert torch.equal(example.valid, torch.cat([valid, valid], 1))
    assert not example.attention[0, :5, 5:8].any()  # nobody sees padding
    assert example.attention[0].any(-1).all()  # which sees itself
    assert example.time[1, :8].tolist() == [0.75] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("options", "names"),
    [({"block": 0}, "block=0"), ({"least": 0.0}, "least=0.0"), ({"mask": -1}, "mask=-1")],
)
def test_options_are_checked(options, names) -> None:
    with pytest.raises(ValueError, match=names):
        BlockDiffusion(**options)


def test_a_mask_comes_from_the_option_before_the_tokenizer() -> None:
    assert BlockDiffusion(mask=3).masked_by(5).mask_id == 3
    assert BlockDiffusion().masked_by(5).mask_id == 5
    with pytest.raises(ValueError, match="has no mask token"):
        BlockDiffusion().masked_by(None).example(a_text(), draws(0))


def test_thresholds_do_not_serve_it() -> None:
    assert BlockDiffusion().served_by("threshold")[0] == "dropless"
    assert BlockDiffusion().served_by("dmoe:tau=0.5") == ("dmoe:tau=0.5", None)
