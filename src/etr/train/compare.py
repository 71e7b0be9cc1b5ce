"""Several routers on the same work: same tokens, same seeds, same start, one table."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import etr
from etr.data import OpenedData, open_data
from etr.evaluate import score_densities
from etr.files import read_json, write_json
from etr.moe import moe_layers
from etr.train.config import TrainConfig, stored_config
from etr.train.folders import METRICS, RESULTS, ROW, refuse_unless_comparison, writing
from etr.train.interrupt import stop_on_interrupt
from etr.train.loop import MetricsRow, Trainer, TrainResult
from etr.train.metrics import count_parameters, read_metrics
from etr.train.tasks import LanguageTask
from etr.train.variants import Variant, parse_variant

FORMAT = 1
LAST_STEPS = 100
"""Steps at the end of training over which kept shares are averaged."""

OnStep = Callable[[str, int, MetricsRow], None]
ResultRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Variants, seeds, and the run they share."""

    variants: tuple[str, ...] = ("baseline", "locmoe", "etr")
    """[NAME=]ROUTER[:option=value,...][/field=value]...; the first is what others are compared
    with."""
    seeds: tuple[int, ...] = (0,)
    """Each variant runs once with every seed."""
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out="runs/compare"))
    """What all variants share; `out` is the folder of the comparison."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants is empty; name at least one router")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be one or more different numbers")
        names = [variant.name for variant in self.parsed()]
        if len(set(names)) != len(names):
            raise ValueError(f"variants {', '.join(names)} must have different names")

    def parsed(self) -> list[Variant]:
        """The variants."""
        return [parse_variant(text) for text in self.variants]


def compare(
    config: CompareConfig,
    *,
    command: str = "",
    on_step: OnStep = lambda name, seed, row: None,
    on_result: Callable[[TrainResult], None] = lambda result: None,
) -> dict[str, Any] | None:
    """Train every variant with every seed and write ``results.json``.

    The variants of a seed train in lockstep, one step each in turn, so that a drift of the
    machine's speed meets all alike and step times can be compared as ratios within a round. A
    comparison can be stopped and continued: finished runs are read, others resume.

    Args:
        config: what to compare.
        command: how to repeat it, for the report.
        on_step: called with variant, seed and each row of metrics.
        on_result: called with each run's trained model.
    Returns:
        What was written, or None if stopped by Ctrl-C.
    """
    out = Path(config.run.out)
    refuse_unless_comparison(out)
    _refuse_others(out, config)
    rows: list[ResultRow] = []
    with writing(out), stop_on_interrupt() as asked_to_stop:
        data = open_data(config.run.data)
        for seed in config.seeds:
            found = _round(out, config, seed, data, asked_to_stop, on_step, on_result)
            if found is None:
                return None
            rows += found
        order = [variant.name for variant in config.parsed()]
        rows.sort(key=lambda row: (order.index(row["name"]), row["seed"]))
        _add_step_time_ratios(out, rows)
        results = {
            "format": FORMAT,
            "command": command,
            "config": dataclasses.asdict(config),
            "environment": {
                **environment(),
                "corpus": data.corpus,
                "data": list(data.notes),
            },
            "rows": rows,
        }
        write_json(out / RESULTS, results)
        return results


def environment() -> dict[str, Any]:
    """What the figures were measured on, and by which code."""
    return {
        "etr": f"{etr.__version__}{_commit()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _commit() -> str:
    """The commit of the checkout that this code runs from, "-dirty" where tracked files are not as
    in it; nothing where it is installed."""
    root = Path(etr.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", commit {found.stdout.strip()}"


def _round(
    out: Path,
    config: CompareConfig,
    seed: int,
    data: OpenedData,
    asked_to_stop: Callable[[], bool],
    on_step: OnStep,
    on_result: Callable[[TrainResult], None],
) -> list[ResultRow] | None:
    """Train all variants of one seed in lockstep; None if asked to stop."""
    runs = {
        variant.name: dataclasses.replace(
            variant.apply(config.run), out=str(out / f"{variant.name}-seed{seed}"), seed=seed
        )
        for variant in config.parsed()
    }
    if all(_is_finished(run) for run in runs.values()):
        return [_stored_row(name, run) for name, run in runs.items()]
    with contextlib.ExitStack() as stack:
        for run in runs.values():
            stack.enter_context(writing(Path(run.out)))
            _refuse_other_steps(run)
        trainers = {
            name: stack.enter_context(Trainer(dataclasses.replace(run, auto_resume=True), data))
            for name, run in runs.items()
        }
        while waiting := [n for n, trainer in trainers.items() if not trainer.finished]:
            # After an interruption some may be ahead: let the others catch up.
            behind = min(trainers[name].step for name in waiting)
            for name in waiting:
                if trainers[name].step == behind:
                    trainers[name].advance(functools.partial(on_step, name, seed))
            if asked_to_stop():
                for trainer in trainers.values():
                    trainer.save()
                return None
    rows = []
    for name, trainer in trainers.items():
        result = trainer.result()
        row = _summary(name, runs[name], result)
        write_json(Path(runs[name].out) / ROW, {"config": _plain(runs[name]), "row": row})
        on_result(result)
        rows.append(row)
    return rows


def _is_finished(run: TrainConfig) -> bool:
    return (Path(run.out) / ROW).exists()


def _stored_row(name: str, run: TrainConfig) -> ResultRow:
    path = Path(run.out) / ROW
    stored = read_json(path)
    found = stored.get("row") if isinstance(stored, dict) else None
    whose = {"name": name, "seed": run.seed, "metrics": f"{Path(run.out).name}/{METRICS}"}
    if not isinstance(found, dict) or any(found.get(key) != value for key, value in whose.items()):
        raise ValueError(f"{path} holds no row of it; remove it: it is made again from the run")
    if stored.get("config") != _plain(run):
        raise ValueError(
            f"{run.out} holds a finished run of another config; choose another out folder, or "
            "remove it"
        )
    row: ResultRow = found
    return row


def _refuse_other_steps(run: TrainConfig) -> None:
    """A run may be given more steps while it trains, but is then no equal work to compare."""
    begun = stored_config(Path(run.out))
    if begun is not None and begun.steps != run.steps:
        raise ValueError(
            f"{run.out} was begun with steps={begun.steps}, and steps={run.steps} is asked for; "
            "choose another out folder"
        )


def _refuse_others(out: Path, config: CompareConfig) -> None:
    """Results of rows that this comparison does not have would be lost to it."""
    try:
        rows = read_json(out / RESULTS)["rows"]
        there = {(row["name"], row["seed"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or none that anybody can read
    others = there - {(v.name, seed) for v in config.parsed() for seed in config.seeds}
    if others:
        names = ", ".join(f"{name} (seed {seed})" for name, seed in sorted(others, key=str))
        raise ValueError(
            f"out={str(out)!r} holds a comparison that also has {names}; name these too, or choose "
            "another folder"
        )


def _plain(run: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(run.to_dict()))
    del values["imports"]  # where a file lies changes nothing
    return values


def _add_step_time_ratios(out: Path, rows: list[ResultRow]) -> None:
    """Median over rounds of a variant's step time over the first variant's in the same round."""
    first = rows[0]["name"]
    times = {
        (row["name"], row["seed"]): {
            step["step"]: step["step_time_seconds"]
            for step in read_metrics(out / row["metrics"])
            if step.get("kind") == "train"
        }
        for row in rows
    }
    for row in rows:
        own, base = times[row["name"], row["seed"]], times[first, row["seed"]]
        ratios = [own[step] / base[step] for step in own if base.get(step)]
        row["step_time_ratio_median"] = statistics.median(ratios) if ratios else None


def _summary(name: str, run: TrainConfig, result: TrainResult) -> ResultRow:
    rows = read_metrics(result.run / "metrics.jsonl")
    steps = [row for row in rows if row.get("kind") == "train"]
    evals = {
        str(row.get("selection")): row
        for row in rows
        if row.get("kind") == "eval" and row["step"] == run.steps
    }
    if not steps or "dropless" not in evals:
        raise ValueError(
            f"{result.run / 'metrics.jsonl'} lost its rows of training, or the evaluation of step "
            f"{run.steps}: train {name!r} again in another folder"
        )
    last = steps[-LAST_STEPS:]
    parameters, active = count_parameters(result.model)
    layer = moe_layers(result.model)[0]
    final = evals.get(layer.eval_selection) or evals["dropless"]
    task = LanguageTask(result.data, run.trained_on())
    few = islice(task.held_out_batches(run), 0, None, 4)

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in last)

    kept = [n for row in last for counts in row["layers"] for n in counts["num_tokens_per_expert"]]
    return {
        "name": name,
        "router": layer.config.router_config.name,
        "capacity": layer.config.capacity_config.name,
        "seed": run.seed,
        "steps": run.steps,
        "tokens": steps[-1]["tokens"],
        "bound": task.objective.bound,
        "val_loss": final["val_loss"],
        "val_loss_dropless": evals["dropless"]["val_loss"],
        "val_loss_by_domain": final["val_loss_by_domain"],
        "kept_fraction": mean("kept_fraction"),
        "kept_fraction_eval": final["kept_fraction_eval"],
        "drop_rate": mean("drop_rate"),
        "num_tokens_per_expert_mean": statistics.fmean(kept),
        "max_violation": mean("max_violation"),
        "step_time_seconds_median": statistics.median(row["step_time_seconds"] for row in steps),
        "expert_flops_per_step": statistics.fmean(
            b["expert_flops"] - a["expert_flops"]
            for a, b in zip([{"expert_flops": 0.0}, *steps], steps, strict=False)
        ),
        "expert_flops_total": steps[-1]["expert_flops"],
        "parameters": parameters,
        "active_parameters": active,
        "selection": final["selection"],
        "causal": layer.traits.causal,
        "metrics": f"{result.run.name}/metrics.jsonl",
        "affinity_histogram": score_densities(result.model, few, objective=task.objective),
    }
