"""`etr demo`: the main job on built-in data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from etr.cli._model import open_model
from etr.cli._of_run import command_line
from etr.cli._options import parse
from etr.cli.compare import run_comparison
from etr.cli.generate import GenerateConfig, continue_text
from etr.files import write_text
from etr.recipes import demo, quick_demo
from etr.report import results_markdown

TITLE = "Demo: baseline and ETR on built-in text, one seed"
FULL_TITLE = "Demo: baseline, LocMoE and ETR on built-in text"
CAN_SAY = """\
A run this short can say: how much work the experts do, what they drop, how even their load is.
It cannot say which router ends with the lower loss: that takes more steps and several seeds
(etr demo --full --seeds 0 1 2)."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of the demo."""

    full: bool = False
    """Four routers and five times the tokens: some ten minutes on two cores."""
    out: str | None = None
    """Folder of the comparison; a finished one is shown again, a stopped one goes on. By default
    runs/demo, or runs/demo-full."""
    seeds: tuple[int, ...] = field(default=(0,))
    """Each variant runs once with every seed."""
    markdown: str | None = None
    """Also write the results as this Markdown file."""
    prompt: str = "def "
    """Text that the trained ETR model continues at the end."""


def run(arguments: list[str]) -> int:
    """Compare the routers, report, and generate a sample."""
    config = parse(DemoConfig, "demo", arguments)
    out = Path(config.out or ("runs/demo-full" if config.full else "runs/demo"))
    words = ["etr", "demo", *(["--full"] if config.full else [])]
    if config.seeds != (0,):
        words += ["--seeds", *map(str, config.seeds)]
    recipe, title = (demo, FULL_TITLE) if config.full else (quick_demo, TITLE)
    command = " ".join(words)
    results = run_comparison(
        recipe(str(out), config.seeds), command, command_line("demo", arguments)
    )
    if results is None:
        return 130
    if not config.full:
        print(f"\n{CAN_SAY}")
    if config.markdown:
        page = results_markdown(out / "results.json", title, command)
        write_text(Path(config.markdown), page)
        print(f"written: {config.markdown}")
    _continue_a_text(str(out / f"etr-seed{config.seeds[0]}"), config.prompt)
    return 0


def _continue_a_text(folder: str, prompt: str) -> None:
    model, tokenizer, _ = open_model(folder)
    options = GenerateConfig(model=folder, prompt=prompt, max_new_tokens=120)
    text = continue_text(model, tokenizer, options)
    print(f"\nETR continues {prompt!r}:\n{'-' * 72}\n{text}\n{'-' * 72}")
