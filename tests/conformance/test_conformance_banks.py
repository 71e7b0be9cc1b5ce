"""Every bank of the table: against the reference, counted as it says, saved, cached, in models."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cells import H, I, T, context, tokens, train_steps
from test_conformance_reference import compare

from etr.moe import BANKS, MoE, MoEConfig
from etr.moe.config import parse_capacity
from etr.moe.experts import BankConfig
from etr.moe.reference import expert_output
from etr.moe.routing import Limit, Routing
from etr.moe.select import select
from etr.moe.state import GlobalState
from etr.moe.table import config_to_dict

E = 4
TEXTS: dict[str, list[str]] = {
    "nulls": [
        "nulls:count=4",
        "nulls:count=4,weighed=true",
        "nulls:count=4,kind=copy",
        "nulls:count=4,kind=constant",
        "nulls:count=0",
    ],
    "widths": [
        "widths",
        "widths:widths=2x8+4+6",
        "widths:widths=3+5+7+9",
        "widths:widths=0+8+2x0",
        "widths:widths=4x0",
    ],
    "shared": ["shared", "shared:nulls", "shared:widths,layers=2"],
    "merged": ["merged", "merged:of=0+1+0+1", "merged:of=0+0+0+0"],
    "low_rank": ["low_rank", "low_rank:ranks=0+3+8+1", "low_rank:ranks=4x0"],
    "low_rank_rows": [
        "low_rank_rows",
        "low_rank_rows:rank=2,rows=3+0+5,of=0+1+0+1",
        "low_rank_rows:rank=0,left=0.5",
    ],
    "compressed": ["compressed", "compressed:main=2"],
    "nested": ["nested", "nested:base=1,levels=1", "nested:group=4,use=2"],
    "stand_in": ["stand_in", "stand_in:rank=1", "stand_in:rank=0"],
    "routed_bits": ["routed_bits", "routed_bits:use=2,alpha=0.1", "routed_bits:shares=0.3+0.4+0.3"],
    "packed": ["packed", "packed:bits=12x16", "packed:bits=2+4+8+16+8x4"],
}
"""What a bank of a name may be; its defaults alone where nothing is named."""
MADE = ("merged", "low_rank", "packed", "nested", "compressed", "routed_bits", "low_rank_rows")
"""Banks that make weights of what they store, or do not run all choices."""
HERE = [text for name in BANKS for text in TEXTS.get(name, [name])]
ROUTERS = ("token_choice", "etr", "expert_choice")


def bank_of(text: str) -> BankConfig:
    return BANKS.parse(text)


def layer_of(text: str, router: str = "token_choice", **options: Any) -> MoE:
    """H=16, E=4, in float64."""
    sizes: dict[str, Any] = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": 2}
    capacity = None if router == "expert_choice" else "factor:capacity_factor=0.6"
    if capacity is not None:
        sizes["capacity"] = parse_capacity(capacity)
    if bank_of(text).of_gates is not None:
        sizes["normalize"] = "none"
    return MoE(MoEConfig(**{**sizes, "router": router, "experts": text, **options})).double()


def plain(text: str) -> bool:
    """Whether the reference knows what the bank computes."""
    if text.startswith("compressed"):  # tests of its method do
        return False
    return type(layer_of(text).experts).__module__.startswith("etr.moe.")


@pytest.mark.parametrize(
    ("router", "backend", "normalize"),
    [
        ("token_choice", "loop", "none"),
        ("token_choice", "bmm", "chosen"),
        ("token_choice", "grouped_mm", "kept"),
        ("etr", "loop", "chosen"),
        ("expert_choice", "loop", None),
    ],
)
@pytest.mark.parametrize("text", list(filter(plain, HERE)))
def test_values_and_gradients_are_those_of_plain_loops(
    text: str, router: str, backend: str, normalize: str | None
) -> None:
    layer = layer_of(text, router, backend=backend, normalize=normalize)
    mask = torch.arange(T) != 3
    routing = compare(layer, tokens(), context(valid_mask=mask))
    assert routing.num_experts == bank_of(text).num_choices(E) == layer.config.num_choices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("text", HERE)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_no_token_and_one_token(text: str, num_tokens: int, training: bool) -> None:
    layer, x = layer_of(text).train(training), tokens(num_tokens).requires_grad_()
    y = layer(x, context(num_tokens)).hidden_states
    assert y.shape == x.shape
    y.sum().backward()
    for name, value in layer.named_parameters():
        assert value.grad is None or torch.isfinite(value.grad).all(), name


def one_choice_a_token(layer: MoE, counts: torch.Tensor) -> list[int]:
    """Rows of each expert where so many tokens make each choice, and no other."""
    expert = torch.arange(len(counts)).repeat_interleave(counts)
    gate = torch.ones(len(expert), dtype=torch.float64)
    routing = Routing(
        token=torch.arange(len(expert)),
        expert=expert,
        score=None,
        gate=gate,
        valid_mask=gate > 0,
        scores=None,
        logits=None,
        probs=None,
        num_experts=len(counts),
        top_k=1,
    )
    selection = select(routing, Limit(), rank_by="position")
    parts = layer.bank.plan(routing, selection)
    return torch.cat([kept.num_tokens_per_expert for _, kept in parts]).tolist()


@pytest.mark.parametrize("text", HERE)
def test_choices_that_have_weights_count_what_they_compute(text: str) -> None:
    """A multiply-add for every weight of every kept row, by one token and one expert at a time."""
    layer = layer_of(text, capacity="none")
    sizes = [
        sum(value[number].numel() for value in (params.up, params.down))
        for params in (part.params(torch.float64) for part in layer.bank.parts)
        for number in range(len(params.down))
    ]
    assert len(sizes) == E
    counts = torch.randint(0, 9, (layer.config.num_choices,))
    if bank_of(text).name in MADE:  # what is stored is not what runs: their tests count it
        want = sum(2 * size * n for size, n in zip(sizes, counts.tolist(), strict=False))
        # Of the compressed one of two choices runs.
        assert float(layer.bank.flops(counts)) == (want / 2 if text == "compressed" else want)
        return
    planned = one_choice_a_token(layer, counts)
    want = sum(2 * size * n for size, n in zip(sizes, planned, strict=True))
    assert float(layer.bank.flops(counts)) == want
    meant = bank_of(text).meant(E)
    assert len(meant) == layer.config.num_choices
    by_number = [
        sum(n for m, n in zip(meant, counts.tolist(), strict=True) if m == e) for e in range(E)
    ]
    assert planned == by_number
    beside = sum(value.numel() for value in layer.experts.parameters()) - sum(sizes)
    for k in (1, 2, layer.config.num_choices):
        found = layer.bank.parameters_of_a_token(k)
        assert found == sum(sorted(sizes, reverse=True)[:k]) + beside


@pytest.mark.parametrize("text", HERE)
def test_what_was_saved_computes_the_same(text: str) -> None:
    layer, other = layer_of(text), layer_of(text)
    train_steps(layer, 2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x, given = tokens(), context()
    assert torch.equal(other(x, given).hidden_states, layer(x, given).hidden_states)


@pytest.mark.parametrize("text", HERE)
def test_a_checkpoint_of_any_bank_without_state_starts_afresh(text: str) -> None:
    """So does one of any of its weights; an adapter's, which has none, leaves the state alone."""
    layer = layer_of(text)
    train_steps(layer, 1)
    learned = {
        f"{path}.{name}"
        for path, module in layer.named_modules()
        if isinstance(module, GlobalState)
        for name in module._buffers
    }
    weights = {n: v for n, v in layer.state_dict().items() if n not in learned}
    layer.load_state_dict({}, strict=False)
    assert int(layer.state.step) == 1
    some = next(name for name in weights if name.startswith("experts."))
    for given in (weights, {some: weights[some]}):
        with pytest.warns(UserWarning, match="no routing state"):
            layer.load_state_dict(given, strict=False)
        assert int(layer.state.step) == 0
        train_steps(layer, 1)


