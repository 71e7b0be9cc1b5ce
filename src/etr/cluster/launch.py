"""Run a command on an emulated cluster, as torchrun runs it on a real one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from etr.cluster.network import INTERFACE, Network, NetworkConfig, network

PORT = 29400
"""Port of the rendezvous on node 0."""
AGENT = str(Path(__file__).with_name("agent.py"))
"""Started as a file, so that an agent does not wait for the library."""


@dataclass(frozen=True, kw_only=True)
class EmulatedCluster(NetworkConfig):
    """An emulated cluster: nodes, ranks, rates."""

    ranks_per_node: int = 2
    """Processes on each node."""
    max_restarts: int = 0
    """Times that all ranks start again after one failed."""
    grace_seconds: float = 10.0
    """Time for the other nodes to end by themselves once one has failed, seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node={self.ranks_per_node} must be at least 1")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} must be >= 0")
        if not self.grace_seconds >= 0:
            raise ValueError(f"grace_seconds={self.grace_seconds} must be >= 0")

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node


def emulate(
    cluster: EmulatedCluster,
    command: Sequence[str],
    show: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Run `command` once per rank, with torchrun's environment, each node in a network of its own.

    Args:
        cluster: nodes, ranks and rates.
        command: program and arguments.
        show: called with every line that a rank prints, which says whose it is.
    Returns:
        The command's exit code: 0 if every rank left with 0, else that of the first to fail.
    Raises:
        ValueError: no command, or this machine can emulate no cluster.
    """
    if not command:
        raise ValueError("no command to run: etr cluster emulate [options] -- COMMAND ...")
    with network(cluster) as net, tempfile.TemporaryDirectory(prefix="etr-emulated-") as logs:
        agents = [_start(cluster, net, node, command, logs) for node in range(cluster.nodes)]
        readers = [threading.Thread(target=_read, args=(a.stdout, show)) for a in agents]
        for reader in readers:
            reader.start()
        try:
            return _wait(agents, cluster.grace_seconds)
        finally:
            net.remove()  # whatever still runs ends here, so that the pipes close
            for agent, reader in zip(agents, readers, strict=True):
                agent.wait()
                reader.join()


def _start(
    cluster: EmulatedCluster, net: Network, node: int, command: Sequence[str], logs: str
) -> subprocess.Popen[str]:
    launcher = (
        f"--nnodes={cluster.nodes}",
        f"--nproc-per-node={cluster.ranks_per_node}",
        f"--max-restarts={cluster.max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={net.address(0)}:{PORT}",
        # Left to itself every node of this machine would take itself for the host.
        f"--rdzv-conf=is_host={'true' if node == 0 else 'false'}",
        f"--rdzv-id={net.name}",
        f"--local-addr={net.address(node)}",
        f"--log-dir={logs}/{node}",
        "--tee=3",
        "--no-python",
    )
    environment = {
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns of addresses that have no name
        **os.environ,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "PYTHONUNBUFFERED": "1",
        # Restarted ranks would find the addresses of those before them in a shared store.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[node {node} rank ${{rank}}] ",
    }
    # torchrun fills templates into a command; doubled, a dollar sign stays what it is.
    command = [argument.replace("$", "$$") for argument in command]
    inside = ("ip", "netns", "exec", net.nodes[node])
    return subprocess.Popen(
        [*inside, sys.executable, "-P", AGENT, *launcher, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone, and we end the rest
    )


def _read(stream: IO[str] | None, show: Callable[[str], None]) -> None:
    assert stream is not None
    for line in stream:
        show(line.rstrip("\n"))


def _wait(agents: list[subprocess.Popen[str]], grace_seconds: float) -> int:
    """Exit code of the first agent to fail, once all have ended or the time of grace is over."""
    failed, deadline = 0, float("inf")
    while time.monotonic() < deadline:
        codes = [agent.poll() for agent in agents]
        if not failed and any(codes):
            failed = next(code for code in codes if code)
            deadline = time.monotonic() + grace_seconds
        if all(code is not None for code in codes):
            break
        time.sleep(0.05)
    return failed if failed >= 0 else 128 - failed
