"""Files of one's own: run when named, once, with errors that say what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etr.methods import METHODS, import_file, told_to_import
from etr.methods.own import MODULES, is_imported
from etr.moe import ROUTERS

METHOD = '''
"""A method of one's own."""
from __future__ import annotations
from dataclasses import dataclass
import etr
from etr.methods import Card, Row
from etr.moe import ROUTERS, TokenChoice

@dataclass(frozen=True, kw_only=True)
class Own(TokenChoice):
    """Token choice under another name."""
    name = "{name}"

etr.methods.add(Card(
    name="{name}", title="Own", summary="a try", level="model", branch="dynamic routing",
    claim="It takes 1 expert.", rows=(Row(table=ROUTERS, kind=Own),),
    options={{"router": "{name}"}},
))
'''


@pytest.fixture(autouse=True)
def shelf() -> Iterator[None]:
    """Take off again what a test adds."""
    before = (set(METHODS), set(ROUTERS), set(sys.modules))
    yield
    for table, names in zip((METHODS, ROUTERS), before, strict=False):
        for name in set(table) - names:
            table.pop(name)  # type: ignore[attr-defined]
    for name in set(sys.modules) - before[2]:
        if name.startswith(MODULES):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "my_method.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, METHOD.format(name="own"))
    import_file(path)
    assert METHODS["own"].rows[0].kind is ROUTERS["own"]
    monkeypatch.chdir(tmp_path)
    import_file("my_method.py")  # the same file by another path
    assert is_imported(path)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        import_file(write(tmp_path / name, METHOD.format(name=name)))
    assert {"one", "two"} <= set(METHODS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise RuntimeError('no luck')\n", r"my_method.py': line 2: RuntimeError: no luck"),
        ("def f(:\n", r"my_method.py': SyntaxError: invalid syntax"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named 'nothing"),
        (METHOD.format(name="etr"), "line 1[0-9]: method 'etr' is taken; choose another name"),
        (METHOD.format(name="random"), "method 'random' is taken by a router that is not its own"),
        (
            METHOD.format(name="random").replace('name="random", title', 'name="other", title'),
            r"router 'random' is taken by etr\.moe\.routers\.random\.Random",
        ),
    ],
)
def test_a_file_that_fails_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        import_file(path)
    assert not is_imported(path)  # it may be mended and tried again
    path.write_text("mended = True\n", encoding="utf-8")
    import_file(path)


def test_what_is_not_a_python_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.py' does not exist"):
        import_file(tmp_path / "nothing.py")
    with pytest.raises(ValueError, match="must be a Python file"):
        import_file(write(tmp_path, "", "notes.txt"))
    with pytest.raises(ValueError, match="must be a Python file"):
        import_file(tmp_path)


def test_an_error_says_what_to_import(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    with (
        pytest.raises(ValueError, match=f"runs/x was made .* pass --import {path} .wrong"),
        told_to_import("runs/x", [str(path)]),
    ):
        raise ValueError("wrong")
    import_file(path)
    with pytest.raises(ValueError, match=r"^wrong$"), told_to_import("runs/x", [str(path)]):
        raise ValueError("wrong")
