"""How the runner of transformers' own tests holds results against its table, and reports them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peer_bases import BASES, SIZES, etr_config
from peer_outcomes import TABLE, Entry, Outcome, Recorder, judge, read_table
from peer_page import NAMES, page, summary
from peer_sources import checkout_tests

ROW = Entry(tests="test_b*", bases=("mixtral",), reason="It asks for what is not there.")


def outcome(test, result, message="", base="mixtral"):
    return Outcome(base=base, test=test, result=result, message=message)


def test_a_failure_that_no_row_covers_is_a_failure():
    failures = [outcome("test_a", "failed"), outcome("test_b", "failed")]
    verdict = judge("mixtral", failures, [ROW], whole=False)
    assert verdict.failed == failures[:1]
    assert verdict.inapplicable == [(failures[1], ROW)]
    assert not verdict.good
    assert judge("mixtral", failures[1:], [ROW], whole=False).good


def test_a_row_covers_its_bases_alone():
    there = outcome("test_b", "failed", base="gpt_oss")
    verdict = judge("gpt_oss", [there], [ROW], whole=False)
    assert verdict.failed == [there]
    assert verdict.stale == []
    everywhere = Entry(tests="test_b", reason="It asks for what is not there.")
    assert judge("gpt_oss", [there], [everywhere], whole=False).good


@pytest.mark.parametrize("result", ["passed", "skipped"])
def test_a_row_whose_test_does_not_fail_is_stale(result):
    outcomes = [outcome("test_b_1", "failed"), outcome("test_b_2", result)]
    verdict = judge("mixtral", outcomes, [ROW], whole=False)
    assert verdict.stale == [f"test_b_2: {result}"]
    assert not verdict.good


def test_a_row_without_a_test_is_stale_unless_only_a_checkout_has_it():
    verdict = judge("mixtral", [outcome("test_a", "passed")], [ROW], whole=False)
    assert verdict.stale == ["test_b*: there is no such test"]
    row = Entry(tests="test_b", whole=True, reason="It asks for what is not there.")
    assert judge("mixtral", [], [row], whole=False).good
    assert not judge("mixtral", [], [row], whole=True).good


def test_the_table_can_be_read_and_names_known_bases():
    table = read_table(TABLE)
    assert table
    for row in table:
        assert set(row.bases) <= set(BASES)
        assert row.reason.endswith(".")


@pytest.mark.parametrize(
    "text", ['tests = "a"', 'reason = "A."', 'tests = "a"\nreason = "A."\nx = 1']
)
def test_a_row_that_lacks_something_or_has_too_much_is_refused(text, tmp_path):
    file = tmp_path / "table.toml"
    file.write_text(f"[[entry]]\n{text}\n")
    with pytest.raises(ValueError, match=r"table\.toml"):
        read_table(file)


def test_page_and_summary_say_what_became_of_each_test():
    outcomes = [
        outcome("test_a", "failed", "ValueError: 1 | 2"),
        outcome("test_b", "failed"),
        outcome("test_c", "passed"),
        *(outcome(f"test_{i}", "skipped", "test requires accelerator") for i in range(3)),
    ]
    old = Entry(tests="test_z", reason="It was there once.")
    verdicts = {
        "mixtral": judge("mixtral", outcomes, [ROW, old], whole=False),
        "gpt_oss": judge("gpt_oss", [outcome("test_c", "passed", base="gpt_oss")], [], whole=False),
    }
    text = page(verdicts, whole=False)
    assert "| Mixtral | 6 | 1 | 1 | 1 | 3 |" in text
    assert "| GPT-OSS | 1 | 1 | 0 | 0 | 0 |" in text
    assert "| `test_a` | Mixtral | ValueError: 1 \\| 2 |" in text
    assert "| `test_b` | Mixtral | It asks for what is not there. |" in text
    assert "| `test_z: there is no such test` | Mixtral |" in text
    assert "| 3 | test requires accelerator |" in text
    assert "which the archive does\nnot hold" in text
    assert "from a\ncheckout" in page(verdicts, whole=True)
    lines = summary(verdicts).splitlines()
    assert lines[0] == "Mixtral: 6 tests, 1 passed, 1 failed, 1 inapplicable, 3 skipped"
    assert "  FAILED test_a: ValueError: 1 | 2" in lines


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the tests of a checkout of version 1.2.3."""
    tests = tmp_path / "tests"
    (tests / "generation").mkdir(parents=True)
    for name in ("test_modeling_common.py", "causal_lm_tester.py", "generation/test_utils.py"):
        (tests / name).touch()
    source = tmp_path / "src" / "transformers"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text('# comment\n__version__ = "1.2.3"\n')
    return tests


def test_a_checkout_must_be_whole_and_of_the_version_installed(checkout):
    assert checkout_tests(checkout, "1.2.3") == checkout
    with pytest.raises(ValueError, match=r"is of transformers 1\.2\.3; .* is 1\.2\.4"):
        checkout_tests(checkout, "1.2.4")
    (checkout.parent / "src" / "transformers" / "__init__.py").unlink()
    with pytest.raises(ValueError, match="says which"):
        checkout_tests(checkout, "1.2.3")
    (checkout / "generation" / "test_utils.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"generation/test_utils\.py"):
        checkout_tests(checkout, "1.2.3")


@pytest.mark.parametrize("base", BASES)
def test_each_base_has_a_name_and_the_sizes_that_the_testers_count_on(base):
    config = etr_config(base)
    assert base in NAMES
    assert config.base_config.model_type == base
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, name) == SIZES[name]


def report(outcome, part=False, message=""):
    found = SimpleNamespace(
        nodeid="tests/peers/model_tests.py::mixtral::test_a",
        failed=outcome == "failed",
        skipped=outcome == "skipped",
        passed=outcome == "passed",
        longrepr=("file", 1, f"Skipped: {message}"),
    )
    if outcome == "failed":
        found.longrepr = SimpleNamespace(reprcrash=SimpleNamespace(message=message))
    if part:
        found.context = "a subtest"
    return found


@pytest.mark.parametrize(
    ("reports", "result", "message"),
    [
        ([report("passed")] * 3, "passed", ""),
        ([report("passed"), report("failed", message="E\nF"), report("passed")], "failed", "E"),
        ([report("failed", message="E" * 300)], "failed", "E" * 200 + " ..."),
        ([report("passed"), report("skipped", message="no GPU")], "skipped", "no GPU"),
        # A subtest that fails does not fail the report on its test, nor does one that skips.
        ([report("failed", part=True, message="E"), report("passed")], "failed", "E"),
        ([report("skipped", part=True, message="no GPU"), report("passed")], "skipped", "no GPU"),
        ([report("skipped", part=True), report("passed", part=True)], "passed", ""),
    ],
)
def test_reports_on_phases_and_subtests_make_one_outcome(reports, result, message):
    recorder = Recorder()
    for one in reports:
        recorder.pytest_runtest_logreport(one)
    expected = Outcome(base="mixtral", test="test_a", result=result, message=message)
    assert recorder.outcomes() == [expected]
