"""``python -m benchmarks.faults``: kill, damage and crowd training runs, and see what it costs.

Two agents of torchrun on one machine stand for two nodes. `benchmarks.faults_files` has what goes
wrong with files, `benchmarks.fuzz` damaged files of every kind.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import tyro

from benchmarks.faults_saves import write_corpus
from benchmarks.settings import ROOT
from etr import sheet
from etr.files import write_text
from etr.train.metrics import read_metrics

END = "<!-- jobs: end -->"
PAGE = ROOT / "docs/reliability.md"
STEPS, EVERY, KILL_AFTER = 40, 5, 12
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault did.

    Args:
        name: the fault, in words.
        exit_code: of the launcher that was not killed.
        output: what it and the ranks printed.
        seconds: from the fault to the first optimizer step after it, or to the job's end.
        lost_steps: optimizer steps done twice.
        losses: of every optimizer step, as the metrics file has them.
        error: what a job that ended early shows.
    """

    name: str
    exit_code: int
    output: str
    seconds: float
    lost_steps: int
    losses: list[float]
    error: str = ""


class Agent(Protocol):
    """An agent of torchrun, as `subprocess.Popen` shows it."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int | None: ...


StartAgent = Callable[[list[str], list[str], dict[str, str], Path], Agent]
"""Starts an agent: torchrun's options, module and arguments of the ranks, variables, log."""


def start_torchrun(
    options: list[str], command: list[str], environment: dict[str, str], log: Path
) -> Agent:
    """The command torchrun.

    Args:
        options: of torchrun.
        command: module that each rank runs, and its arguments.
        environment: variables beside those of this process.
        log: gets what is printed, after what it holds.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, "-m", *command],
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )


@dataclass
class Job:
    """A training run under torchrun, in a folder of its own.

    Args:
        folder: gets the run, its corpus and what is printed.
        nodes: agents of torchrun; each starts ``2 / nodes`` ranks.
        module: what each rank runs, with its first arguments.
        start_agent: as `start_torchrun`.
    """

    folder: Path
    nodes: int = 1
    module: tuple[str, ...] = ("etr", "train")
    restarts: int = 2
    timeout_seconds: int = 60
    start_agent: StartAgent = start_torchrun
    agents: list[Agent] = field(default_factory=list)
    port: int = 0

    @property
    def metrics(self) -> Path:
        return self.folder / "run/metrics.jsonl"

    def start(self) -> None:
        """Write the corpus, start every agent."""
        write_corpus(self.folder / "corpus")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for node in range(self.nodes):
            self.start_node(node)

    def start_node(self, node: int) -> None:
        """Start the agent of a node; a later call for the same node replaces it."""
        environment = {
            "OMP_NUM_THREADS": "1",
            # Restarted ranks would read the addresses of those before them.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command, log = [*self.module, *self._options()], self.folder / f"node{node}.log"
        agent = self.start_agent(self._launcher(node), command, environment, log)
        self.agents[node : node + 1] = [agent]

    def kill_rank(self) -> None:
        """kill -9 of the last rank of the last node."""
        os.kill(max(children(self.agents[-1].pid)), signal.SIGKILL)

    def kill_node(self) -> None:
        """kill -9 of the last agent and its ranks; then another agent takes its place."""
        agent = self.agents[-1]
        ranks = children(agent.pid)
        for pid in (agent.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
        agent.wait()
        self.start_node(self.nodes - 1)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when it holds, or when the job has ended.

        Raises:
            TimeoutError: neither happens in time.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition() and self.agents[0].poll() is None:
            if time.monotonic() > end:
                self.stop()
                raise TimeoutError(f"nothing for {PATIENCE_SECONDS:.0f} s\n{self.output()}")
            time.sleep(0.02)

    def steps(self) -> list[int]:
        """Optimizer steps in the metrics file."""
        if not self.metrics.exists():
            return []
        return [row["step"] for row in read_metrics(self.metrics) if row["kind"] == "train"]

    def output(self) -> str:
        """All that was printed."""
        logs = sorted(self.folder.glob("node*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def stop(self) -> None:
        """End what still runs."""
        for agent in self.agents:
            for pid in (*children(agent.pid), agent.pid):
                if agent.poll() is None:
                    os.kill(pid, signal.SIGKILL)
            agent.wait()

    def _launcher(self, node: int) -> list[str]:
        return [
            *("--nnodes", str(self.nodes), "--nproc-per-node", str(2 // self.nodes)),
            *("--max-restarts", str(self.restarts), "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"127.0.0.1:{self.port}", "--rdzv-id", "faults"),
            *("--rdzv-conf", f"is_host={'true' if node == 0 else 'false'}"),
        ]

    def _options(self) -> list[str]:
        sizes = {"hidden-size": 32, "num-layers": 2, "num-heads": 2, "num-key-value-heads": 2}
        sizes |= {"num-experts": 4, "expert-size": 32, "sequence-length": 32, "batch-size": 4}
        sizes |= {"locality-mu": 0}  # or two nodes would learn another thing than one
        sizes |= {"steps": STEPS, "checkpoint-every": EVERY, "eval-every": STEPS}
        sizes |= {"eval-tokens-per-domain": 128, "timeout-seconds": self.timeout_seconds}
        paths = {"out": "run", "data": "corpus", "cache-dir": "cache"}
        values = sizes | {name: self.folder / path for name, path in paths.items()}
        pairs = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        flags = ("--device", "cpu", "--expert-ranks", "2", "--profile-every", "None")
        return [*pairs, *flags, "--auto-resume"]


def children(pid: int) -> list[int]:
    """Processes that a process has started itself."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(after_name[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def undisturbed(folder: Path, start_agent: StartAgent = start_torchrun) -> Outcome:
    """The run that others are compared with."""
    job = Job(folder, start_agent=start_agent)
    job.start()
    began = time.monotonic()
    job.wait_for(lambda: False)
    return _outcome(job, "none", time.monotonic() - began, 0)


