"""Constraints files of the lowest and of the newest allowed versions, for make.

    python tools/versions.py lowest        every lower bound of pyproject.toml
    python tools/versions.py lock REPORT   what pip chose (`pip install --dry-run --report REPORT`)

It needs Python alone: make calls it before anything is installed.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BY_MINOR = {
    "torch",
    "transformers",
    "megatron-core",
    "deepspeed",
    "st-moe-pytorch",
    "lm-eval",
    "ruff",
    "vl-convert-python",
    "mkdocs-material",
}
"""Bounded by the next minor release: internals are used, or the output depends on it."""
NOT_LOWERED = {"torch"}
"""Stays as the index has it: only some releases come as a small CPU build."""
NOT_LOCKED = re.compile("triton|nvidia-.*|cuda-.*")
"""torch's GPU builds ask for exact versions of these; its CPU build has none."""

HEADER = """\
# Exact versions of everything that the extras bring, for `pip install -c` (make does that).
# Written by `make lock` on Linux with Python 3.11. Not in it: triton, nvidia-* and cuda-*, whose
# versions torch's GPU builds state themselves.
"""


def direct() -> list[str]:
    """The requirements that pyproject.toml states, of the build, the library and all extras."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = tables["project"]
    stated = [*tables["build-system"]["requires"], *project["dependencies"]]
    stated += [text for extra in project["optional-dependencies"].values() for text in extra]
    return sorted({text for text in stated if not text.startswith(project["name"])})


def normal(name: str) -> str:
    """The name of a package as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lowest() -> list[str]:
    """``name==version`` at the lower bound of every direct requirement."""
    bounds = [text.partition(",")[0].split(">=") for text in direct()]
    return [f"{name}=={version}" for name, version in bounds if name not in NOT_LOWERED]


def locked(report: dict[str, Any]) -> list[str]:
    """``name==version`` of every package in pip's report, without labels of local builds."""
    versions = {
        normal(entry["metadata"]["name"]): entry["metadata"]["version"].partition("+")[0]
        for entry in report["install"]
        if "dir_info" not in entry["download_info"]  # the project itself
    }
    return [f"{n}=={versions[n]}" for n in sorted(versions) if not NOT_LOCKED.fullmatch(n)]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lowest"]:
            print(*lowest(), sep="\n")
        case ["lock", report]:
            print(HEADER + "\n".join(locked(json.loads(Path(report).read_text(encoding="utf-8")))))
        case _:
            sys.exit(__doc__)
