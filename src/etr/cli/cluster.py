"""`etr cluster`: emulate a cluster, measure one, the benchmark, and what a model predicts."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from etr.cli._options import HELP_OPTIONS, parse
from etr.cli._short_help import HELP
from etr.cluster import EmulatedCluster, emulate, remove_leftovers

if TYPE_CHECKING:
    from etr.cluster.measure import NetworkCurve

_PARTS = {
    "emulate": "run a command on nodes with limited network rates, on this machine",
    "measure": "all-to-all curve of the machine it runs on; under torchrun, on a real cluster too",
    "bench": "step time and bytes of ETR, LocMoE and the baseline on an emulated cluster",
    "study": "held-out loss in equal wall time of whole steps, on an emulated cluster; hours",
    "plan": "predicted: the fastest layout that fits, for several routers side by side",
    "paper": "predicted: the paper's clusters beside what the paper reports",
    "calibrate": "fit the cost model to measured steps, and test it on others",
    "scale": "predicted: expert groups of 8 to 1,024 over 10,000 devices",
    "clean": "remove what an emulated cluster left behind when it was killed",
}


def run(arguments: list[str]) -> int:
    """Run one part of the verb."""
    part, *rest = arguments or ["--help"]
    if part in HELP_OPTIONS:
        print(_help())
        return 0
    if part not in _PARTS:
        print(f"etr cluster: there is no {part!r}\n\n{_help()}", file=sys.stderr)
        return 2
    own = {
        "emulate": _emulate,
        "measure": _measure,
        "bench": _bench,
        "study": _study,
        "clean": _clean,
    }
    return own.get(part, _predict(part))(rest)


def _predict(part: str) -> Callable[[list[str]], int]:
    def run_part(arguments: list[str]) -> int:
        from etr.cli import _cluster_cost as cost

        parts = {"plan": cost.plan, "paper": cost.paper, "calibrate": cost.calibrate_steps}
        return {**parts, "scale": cost.scale}[part](arguments)

    return run_part


def _emulate(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    cluster = parse(EmulatedCluster, "cluster emulate", arguments[:split])
    signal.signal(signal.SIGTERM, _terminated)
    return emulate(cluster, arguments[split + 1 :])


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that the clean-up runs


def _measure(arguments: list[str]) -> int:
    import torch.distributed as dist

    from etr.cluster.measure import MeasureConfig, join_group, measure_curve

    config = parse(MeasureConfig, "cluster measure", arguments)
    join_group()
    curve = measure_curve(config)
    if dist.get_rank() == 0:
        _write_curve(curve, Path(config.out))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _write_curve(curve: NetworkCurve, out: Path) -> None:
    from etr.cluster.figure import curve_drawing
    from etr.files import write_json
    from etr.report.chart import save_files

    write_json(out / "curve.json", curve.to_dict())
    save_files(curve_drawing(curve), out)
    print(f"{'bytes per rank':>16} {'seconds':>10} {'fitted':>10}")
    for size, seconds in zip(curve.sizes, curve.seconds, strict=True):
        print(f"{size:>16,} {seconds:>10.4f} {curve.line.seconds(size):>10.4f}")
    for name, line in (
        ("all-to-all", curve.line),
        ("pair within a node", curve.within),
        ("pair between nodes", curve.between),
    ):
        if line is not None:
            print(
                f"{name}: {line.latency_seconds * 1e3:.3f} ms + bytes / "
                f"{line.bytes_per_second / 1e6:,.1f} MB/s ({line.bytes_per_second / 125e3:,.0f} "
                "Mbit/s)"
            )
    print(f"written: {out}/curve.json, {out}/all-to-all.svg")


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Train, time and write the page; what is done is not done again."""

    smoke: bool = False
    """The whole path on a few steps, for tests and not for conclusions."""
    out: str | None = None
    """Folder of results. None: the recipe's."""
    page: str | None = None
    """Markdown file to write, e.g. docs/results/cluster.md. None: cluster.md in `out`."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the trained models. None: the recipe's."""
    steps: int | None = None
    """Optimizer steps of each training run. None: the recipe's."""
    rounds: int | None = None
    """Times that all rows are timed in turn. None: the recipe's."""
    shapes: tuple[str, ...] | None = None
    """Shapes among 2x2 and 4x1, nodes x ranks per node; None for the recipe's."""
    variants: tuple[str, ...] | None = None
    """Rows to run. None: all."""


def _bench(arguments: list[str]) -> int:
    from etr.cluster.bench.run import bench
    from etr.recipes.cluster import FULL, SMOKE

    command = parse(BenchCommand, "cluster bench", arguments)
    given = {k: v for k, v in vars(command).items() if k != "smoke" and v is not None}
    signal.signal(signal.SIGTERM, _terminated)
    return bench(dataclasses.replace(SMOKE if command.smoke else FULL, **given))


@dataclass(frozen=True, kw_only=True)
class StudyCommand:
    """Train, time, train for as long as the reference, and write the page; it goes on where it
    was."""

    out: str = "runs/time-to-loss"
    """Folder of results, figures and page."""
    weights: str | None = None
    """Folder of trained weights. None: `weights` in `out`."""
    smoke: bool = False
    """The whole path on a few steps, for tests and not for conclusions."""
    blocks: tuple[str, ...] = ()
    """Blocks to run; all where none is named. A matched block needs those before it."""
    workers: int = 2
    """Runs side by side, one thread each."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


def _study(arguments: list[str]) -> int:
    from etr.cli._of_run import command_line
    from etr.cli._studies import run_study
    from etr.cluster.study.runner import EqualTimeRunner
    from etr.recipes.time_to_loss import equal_time, smoke
    from etr.train.folders import writing

    command = parse(StudyCommand, "cluster study", arguments)
    out = Path(command.out)
    runner = EqualTimeRunner(
        study=smoke() if command.smoke else equal_time(),
        out=out,
        weights=Path(command.weights) if command.weights else out / "weights",
        workers=command.workers,
    )
    signal.signal(signal.SIGTERM, _terminated)
    with writing(out):
        return run_study(runner, command.blocks, command_line("cluster study", arguments))


@dataclass(frozen=True, kw_only=True)
class CleanCommand:
    """Remove namespaces whose maker is gone, and end what runs in them."""


def _clean(arguments: list[str]) -> int:
    parse(CleanCommand, "cluster clean", arguments)
    removed = remove_leftovers()
    print("\n".join(f"removed {name}" for name in removed) or "nothing to remove")
    return 0


def _help() -> str:
    lines = [f"  {part:9} {what}" for part, what in _PARTS.items()]
    example = f"Example: {HELP['cluster'].example}"
    return "\n".join([example, "", "usage: etr cluster PART [options]", "", *lines])
