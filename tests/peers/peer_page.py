"""The result of a run, in the terminal and as a page of the documentation."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
import transformers
from peer_outcomes import Verdict

import etr

NAMES = {
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "deepseek_v3": "DeepSeek-V3",
    "gpt_oss": "GPT-OSS",
}


WHOLE = """\
Run: the common model tests, the generation tests and the tester of causal language models, from a
checkout. Not run: the pipelines' tests, which download models."""
PART = """\
Run: the common model tests (`ModelTesterMixin`), from transformers' source archive. Not run: the
generation tests, the exporters' and the tester of causal language models, which the archive does
not hold. `make test-peers TRANSFORMERS_TESTS=DIR` runs them too, from the folder `tests` of a
checkout of the same version. That has been tried with a stand-in for such a folder (the archive's
files over a development version of 5.16), not with a checkout of 5.24 itself."""


def summary(verdicts: Mapping[str, Verdict]) -> str:
    """A few lines for the terminal: counts, failures and stale rows."""
    lines = []
    for base, verdict in verdicts.items():
        counts = ", ".join(f"{count} {kind}" for kind, count in _counts(verdict).items())
        lines.append(f"{NAMES[base]}: {counts}")
        lines += [f"  FAILED {outcome.test}: {outcome.message}" for outcome in verdict.failed]
        lines += [f"  STALE {text}" for text in verdict.stale]
    return "\n".join(lines)


def page(verdicts: Mapping[str, Verdict], whole: bool) -> str:
    """The page, in Markdown."""
    return "\n\n".join([_head(whole), _table(verdicts), *_details(verdicts)]) + "\n"


def _counts(verdict: Verdict) -> dict[str, int]:
    kinds = ("passed", "failed", "inapplicable", "skipped")
    counts = {kind: len(getattr(verdict, kind)) for kind in kinds}
    return {"tests": sum(counts.values()), **counts}


def _head(whole: bool) -> str:
    what = WHOLE if whole else PART
    accelerator = "with a GPU" if torch.cuda.is_available() else "no accelerator"
    return f"""# transformers' own model tests

Written by `make test-peers`. It runs the tests that transformers runs on each of its models on
`EtrForCausalLM`, tiny and with random weights, over four bases; the router is `etr` at its
defaults. Nothing is downloaded while the tests run.

{what}

etr {etr.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, \
Python {platform.python_version()}, {platform.machine()}, {accelerator}."""


def _table(verdicts: Mapping[str, Verdict]) -> str:
    rows = {NAMES[base]: _counts(verdict) for base, verdict in verdicts.items()}
    kinds = list(next(iter(rows.values())))
    lines = [
        f"| base | {' | '.join(kinds)} |",
        f"|---|{'---:|' * len(kinds)}",
        *(f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in rows.items()),
    ]
    return "\n".join(lines) + (
        "\n\nInapplicable tests fail for a reason that `tests/peers/inapplicable.toml` gives. "
        "Skipped ones skip themselves: they ask for hardware, a package or a kind of model that "
        "is not there."
    )


def _details(verdicts: Mapping[str, Verdict]) -> list[str]:
    failed: dict[tuple[str, ...], list[str]] = defaultdict(list)
    inapplicable: dict[tuple[str, ...], list[str]] = defaultdict(list)
    stale: dict[tuple[str, ...], list[str]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for base, verdict in verdicts.items():
        for outcome in verdict.failed:
            failed[outcome.test, outcome.message].append(base)
        for outcome, row in verdict.inapplicable:
            inapplicable[outcome.test, row.reason].append(base)
        for text in verdict.stale:
            stale[text,].append(base)
        skipped.update(outcome.message for outcome in verdict.skipped)
    sections = {
        "Failed": _by_test("test | bases | error", failed),
        "Inapplicable": _by_test("test | bases | why it does not apply", inapplicable),
        "Stale rows of the table": _by_test("row | bases", stale),
        "Skipped": _by_reason(skipped),
    }
    return [f"## {title}\n\n{body}" for title, body in sections.items() if body]


def _by_test(head: str, found: Mapping[tuple[str, ...], list[str]]) -> str:
    if not found:
        return ""
    lines = [f"| {head} |", f"|{'---|' * (head.count('|') + 1)}"]
    for (name, *rest), bases in found.items():
        where = ", ".join(NAMES[base] for base in bases) if len(bases) < len(NAMES) else "all"
        lines.append(f"| {' | '.join([f'`{name}`', where, *map(_cell, rest)])} |")
    return "\n".join(lines)


def _by_reason(skipped: Counter[str]) -> str:
    lines = ["| tests, over all bases | reason given |", "|---:|---|"]
    rows = sorted(skipped.items(), key=lambda row: (-row[1], row[0]))
    return "\n".join([*lines, *(f"| {count} | {_cell(reason)} |" for reason, count in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
