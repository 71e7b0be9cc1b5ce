"""SCMoE: identities and the worked example; two caches are tests/hf/test_hf_decode.py's."""

from __future__ import annotations

import math

import pytest
import torch
from blocks import layer, route, same

from etr.model import DECODINGS
from etr.moe import RoutingContext
from etr.moe.context import Replay
from etr.moe.serving import SERVING

STRONG = torch.tensor([[[2.0, 1.8, 0.0, -2.0]]], dtype=torch.float64)
WEAK = torch.tensor([[[2.2, 0.5, 1.0, -3.0]]], dtype=torch.float64)


@pytest.mark.criterion
def test_identities_and_the_worked_example() -> None:
    """beta = 0 chooses the token that greedy decoding chooses; ranks 1 to k are the model's own
    routing bit for bit; strong logits 2, 1.8, 0, -2 and weak ones 2.2, .5, 1, -3 give 1.9, 2.45,
    -.5 and none, so token 1 and not 0 (alpha = 0.1, beta = 0.5)."""
    found = DECODINGS.parse("scmoe").combine([STRONG, WEAK])
    torch.testing.assert_close(found[0, 0], torch.tensor([1.9, 2.45, -0.5, -math.inf]).double())
    assert found.argmax(-1).item() == 1
    logits = torch.randn(5, 7, 11)
    for text in ("scmoe:beta=0", "scmoe:beta=0,alpha=1"):
        greedy = DECODINGS.parse(text).combine([logits, torch.randn(5, 7, 11)]).argmax(-1)
        assert torch.equal(greedy, logits.argmax(-1))
    for normalize in ("none", "chosen"):
        one, x = layer(top_k=3, normalize=normalize), torch.randn(16, 16, dtype=torch.float64)
        assert same(route(one, x, "ranks:count=3"), route(one, x, "dropless"))


def test_a_weak_pass_that_is_the_strong_one_changes_nothing_but_the_mask() -> None:
    found = DECODINGS.parse("scmoe").combine([STRONG, STRONG])
    torch.testing.assert_close(found[found.isfinite()], STRONG[found.isfinite()])


def test_one_rank_has_weight_one() -> None:
    """Also below the k best, and the last one where there are not so many."""
    one, x = layer(4, normalize="none"), torch.randn(16, 16, dtype=torch.float64)
    routing = route(one, x, "dropless")
    assert routing.probs is not None
    order = routing.probs.argsort(-1, descending=True)
    for first, place in ((0, 0), (1, 1), (3, 3), (9, 3)):
        found = route(one, x, f"ranks:first={first}")
        assert torch.equal(found.expert, order[:, place])
        assert torch.equal(one.keep(found).selection.combine_weight, torch.ones(16).double())


def test_recorded_choices_win() -> None:
    one, x = layer(4), torch.randn(3, 16, dtype=torch.float64)
    recorded = {0: Replay(expert=torch.tensor([[3, 1], [0, 2], [1, 0]]))}
    for serving in ("ranks:first=1", "dmoe", "dynamic_sharing"):
        routing = one.route(x, RoutingContext(serving=serving, replay=recorded))[0]
        assert torch.equal(routing.expert.view(3, 2), recorded[0].expert)


@pytest.mark.parametrize("option", ["beta=-1", "alpha=0", "alpha=2", "rank=0"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        DECODINGS.parse(f"scmoe:{option}")
    for text in ("ranks:first=-1", "ranks:count=0"):
        with pytest.raises(ValueError, match=text.partition(":")[2].partition("=")[0]):
            SERVING.parse(text)
