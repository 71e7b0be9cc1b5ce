"""`--import`: a method in a file of one's own, from training to evaluation, by request alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etr.cli import main
from etr.methods import METHODS
from etr.methods.own import MODULES, import_file, is_imported
from etr.moe import ROUTERS

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

METHOD = '''
from dataclasses import dataclass
import etr
from etr.methods import Card, Row
from etr.moe import ROUTERS, TokenChoice

@dataclass(frozen=True, kw_only=True)
class Mine(TokenChoice):
    """Token choice under a name of one's own."""
    name = "mine"
    summary = "a try"

etr.methods.add(Card(
    name="my_method", title="Mine", summary="a try", level="model", branch="dynamic routing",
    claim="It takes 2 experts.", rows=(Row(table=ROUTERS, kind=Mine),),
    options={"router": "mine", "capacity": "none", "top_k": "2", "rank_by": "score",
        "z_beta": "0.001"},
))
'''


def forget() -> None:
    """As in a process that imported nothing."""
    METHODS.pop("my_method", None)
    ROUTERS.pop("mine", None)
    for name in [name for name in sys.modules if name.startswith(MODULES)]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "my_file.py"
    path.write_text(METHOD, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"{number} one two three four five " * 25)
    return [
        *("--data", str(folder), "--cache-dir", str(tmp_path_factory.mktemp("cache"))),
        *("--sequence-length", "32", "--batch-size", "4", "--steps", "4", "--device", "cpu"),
        *("--hidden-size", "32", "--num-layers", "1", "--num-heads", "2", "--expert-size", "16"),
        *("--num-key-value-heads", "2", "--num-experts", "4", "--checkpoint-every", "2"),
        *("--eval-every", "4", "--eval-tokens-per-domain", "64", "--warmup-steps", "2"),
    ]


@pytest.fixture(scope="module")
def run(file: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the method."""
    out = tmp_path_factory.mktemp("runs") / "own"
    arguments = ["--router", "my_method", "--import", str(file), "--out", str(out), *options]
    assert main(["train", *arguments]) == 0
    forget()
    return out


def test_a_run_has_the_methods_options_and_notes_its_file(run: Path, file: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    routing = config["model"]["routing"]
    assert config["imports"] == [str(file)]
    assert (routing["router"], routing["capacity"], routing["top_k"]) == ("mine", "none", 2)
    assert routing["losses"]["z_beta"] == 0.001


def test_options_beside_the_method_win(file: Path, options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--top-k", "1", "--router=my_method:bias=true", f"--import={file}"]
    assert main(["train", *arguments, "--out", str(out), *options]) == 0
    routing = json.loads((out / "config.json").read_text())["model"]["routing"]
    assert (routing["router"], routing["capacity"], routing["top_k"]) == (
        "mine:bias=true",
        "none",
        1,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "RUN"],
        ["generate", "RUN", "--max-new-tokens", "2"],
        ["trace", "RUN", "--max-tokens", "64", "--out", "TMP/trace.parquet"],
        ["calibrate", "RUN", "--num-batches", "1", "--save-to", "TMP/calibrated"],
        ["train", "--resume", "--out", "RUN"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_folder_runs_code_and_verbs_say_what_to_pass(
    arguments: list[str], run: Path, file: Path, tmp_path: Path, capsys
) -> None:
    words = [word.replace("RUN", str(run)).replace("TMP", str(tmp_path)) for word in arguments]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"pass --import {file}" in said
    assert "Traceback" not in said
    assert "my_method" not in METHODS
    assert main([*words, "--import", str(file)]) == 0
    if words[0] == "train":
        assert json.loads((run / "config.json").read_text())["imports"] == [str(file)]


def test_compare_takes_it_as_a_row(file: Path, options, tmp_path: Path, capsys) -> None:
    out = tmp_path / "compare"
    words = ["compare", "--variants", "baseline", "my_method", "--import", str(file)]
    assert main([*words, "--out", str(out), *options]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["router"] for row in rows] == ["baseline", "mine"]
    capsys.readouterr()
    moved = tmp_path / "moved.py"
    moved.write_text(METHOD, encoding="utf-8")
    forget()
    words[-1] = str(moved)  # the same method from another place: finished runs are taken over
    assert main([*words, "--out", str(out), *options]) == 0


def test_methods_shows_it(file: Path, capsys) -> None:
    assert main(["methods", "my_method", "--import", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "It takes 2 experts." in out
    assert "--router mine --capacity none --top-k 2" in out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing.py", None, "does not exist"),
        ("notes.txt", "", "must be a Python file"),
        ("bad.py", "\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("taken.py", METHOD.replace('"my_method"', '"etr"'), "method 'etr' is taken"),
    ],
)
def test_errors_are_sentences(name, text, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main(["train", "--import", str(path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert name in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_verb_without_the_option_says_so(tmp_path: Path, capsys) -> None:
    """`etr upcycle` has no rank_by: the method cannot be taken as a whole."""
    file = tmp_path / "my_file.py"
    file.write_text(METHOD, encoding="utf-8")
    from etr.methods import import_file

    import_file(file)
    assert main(["upcycle", "SRC", "DST", "--router", "my_method"]) == 2
    said = capsys.readouterr().err
    assert "router='my_method' sets rank_by, for which etr upcycle has no option" in said


SEAMS = """
from dataclasses import dataclass
import torch
import etr
from etr.methods import Card, Row
from etr.model import TRANSFORMS, Transform
from etr.systems import CACHES, PLANNERS
from etr.systems.cache import LeastRecentlyUsed
from etr.systems.plan import Planner

@dataclass(frozen=True, kw_only=True)
class Backwards(Planner):
    name = "backwards"
    summary = "the last experts on the first rank"

    def place(self, demand, devices):
        layers, experts = demand.counts.shape
        return (torch.arange(experts).flip(0) // (experts // devices.num_ranks)).repeat(layers, 1)

@dataclass(frozen=True, kw_only=True)
class Same(Transform):
    name = "same"
    summary = "the same again"

    def apply(self, tensors, plan, place):
        return tensors

@dataclass(frozen=True, kw_only=True)
class Again(LeastRecentlyUsed):
    name = "again"

etr.methods.add(Card(
    name="my_seams", title="Seams", summary="a try", level="system", branch="parallelism",
    claim="It takes 3 seams.",
    rows=(Row(table=PLANNERS, kind=Backwards), Row(table=TRANSFORMS, kind=Same),
        Row(table=CACHES, kind=Again)),
))
"""


def test_planners_caches_and_transforms_may_be_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from etr.cli.cache import CacheConfig
    from etr.model import TRANSFORMS
    from etr.systems import CACHES, PLANNERS

    (tmp_path / "seams.py").write_text(SEAMS, encoding="utf-8")
    own = ["--import", str(tmp_path / "seams.py")]
    run, text = tmp_path / "run", tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(" ".join(str(number * i % 7) for i in range(200)))
    size = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--steps", "2"]
    size += ["--num-key-value-heads", "2", "--num-experts", "4", "--expert-size", "8"]
    data = ["--data", str(text), "--sequence-length", "32", "--batch-size", "4"]
    data += ["--cache-dir", str(tmp_path / "cache")]
    try:
        assert main(["train", "--out", str(run), "--device", "cpu", *size, *data]) == 0
        assert main(["trace", str(run), "--max-tokens", "64", *data]) == 0
        trace = str(run / "trace.parquet")
        assert main(["plan", "backwards", trace, "--ranks", "2", *own]) == 0
        plan = json.loads((run / "plan.json").read_text())
        assert plan["rank_of_expert"] == [[1, 1, 0, 0]]
        # The default is every policy that there is now, whenever the verb was read first.
        assert main(["cache", trace, *own]) == 0
        assert "again" in capsys.readouterr().out
        assert main(["transform", "same", str(run), str(tmp_path / "new"), *own]) == 0
        assert (tmp_path / "new/transform.json").is_file()
    finally:
        for table, name in ((PLANNERS, "backwards"), (TRANSFORMS, "same"), (CACHES, "again")):
            table.pop(name, None)
        METHODS.pop("my_seams", None)
    assert "again" not in CacheConfig(trace=trace).caches


def test_a_file_that_raised_is_not_taken_for_imported(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('no')", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ValueError, match="line 1: no"):
            import_file(path)
        assert not is_imported(path)
    path.write_text("x = 1", encoding="utf-8")
    import_file(path)
    assert is_imported(path)
