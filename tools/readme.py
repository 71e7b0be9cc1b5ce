"""What README shows: the routing as a picture, light and dark, the demo's table, and the speed.

python tools/readme.py
"""

from __future__ import annotations

import io
import json
import math
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
RESULTS = ROOT / "docs/results/demo-quick.json"
PICTURES = ROOT / "docs/images"
SPEED = ROOT / "docs/results/speed.json"
BEGIN, END = "<!-- demo: made by tools/readme.py -->", "<!-- end of demo -->"
SPEED_BEGIN, SPEED_END = "<!-- speed: made by tools/readme.py -->", "<!-- end of speed -->"
WIDTH = 80
"""Columns of the terminal that the table is made for."""

TOKENS = ("the", "cat", "sat", "on", "an", "old", "red", "wall")
CHOICES = (1, 0, 2, 1, 1, 1, 3, 0)
"""Expert that each token chooses."""
SCORES = (0.9, 0.8, 0.9, 0.7, 0.6, 0.2, 0.8, 0.5)
"""How high that expert ranks it."""
NUM_EXPERTS = 4
STAGES = (("early in training", 0.4), ("at its end", 1.1))
"""Two moments of the default schedule, and their capacity factors."""


@dataclass(frozen=True)
class Theme:
    """Colours of one of the two pictures."""

    name: str
    text: str
    faint: str
    box: str
    experts: tuple[str, ...]


