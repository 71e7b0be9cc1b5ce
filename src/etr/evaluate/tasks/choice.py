"""Multiple choice: the likelihood of each choice after the question, normalised by its length."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etr.evaluate.tasks.base import Exam, read_lines, require, spread

TELEQNA_PASSWORD = b"teleqnadataset"
"""Published by the authors: the encryption keeps the questions out of training text."""
TELEQNA_ZIP_BYTES, TELEQNA_BYTES = 16_000_000, 64_000_000
"""Most bytes of the zip, and of the text in it: about ten times what the authors' has."""
_CHOICE = re.compile(r"\s*\(([A-E])\) ")
_ANSWER = re.compile(r"answer is \(([A-E])\)")


def question(text: str, choices: list[str], answer: int, category: str = "") -> dict[str, Any]:
    """One question as `Exam` holds it.

    Raises:
        ValueError: fewer than two choices, an empty one, or an answer that is none of them.
    """
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"choices={choices!r} must be two texts or more, none of them empty")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer} must be the place of a choice, 0 to {len(choices) - 1}")
    return {
        "prompt": f"Question: {text.strip()}\nAnswer:",
        "choices": [choice.strip() for choice in choices],
        "answer": answer,
        "category": category,
    }


def own_questions(path: str | Path, limit: int | None = None) -> Exam:
    """Multiple-choice questions of one's own.

    Args:
        path: JSON lines with "question", "choices", "answer" (place of the right choice, from 0),
            and optionally "category".
        limit: most questions.
    """
    found = []
    for values in read_lines(path, {"question": str, "choices": list, "answer": int}):
        try:
            category = str(values.get("category", ""))
            asked = question(values["question"], values["choices"], values["answer"], category)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        found.append(asked)
    return Exam(name="questions", label=Path(path).name, questions=spread(found, limit))


def mmlu_dev(limit: int | None = None) -> Exam:
    """The development questions of MMLU, which lm-evaluation-harness shows as examples.

    Four or five of each of 57 subjects: far fewer than MMLU asks, and seen more often, so these
    scores are not comparable with those of MMLU.

    Raises:
        ValueError: the harness is not installed, or does not hold them where they are expected.
    """
    lm_eval = require("lm_eval", "lm-eval")
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    found = [asked for path in sorted(folder.glob("mmlu_*.yaml")) for asked in _dev_questions(path)]
    if not found:
        raise ValueError(f"lm-eval {lm_eval.__version__} holds no MMLU dev questions in {folder}")
    label = "MMLU's development questions (not the MMLU test)"
    return Exam(name="mmlu_dev", label=label, questions=spread(found, limit))


def _dev_questions(path: Path) -> Iterator[dict[str, Any]]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves the harness's own tags, which name code, unread."""

    Loader.add_multi_constructor("!", lambda *_: None)
    values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    subjects = values["tag"].removeprefix("mmlu_flan_cot_fewshot_").replace("_", " ")
    for sample in values["fewshot_config"]["samples"]:
        text, *rest = _CHOICE.split(sample["question"])
        answer = _ANSWER.search(sample["target"])
        letters, choices = rest[::2], rest[1::2]
        if answer is not None and answer[1] in letters:
            yield question(text, choices, letters.index(answer[1]), subjects)


def teleqna(path: str | Path, limit: int | None = None) -> Exam:
    """TeleQnA: questions on telecommunications, of five categories, with two to five choices.

    Args:
        path: the authors' encrypted zip; it is read in memory and never unpacked to disk.
        limit: most questions, at equal distances over the file.
    Raises:
        FileNotFoundError: no such file.
        ValueError: pyzipper is not installed, or the file is not such a zip.
    """
    pyzipper = require("pyzipper", "pyzipper")
    if not Path(path).is_file():
        raise FileNotFoundError(f"teleqna={str(path)!r} is not a file; give the authors' zip")
    try:
        entries = _teleqna_entries(Path(path), pyzipper)
        found = [_teleqna_question(entry) for entry in entries.values()]
    except Exception as error:  # readers of a damaged or hostile archive raise what they like
        raise ValueError(f"teleqna={str(path)!r} is not a TeleQnA zip: {error}") from error
    return Exam(name="teleqna", label="TeleQnA", questions=spread(found, limit))


def _teleqna_entries(path: Path, pyzipper: Any) -> dict[str, Any]:
    """The questions in the zip's one file, which is read no further than it may be long."""
    if path.stat().st_size > TELEQNA_ZIP_BYTES:  # whose list of members may be long
        raise ValueError(f"it has {path.stat().st_size} bytes, more than {TELEQNA_ZIP_BYTES}")
    with pyzipper.AESZipFile(path) as archive:
        archive.setpassword(TELEQNA_PASSWORD)
        names = [name for name in archive.namelist() if name.endswith((".txt", ".json"))]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} files of text; it should hold one")
        with archive.open(names[0]) as file:
            data = file.read(TELEQNA_BYTES + 1)
    if len(data) > TELEQNA_BYTES:
        raise ValueError(f"{names[0]!r} in it becomes more than {TELEQNA_BYTES} bytes")
    entries: dict[str, Any] = json.loads(data)
    return entries


def _teleqna_question(entry: dict[str, str]) -> dict[str, Any]:
    names = sorted(name for name in entry if name.startswith("option "))
    right = entry["answer"].partition(":")[0]
    choices = [str(entry[name]) for name in names]
    return question(entry["question"], choices, names.index(right), entry["category"])