@pytest.mark.parametrize("text", HERE)
def test_texts_and_values_of_banks_are_read_back(text: str) -> None:
    config = layer_of(text).config
    again = MoEConfig.from_dict(config.to_dict())
    assert again.bank_config == config.bank_config == bank_of(text)
    assert BANKS.from_dict(config_to_dict(bank_of(text))) == bank_of(text)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "text", ["nulls:count=0", "widths", "widths:widths=4x8", "shared", "merged"]
)
def test_what_changes_nothing_is_the_uniform_bank_bit_for_bit(text: str, router: str) -> None:
    uniform, layer = layer_of("uniform", router), layer_of(text, router)
    with torch.no_grad():
        for new, old in zip(layer.parameters(), uniform.parameters(), strict=True):
            new.copy_(old)
    x, given = tokens(), context()
    found, want = layer(x, given), uniform(x, given)
    assert torch.equal(found.hidden_states, want.hidden_states)
    for name, value in want.stats.items():
        assert torch.equal(found.stats[name], value), name


def test_the_uniform_bank_has_the_names_that_it_always_had() -> None:
    names = {name for name, _ in layer_of("uniform", expert_bias=True).named_parameters()}
    assert {name for name in names if name.startswith("experts.")} == {
        "experts.gate_up_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj",
        "experts.down_proj_bias",
    }


