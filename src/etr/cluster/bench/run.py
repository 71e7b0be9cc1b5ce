"""The benchmark from training to page; what is done is not done again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etr.cluster.bench.page import page
from etr.cluster.bench.plan import CURVE_SIZES, BenchConfig, BenchRun
from etr.cluster.bench.training import train_missing
from etr.cluster.launch import EmulatedCluster, emulate
from etr.cluster.network import why_unavailable
from etr.files import read_json, write_json, write_text
from etr.train import TrainConfig


def bench(
    config: BenchConfig, say: Callable[[str], None] = lambda line: print(line, flush=True)
) -> int:
    """Train what is missing, time what is missing, write the page.

    Args:
        config: the whole benchmark.
        say: called with each line of progress.
    Returns:
        0, or the exit code of the timing that failed.
    Raises:
        ValueError: no cluster can be emulated here, or `out` holds another benchmark.
    """
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(f"no cluster can be emulated here: {reason}")
    out = Path(config.out)
    _check_config(config, out)
    train_missing(config, say)
    for shape in config.shapes:
        code = _time_shape(config, shape, out, say)
        if code:
            return code
    target = Path(config.page) if config.page else out / "cluster.md"
    found = results(out)
    write_json(target.with_suffix(".json"), {"format": 1, **found})
    write_text(target, page(config, found))
    say(f"written: {target}")
    return 0


def results(out: Path) -> dict[str, Any]:
    """Everything measured: ``trained`` by run, ``timed`` as a list, ``curves`` by shape."""

    def read(path: Path, *without: str) -> dict[str, Any]:
        found = read_json(path)
        return {key: value for key, value in found.items() if key not in without}

    trained = sorted(out.glob("trained/*/result.json"))
    return {
        "trained": {path.parent.name: read(path, "config") for path in trained},
        "timed": [read(path, "out") for path in sorted(out.glob("timed/*/*.json"))],
        "curves": {path.stem: read(path) for path in sorted(out.glob("curves/*.json"))},
    }


def _time_shape(config: BenchConfig, shape: str, out: Path, say: Callable[[str], None]) -> int:
    """Time what has no result yet on the cluster of this shape, started once."""
    jobs = [job for job in _jobs(config, shape, out) if not Path(job["out"]).exists()]
    curve = out / "curves" / f"{shape}.json"
    say(f"{shape}: {len(jobs)} timings are missing")
    if not jobs and curve.exists():
        return 0
    curve.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        "bench": dataclasses.asdict(config),
        "jobs": jobs,
        "layers": {run.name: _layer(out, run) for run in config.runs()},
        "curve": None if curve.exists() else str(curve),
        "sizes": CURVE_SIZES,
    }
    path = out / f".plan-{shape}.json"
    write_json(path, plan)
    nodes, ranks_per_node = (int(part) for part in shape.split("x"))
    cluster = EmulatedCluster(
        nodes=nodes, ranks_per_node=ranks_per_node, inter=config.inter, intra=config.intra
    )
    command = [sys.executable, "-m", "etr.cluster.bench.timing", str(path)]
    return emulate(cluster, command, say)


def _layer(out: Path, run: BenchRun) -> dict[str, Any]:
    """Config of the MoE layers of a trained model, for ranks that know nothing of training."""
    stored = read_json(out / "trained" / run.name / "result.json")
    return TrainConfig.from_dict(stored["config"]).model.moe_config().to_dict()


def _jobs(config: BenchConfig, shape: str, out: Path) -> list[dict[str, Any]]:
    """Timings of a shape, round by round so that a drift of the machine meets all variants."""
    found = []
    for number in range(config.rounds):
        for seed in config.seeds:
            for _, text, variant in (cell for cell in config.cells() if cell[0] == shape):
                for compute in config.computes(shape, text, variant):
                    name = f"{variant}-{text}-{compute}-seed{seed}-round{number}.json"
                    found.append(
                        {
                            "shape": shape,
                            "variant": variant,
                            "run": dataclasses.asdict(config.run_of(shape, text, variant, seed)),
                            "compute": compute,
                            "round": number,
                            "rounds": 1,
                            "out": str(out / "timed" / shape / name),
                        }
                    )
    return found


def _check_config(config: BenchConfig, out: Path) -> None:
    """One folder holds one benchmark; rows, seeds and rounds may be added to it."""
    free = ("out", "page", "seeds", "rounds", "shapes", "variants", "other_ratios")
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    path = out / "bench.json"
    if not path.exists():
        write_json(path, own)
        return
    stored = read_json(path)
    differ = sorted(k for k in {*own, *stored} if own.get(k) != stored.get(k))
    if differ:
        pairs = ", ".join(f"{k} is {stored.get(k)} there and {own.get(k)} here" for k in differ)
        raise ValueError(f"out={str(out)!r} holds another benchmark: {pairs}; use another folder")
