"""The console script: what it answers without torch, and what the wheel holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import etr
import etr.cli
import etr_command

ROOT = Path(__file__).resolve().parent.parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["--version"], ["dance"]])
def test_help_and_version_import_neither_etr_nor_torch(arguments: list[str]) -> None:
    code = (
        "import json, sys; from etr_command import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, [n for n in sys.modules if n.split('.')[0] in ('etr', 'torch')]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    status, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    assert status == (2 if arguments == ["dance"] else 0)
    if arguments == ["--version"]:
        assert done.stdout.splitlines()[0] == f"etr {VERSION}"
    else:
        assert all(f"  {verb} " in done.stdout + done.stderr for verb in etr_command.VERBS)


def test_what_reads_no_model_starts_without_transformers() -> None:
    """Verbs, and the ranks of the cluster's benchmark."""
    verbs = [f"etr.cli.{verb}" for verb in ("methods", "plan", "cache", "theory", "report")]
    modules = ", ".join([*verbs, "etr.cluster.bench.timing"])
    code = f"import sys, {modules}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_is_one_table_of_verbs() -> None:
    assert etr.cli.VERBS is etr_command.VERBS
    assert etr.cli.main is etr_command.main
    names = {path.stem for path in Path(etr.cli.__file__).parent.glob("[a-z]*.py")}
    assert names == set(etr_command.VERBS)


def test_the_package_knows_its_version() -> None:
    assert etr.__version__ == VERSION


@pytest.mark.slow
def test_the_wheel_alone_runs_the_layer_of_the_guide(tmp_path: Path) -> None:
    """Without any dependency but torch, which a path file shows to the empty environment."""
    project, env = tmp_path / "project", tmp_path / "env"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", tmp_path, project)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    pages = {f"etr/report/pages/report.{kind}" for kind in ("html", "css", "js")}
    assert {"etr/py.typed", "etr_command.py", "etr/cli/train.py", *pages} <= held
    assert {name.split("/")[0] for name in held if "dist-info" not in name} == {
        "etr",
        "etr_command.py",
    }

    venv.create(env)
    python = env / "bin/python"
    run(*pip, "--python", python, "install", *offline, wheel)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")

    example = (ROOT / "docs/guides/layer.md").read_text(encoding="utf-8").split("```python\n")[1]
    example = example.partition("```")[0]
    assert "etr.attach(layer" in example
    where = run(python, "-c", example + "\nprint(etr.__file__, y.shape)")
    assert where == f"{packages / 'etr' / '__init__.py'} torch.Size([512, 64])\n"
    assert run(env / "bin/etr", "--version") == f"etr {VERSION}\n"
