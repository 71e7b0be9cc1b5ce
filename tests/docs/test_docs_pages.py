"""The pages say what is true: their code runs, their links and paths exist, their words are fit."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from markdown_blocks import ROOT, Block, blocks, links, name_of, pages, run

README = ROOT / "README.md"
LAYER = ROOT / "docs/guides/layer.md"
METHOD = ROOT / "docs/method.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
SNIPPETS = [(page, block) for page in (README, LAYER, METHOD) for block in blocks(page, "python")]
DISAGREEMENTS = "## Where the paper's story does not hold"


def test_the_pages_are_there() -> None:
    names = {name_of(page) for page in pages()}
    written = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert written | {"docs/architecture.md", "docs/method.md"} <= names


def test_every_page_is_in_the_contents_of_the_site() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/-]+\.md", contents)
    names = {name_of(page) for page in pages()}
    assert len(set(listed)) == len(listed)
    # The page of results lists those of its folder.
    assert {n for n in names if "/results/" not in n} <= set(listed) <= names


@pytest.mark.parametrize(
    ("page", "block"), SNIPPETS, ids=[f"{name_of(p)}:{b.line}" for p, b in SNIPPETS]
)
def test_python_blocks_run_as_shown(page: Path, block: Block) -> None:
    if "transformers" in block.text:
        pytest.importorskip("transformers")
    run(page, block)


def test_the_layer_example_trains_and_calibrates() -> None:
    """The guide's first example does what it says, beyond running without an error."""
    example = run(LAYER, blocks(LAYER, "python")[0])
    layer = example["layer"]
    assert int(layer.state.step) == 100  # type: ignore[attr-defined]
    assert layer.has_thresholds()  # type: ignore[attr-defined]
    assert example["y"].shape == (512, 64)  # type: ignore[attr-defined]
    # At the end of the schedule experts keep 1.1 of the mean load at most.
    stats = example["output"].stats  # type: ignore[attr-defined]
    chosen, kept = stats["num_choices_per_expert"], stats["num_tokens_per_expert"]
    assert kept.tolist() == chosen.clamp_max(71).tolist()
    assert int(chosen.max()) > 71  # or the line above would say nothing


def test_every_disagreement_with_the_paper_has_a_check() -> None:
    section = METHOD.read_text(encoding="utf-8").partition(DISAGREEMENTS)[2]
    parts = re.split(r"^### ", section, flags=re.MULTILINE)[1:]
    assert [part[:2] for part in parts] == [f"{number}." for number in range(1, 8)]
    for part in parts:
        assert part.count("```python") == 1
        assert "assert" in part


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_relative_links_exist(page: Path) -> None:
    for target in links(page):
        if target.startswith(("https://", "#")):
            continue
        path = page.parent / target.partition("#")[0]
        assert path.exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_fenced_blocks_are_closed(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("\n```") % 2 == 0


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_no_hosts_and_no_paths_of_a_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"\b[\w-]+\.(?:org|com|io|net|co|dev)\b", text)
    assert not re.findall(r"(?:^|[\s`'\"(=])/\w[\w.-]*/", text, flags=re.MULTILINE)


def tree_paths(text: str) -> list[Path]:
    """Paths that a tree block names: one a line, two spaces deeper inside a folder."""
    found: list[Path] = []
    folders: list[str] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        found.append(Path(*folders))
    return found


def tree_of(page: Path) -> list[Path]:
    (tree,) = [b for b in blocks(page, "text") if "src/etr/\n" in b.text]
    return tree_paths(tree.text)


def test_the_tree_is_true() -> None:
    listed = tree_of(ARCHITECTURE)
    missing = [path.as_posix() for path in listed if not (ROOT / path).exists()]
    assert not missing
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("src/etr/*/__init__.py")}
    assert packages <= set(listed), "a package under src/etr is not in the tree"


def test_the_tree_lists_every_module_of_the_layer() -> None:
    modules = {
        path.relative_to(ROOT)
        for path in ROOT.glob("src/etr/moe/*")
        if not path.name.startswith("__")
    }
    assert modules <= set(tree_of(ARCHITECTURE))


def test_the_install_page_lists_every_extra() -> None:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in project["optional-dependencies"]:
        assert f"| `{extra}` |" in text, extra


def test_the_changelog_has_the_version() -> None:
    import etr

    assert f"## [{etr.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", ["ROUTERS", "CAPACITIES", "EXPERT_BACKENDS"])
def test_the_changelog_names_every_row(table: str) -> None:
    """But for those of the shelf, which docs/methods.md lists."""
    import etr

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, kind in getattr(etr, table).items():
        assert kind.__module__.startswith("etr.methods.") or f"`{name}`" in text, name


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?:`|^    )make ([a-z-]+)", text, flags=re.MULTILINE):
            assert name in targets, f"{name_of(page)}: make {name}"


def test_the_method_page_quotes_the_constants() -> None:
    from etr.moe import ROUTERS
    from etr.moe.calibration import HISTOGRAM_DECAY, NUM_BINS, SHARE_DECAY
    from etr.moe.capacity import LocMoE, Schedule
    from etr.moe.config import parse_capacity

    text = " ".join(METHOD.read_text(encoding="utf-8").split())
    plan, frozen = Schedule(), LocMoE()
    ours = ROUTERS["etr"]().traits.default_capacity
    assert parse_capacity(ROUTERS["etr_paper"]().traits.default_capacity) == plan
    rises = parse_capacity(ours)
    assert isinstance(rises, Schedule)
    for quoted in (
        f"`{ours}`",
        f"`etr`: {rises.start_factor} to {rises.end_factor}",
        f"{plan.start_factor} to {plan.end_factor} | {rises.start_factor} to {rises.end_factor}",
        f"running histogram ({NUM_BINS} bins, decay {HISTOGRAM_DECAY})",
        f"running share (decay {SHARE_DECAY})",
        f"`f` {plan.start_factor} until `u = {plan.start}`, then in {plan.num_stages} stages to "
        f"{plan.end_factor} at `u = {plan.end}`",
        f"clamped to [{frozen.min_factor}, {frozen.max_factor}]",
    ):
        assert quoted in text, quoted
