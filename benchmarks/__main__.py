"""``python -m benchmarks``: measure, print the targets, and write JSON and a page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.cases import Case, all_cases
from benchmarks.page import page
from benchmarks.run import run_cases, write_results
from benchmarks.screen import screen
from benchmarks.settings import Settings, load_average
from benchmarks.systems import SYSTEMS
from benchmarks.tables import losses_table, targets_table
from etr.files import write_text

TARGET_COLUMNS = {"quartiles", "best"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time this library against its floors and against others, on one machine in one run."""

    only: tuple[str, ...] = ()
    """Cases whose name contains one of these words, e.g. `layer/8`, `router`, `bfloat16`."""
    quick: bool = False
    """Small sizes and few rounds: shows that everything runs, says nothing about speed."""
    again: bool = False
    """Measure cases again that are stored already."""
    show: bool = False
    """List cases and systems, and stop."""
    device: str = "cpu"
    """cpu, cuda, or another device of torch."""
    threads: int | None = None
    """Threads of torch. None: as many as torch takes by itself."""
    mallopt: bool = True
    """Let glibc keep freed memory, for all systems alike, so that page faults do not drown what is
    compared; stated in the results. --no-mallopt: its defaults, as an untuned process has them."""
    against: str | None = None
    """Root of another checkout, whose demo step is timed in turn with this one's."""
    out: str = "runs/bench"
    """Folder of the results; a stopped run goes on from it, a finished one is shown again."""
    markdown: str | None = None
    """Also write the page to this file."""

    def settings(self) -> Settings:
        """What is the same for all systems."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        return Settings(
            device=torch.device(self.device),
            threads=self.threads or torch.get_num_threads(),
            mallopt=self.mallopt,
            against=self.against,
            quick=self.quick,
        )

    def cases(self) -> list[Case]:
        """The cases asked for.

        Raises:
            ValueError: no case has such a name.
        """
        wanted = [
            case
            for case in all_cases()
            if not self.only or any(word in case.name for word in self.only)
        ]
        if not wanted:
            raise ValueError(f"only={self.only} matches no case; --show lists them")
        return [case.small() for case in wanted] if self.quick else wanted


def main(options: Options) -> int:
    """Run the cases asked for."""
    settings, cases = options.settings(), options.cases()
    if options.show:
        print(*(case.name for case in cases), sep="\n")
        for name, system in SYSTEMS.items():
            print(f"{name:26} {system.missing(settings.device) or 'available':20} {system.summary}")
        return 0
    settings.apply()
    out, load = Path(options.out), load_average()
    with screen(len(cases)) as shown:
        try:
            results = run_cases(
                cases,
                settings,
                out,
                again=options.again,
                on_note=shown.note,
                on_case=shown.case,
            )
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on from {out}")
            return 130
    found = write_results(out, settings, results, load)
    shown.table(losses_table(results), set())
    shown.table(targets_table(results), TARGET_COLUMNS)
    text = page(found, command(options))
    for path in filter(None, (str(out / "speed.md"), options.markdown)):
        write_text(Path(path), text)
        print(f"written: {path}")
    return 0


def command(options: Options) -> str:
    """How to repeat a run; where its files go does not matter."""
    words = ["python -m benchmarks"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("out", "again", "against") or value == field.default:
            continue
        words.append(f"--no-{field.name}" if value is False else f"--{field.name}")
        if not isinstance(value, bool):
            words.append(" ".join(value) if isinstance(value, tuple) else str(value))
    return " ".join(words)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, prog="python -m benchmarks")))
