"""Decodings on their own: what `combine` must hold to."""

from __future__ import annotations

import pytest
import torch

from etr.model import DECODINGS
from etr.table import config_to_dict


@pytest.mark.parametrize("name", DECODINGS)
def test_every_decoding_treats_each_place_by_itself(name):
    """One token at a time, and any part of a batch, equal the whole."""
    decoding = DECODINGS.parse(name)
    assert DECODINGS.from_dict(config_to_dict(decoding)) == decoding
    assert decoding.branches
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 5, 11, generator=generator) for _ in decoding.branches]
    whole = decoding.combine(logits)
    assert whole.shape == (3, 5, 11)
    for place in range(5):
        one = decoding.combine([x[1:2, place : place + 1] for x in logits])
        assert torch.equal(one[0, 0], whole[1, place])


def test_plain_is_the_models_own():
    logits = torch.randn(2, 1, 7)
    assert DECODINGS.parse("plain").combine([logits]) is logits