def killed(folder: Path, nodes: int, start_agent: StartAgent = start_torchrun) -> Outcome:
    """A rank (of one node) or a whole node (of two) is killed in the middle of the run."""
    job = Job(folder, nodes=nodes, start_agent=start_agent)
    job.start()
    job.wait_for(lambda: len(job.steps()) >= KILL_AFTER)
    before = job.steps()
    began = time.monotonic()
    (job.kill_node if nodes > 1 else job.kill_rank)()
    first = job.metrics.stat().st_ino
    # A resumed run writes the file anew with the rows it keeps, then goes on.
    job.wait_for(lambda: job.metrics.stat().st_ino != first)
    kept = len(job.steps())
    job.wait_for(lambda: len(job.steps()) > kept)
    seconds = time.monotonic() - began
    job.wait_for(lambda: False)
    name = "kill -9 of a node (agent and ranks)" if nodes > 1 else "kill -9 of a rank"
    return _outcome(job, name, seconds, len(before) - kept)


def spoiled(folder: Path, fault: str, start_agent: StartAgent = start_torchrun) -> Outcome:
    """A rank raises, or hangs, and no restart is allowed."""
    module = ("benchmarks.faults_worker", fault, "1", "3")
    job = Job(folder, 1, module, restarts=0, timeout_seconds=10, start_agent=start_agent)
    job.start()
    job.wait_for(lambda: len(job.steps()) >= 3)
    began = time.monotonic()
    job.wait_for(lambda: False)
    seconds = time.monotonic() - began
    words, error = "raises", "that rank's traceback"
    if fault == "hang":
        words, error = (
            f"hangs (time-out {job.timeout_seconds} s)",
            "the time-out of one that waited",
        )
    outcome = _outcome(job, f"a rank {words}, no restarts allowed", seconds, 0)
    return dataclasses.replace(outcome, error=error)


def _outcome(job: Job, name: str, seconds: float, lost: int) -> Outcome:
    codes = [agent.wait(timeout=PATIENCE_SECONDS) for agent in job.agents]
    assert codes[0] is not None
    rows = read_metrics(job.metrics) if job.metrics.exists() else []
    return Outcome(
        name=name,
        exit_code=codes[0],
        output=job.output(),
        seconds=seconds,
        lost_steps=lost,
        losses=[row["loss"] for row in rows if row["kind"] == "train"],
    )


def table(whole: Outcome, others: list[Outcome]) -> str:
    """The page's table, in Markdown."""
    rows = []
    for outcome in others:
        ended = outcome.exit_code != 0
        done = f"the job ends with {outcome.error}" if ended else "restarts and finishes"
        same = "equal, bit for bit" if outcome.losses == whole.losses else "differs"
        curve = f"{len(outcome.losses)} steps, then nothing" if ended else same
        again = "-" if ended else str(outcome.lost_steps)
        rows.append((outcome.name, done, f"{outcome.seconds:.1f}", again, curve))
    head = ("fault", "what happens", "seconds", "steps done again", "loss curve")
    return sheet.table(head, rows, "llrrl")


def jobs(folder: Path) -> str:
    """The table of what becomes of jobs whose ranks and nodes are at fault."""
    whole = undisturbed(folder / "whole")
    others = [
        killed(folder / "rank", nodes=1),
        killed(folder / "node", nodes=2),
        spoiled(folder / "raise", "raise"),
        spoiled(folder / "hang", "hang"),
    ]
    return table(whole, others)


def main(only: tuple[Literal["jobs", "files", "fuzz"], ...] = ("jobs", "files", "fuzz")) -> None:
    """Run the faults, write their tables into docs/reliability.md.

    Args:
        only: which tables.
    """
    from benchmarks import faults_files, fuzz

    tables = {
        "jobs": jobs,
        "files": lambda folder: faults_files.table(faults_files.all_tried(folder)),
        "fuzz": lambda folder: fuzz.table(fuzz.fuzz_all()),
    }
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            text = tables[name](Path(folder))
        print(text)
        page = PAGE.read_text(encoding="utf-8")
        begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        write_text(PAGE, f"{head}{begin}\n{text}{end}{tail}")


if __name__ == "__main__":
    tyro.cli(main)
