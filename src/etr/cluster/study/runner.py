"""Runs a study of equal wall time: the clock is that of an emulated cluster."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from etr.cluster.bench.book import local_share
from etr.cluster.launch import EmulatedCluster, emulate
from etr.cluster.network import why_unavailable
from etr.cluster.study.capture import UPDATE_FLOPS, capture
from etr.cluster.study.page import page
from etr.cluster.study.plan import RANKS, Condition, EqualTimeStudy
from etr.files import read_json, write_json
from etr.study.collection import Collection
from etr.study.grid import Block
from etr.study.study import StudyRunner


@dataclass(frozen=True, kw_only=True)
class EqualTimeRunner(StudyRunner):
    """The page is ``time-to-loss.md``, the results lie in ``time-to-loss/``."""

    name: ClassVar[str] = "time-to-loss"

    study: EqualTimeStudy

    def times_file(self, block: Block) -> Path:
        return self.results / block.task / f"times-{self.study.conditions[block.name].name}.json"

    def time(self, block: Block) -> None:
        """Time whole steps of the block's rows on its cluster.

        Raises:
            ValueError: no cluster can be emulated here.
            RuntimeError: a rank failed.
        """
        reason = why_unavailable()
        if reason is not None:
            raise ValueError(f"no cluster can be emulated here: {reason}")
        condition = self.study.conditions[block.name]
        folder = self.weights / "captured" / block.task
        folder.mkdir(parents=True, exist_ok=True)
        runs = self.first_runs(block, [self.study.reference, *block.rows])
        rows = [capture(run, self.weights, folder, self.study) for run in runs]
        for row in rows:
            row |= {"dispatch": self.study.dispatch(row["row"]), "update_flops": UPDATE_FLOPS}
        out, plan = folder / "timed.json", folder / "plan.json"
        (num_experts,) = {layer["num_experts"] for row in rows for layer in row["layers"]}
        seconds_per_row = self.study.seconds_per_row(condition, rows[0]["hidden_size"])
        write_json(
            plan,
            {
                "rows": rows,
                "progress": self.study.progress,
                "rounds": self.study.rounds,
                "seconds_per_row": seconds_per_row,
                "num_experts": num_experts,
                "out": str(out),
            },
        )
        cluster = EmulatedCluster(
            nodes=condition.nodes,
            ranks_per_node=condition.ranks_per_node,
            inter=self.study.inter,
            intra=self.study.intra,
        )
        command = [sys.executable, "-m", "etr.cluster.study.timing", str(plan)]
        if emulate(cluster, command) != 0:
            raise RuntimeError(f"timing of {block.name!r} failed; its output stands above")
        write_json(
            self.times_file(block),
            {
                "condition": vars(condition),
                "seconds_per_row": seconds_per_row,
                "tokens_per_rank": rows[0]["tokens_per_rank"],
                "reference": self.study.reference,
                "rows": summary(
                    read_json(out),
                    self.study.reference,
                    condition,
                    RANKS * rows[0]["tokens_per_rank"] * len(rows[0]["layers"]),
                ),
            },
        )

    def page(self, study: Collection) -> str:
        measured = {}
        for block in self.study.blocks:
            with contextlib.suppress(KeyError, FileNotFoundError):
                measured[block.name] = read_json(self.times_file(block))
        return page(study, self.study, measured, self.out)


def summary(
    timed: dict[str, Any], reference: str, condition: Condition, tokens: int
) -> dict[str, dict[str, Any]]:
    """What is kept of the timings of each row.

    `mean_ratio` is the time of a whole schedule over the reference's, and `error` the standard
    error of its logarithm over rounds.

    Args:
        timed: by row: seconds [rounds][points], and what travelled.
        reference: the row that others are compared with.
        condition: the cluster.
        tokens: of a step, all ranks and layers.
    """

    def rounds_of(row: dict[str, Any]) -> list[float]:
        return [statistics.fmean(points) for points in row["seconds"]]

    base = timed[reference]
    found = {}
    for name, row in timed.items():
        pairs = zip(rounds_of(row), rounds_of(base), strict=True)
        logs = [math.log(own / other) for own, other in pairs]
        points = [statistics.median(column) for column in zip(*row["seconds"], strict=True)]
        found[name] = {
            "mean_ratio": math.exp(statistics.fmean(logs)),
            "error": statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0,
            "seconds": statistics.fmean(points),
            "seconds_by_point": points,
            "bytes_between_nodes": row["bytes_between_nodes"],
            "bytes_within_node": row["bytes_within_node"],
            "local_share": local_share(row["kept"], condition.node_of_rank),
            "kept_per_token": sum(map(sum, row["kept"])) / tokens,
        }
    return found


__all__ = ["EqualTimeRunner", "summary"]