THEMES = (
    Theme("light", "#1f2328", "#6e7781", "#f6f8fa", ("#0969da", "#bc4c00", "#1a7f37", "#8250df")),
    Theme("dark", "#e6edf3", "#9198a1", "#161b22", ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff")),
)


def capacity(factor: float) -> int:
    """Tokens that an expert has room for."""
    return math.ceil(factor * len(TOKENS) / NUM_EXPERTS)


def kept(expert: int, room: int) -> list[int]:
    """Tokens that an expert keeps: of those that chose it, the ones that it ranks highest."""
    choosers = [token for token, chosen in enumerate(CHOICES) if chosen == expert]
    return sorted(choosers, key=lambda token: -SCORES[token])[:room]


def picture(theme: Theme) -> str:
    """The routing of a few tokens at both moments, as SVG."""
    panels = "".join(
        f'<g transform="translate({15 + 460 * place},0)">{_panel(theme, *stage)}</g>\n'
        for place, stage in enumerate(STAGES)
    )
    notes = "".join(
        _text(theme, 450, 322 + 22 * line, note, size=14, fill=theme.faint)
        for line, note in enumerate(
            (
                "Each token chooses an expert; each expert keeps, of the tokens that chose it, "
                "those that it ranks highest.",
                "A token that nobody keeps (dashed) passes by, and costs no expert work.",
            )
        )
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 356" width="900" height="356" '
        'font-family="system-ui, sans-serif" role="img">\n'
        "<title>Tokens choose experts, and experts choose among those tokens</title>\n"
        f"{panels}{notes}</svg>\n"
    )


def _panel(theme: Theme, moment: str, factor: float) -> str:
    room = capacity(factor)
    held = [kept(expert, room) for expert in range(NUM_EXPERTS)]
    share = sum(map(len, held))
    title = f"{moment}: capacity factor {factor}, room for {room}"
    found = [_text(theme, 205, 24, title, size=15, weight=600)]
    for token, expert in enumerate(CHOICES):
        if token in held[expert]:
            end = _slot_x(expert, room, held[expert].index(token))
            line = f'stroke="{theme.experts[expert]}" stroke-width="2.5"'
        else:
            end = _expert_x(expert)
            line = f'stroke="{theme.faint}" stroke-width="1.5" stroke-dasharray="4 4"'
        found.append(
            f'<path d="M{_token_x(token)},82 C{_token_x(token)},140 {end},150 {end},206" '
            f'fill="none" {line}/>\n'
        )
    for token, word in enumerate(TOKENS):
        lost = token not in held[CHOICES[token]]
        edge = theme.faint if lost else theme.experts[CHOICES[token]]
        found.append(_box(theme, _token_x(token), 54, 46, 28, edge, dashed=lost))
        found.append(_text(theme, _token_x(token), 73, word, fill=theme.faint if lost else ""))
    for expert, colour in enumerate(theme.experts):
        found.append(_box(theme, _expert_x(expert), 206, 96, 72, colour))
        found.append(_text(theme, _expert_x(expert), 268, f"expert {expert + 1}", size=14))
        for slot in range(room):
            full = slot < len(held[expert])
            x, wide = _slot_x(expert, room, slot), min(40, 90 // room)
            edge = colour if full else theme.faint
            found.append(_box(theme, x, 212, wide - 2, 26, edge, dashed=not full))
            if full:
                word = TOKENS[held[expert][slot]]
                found.append(_text(theme, x, 229, word, size=12))
    found.append(_text(theme, 205, 296, f"{share} of {len(TOKENS)} tokens reach their expert"))
    return "".join(found)


def _token_x(token: int) -> int:
    return 30 + 50 * token


def _expert_x(expert: int) -> int:
    return 49 + 104 * expert


def _slot_x(expert: int, room: int, slot: int) -> float:
    return _expert_x(expert) + (slot - (room - 1) / 2) * min(40, 90 // room)


def _box(
    theme: Theme, x: float, y: int, wide: int, high: int, edge: str, *, dashed: bool = False
) -> str:
    dash = ' stroke-dasharray="3 3"' if dashed else ""
    return (
        f'<rect x="{x - wide / 2:g}" y="{y}" width="{wide}" height="{high}" rx="5" '
        f'fill="{theme.box}" stroke="{edge}" stroke-width="1.5"{dash}/>\n'
    )


def _text(
    theme: Theme, x: float, y: int, said: str, *, size: int = 13, weight: int = 400, fill: str = ""
) -> str:
    return (
        f'<text x="{x:g}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="middle" '
        f'fill="{fill or theme.text}">{said}</text>\n'
    )


def pictures() -> dict[Path, str]:
    """The files of the picture, and what is in them."""
    return {PICTURES / f"routing-{theme.name}.svg": picture(theme) for theme in THEMES}


def demo_table() -> str:
    """What `etr demo` prints for its stored results, as a fenced block."""
    from rich.console import Console

    from etr.report import terminal_table

    out = io.StringIO()
    Console(file=out, width=WIDTH, no_color=True).print(terminal_table(RESULTS, WIDTH))
    lines = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return f"```text\n{lines}\n```"


def speed_sentence() -> str:
    """What the stored page of speed says of the layer beside transformers' block, in a sentence."""
    sys.path.append(str(ROOT))  # run as a script, this file sees its own folder alone
    from benchmarks.measures import few, generate
    from benchmarks.results import CaseResult
    from benchmarks.targets import of_layer, over, saved

    found = json.loads(SPEED.read_text(encoding="utf-8"))
    results = [CaseResult.from_dict(values) for values in found["cases"]]

    def span(readings: Iterable[object]) -> str:
        values = sorted(reading.value.median for reading in readings)  # type: ignore[attr-defined]
        return f"{values[0]:.2f} to {values[-1]:.2f}" if values else "(not measured)"

    step = span(of_layer(few.HF, lambda result: True, ours_over_other=True)(results))

    def whole(label: str, ours: str) -> str:
        of_label = [r for r in results if r.group == "generate" and r.sizes["label"] == label]
        return span(over("generate", ours, generate.HF, "forward")(of_label))

    parts = [
        "with the same learned linear router and nothing dropped, a training step of the layer "
        f"takes {step} of its time and saves {span(saved(few.HF)(results))} of its bytes",
        "of transformers' own time, a whole model's prefill takes "
        f"{whole('prefill', generate.SAME)} and its decoding {whole('decode', generate.SAME)} with "
        f"that router, {whole('prefill', generate.OWN)} and {whole('decode', generate.OWN)} with "
        "ETR's",
    ]
    if any(result.group == "few" for result in results):
        one = [result for result in results if result.sizes["num_tokens"] == 1]
        alone, drops = (
            span(over("few", ours, few.HF, "forward")(one)) for ours in (few.SAME, few.DROPS)
        )
        parts.insert(1, f"one token takes {alone}, and {drops} with ETR's thresholds, which drop")
    where = found["environment"]
    return (
        f"On {where['threads']} threads of a CPU ({where['date']}), beside the grouped_mm block of "
        f"transformers: {'; '.join(parts)}. [speed.md](docs/results/speed.md) has all that was "
        "measured then, and where it loses."
    )


def renewed(text: str) -> str:
    """README with the table and the sentence of today's results.

    Raises:
        ValueError: it has no place for them.
    """
    text = _between(text, BEGIN, END, demo_table())
    return _between(
        text, SPEED_BEGIN, SPEED_END, textwrap.fill(speed_sentence(), 100, break_on_hyphens=False)
    )


def _between(text: str, begin: str, end: str, new: str) -> str:
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md has no {begin} ... {end}")
    return f"{before}{begin}\n{new}\n{end}{after}"


if __name__ == "__main__":
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
