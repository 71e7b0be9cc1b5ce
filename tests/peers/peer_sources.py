"""Where transformers' own tests come from: its source archive, or a checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(__file__).parents[2] / "runs" / "peers"
"""Not committed; `make clean` empties it."""
REQUIREMENTS = ("parameterized==0.9.0",)
"""What the tests import that nothing here needs; pure Python."""


def archive_tests(version: str) -> Path:
    """Tests of a version's source archive, which pip downloads once.

    The archive holds the common testers, and neither the generation tests nor the exporters'.
    """
    target = CACHE / f"transformers-{version}"
    if not target.is_dir():
        source = ("--no-deps", "--no-binary=transformers", "--no-build-isolation")
        _pip("download", *source, f"transformers=={version}")
        _unpack(CACHE / f"transformers-{version}.tar.gz", target)
    return target / "tests"


def checkout_tests(folder: str | Path, version: str) -> Path:
    """The tests folder of a checkout of `version`.

    Raises:
        FileNotFoundError: it lacks the common tester or the one for causal language models.
        ValueError: the checkout is of another version, or does not say of which.
    """
    folder = Path(folder).resolve()
    for name in ("test_modeling_common.py", "causal_lm_tester.py", "generation/test_utils.py"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"TRANSFORMERS_TESTS={str(folder)!r} holds no {name}; give the folder tests of a "
                "checkout of transformers"
            )
    source = folder.parent / "src" / "transformers" / "__init__.py"
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    if found is None or found[1] != version:
        raise ValueError(
            f"TRANSFORMERS_TESTS={str(folder)!r} is of transformers "
            f"{found[1] if found else '(no src/transformers/__init__.py beside it says which)'}; "
            f"the one installed is {version}: check out v{version}"
        )
    return folder


def requirements() -> Path:
    """Folder with the packages that the tests import besides what is installed."""
    target = CACHE / "packages"
    if not target.is_dir():
        _pip("install", "--no-deps", "--target", str(target), *REQUIREMENTS)
    return target


def _pip(command: str, *arguments: str) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    options = ("--quiet", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments], cwd=CACHE, check=True
    )


def _unpack(archive: Path, target: Path) -> None:
    """The archive's tests, under a name that is there only when they are whole."""
    part = CACHE / "unpacking"
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if member.name.startswith(f"{target.name}/tests/")]
        tar.extractall(part, wanted, filter="data")
    (part / target.name).rename(target)
    part.rmdir()