# Null experts, by hand


def weights_of(layer: MoE, gates: list[list[float]], ids: list[list[int]]) -> list[list[float]]:
    """Combine weights of given choices [T][k]."""
    from etr.moe.select import combine_weights

    expert, gate = torch.tensor(ids).flatten(), torch.tensor(gates).flatten()
    count, k = len(ids), len(ids[0])
    routing = Routing(
        token=torch.arange(count).repeat_interleave(k),
        expert=expert,
        score=gate,
        gate=gate,
        valid_mask=torch.ones(count, dtype=torch.bool),
        scores=None,
        logits=None,
        probs=None,
        num_experts=layer.config.num_choices,
        top_k=k,
    )
    num_weighed = layer.config.bank_config.num_weighed(layer.config.num_experts)
    found = combine_weights(routing, ~routing.valid, layer.normalize, num_weighed)
    return found.view(count, k).tolist()


def test_weights_are_normalised_over_true_experts() -> None:
    """Experts 0 and 1, nulls 2 and 3; a token that chose nulls alone gets nothing."""
    sizes: dict[str, Any] = {"hidden_size": 4, "intermediate_size": 4, "num_experts": 2, "top_k": 2}
    given = [[0.4, 0.3], [0.4, 0.3], [0.4, 0.3], [0.4, 0.3]], [[0, 2], [2, 0], [2, 3], [0, 1]]
    layer = MoE(MoEConfig(**sizes, router="token_choice", experts="nulls:count=2"))
    found = weights_of(layer, *given)
    want = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [4 / 7, 3 / 7]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(want))
    layer = MoE(MoEConfig(**sizes, router="token_choice", experts="nulls:count=2,kind=copy"))
    torch.testing.assert_close(
        torch.tensor(weights_of(layer, *given)), torch.tensor([[4 / 7, 3 / 7]] * 4)
    )


def test_nulls_add_what_their_kind_says() -> None:
    x, found = tokens(5), {}
    for kind in ("zero", "copy", "constant"):
        layer = layer_of(f"nulls:count=2,kind={kind}")
        found[kind] = expert_output(layer.bank, x[0], E + 1)
        if kind == "constant":
            assert torch.equal(found[kind], layer.experts.constants[1])
    assert torch.equal(found["zero"], torch.zeros(H).double())
    assert torch.equal(found["copy"], x[0])


def test_a_token_may_choose_more_than_there_are_experts_with_nulls() -> None:
    layer = layer_of("nulls:count=4", top_k=6, capacity="none")
    compare(layer, tokens(), context())
    with pytest.raises(ValueError, match=r"top_k=9 exceeds .*8"):
        layer_of("nulls:count=4", top_k=9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nulls:count=-1", "count=-1 null experts must be at least 0"),
        ("nulls:kind=one", "kind='one' must be one of zero, copy, constant"),
        ("nulls:kind=copy,weighed=false", "weighed=False with kind='copy'"),
        ("widths:widths=8+x", r"widths='8\+x' must be widths or runs"),
        ("widths:widths=0x8", "must be widths or runs"),
        ("widths:widths=3x8", "names 3 experts; there are num_experts=4"),
        ("shared:shared", "a shared bank is shared once"),
        ("shared:layers=0", "layers=0 must be at least 1"),
        ("merged:of=0+2", "must be a number for each choice joined by"),
        ("merged:of=0+1", "names 2 choices; there are num_experts=4"),
        ("low_rank:ranks=2x3", "names 2 experts; there are num_experts=4"),
        ("stand_in:rank=-1", "rank=-1 of what stands in must be at least 0"),
        ("low_rank_rows:rank=-1", "rank=-1 must be at least 0"),
        ("low_rank_rows:left=2", "left=2 must be a share of the rows"),
        ("low_rank_rows:rows=3+3", "must be a number for each of gate, up, down, up to 32, 32, 64"),
        ("low_rank_rows:rows=33+2x0", "must be a number for each of gate, up, down"),
        ("nested:use=4", "use=4 must lie between 1 and levels=3"),
        ("packed:bits=3+3", "must be 2, 4, 8 or 16 for each matrix"),
        ("packed:bits=5x4", "names 5 matrices; num_experts=4 have 3 each"),
        ("packed:bits=8x4", "must name 12 matrices"),
        ("none", "experts='none' is unknown; choose one of uniform, nulls, widths, shared"),
    ],
)
def test_options_are_checked(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer_of(text)
