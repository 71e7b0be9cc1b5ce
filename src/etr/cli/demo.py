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
from etr.recipes import demo
from etr.report import results_markdown


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of the demo."""

    out: str = "runs/demo"
    """Folder of the comparison; a finished one is shown again, a stopped one goes on."""
    seeds: tuple[int, ...] = field(default=(0,))
    """Each variant runs once with every seed."""
    markdown: str | None = None
    """Also write the results as this Markdown file."""
    prompt: str = "def "
    """Text that the trained ETR model continues at the end."""


def run(arguments: list[str]) -> int:
    """Compare the three routers, report, and generate a sample."""
    config = parse(DemoConfig, "demo", arguments)
    comparison = demo(config.out, config.seeds)
    command = "etr demo" + (
        " --seeds " + " ".join(map(str, config.seeds)) if config.seeds != (0,) else ""
    )
    results = run_comparison(comparison, command, command_line("demo", arguments))
    if results is None:
        return 130
    if config.markdown:
        title = "Demo: baseline, LocMoE and ETR on built-in text"
        write_text(
            Path(config.markdown),
            results_markdown(Path(config.out) / "results.json", title, command),
        )
        print(f"written: {config.markdown}")
    folder = Path(config.out) / f"etr-seed{config.seeds[0]}"
    model, tokenizer, _ = open_model(str(folder))
    options = GenerateConfig(model=str(folder), prompt=config.prompt, max_new_tokens=160)
    text = continue_text(model, tokenizer, options)
    print(f"\nETR continues {config.prompt!r}:\n{'-' * 72}\n{text}\n{'-' * 72}")
    return 0
