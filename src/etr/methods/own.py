"""A file of one's own that adds methods. It runs because somebody names it, and not otherwise."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MODULES = "etr_import_"
"""How the module of such a file is called: this, a number, and the file's name."""


def import_file(path: str | Path) -> None:
    """Run a Python file, once per process.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a Python file, or it raises.
    """
    file = Path(path)
    if file.suffix != ".py":
        raise ValueError(f"import={str(path)!r} must be a Python file, NAME.py")
    if not file.is_file():
        raise FileNotFoundError(f"import={str(path)!r} does not exist")
    file = file.resolve()
    if is_imported(file):
        return
    name = f"{MODULES}{len(_imported())}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for what annotations name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"import={str(path)!r}: {_place(error, file)}{_said(error)}") from error
    except BaseException:
        del sys.modules[name]
        raise


def is_imported(path: str | Path) -> bool:
    """Whether the file has been run in this process."""
    return Path(path).resolve() in _imported()


@contextmanager
def told_to_import(what: str, paths: Iterable[str]) -> Iterator[None]:
    """Let a ValueError say which files to import, where some have not been.

    Args:
        what: a folder or file, for the message.
        paths: files that it was made with; nothing but a person's request runs them.
    """
    try:
        yield
    except ValueError as error:
        missing = " ".join(f"--import {path}" for path in paths if not is_imported(path))
        if not missing:
            raise
        raise ValueError(
            f"{what} was made with methods of a file that runs only when it is named: pass "
            f"{missing} ({error})"
        ) from error


def _imported() -> list[Path]:
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith(MODULES)]
    return [Path(str(module.__file__)) for _, module in modules]


def _place(error: Exception, file: Path) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f"line {lines[-1]}: " if lines else ""


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
