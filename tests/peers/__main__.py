"""Run transformers' own model tests on `EtrForCausalLM`: `python tests/peers --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.dont_write_bytecode = True  # a checkout stays as it is


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/peers", description=__doc__)
    parser.add_argument("--tests", type=Path, help="tests folder of a checkout of transformers")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    parser.add_argument("--only", default="", help="pytest's -k; no page, and no stale rows")
    args = parser.parse_args()
    if args.page and args.only:
        parser.error("--page reports a whole run: leave out --only")

    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

    import pytest
    import transformers
    from peer_bases import BASES
    from peer_outcomes import Recorder, judge, read_table
    from peer_package import import_tests
    from peer_page import page, summary
    from peer_sources import archive_tests, checkout_tests, requirements

    version = transformers.__version__
    folder = checkout_tests(args.tests, version) if args.tests else archive_tests(version)
    sys.path.append(str(requirements()))
    whole = import_tests(folder)
    recorder = Recorder()
    # Markers of transformers' own are not registered here, so they must not be errors.
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--disable-warnings", "--tb=short"]
    status = pytest.main(
        [*options, "-k", args.only, str(HERE / "model_tests.py")], plugins=[recorder]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"the run broke off: {status!r}")
        return 1
    outcomes, table = recorder.outcomes(), read_table()
    verdicts = {base: judge(base, outcomes, table, whole) for base in BASES}
    if args.only:
        for verdict in verdicts.values():
            verdict.stale.clear()
    print(summary(verdicts))
    if args.page:
        args.page.write_text(page(verdicts, whole), encoding="utf-8")
    return 0 if all(verdict.good for verdict in verdicts.values()) else 1


sys.exit(main())
