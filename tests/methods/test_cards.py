"""The shelf: every method has a file, a card, a line and a criterion, and its card is true."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import etr
from etr.methods import BRANCHES, METHODS, Card, Row, add, options_of
from etr.methods.card import MOVES
from etr.moe import CAPACITIES, ROUTERS, Baseline, MoEConfig, TokenChoice

SHELF = Path(etr.__file__).parent / "methods"
TESTS = Path(__file__).parent
HOUSEKEEPING = {"__init__", "card", "own"}
"""Files of the shelf that are no method."""
ALLOWED = {"torch", "etr"}
SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8}
cards = pytest.mark.parametrize("card", METHODS.values(), ids=METHODS)


def make(**changes: Any) -> Card:
    """A card that is fine but for the changes."""
    values: dict[str, Any] = {
        "name": "mine",
        "title": "Mine",
        "summary": "a try",
        "level": "model",
        "branch": "dynamic routing",
        "claim": "It takes 1 expert.",
        "options": {"router": "token_choice"},
    }
    return Card(**{**values, **changes})


def config_of(card: Card) -> MoEConfig:
    """A layer as the card asks for it; it may name sizes too."""
    return MoEConfig(**{**SIZES, **card.config_options()})


def criteria(name: str) -> list[str]:
    """Docstrings of the tests that are marked `criterion` in a method's test file."""
    body = ast.parse((TESTS / f"test_{name}.py").read_text(encoding="utf-8")).body
    found = [x for x in body if isinstance(x, ast.FunctionDef) and x.name.startswith("test_")]
    return [
        " ".join((ast.get_docstring(test) or "").split())
        for test in found
        if any("pytest.mark.criterion" in ast.unparse(mark) for mark in test.decorator_list)
    ]


def test_every_file_is_a_method() -> None:
    files = {path.stem for path in SHELF.glob("*.py")} - HOUSEKEEPING
    assert files == set(METHODS)
    for name, card in METHODS.items():
        module = sys.modules[f"etr.methods.{name}"]
        assert module.CARD is card
        assert card.name == name


@cards
def test_a_criterion_says_the_claim(card: Card) -> None:
    assert card.claim in criteria(card.name)
    assert re.search(r"[\d=<>]", card.claim), "a claim holds a figure or a symbol"
    assert card.claim.endswith(".")


@cards
def test_the_options_make_a_layer(card: Card) -> None:
    etr.MoE(config_of(card))
    for row in card.rows:
        assert row.table[row.kind.name] is row.kind  # type: ignore[attr-defined]


@cards
def test_its_name_is_a_variant_and_what_it_is_compared_with_too(card: Card) -> None:
    pytest.importorskip("transformers")
    from etr.train import TrainConfig, parse_variant

    if not card.options:
        with pytest.raises(ValueError, match=f"runs by `etr .*{card.rows[0].kind.name}"):  # type: ignore[attr-defined]
            parse_variant(card.name)
        return
    for text in (card.name, card.against):
        config = parse_variant(text).apply(TrainConfig())
        config.model.moe_config()
    applied = parse_variant(card.name).apply(TrainConfig()).model.moe_config()
    want = config_of(card)
    for field in dataclasses.fields(MoEConfig):
        if field.name not in SIZES:
            name = f"{field.name}_config" if field.name in ("router", "capacity") else field.name
            assert getattr(applied, name) == getattr(want, name)


@cards
def test_flags_are_those_of_the_router(card: Card) -> None:
    traits = config_of(card).router_config.traits
    if "router" in card.options:
        assert (card.causal, card.fixed_load) == (traits.causal, traits.fixed_load)


@pytest.mark.parametrize("path", sorted(SHELF.glob("*.py")), ids=lambda path: path.stem)
def test_imports_at_load_are_torch_and_the_layer(path: Path) -> None:
    """Whatever stands at the left margin; SciPy may be imported inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                top = str(name).partition(".")[0]
                known = ALLOWED | ({"scipy"} if id(node) in inside else set())
                assert top in known | sys.stdlib_module_names, f"{path.name} imports {name}"


def test_old_texts_mean_what_they_meant() -> None:
    for name in (name for name in ROUTERS if ROUTERS[name].__module__.startswith("etr.moe.")):
        assert options_of(name) == {"router": name}
        assert options_of(f"{name}:seed=3") == {"router": f"{name}:seed=3"}


def test_options_after_a_method_are_those_of_its_router() -> None:
    assert options_of("loss_free_balance:bias_rate=0.01") == {
        "router": "token_choice:gate=sigmoid,bias_update=sign,bias_rate=0.01",
        "aux_alpha": "0",
    }
    with pytest.raises(ValueError, match=r"router='nonsense' is unknown; .*loss_free_balance"):
        options_of("nonsense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "soft"}, "card 'mine': level='soft' must be one of model, system, hardware"),
        ({"branch": "routing"}, "card 'mine': branch='routing' must be one of expert design, att"),
        ({"level": "system"}, "branch='dynamic routing' must be one of parallelism, load balanc"),
        ({"moves": ("speed",)}, "moves='speed' must be one of loss, load"),
        ({"ranks": "some"}, "ranks='some' must be one of all, own"),
        ({"paper": "arXiv 2406.00023"}, "must be arXiv ids"),
        ({"claim": "it wins"}, "must be a sentence"),
        ({"name": "My method"}, "must be lower case"),
        ({"options": {}}, "neither rows nor options"),
    ],
)
def test_a_card_that_says_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    make()
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_every_tag_is_of_the_closed_set() -> None:
    for card in METHODS.values():
        assert card.branch in BRANCHES[card.level]
        assert set(card.moves) <= set(MOVES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(TokenChoice):
    """A router of a test."""

    name = "mine"


class TestAdding:
    """Adding a method of one's own."""

    @pytest.fixture(autouse=True)
    def clean(self) -> Any:
        yield
        for table in (METHODS, ROUTERS):
            for name in ("mine", "second"):
                table.pop(name, None)  # type: ignore[arg-type]

    def test_rows_reach_their_table(self) -> None:
        add(make(rows=(Row(table=ROUTERS, kind=Mine),), options={"router": "mine"}))
        assert ROUTERS["mine"] is Mine
        assert MoEConfig(**SIZES, router="mine").router_config == Mine()
        assert options_of("mine:bias=true") == {"router": "mine:bias=true"}

    def test_a_row_that_is_there_stays(self) -> None:
        add(make(rows=(Row(table=ROUTERS, kind=TokenChoice),)))
        assert ROUTERS["token_choice"] is TokenChoice

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "etr"}, "method 'etr' is taken"),
            ({"name": "random"}, "method 'random' is taken by a router that is not its own"),
        ],
    )
    def test_a_taken_name_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            add(make(**changes))
        assert "mine" not in METHODS

    def test_a_taken_row_is_refused_and_nothing_changes(self) -> None:
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Thief(Baseline):
            name = "baseline"

        rows = (Row(table=ROUTERS, kind=Mine), Row(table=ROUTERS, kind=Thief))
        with pytest.raises(ValueError, match=r"router 'baseline' is taken by etr\.moe\.routers"):
            add(make(rows=rows))
        assert "mine" not in ROUTERS
        assert "mine" not in METHODS
        assert ROUTERS["baseline"] is Baseline


def test_a_method_that_sets_no_option_says_which_verb_runs_it() -> None:
    """A row of another table; it is no router, nor listed as one."""
    from etr.model import TRANSFORMS
    from etr.model.transform import Renumber

    card = make(options={}, rows=(Row(table=TRANSFORMS, kind=Renumber),), branch="pruning")
    assert card.command == "etr transform renumber SRC DST"
    assert make().command == "--router token_choice"
    assert (card.rival, make().rival) == ("", "token_choice")
    assert make(options={}, rows=card.rows, against="renumber").rival == "renumber"
    add(card)
    try:
        with pytest.raises(ValueError, match="runs by `etr transform renumber SRC DST`"):
            options_of("mine")
        with pytest.raises(ValueError, match="choose one of") as found:
            options_of("nonsense")
        assert "mine" not in str(found.value)
    finally:
        METHODS.pop("mine")


def test_flags_of_a_method_without_a_router() -> None:
    """No router named: nothing to say of causality, unless a row does."""
    card = make(options={"capacity": "none"})
    assert (card.causal, card.fixed_load) == (None, None)
    leaks = type("Leaks", (), {"name": "leaks", "causal": False})
    assert make(rows=(Row(table=CAPACITIES, kind=leaks),)).causal is False
